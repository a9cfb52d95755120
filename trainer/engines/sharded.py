"""DDP with the classifier's rows split over the ranks.

For label sets whose rows, gradients and optimizer states are too much for one rank.  The trunk is
DDP's.  The head's gradients never leave their rank, only features and sums do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

from networks import Classifier
from networks.head_rows import cut_head, row_bounds, row_tensors, with_tensors
from networks.heads import RowsHead, ShardedHead
from pipeline.config import Engine as EngineConfig
from pipeline.config import ResolvedSchedule, UserError

from ..core.optim import AveragedWeights
from ..core.split_state import Part
from ..distributed.ranks import Ranks
from .ddp import DDPEngine

HEAD = "head."  # before the names of a plain head's tensors
PLACE = "head.rows."  # before those of a split one


class ShardedHeadEngine(DDPEngine):
    """An Engine (see trainer.engines) that splits a head over all classes.

    A specialist's logits are few, and so its head is left whole.

    split: whether validation and the trained network keep the head split. Otherwise every rank has
    it whole there.
    """

    head: HeadShard | None = None  # from `prepare` on. None of a head that is left whole

    def __init__(self, config: EngineConfig, ranks: Ranks, split: bool = False):
        super().__init__(config, ranks)
        self.block = config.head_block
        self.split = split
        if self.scaler.is_enabled():
            # Ranks have different rows: all of them must agree on which steps overflowed.
            self.scaler = ShardedGradScaler(ranks.device.type)

    def own_rows(self, network: nn.Module) -> dict[str, slice]:
        assert isinstance(network, Classifier), "a sharded head needs a network with a head"
        if network.spec.head["kind"] != "linear":
            return {}
        rank, bounds = self.ranks.rank, self._tensor_bounds(network)
        return {HEAD + name: slice(*own[rank : rank + 2]) for name, own in bounds.items()}

    def _tensor_bounds(self, network: Classifier) -> dict[str, tuple[int, ...]]:
        """For each of the head's tensors, the first row of each rank, and their number."""
        head, bounds = network.head, self._bounds(network)
        if isinstance(head, ShardedHead):
            return dict.fromkeys(row_tensors(head.rows), bounds)
        assert isinstance(head, RowsHead)
        return row_bounds(head, bounds)

    def _bounds(self, network: Classifier) -> tuple[int, ...]:
        """The first class of each rank, and C."""
        if isinstance(network.head, ShardedHead):
            comm = network.head.comm
            assert isinstance(comm, DistributedComm)
            return comm.bounds
        classes, world = network.spec.num_classes, self.ranks.world_size
        if classes < world:
            raise UserError(
                f"engine.shard_head cannot split {classes} classes over {world} ranks; "
                "take fewer ranks"
            )
        return class_bounds(classes, world)

    def prepare(
        self, network: nn.Module, schedule: ResolvedSchedule, state: dict | None = None
    ) -> nn.Module:
        if self.own_rows(network):
            assert isinstance(network, Classifier)
            self.head = self._shard(network)
            if state is not None:
                self.head.cut_state(state)
        return super().prepare(network, schedule, state)

    def _shard(self, network: Classifier) -> HeadShard:
        """Leave this rank its rows of the head."""
        bounds, of_tensors = self._bounds(network), self._tensor_bounds(network)
        sharded = network.head
        if not isinstance(sharded, ShardedHead):
            assert isinstance(sharded, RowsHead)
            rows = cut_head(sharded, bounds, self.ranks.rank)
            comm = DistributedComm(bounds)
            sharded = ShardedHead(rows, network.spec.num_classes, comm, self.block)
        network.head = sharded
        shard = HeadShard(network, sharded, of_tensors, self.ranks)
        names = [PLACE + name for name in of_tensors]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)
        return shard

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Inside, ranks have micro-batches of one size: check_batch_size has made sure of it."""
        if self.head is None:
            with super().accumulating(last):
                yield
            return
        self.head.sharded.even = True
        try:
            with super().accumulating(last):
                yield
        finally:
            self.head.sharded.even = False

    def averaged(self, network: nn.Module) -> Iterable[nn.Parameter]:
        return [p for name, p in network.named_parameters() if not name.startswith(PLACE)]

    def clip(self) -> None:
        if self.head is None:
            return super().clip()
        parameters = list(self.network.named_parameters())
        trunk = [p.grad for name, p in parameters if not name.startswith(PLACE)]
        rows = [p.grad for name, p in parameters if name.startswith(PLACE)]
        squares = nn.utils.get_total_norm([grad for grad in rows if grad is not None]) ** 2
        dist.all_reduce(squares)
        trunk_norm = nn.utils.get_total_norm([grad for grad in trunk if grad is not None])
        norm = (squares + trunk_norm**2).sqrt()
        nn.utils.clip_grads_with_norm_(self.network.parameters(), self.clip_norm, norm)

    def step(self, rate: float) -> None:
        super().step(rate)
        if self.head is not None:
            for parameter in self.head.sharded.rows.parameters():
                parameter.grad = None  # else the next one would lie beside it

    def state(self) -> dict:
        """Like DDP's, except the head: "rows" says which rows this rank's tensors are."""
        state = super().state()
        if self.head is None:
            return state
        return state | {"rows": self.head.saved_rows()}

    @contextmanager
    def eval_model(self, average: AveragedWeights | None) -> Iterator[nn.Module]:
        with super().eval_model(average) as network, self._whole_network():
            yield network

    def remember(self, network: nn.Module) -> dict[str, Tensor]:
        weights = super().remember(network)
        if self.head is None or self.split:
            return weights
        return self.head.cut(weights)

    def export(self, weights: Mapping[str, Tensor | Part] | None = None) -> nn.Module:
        del self.optimizer  # its states go before the whole head comes
        network = super().export(weights)
        if self.head is not None and not self.split:
            self.head.network.head = self.head.whole()
            self.head = None
        return network

    @contextmanager
    def _whole_network(self) -> Iterator[None]:
        """Inside, the network has a plain head, on every rank, unless it stays split."""
        if self.head is None or self.split:
            yield
            return
        self.head.network.head = self.head.whole()
        try:
            yield
        finally:
            self.head.network.head = self.head.sharded


@dataclass(frozen=True)
class HeadShard:
    """This rank's rows of the head of `network`.

    bounds: of each of the head's tensors the first row of each rank, and their number.
    """

    network: Classifier
    sharded: ShardedHead
    bounds: dict[str, tuple[int, ...]]
    ranks: Ranks

    def saved_rows(self) -> dict[str, tuple[int, ...]]:
        """bounds, by the names that a network with a split head has in its state."""
        saved = {name.removeprefix(PLACE) for name in self.network.state_dict()}
        return {PLACE + name: own for name, own in self.bounds.items() if name in saved}

    def cut_state(self, state: dict) -> None:
        """Leave in a checkpoint's state only this rank's rows, named as the split head has them."""
        for part in ("network", "average", "best"):
            if state.get(part) is not None:
                state[part] = self.cut(state[part])
        state["optimizer"] = {
            self._place(name): self._cut_entries(name, entries)
            for name, entries in state["optimizer"].items()
        }

    def cut(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by name, with this rank's rows of the head's, and the others as they are."""
        return {self._place(name): self._own(name, value) for name, value in weights.items()}

    def _cut_entries(self, name: str, entries: Mapping[str, object]) -> dict[str, object]:
        return {
            key: self._own(name, value) if is_per_row(value) else value
            for key, value in entries.items()
        }

    def _own(self, name: str, value: Tensor) -> Tensor:
        bounds = self.bounds.get(name.removeprefix(HEAD))
        if bounds is None or len(value) != bounds[-1]:  # a rank's own rows, as they were loaded
            return value
        return value[bounds[self.ranks.rank] : bounds[self.ranks.rank + 1]].clone()

    def _place(self, name: str) -> str:
        """Where a tensor of a plain head lies in a split one."""
        own = name.removeprefix(HEAD)
        return PLACE + own if name.startswith(HEAD) and own in self.bounds else name

    def whole(self) -> RowsHead:
        """The plain head, on every rank. Collective."""
        rows = self.sharded.rows
        joined = {name: self._join(name, own) for name, own in row_tensors(rows).items()}
        if "classes" in joined:
            joined["classes"] = self._whole_classes(joined["classes"])
        return with_tensors(rows, joined)

    def _join(self, name: str, own: Tensor) -> Tensor:
        bounds = self.bounds[name]
        whole = own.new_empty(bounds[-1], *own.shape[1:])
        for rank, part in enumerate(whole.split([end - first for first, end in pairwise(bounds)])):
            if rank == self.ranks.rank:
                part.copy_(own.detach())
            if len(part):
                dist.broadcast(part, src=rank)
        return whole

    def _whole_classes(self, joined: Tensor) -> Tensor:
        """The learning classes, which each rank numbers from its first one on."""
        comm = self.sharded.comm
        assert isinstance(comm, DistributedComm)
        counts = [end - first for first, end in pairwise(self.bounds["classes"])]
        first = torch.tensor(comm.bounds[:-1], device=joined.device)
        return joined + first.repeat_interleave(torch.tensor(counts, device=joined.device))


