"""DDP with the classifier's rows split over the ranks, for label sets whose rows, gradients and optimizer states are
too much for one rank.  The trunk is DDP's; the head's gradients never leave their rank, only features and sums do.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from networks.heads import ShardedLinear
from networks.linear_logits import LocalComm
from pipeline.config import Engine, Schedule, UserError

from ..core.optim import AveragedWeights
from ..distributed.ranks import Ranks
from .ddp import DDPEngine


class ShardedHeadEngine(DDPEngine):
    """Only a linear head over all classes is split; a specialist's logits are few, its rows are left as they are."""

    def __init__(self, config: Engine, ranks: Ranks):
        super().__init__(config, ranks)
        self.block = config.head_block
        if self.scaler.is_enabled():
            raise UserError(
                'engine.shard_head with precision = "fp16": ranks would disagree on which steps overflowed; take "bf16"'
            )

    def prepare(
        self, network: nn.Module, schedule: Schedule, state: dict | None = None
    ) -> nn.Module:
        self.sharded = network.spec.head["kind"] == "linear"
        if self.sharded:
            self._shard(network, state)
        return super().prepare(network, schedule, state)

    def _shard(self, network: nn.Module, state: dict | None) -> None:
        """Leave this rank its rows of the head, of its weights in a checkpoint and of their optimizer states too."""
        classes, world = network.spec.num_classes, self.ranks.world_size
        if classes < world:
            raise UserError(
                f"engine.shard_head cannot split {classes} classes over {world} ranks; take fewer ranks"
            )
        self.bounds = [classes * rank // world for rank in range(world + 1)]
        own = slice(*self.bounds[self.ranks.rank : self.ranks.rank + 2])
        self.head_names = [f"head.{name}" for name, _ in network.head.named_parameters()]
        network.head = ShardedLinear(
            cut(network.head, own), classes, DistributedComm(tuple(self.bounds)), self.block
        )
        for name in self.head_names if state else ():
            state["network"][name] = state["network"][name][own].clone()
            for key, value in state["optimizer"].get(name, {}).items():
                if is_per_row(value):
                    state["optimizer"][name][key] = value[own].clone()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            network, self.head_names
        )

    def clip(self) -> None:
        if not self.sharded:
            return super().clip()
        trunk = [
            p.grad for name, p in self.network.named_parameters() if name not in self.head_names
        ]
        head = [p.grad for p in self.network.head.parameters()]
        squares = nn.utils.get_total_norm([g for g in head if g is not None]) ** 2
        dist.all_reduce(squares)
        norm = (squares + nn.utils.get_total_norm([g for g in trunk if g is not None]) ** 2).sqrt()
        nn.utils.clip_grads_with_norm_(self.network.parameters(), self.clip_norm, norm)

    def step(self, rate: float) -> None:
        super().step(rate)
        if self.sharded:
            for parameter in self.network.head.parameters():
                parameter.grad = None  # else the next one would lie beside it

    def state(self) -> dict:
        """As DDP's, whole on rank 0 and of no use elsewhere.  Collective."""
        state = super().state()
        if not self.sharded:
            return state
        network, optimizer = dict(state["network"]), dict(state["optimizer"])
        for name in self.head_names:
            network[name] = self._on_main(network[name])
            if name in optimizer:
                optimizer[name] = {
                    key: self._on_main(value) if is_per_row(value) else value
                    for key, value in optimizer[name].items()
                }
        return state | {"network": network, "optimizer": optimizer}

    @contextmanager
    def eval_model(self, average: AveragedWeights | None):
        with self._whole(), super().eval_model(average):
            yield self.network

    def export(self) -> nn.Module:
        self.optimizer = None  # its states go before the whole head comes
        if self.sharded:
            self.network.head = self._whole_head()
        return super().export()

    @contextmanager
    def _whole(self):
        """The network with a plain head, on every rank; collective."""
        if not self.sharded:
            yield
            return
        shard, self.network.head = self.network.head, self._whole_head()
        try:
            yield
        finally:
            self.network.head = shard

    def _whole_head(self) -> nn.Linear:
        head = self.network.head
        whole = empty_linear(head.in_features, head.num_classes, head.weight)
        for name, parameter in whole.named_parameters():
            own = getattr(head, name)
            for rank, part in enumerate(self._parts(parameter.data)):
                if rank == self.ranks.rank:
                    part.copy_(own.detach())
                dist.broadcast(part, src=rank)
            parameter.requires_grad_(own.requires_grad)
        return whole

    def _on_main(self, rows: Tensor) -> Tensor:
        """Every rank's rows, joined in rank 0's host memory; elsewhere nothing."""
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

    def _parts(self, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.split(
            [last - first for first, last in zip(self.bounds, self.bounds[1:], strict=False)]
        )


@dataclass(frozen=True)
class DistributedComm(LocalComm):
    """The comm over the default process group; rank r holds the classes bounds[r] to bounds[r + 1].

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
        places = torch.searchsorted(classes, torch.tensor(self.bounds, device=classes.device))
        return replace(self, bounds=tuple(places.tolist()))

    def gather(self, rows: Tensor) -> Tensor:
        most = max(self.sizes)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        every = rows.new_empty(len(self.sizes) * most, *rows.shape[1:])
        dist.all_gather(list(every.split(most)), padded)
        if min(self.sizes) == most:
            return every
        return torch.cat(
            [part[:size] for part, size in zip(every.split(most), self.sizes, strict=True)]
        )

    def own(self, rows: Tensor) -> Tensor:
        return rows.split(self.sizes)[dist.get_rank()]

    def own_columns(self, dense: Tensor) -> Tensor:
        found = None
        for rank, (first, last) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            every = self.gather(dense[:, first:last])
            if rank == dist.get_rank():
                found = every
        return found

    def max(self, values: Tensor) -> Tensor:
        found = values.clone()
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found

    def sum(self, values: Tensor) -> Tensor:
        found = values.clone()
        dist.all_reduce(found)
        return found


def cut(head: nn.Linear, own: slice) -> nn.Linear:
    """A copy of some of its rows."""
    rows = empty_linear(head.in_features, own.stop - own.start, head.weight)
    for name, parameter in rows.named_parameters():
        whole = getattr(head, name)
        parameter.data.copy_(whole.detach()[own])
        parameter.requires_grad_(whole.requires_grad)
    return rows


def empty_linear(in_features: int, rows: int, like: Tensor) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, in_features, rows, device=like.device, dtype=like.dtype)


def is_per_row(value) -> bool:
    """Whether an optimizer's state has an entry for each weight; a step count has not."""
    return isinstance(value, Tensor) and value.ndim > 0
