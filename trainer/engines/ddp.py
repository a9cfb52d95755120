"""torch's DistributedDataParallel: every rank holds the whole network."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import Engine, Schedule

from ..core.optim import (
    AveragedWeights,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_rate,
)
from ..distributed.ranks import Ranks, precision


class DDPEngine:
    def __init__(self, config: Engine, ranks: Ranks):
        self.ranks = ranks
        self.precision = precision(config, ranks.device)
        self.scaler = torch.amp.GradScaler(
            ranks.device.type, enabled=self.precision == torch.float16
        )

    def prepare(
        self, network: nn.Module, schedule: Schedule, state: dict | None = None
    ) -> nn.Module:
        """Build the optimizer, go on from a checkpoint's state.  Returns the module to call in the forward pass."""
        self.network = network
        self.optimizer = build_optimizer(network, schedule)
        self.clip_norm = schedule.clip_norm
        if state is not None:
            network.load_state_dict(state["network"])
            load_optimizer_state(self.optimizer, network, state["optimizer"])
            if self.scaler.is_enabled() and "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
        devices = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
        self.module = DistributedDataParallel(
            network, device_ids=devices, gradient_as_bucket_view=True
        )
        return self.module

    def autocast(self):
        return torch.autocast(
            self.ranks.device.type, self.precision, enabled=self.precision != torch.float32
        )

    def accumulating(self, last: bool):
        """Gradients are exchanged once a step, in the last micro-batch."""
        return nullcontext() if last else self.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> None:
        """One optimizer step at this learning rate."""
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            self.clip()
        set_rate(self.optimizer, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)

    def state(self) -> dict:
        """What a checkpoint keeps, by the names of the parameters: any engine goes on from it.  Collective."""
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        found = optimizer_state(self.optimizer, self.network)
        return {"network": self.network.state_dict(), "optimizer": found, **scaler}

    @contextmanager
    def eval_model(self, average: AveragedWeights | None):
        """The network as it would be exported now, with the averaged weights where there are any; collective."""
        if average:
            average.swap(self.network)
        try:
            yield self.network
        finally:
            if average:
                average.swap(self.network)

    def export(self) -> nn.Module:
        """The plain network with the trained weights."""
        return self.network

    def close(self) -> None:
        """Let go of the reducer while the process group lives.  If an exception's frames kept it, it would be the
        last to let go of the group, and joining gloo's threads with the interpreter locked is a deadlock."""
        if getattr(self, "module", None) is not None:
            self.module.logger = self.module.reducer = None
            self.module = None
