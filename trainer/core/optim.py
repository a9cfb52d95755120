"""Optimizers, learning-rate schedules and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from networks import RankOne
from pipeline.config import ResolvedSchedule


def build_optimizer(network: nn.Module, schedule: ResolvedSchedule) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters.

    Each group's rate is the schedule's times the group's rate_scale (see set_rate).

    parameters                         weight decay   rate_scale
    matrices and kernels               schedule's     1
    vectors (norms) and biases,        0              1
    also one for each member
    rank-one factors of a              0              0.5  (Nam et al. 2021, in their code)
    BatchEnsemble
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


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the schedule's rate of this step, times each group's own scale."""
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
    """Set what `optimizer_state` returned, on the device of each parameter."""
    for name, p in network.named_parameters():
        if name in states:
            optimizer.state[p] = {key: _copy_to(p, value) for key, value in states[name].items()}


def _copy_to(parameter: nn.Parameter, value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.to(parameter.device, copy=True)
    return value


def learning_rate(step: int, steps: int, schedule: ResolvedSchedule) -> float:
    """The rate of step 0 ... steps - 1: a linear rise over the warm-up share, then the schedule.

    cosine    falls to zero
    onecycle  the same. The rise starts at 1/25 of the peak and is a cosine too
              (Smith & Topin 2018)
    constant  stays at the peak
    """
    peak = schedule.learning_rate
    rise = 0
    if schedule.warmup:
        rise = max(1, round(schedule.warmup * steps))
    if step < rise:
        if schedule.schedule == "onecycle":
            return peak * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * (step + 1) / rise)) / 2)
        return peak * (step + 1) / rise
    if schedule.schedule == "constant":
        return peak
    return peak * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


class AveragedWeights:
    """Exponential moving average of a network's parameters. Buffers are the network's own.

    The decay is warmed up, min(decay, (1 + t) / (10 + t)), so that early averages are not stuck at
    the initial weights.

    average: the averages so far, from a checkpoint. By default they start at the network's weights.
    """

    def __init__(
        self, network: nn.Module, decay: float, average: dict[str, torch.Tensor] | None = None
    ):
        self.decay = decay
        self.average = average or {
            name: p.detach().clone() for name, p in network.named_parameters()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(network.named_parameters())
        # One kernel for all tensors, as torch's own optimizers do it. Torch has no public name.
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.average.values()),
            [current[name].detach() for name in self.average],
            1 - decay,
        )

    @torch.no_grad()
    def swap(self, network: nn.Module) -> None:
        """Exchange the network's weights and the averages. A second call undoes it."""
        for name, parameter in network.named_parameters():
            current = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(current)
