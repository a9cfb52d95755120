"""Any engine for the trunk, and a head that learns by rows.

What a step exchanges and changes of the head is the rows that its batch has read, not all classes.
Every rank holds the whole head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from networks import Classifier
from networks.row_head import RowGradients, RowHead, sum_rows
from pipeline.choices import resolve
from pipeline.config import Engine as EngineConfig
from pipeline.config import ResolvedSchedule

from ..core.optim import AveragedWeights
from ..core.row_optim import RowOptimizer
from ..core.split_state import Part
from ..distributed.ranks import Ranks
from .sharded import DistributedComm

if TYPE_CHECKING:
    from . import Engine

HEAD = "head."
LEAVES = ("weight", "bias")


class RowHeadEngine:
    """An Engine (see trainer.engines) of a network whose head is a RowHead. `trunk` has the rest.

    A checkpoint names the head's tensors as a plain head's, head.weight and head.bias.
    """

    # From `prepare` on.
    head: RowHead
    optimizer: RowOptimizer

    def __init__(self, config: EngineConfig, ranks: Ranks):
        trunk: type[Engine] = resolve(config.kind.engine)
        self.trunk = trunk(config, ranks)
        self.ranks = ranks

    def prepare(
        self, network: nn.Module, schedule: ResolvedSchedule, state: dict | None = None
    ) -> nn.Module:
        assert isinstance(network, Classifier) and isinstance(network.head, RowHead)
        assert not schedule.clip_norm, "the config has checked it"
        self.head = network.head
        states = None
        if state is not None:
            tensors, state = split_state(state)
            for leaf in LEAVES:
                getattr(self.head, leaf).copy_(tensors["network"][leaf])
            states = tensors["optimizer"]
        self.optimizer = RowOptimizer(self.head, schedule, states)
        return self.trunk.prepare(network, schedule, state)

    def autocast(self) -> AbstractContextManager[object]:
        return self.trunk.autocast()

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        return self.trunk.accumulating(last)

    def backward(self, loss: Tensor) -> None:
        self.trunk.backward(loss)

    def step(self, rate: float) -> None:
        gradients = average_over_ranks(self.head.take_gradients(), self.ranks)
        self.optimizer.step(gradients, rate)
        self.trunk.step(rate)

    def state(self) -> dict:
        """The trunk's engine's state, and the head, which is the same on every rank."""
        state = self.trunk.state()
        network, optimizer = dict(state["network"]), dict(state["optimizer"])
        for leaf in LEAVES:
            network[HEAD + leaf] = getattr(self.head, leaf)
            optimizer[HEAD + leaf] = self.optimizer.states[leaf]
        return state | {"network": network, "optimizer": optimizer}

    @contextmanager
    def eval_model(self, average: AveragedWeights | None) -> Iterator[nn.Module]:
        with self.trunk.eval_model(average) as network:
            assert isinstance(network, Classifier)
            by_rows = network.head
            network.head = self.head.whole()
            try:
                yield network
            finally:
                network.head = by_rows

    def own_rows(self, network: nn.Module) -> dict[str, slice]:
        return {}

    def remember(self, network: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in network.state_dict().items()}

    def export(self, weights: Mapping[str, Tensor | Part] | None = None) -> nn.Module:
        network = self.trunk.export()
        assert isinstance(network, Classifier)
        network.head = self.head.whole()
        network.load_state_dict(weights or {}, strict=False)
        return network

    def close(self) -> None:
        self.trunk.close()


def split_state(state: dict) -> tuple[dict[str, dict], dict]:
    """A checkpoint's state as (the head's part, by leaf, the rest)."""
    head: dict[str, dict] = {}
    rest = dict(state)
    for part in ("network", "optimizer"):
        entries = state[part].items()
        head[part] = {k.removeprefix(HEAD): v for k, v in entries if k.startswith(HEAD)}
        rest[part] = {k: v for k, v in entries if not k.startswith(HEAD)}
    return head, rest


def average_over_ranks(gradients: RowGradients, ranks: Ranks) -> RowGradients:
    """The mean over the ranks, of every row that any of them has read. Collective."""
    comm = DistributedComm(bounds=()).of(gradients.classes)
    gathered = [comm.gather(each).split(comm.sizes) for each in gradients]
    total = sum_rows([RowGradients(*of_rank) for of_rank in zip(*gathered, strict=True)])
    return total._replace(
        weight=total.weight / ranks.world_size, bias=total.bias / ranks.world_size
    )


if TYPE_CHECKING:
    _: type[Engine] = RowHeadEngine
