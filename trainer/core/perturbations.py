"""Inputs moved to where the members of an ensemble disagree.  Nam et al. 2021, "Diversity matters when learning from
ensembles", after the output diversified sampling of Tashiro et al. 2020.

B batch, C classes, D numbers in one input; x inputs, floats scaled to 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

KINDS = ("none", "gaussian", "ods", "conf_ods")

LogitsOf = Callable[
    [Tensor], Tensor
]  # inputs [B, ...] -> logits [B, C], each row of its own input alone


def ods(
    logits_of: LogitsOf, inputs: Tensor, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(direction [B, ...], confidence [B]) of a teacher at inputs [B, ...]; weights: [B, C].

    direction = sqrt(D) g / ||g||_2 with g = grad_x weights . softmax(logits_of(x) / temperature), Nam et al. 2021;
    0 where g is 0.  confidence: the largest softmax(logits_of(x) / temperature).  Works under no_grad and autocast; no
    parameter gets a gradient.
    Raises ValueError where the logits cannot be differentiated by the inputs.
    """
    inputs, logits = _asked(logits_of, inputs)
    return _along(inputs, logits, weights, temperature)


def perturb(
    kind: str,
    inputs: Tensor,
    size: float,
    temperature: float,
    teachers: Sequence[LogitsOf],
    generator: torch.Generator | None = None,
) -> Tensor:
    """clip(x + size eps, 0, 1), of the shape and type of `inputs`.

    eps: "gaussian", N(0, 1) in each number, so that size is the standard deviation; "ods", the direction of one of
    `teachers`, drawn for the whole batch, with weights ~ U(-1, 1)^C of each example's own; "conf_ods", that times the
    teacher's confidence; "none" gives the inputs back.  Nam et al. 2021: size 1/255, the same result for every member.

    teachers: see ods; in eval mode, for batch norm in training mode mixes examples (their flags are left as they are).
    generator: draws; None: torch's global one of the CPU, which checkpoints keep.
    Raises ValueError for an unknown kind, inputs that are not floating and a direction without teachers.
    """
    if kind not in KINDS:
        raise ValueError(f"perturbation {kind!r} must be one of {', '.join(KINDS)}")
    if kind == "none":
        return inputs
    if not inputs.is_floating_point():
        raise ValueError(f"inputs of {inputs.dtype} cannot be perturbed; scale them to 0..1 first")
    device = generator.device if generator is not None else "cpu"
    if kind == "gaussian":
        eps = torch.randn(inputs.shape, generator=generator, device=device).to(inputs)
    else:
        if not teachers:
            raise ValueError(
                f"perturbation {kind!r} follows a teacher's gradient, and there is none"
            )
        drawn = int(torch.randint(len(teachers), (), generator=generator, device=device))
        asked, logits = _asked(teachers[drawn], inputs)
        weights = torch.rand(logits.shape, generator=generator, device=device) * 2 - 1
        eps, confidence = _along(asked, logits, weights.to(logits.device), temperature)
        if kind == "conf_ods":
            eps = eps * confidence.view(-1, *[1] * (eps.dim() - 1)).to(eps)
    return (inputs.detach() + size * eps).clamp(0, 1)


def _asked(logits_of: LogitsOf, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs as a leaf, and the teacher's answer to them with what its gradient needs."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        logits = logits_of(inputs)
    if not logits.requires_grad:
        raise ValueError(
            "the teacher's logits do not depend on its inputs; does it answer under torch.no_grad?"
        )
    return inputs, logits


def _along(
    inputs: Tensor, logits: Tensor, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """ods, once the teacher has answered."""
    p = torch.softmax(logits.detach().float() / temperature, dim=1)
    confidence, top = p.max(1, keepdim=True)
    # The slope by the logits is p_i (w_i - w . p) / temperature.  Of a teacher that is certain to within rounding, the
    # top class's would round to 0; but it is minus the sum of the others', for softmax ignores a constant.
    slope = p * (weights - (weights * p).sum(1, keepdim=True))
    slope = slope.scatter(1, top, 0.0)
    slope = slope.scatter(1, top, -slope.sum(1, keepdim=True))
    # Only the direction is asked, so each row is scaled to size 1 before it could underflow on its way through the
    # teacher.  The square of a small gradient underflows too, and so that is scaled as well.
    (gradient,) = torch.autograd.grad(logits, inputs, _unit_peak(slope).to(logits.dtype))
    gradient = _unit_peak(gradient.float().flatten(1))
    norm = gradient.square().sum(1, keepdim=True).sqrt()
    direction = gradient * (
        math.sqrt(gradient.shape[1]) / norm.clamp_min(0.5)
    )  # norm >= 1, or the gradient is 0
    return direction.view_as(inputs).to(inputs.dtype), confidence[:, 0]


def _unit_peak(rows: Tensor) -> Tensor:
    """Each row [B, n] divided by its largest absolute value; rows of 0 stay 0."""
    peak = rows.abs().amax(1, keepdim=True)
    return rows / peak.where(peak > 0, 1.0)
