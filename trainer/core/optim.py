"""Optimizers, learning-rate schedules and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from networks import RankOne
from pipeline.config import Schedule


def build_optimizer(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters, in groups whose rate is the schedule's times their rate_scale.

    Matrices and kernels decay; vectors (norms) and biases, also one for each member, do not, nor do the rank-one
    factors of a BatchEnsemble, which learn at half the rate (Nam et al. 2021, in their code).
    """
    decayed, plain, factors = [], [], []
    for name, parameter in network.named_parameters():
        module, _, leaf = name.rpartition(".")
        if not parameter.requires_grad:
            continue
        if isinstance(network.get_submodule(module), RankOne) and leaf in RankOne.FACTORS:
            factors.append(parameter)
        elif leaf == "bias" or parameter.ndim <= 1:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": schedule.weight_decay, "rate_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "rate_scale": 1.0},
        {"params": factors, "weight_decay": 0.0, "rate_scale": 0.5},
    ]
    groups = [group for group in groups if group["params"]]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=schedule.momentum)
    return torch.optim.AdamW(
        groups, lr=schedule.learning_rate, betas=(0.9, schedule.beta2), fused=True
    )


def set_rate(optimizer, rate: float) -> None:
    """The schedule's rate of this step, times each group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


def optimizer_state(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, dict]:
    """{parameter: {"exp_avg": tensor, ...}}, of the parameters that a step has reached."""
    return {
        name: optimizer.state[p] for name, p in network.named_parameters() if p in optimizer.state
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, network: nn.Module, states: dict[str, dict]
) -> None:
    for name, p in network.named_parameters():
        if name in states:
            optimizer.state[p] = {key: _placed(value, p) for key, value in states[name].items()}


def _placed(value, parameter: nn.Parameter):
    return value.to(parameter.device, copy=True) if isinstance(value, torch.Tensor) else value


def learning_rate(step: int, steps: int, schedule: Schedule) -> float:
    """The rate of step 0 ... steps - 1: a linear rise over the warm-up share, then by `schedule.schedule`.

    cosine: to zero.  onecycle: the rise starts at 1/25 of the peak and is a cosine too (Smith & Topin 2018).
    constant: flat.
    """
    peak, rise = (
        schedule.learning_rate,
        max(1, round(schedule.warmup * steps)) if schedule.warmup else 0,
    )
    if step < rise:
        if schedule.schedule == "onecycle":
            return peak * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * (step + 1) / rise)) / 2)
        return peak * (step + 1) / rise
    if schedule.schedule == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


class AveragedWeights:
    """Exponential moving average of a network's parameters; buffers are those of the network itself.

    The decay is warmed up, min(decay, (1 + t) / (10 + t)), so that early averages are not stuck at the initial weights.
    """

    def __init__(
        self, network: nn.Module, decay: float, average: dict[str, torch.Tensor] | None = None
    ):
        """average: where it stands already."""
        self.decay = decay
        self.average = average or {
            name: p.detach().clone() for name, p in network.named_parameters()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(network.named_parameters())
        torch._foreach_lerp_(
            list(self.average.values()), [current[n].detach() for n in self.average], 1 - decay
        )

    @torch.no_grad()
    def swap(self, network: nn.Module) -> None:
        """Exchange the network's weights and the averages; a second call undoes it."""
        for name, parameter in network.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)
