"""Optimizers, learning-rate schedules and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from networks import Classifier, RankOne
from pipeline.config import ResolvedSchedule

HEAD = "head."  # before the names of a head's parameters


def build_optimizer(network: nn.Module, schedule: ResolvedSchedule) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters.

    Each group's rate is the schedule's times the group's rate_scale (see set_rate).

    parameters                         weight decay   rate_scale
    matrices and kernels               schedule's     1
    vectors (norms) and biases,        0              1
    also one for each member
    rank-one factors of a              0              0.5  (Nam et al. 2021, in their code)
    BatchEnsemble
    rows of a head over all classes,   schedule's, 0  row_rate / learning_rate, without averages
    and biases, with row_rate

    A network with layer-wise decay (networks.set_layer_decay) has these groups for each of its
    scales, multiplied by it.
    """
    scales = getattr(network, "rate_scales", {})
    members: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    rows: list[nn.Parameter] = []
    row_biases: list[nn.Parameter] = []
    by_rows = schedule.row_rate is not None and has_all_rows(network)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if by_rows and name.startswith(HEAD):
            (rows if parameter.ndim > 1 else row_biases).append(parameter)
            continue
        kind = (scales.get(name, 1.0), *_kind(network, name, parameter))
        members.setdefault(kind, []).append(parameter)
    groups = [
        {
            "params": members[layer, scale, decayed],
            "weight_decay": decayed * schedule.weight_decay,
            "rate_scale": layer * scale,
        }
        for layer, scale, decayed in sorted(members, reverse=True)
    ]
    if by_rows:
        assert schedule.row_rate is not None
        of_rows = {"rate_scale": schedule.row_rate / schedule.learning_rate, "momentum": 0.0}
        decay = schedule.weight_decay
        groups.append({"params": rows, "weight_decay": decay, "without_averages": True, **of_rows})
        groups.append(
            {"params": row_biases, "weight_decay": 0.0, "without_averages": True, **of_rows}
        )
    groups = [group for group in groups if group["params"]]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=schedule.momentum)
    kind = AdamWBesideRows if by_rows else torch.optim.AdamW
    return kind(groups, lr=schedule.learning_rate, betas=(0.9, schedule.beta2), fused=True)


def has_all_rows(network: nn.Module) -> bool:
    """Whether its head is one plain layer with a row for every class."""
    if not isinstance(network, Classifier):
        return False
    return network.spec.head["kind"] == "linear" and network.spec.members is None


class AdamWBesideRows(torch.optim.AdamW):
    """AdamW, but for groups that are `without_averages`: these take plain steps."""

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "no loss is computed again"
        every = self.param_groups
        try:
            self.param_groups = [g for g in every if not g.get("without_averages")]
            super().step()
        finally:
            self.param_groups = every
        for group in every:
            if group.get("without_averages"):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        plain_step(parameter, parameter.grad, group["lr"], group["weight_decay"])


def plain_step(p: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> None:
    """p - rate (gradient + decay p), in place."""
    p.mul_(1 - rate * decay).add_(gradient, alpha=-rate)


def _kind(network: nn.Module, name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """(rate_scale, share of the weight decay) of a parameter by the table of build_optimizer."""
    module, _, leaf = name.rpartition(".")
    if isinstance(network.get_submodule(module), RankOne) and leaf in RankOne.FACTORS:
        return 0.5, 0.0
    if leaf == "bias" or parameter.ndim <= 1:
        return 1.0, 0.0
    return 1.0, 1.0


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
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    # In the parameter's order of numbers, which fused steps expect.
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


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
