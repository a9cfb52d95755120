"""DDP with the classifier's rows split over the ranks.

For label sets whose rows, gradients and optimizer states are too much for one rank.  The trunk is
DDP's.  The head's gradients never leave their rank, only features and sums do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from networks import Classifier
from networks.heads import ShardedLinear
from pipeline.config import Engine as EngineConfig
from pipeline.config import ResolvedSchedule, UserError

from ..core.optim import AveragedWeights
from ..distributed.ranks import Ranks
from .ddp import DDPEngine


class ShardedHeadEngine(DDPEngine):
    """An Engine (see trainer.engines) that splits a linear head over all classes.

    A specialist's logits are few, and so its head is left whole.
    """

    head: HeadShard | None = None  # from `prepare` on; None of a head that is left whole

    def __init__(self, config: EngineConfig, ranks: Ranks):
        super().__init__(config, ranks)
        self.block = config.head_block
        if self.scaler.is_enabled():
            raise UserError(
                'engine.shard_head with precision = "fp16": ranks would disagree on which steps '
                'overflowed; take "bf16"'
            )

    def prepare(
        self, network: nn.Module, schedule: ResolvedSchedule, state: dict | None = None
    ) -> nn.Module:
        assert isinstance(network, Classifier), "a sharded head needs a network with a head"
        if network.spec.head["kind"] == "linear":
            self.head = self._shard(network)
            if state is not None:
                self.head.cut_state(state)
        return super().prepare(network, schedule, state)

    def _shard(self, network: Classifier) -> HeadShard:
        """Leave this rank its rows of the head."""
        classes, world = network.spec.num_classes, self.ranks.world_size
        if classes < world:
            raise UserError(
                f"engine.shard_head cannot split {classes} classes over {world} ranks; "
                "take fewer ranks"
            )
        whole = network.head
        assert isinstance(whole, nn.Linear)
        names = [f"head.{name}" for name, _ in whole.named_parameters()]
        bounds = tuple(classes * rank // world for rank in range(world + 1))
        own = slice(bounds[self.ranks.rank], bounds[self.ranks.rank + 1])
        rows = ShardedLinear(cut(whole, own), classes, DistributedComm(bounds), self.block)
        network.head = rows
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)
        return HeadShard(network, rows, names, self.ranks)

    def clip(self) -> None:
        if self.head is None:
            return super().clip()
        names = self.head.names
        trunk = [p.grad for name, p in self.network.named_parameters() if name not in names]
        rows = [p.grad for p in self.head.rows.parameters()]
        squares = nn.utils.get_total_norm([grad for grad in rows if grad is not None]) ** 2
        dist.all_reduce(squares)
        trunk_norm = nn.utils.get_total_norm([grad for grad in trunk if grad is not None])
        norm = (squares + trunk_norm**2).sqrt()
        nn.utils.clip_grads_with_norm_(self.network.parameters(), self.clip_norm, norm)

    def step(self, rate: float) -> None:
        super().step(rate)
        if self.head is not None:
            for parameter in self.head.rows.parameters():
                parameter.grad = None  # else the next one would lie beside it

    def state(self) -> dict:
        """As DDP's; the head is whole on rank 0 and empty elsewhere."""
        state = super().state()
        if self.head is None:
            return state
        network = dict(state["network"])
        optimizer = dict(state["optimizer"])
        for name in self.head.names:
            network[name] = self.head.join_on_main(network[name])
            if name in optimizer:
                optimizer[name] = self.head.join_state_on_main(optimizer[name])
        return state | {"network": network, "optimizer": optimizer}

    @contextmanager
    def eval_model(self, average: AveragedWeights | None) -> Iterator[nn.Module]:
        with self._whole_network(), super().eval_model(average) as network:
            yield network

    def export(self) -> nn.Module:
        del self.optimizer  # its states go before the whole head comes
        if self.head is not None:
            self.head.network.head = self.head.whole()
            self.head = None
        return super().export()

    @contextmanager
    def _whole_network(self) -> Iterator[None]:
        """Inside, the network has a plain head, on every rank; collective."""
        if self.head is None:
            yield
            return
        self.head.network.head = self.head.whole()
        try:
            yield
        finally:
            self.head.network.head = self.head.rows


