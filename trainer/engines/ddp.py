"""torch's DistributedDataParallel: every rank holds the whole network."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import Engine, Schedule
from ..distributed import Ranks
from ..optimisation import build_optimizer


class DDPEngine:
    def __init__(self, config: Engine, ranks: Ranks):
        self.ranks = ranks
        bf16 = config.precision == "bf16" or (config.precision == "auto" and ranks.device.type == "cuda")
        self.precision = torch.bfloat16 if bf16 else torch.float32

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
        loss.backward()

    def step(self, rate: float) -> float | None:
        """One optimizer step at this learning rate.  Returns the gradient's norm where it is clipped."""
        norm = None
        if self.clip_norm:
            norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def state(self) -> dict:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self) -> nn.Module:
        """The plain network with the trained weights; nothing downstream knows which engine ran."""
        return self.network

    def close(self) -> None:
        """Let go of the reducer while the process group lives.  If an exception's frames kept it, it would be the
        last to let go of the group, and joining gloo's threads with the interpreter locked is a deadlock."""
        if getattr(self, "module", None) is not None:
            self.module.logger = self.module.reducer = None
            self.module = None
