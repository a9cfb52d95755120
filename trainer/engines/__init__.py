"""How a step is taken on many ranks.

The loop knows an `Engine` and no more: any class with these methods is one.  Nothing behind
`export` knows which engine ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from pipeline.choices import resolve
from pipeline.config import Engine as EngineConfig
from pipeline.config import ResolvedSchedule

from ..distributed.ranks import Ranks

if TYPE_CHECKING:
    from ..core.optim import AveragedWeights
    from ..core.split_state import Part

__all__ = ["Engine", "build_engine"]


class Engine(Protocol):
    """One network's optimizer steps on these ranks. A new engine for each training run.

    "Collective" methods exchange data: every rank calls them, in the same order.
    The call order is prepare. Then for each step, for each micro-batch `accumulating` around
    `autocast` and `backward`, and `step`. At last export and close.
    """

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None: ...

    def prepare(
        self, network: nn.Module, schedule: ResolvedSchedule, state: dict | None = None
    ) -> nn.Module:
        """Take over `network`, on the rank's device, and build its optimizer. Collective.

        state: what `state` returned on rank 0, of any engine and any number of ranks.
        Returns the module to call in the forward pass.
        """
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The context of the forward pass: precision is torch's autocast, weights are float32."""
        ...

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """The context of one micro-batch. last: whether it is the last one of its step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's loss. Collective."""
        ...

    def step(self, rate: float) -> None:
        """One optimizer step at this learning rate, with gradients averaged over ranks. Collective.

        Gradients are zero, or None, afterwards.
        """
        ...

    def state(self) -> dict:
        """What a checkpoint keeps of network and optimizer, on rank 0. Collective.

        {"network": {name: tensor}, "optimizer": {parameter: {key: tensor}}}, by the names of the
        parameters, so that every engine can resume from it.  Of a split head every rank has its own
        rows, and "rows" says which: {name: the first row of each rank, and their number}.  Of
        weights that are split otherwise every rank has a `Part` in place of a tensor.
        """
        ...

    def eval_model(self, average: AveragedWeights | None) -> AbstractContextManager[nn.Module]:
        """The context of the network as `export` would return it now, on every rank. Collective.

        Where ranks split its weights it can be asked by all of them together alone, without
        inference mode.

        average: averaged weights, which it has inside.
        """
        ...

    def own_rows(self, network: nn.Module) -> dict[str, slice]:
        """This rank's rows of a head that `prepare` will split, by the tensors' names."""
        ...

    def remember(self, network: nn.Module) -> Mapping[str, Tensor | Part]:
        """A copy of the weights of eval_model's network. Of what is split this rank's share."""
        ...

    def export(self, weights: Mapping[str, Tensor | Part] | None = None) -> nn.Module:
        """The plain network with the trained weights, whole on every rank. Collective.

        A head may stay split, where build_engine says so.  No step can follow.

        weights: what it has instead of the last step's, as `remember` or averages name them.
        """
        ...

    def close(self) -> None:
        """Release what holds the process group. May be called twice, and before `prepare`."""
        ...


def build_engine(
    config: EngineConfig, ranks: Ranks, by_rows: bool = False, split: bool = False
) -> Engine:
    """The engine that [engine] asks for, on these ranks.

    Only the chosen engine's module is imported, and so DeepSpeed only where it is chosen.

    by_rows: for a network whose head is a RowHead, which every rank has whole.  split: a head that
    is split stays so in validation and in what is exported.
    """
    target = config.kind.engine
    if by_rows:
        target = "trainer.engines.rows:RowHeadEngine"
    elif config.shard_head:
        assert config.kind.sharded_head is not None, "the config has checked it"
        sharded: Callable[[EngineConfig, Ranks, bool], Engine] = resolve(config.kind.sharded_head)
        return sharded(config, ranks, split)
    engine_class: type[Engine] = resolve(target)
    return engine_class(config, ranks)