@dataclass(frozen=True)
class HeadShard:
    """This rank's rows of the head of `network`."""

    network: Classifier
    rows: ShardedLinear
    names: list[str]  # of the head's parameters within the network
    ranks: Ranks

    @property
    def bounds(self) -> tuple[int, ...]:
        """Rank r has the classes bounds[r] to bounds[r + 1]."""
        comm = self.rows.comm
        assert isinstance(comm, DistributedComm)
        return comm.bounds

    def cut_state(self, state: dict) -> None:
        """Leave in a checkpoint's state only this rank's rows, of weights and optimizer states."""
        own = slice(self.bounds[self.ranks.rank], self.bounds[self.ranks.rank + 1])
        for name in self.names:
            state["network"][name] = state["network"][name][own].clone()
            for key, value in state["optimizer"].get(name, {}).items():
                if is_per_row(value):
                    state["optimizer"][name][key] = value[own].clone()

    def whole(self) -> nn.Linear:
        """The plain head, on every rank; collective."""
        rows = self.rows
        whole = empty_linear(rows.in_features, rows.num_classes, rows.weight)
        for name, parameter in whole.named_parameters():
            own = rows.get_parameter(name)
            for rank, part in enumerate(self._parts(parameter.data)):
                if rank == self.ranks.rank:
                    part.copy_(own.detach())
                dist.broadcast(part, src=rank)
            parameter.requires_grad_(own.requires_grad)
        return whole

    def join_on_main(self, rows: Tensor) -> Tensor:
        """Every rank's rows, joined in rank 0's host memory; elsewhere nothing.  Collective."""
        if not self.ranks.is_main:
            dist.send(rows.detach().contiguous(), dst=0)
            return rows.new_empty(0)
        whole = torch.empty(self.bounds[-1], *rows.shape[1:], dtype=rows.dtype)
        for rank, part in enumerate(self._parts(whole)):
            theirs = rows.detach()
            if rank:
                theirs = torch.empty_like(part, device=rows.device)
                dist.recv(theirs, src=rank)
            part.copy_(theirs)
        return whole

    def join_state_on_main(self, state: dict[str, object]) -> dict[str, object]:
        """`join_on_main` of what an optimizer's state of one parameter has per row; collective."""
        joined = dict(state)
        for key, value in state.items():
            if is_per_row(value):
                joined[key] = self.join_on_main(value)
        return joined

    def _parts(self, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.split([last - first for first, last in pairwise(self.bounds)])


@dataclass(frozen=True)
class DistributedComm:
    """The Comm over the default process group; rank r has the classes bounds[r] to bounds[r + 1].

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

    def of(self, features: Tensor) -> DistributedComm:
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


def cut(head: nn.Linear, own: slice) -> nn.Linear:
    """A copy of some of its rows."""
    rows = empty_linear(head.in_features, own.stop - own.start, head.weight)
    for name, parameter in rows.named_parameters():
        whole = head.get_parameter(name)
        parameter.data.copy_(whole.detach()[own])
        parameter.requires_grad_(whole.requires_grad)
    return rows


def empty_linear(in_features: int, rows: int, like: Tensor) -> nn.Linear:
    """An unfilled layer, on the device and of the dtype of `like`."""
    layer = nn.utils.skip_init(nn.Linear, in_features, rows, device=like.device, dtype=like.dtype)
    return cast(nn.Linear, layer)


def is_per_row(value: object) -> TypeGuard[Tensor]:
    """Whether an optimizer's state has an entry for each weight; a step count has not."""
    return isinstance(value, Tensor) and value.ndim > 0


if TYPE_CHECKING:
    from networks.linear_logits import Comm

    from . import Engine

    _: type[Engine] = ShardedHeadEngine
    __: type[Comm] = DistributedComm
