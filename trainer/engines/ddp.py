"""torch's DistributedDataParallel: every rank holds the whole network."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import Engine, Schedule
from ..distributed import Ranks, precision
from ..optimisation import AveragedWeights, build_optimizer


class DDPEngine:
    name = "ddp"
    write_part = None  # rank 0 holds all there is, so nothing is written by the others

    def __init__(self, config: Engine, ranks: Ranks):
        self.ranks = ranks
        self.precision = precision(config, ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == torch.float16)

    def prepare(self, network: nn.Module, schedule: Schedule) -> nn.Module:
        """Place the network and build its optimizer.  Returns the module to call in the forward pass."""
        self.network = network.to(self.ranks.device)
        self.optimizer = build_optimizer(self.network, schedule)
        self.clip_norm = schedule.clip_norm
        devices = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
        self.module = DistributedDataParallel(self.network, device_ids=devices, gradient_as_bucket_view=True)
        return self.module

    def autocast(self):
        return torch.autocast(self.ranks.device.type, self.precision, enabled=self.precision != torch.float32)

    def accumulating(self, last: bool):
        """Gradients are exchanged once a step, in the last micro-batch."""
        return nullcontext() if last else self.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, rate: float) -> None:
        """One optimizer step at this learning rate."""
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)

    def state(self) -> dict:
        """What a checkpoint keeps of rank 0."""
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), **scaler}

    def load(self, state: dict, place: Path) -> None:
        """Go on from a checkpoint: its state, and the directory where it stands."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def weights(self) -> dict[str, Tensor]:
        """A copy of the whole network's state; collective."""
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    @contextmanager
    def judged(self, average: AveragedWeights | None):
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
