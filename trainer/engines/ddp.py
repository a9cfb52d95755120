"""torch's DistributedDataParallel: every rank holds the whole network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import Engine as EngineConfig
from pipeline.config import ResolvedSchedule

from ..core.optim import (
    AveragedWeights,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_rate,
)
from ..core.split_state import Part
from ..distributed.ranks import Ranks, autocast, precision
from .layers import change_layers, check_layers, compiled, restore_layers


class DDPEngine:
    """An Engine (see trainer.engines) by DistributedDataParallel."""

    # From `prepare` on.
    network: nn.Module
    optimizer: torch.optim.Optimizer
    clip_norm: float
    replaced: dict[str, nn.Module]  # what change_layers has put aside
    module: DistributedDataParallel | None = None

    def __init__(self, config: EngineConfig, ranks: Ranks):
        check_layers(config, ranks.device)
        self.config = config
        self.ranks = ranks
        self.precision = precision(config, ranks.device)
        self.scaler = torch.amp.GradScaler(
            ranks.device.type, enabled=self.precision == torch.float16
        )

    def prepare(
        self, network: nn.Module, schedule: ResolvedSchedule, state: dict | None = None
    ) -> nn.Module:
        self.replaced = change_layers(network, self.config, self.ranks.world_size)
        self.network = network
        self.optimizer = build_optimizer(network, schedule)
        self.clip_norm = schedule.clip_norm
        if state is not None:
            network.load_state_dict(state["network"])
            load_optimizer_state(self.optimizer, network, state["optimizer"])
            if self.scaler.is_enabled() and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
        trained = compiled(network) if self.config.compile else network
        if not any(parameter.requires_grad for parameter in self.averaged(network)):
            return trained  # there is no gradient that ranks would have to exchange
        devices = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
        self.module = DistributedDataParallel(
            trained, device_ids=devices, gradient_as_bucket_view=True
        )
        return self.module

    def averaged(self, network: nn.Module) -> Iterable[nn.Parameter]:
        """The parameters whose gradients ranks average."""
        return network.parameters()

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self.config, self.ranks.device)

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Gradients are exchanged once a step, in the last micro-batch."""
        if last or self.module is None:
            return nullcontext()
        return self.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> None:
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            self.clip()
        set_rate(self.optimizer, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)

    def clip(self) -> None:
        """Scale the gradients down to a norm of at most clip_norm."""
        nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)

    def state(self) -> dict:
        state = {
            "network": self.network.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.network),
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    @contextmanager
    def eval_model(self, average: AveragedWeights | None) -> Iterator[nn.Module]:
        if average:
            average.swap(self.network)
        try:
            yield self.network
        finally:
            if average:
                average.swap(self.network)

    def own_rows(self, network: nn.Module) -> dict[str, slice]:
        return {}

    def remember(self, network: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in network.state_dict().items()}

    def export(self, weights: Mapping[str, Tensor | Part] | None = None) -> nn.Module:
        self.network.load_state_dict(weights or {}, strict=False)
        restore_layers(self.network, self.config, self.replaced)
        return self.network

    def close(self) -> None:
        """Let go of the reducer while the process group lives.

        An exception's frames may keep this engine.  Its reducer would then be the last to let go of
        the group, and joining gloo's threads with the interpreter locked is a deadlock.
        """
        if self.module is not None:
            del self.module.logger, self.module.reducer
            self.module = None


if TYPE_CHECKING:
    from . import Engine

    _: type[Engine] = DDPEngine