@dataclass(frozen=True)
class DistributedComm:
    """The Comm over the default process group. Rank r has the classes bounds[r] to bounds[r + 1].

    sizes: the rows that each rank has of the batch, which may differ.
    """

    bounds: tuple[int, ...]
    sizes: tuple[int, ...] = ()

    @property
    def first(self) -> int:
        return self.bounds[dist.get_rank()]

    @property
    def share(self) -> float:
        return 1 / dist.get_world_size()

    def of(self, features: Tensor, even: bool = False) -> DistributedComm:
        if even:
            return replace(self, sizes=(len(features),) * dist.get_world_size())
        sizes = torch.empty(dist.get_world_size(), dtype=torch.int64, device=features.device)
        dist.all_gather(list(sizes.split(1)), torch.tensor([len(features)], device=features.device))
        return replace(self, sizes=tuple(sizes.tolist()))

    def among(self, classes: Tensor) -> DistributedComm:
        bounds = torch.searchsorted(classes, torch.tensor(self.bounds, device=classes.device))
        return replace(self, bounds=tuple(bounds.tolist()))

    def gather(self, rows: Tensor) -> Tensor:
        if len(self.sizes) == 1:
            return rows
        most = max(self.sizes)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(len(self.sizes) * most, *rows.shape[1:])
        parts = gathered.split(most)
        dist.all_gather(list(parts), padded)
        if min(self.sizes) == most:
            return gathered
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def stack(self, values: Tensor) -> Tensor:
        stacked = values.new_empty(dist.get_world_size(), *values.shape)
        dist.all_gather(list(stacked.unbind()), values.contiguous())
        return stacked

    def own(self, rows: Tensor) -> Tensor:
        return rows.split(self.sizes)[dist.get_rank()]

    def own_columns(self, dense: Tensor) -> Tensor:
        own = None
        for rank, (first, last) in enumerate(pairwise(self.bounds)):
            columns = self.gather(dense[:, first:last])
            if rank == dist.get_rank():
                own = columns
        assert own is not None
        return own

    def max(self, values: Tensor) -> Tensor:
        result = values.clone()
        dist.all_reduce(result, op=dist.ReduceOp.MAX)
        return result

    def sum(self, values: Tensor) -> Tensor:
        result = values.clone()
        dist.all_reduce(result)
        return result

    def sum_own(self, values: Tensor) -> Tensor:
        if len(self.sizes) == 1:
            return values
        most = max(self.sizes)
        if min(self.sizes) < most:  # a reduce-scatter takes parts of one size
            padded = values.new_zeros(len(self.sizes) * most, *values.shape[1:])
            for part, own in zip(padded.split(most), values.split(self.sizes), strict=True):
                part[: len(own)] = own
            values = padded
        result = values.new_empty(most, *values.shape[1:])
        dist.reduce_scatter_tensor(result, values.contiguous())
        return result[: self.sizes[dist.get_rank()]]


def class_bounds(classes: int, parts: int) -> tuple[int, ...]:
    """The first class of each of so many parts, and the number of classes."""
    return tuple(classes * part // parts for part in range(parts + 1))


def is_per_row(value: object) -> TypeGuard[Tensor]:
    """Whether an optimizer's state has an entry for each weight. A step count has not."""
    return isinstance(value, Tensor) and value.ndim > 0


if TYPE_CHECKING:
    from networks.linear_logits import Comm

    from . import Engine

    _: type[Engine] = ShardedHeadEngine
    __: type[Comm] = DistributedComm
