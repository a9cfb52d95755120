"""Move inputs to where teachers have something to say.

Of pictures: to where the members of an ensemble disagree.  Nam et al. 2021, "Diversity matters when
learning from ensembles", after the output diversified sampling of Tashiro et al. 2020.
Of bags: between two examples, where networks that memorised theirs cannot answer from memory.

B batch, C classes, D numbers in one input. x inputs, floats scaled to 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

KINDS = ("none", "gaussian", "ods", "conf_ods")

# inputs [B, ...] -> logits [B, C]. Each row depends on its own input alone.
LogitsOf = Callable[[Tensor], Tensor]


def ods(
    logits_of: LogitsOf, inputs: Tensor, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The direction of output diversified sampling, and a teacher's confidence.

    Works under no_grad and autocast. No parameter gets a gradient.

    Parameters
    ----------
    logits_of : callable
        The teacher: inputs [B, ...] -> logits [B, C].
    inputs : Tensor [B, ...]
    weights : Tensor [B, C]
    temperature : float

    Returns
    -------
    direction : Tensor [B, ...]
        sqrt(D) g / ||g||_2 with g = grad_x weights . softmax(logits_of(x) / temperature). 0 where g
        is 0.
    confidence : Tensor [B]
        The largest softmax(logits_of(x) / temperature).

    Raises
    ------
    ValueError
        Where the logits cannot be differentiated by the inputs.
    """
    inputs, logits = _differentiable_logits(logits_of, inputs)
    return _direction(inputs, logits, weights, temperature)


def perturb(
    kind: str,
    inputs: Tensor,
    size: float,
    temperature: float,
    teachers: Sequence[LogitsOf],
    generator: torch.Generator | None = None,
) -> Tensor:
    """clip(x + size eps, 0, 1), of the shape and type of `inputs`.

    Nam et al. 2021 take size 1/255, and the same result for every member.

    Parameters
    ----------
    kind : {"none", "gaussian", "ods", "conf_ods"}
        What eps is.
        none: the inputs are returned as they are.
        gaussian: N(0, 1) in each number, so that size is the standard deviation.
        ods: the direction of one of `teachers`, drawn for the whole batch, with weights
        ~ U(-1, 1)^C of each example's own.
        conf_ods: that times the teacher's confidence.
    inputs : float Tensor [B, ...]
    size, temperature : float
    teachers : sequence of callables
        See `ods`.  In eval mode, for batch norm in training mode mixes examples. Their flags are
        left as they are.
    generator : torch.Generator, optional
        What draws. By default torch's global one of the CPU, which checkpoints keep.

    Raises
    ------
    ValueError
        For an unknown kind, inputs that are not floating, and a direction without teachers.
    """
    if kind not in KINDS:
        raise ValueError(f"perturbation {kind!r} must be one of {', '.join(KINDS)}")
    if kind == "none":
        return inputs
    if not inputs.is_floating_point():
        raise ValueError(f"inputs of {inputs.dtype} cannot be perturbed; scale them to 0..1 first")
    device = torch.device("cpu")
    if generator is not None:
        device = generator.device
    if kind == "gaussian":
        eps = torch.randn(inputs.shape, generator=generator, device=device).to(
            inputs, non_blocking=True
        )
        return (inputs.detach() + size * eps).clamp(0, 1)
    if not teachers:
        raise ValueError(f"perturbation {kind!r} follows a teacher's gradient, and there is none")
    teacher = int(torch.randint(len(teachers), (), generator=generator, device=device))
    leaf, logits = _differentiable_logits(teachers[teacher], inputs)
    weights = torch.rand(logits.shape, generator=generator, device=device) * 2 - 1
    eps, confidence = _direction(
        leaf, logits, weights.to(logits.device, non_blocking=True), temperature
    )
    if kind == "conf_ods":
        eps = eps * confidence.view(-1, *[1] * (eps.dim() - 1)).to(eps)
    return (inputs.detach() + size * eps).clamp(0, 1)


def mix_bags(bags: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Bags of indices, each with some of its own left out and some of another's put in.

    Of a bag's own indices each stays with a probability that is drawn for the bag, uniform in
    [1 - 2 share, 1]. Of another bag of the batch each joins it with probability `share`.  So bags
    keep about their sizes.  What has no room is left out. A bag that would end up empty stays as it
    is.

    Parameters
    ----------
    bags : int Tensor [B, L]
        Negative indices are padding, and stand last in what is returned.
    share : float
        Within [0, 1 / 2].
    generator : torch.Generator, optional
        What draws. By default torch's global one of the CPU, which checkpoints keep.

    Returns
    -------
    Tensor [B, L], of the type of `bags`.
    """
    count, room = bags.shape
    real = bags >= 0
    length = int(real.any(0).nonzero().max()) + 1 if bool(real.any()) else 0
    own, real = bags[:, :length], real[:, :length]
    device = generator.device if generator is not None else torch.device("cpu")
    ring = torch.randperm(count, generator=generator, device=device).to(
        bags.device, non_blocking=True
    )
    partner = torch.empty_like(ring).scatter_(0, ring, ring.roll(1))  # nobody's is itself
    lost = 2 * share * torch.rand(count, 1, generator=generator, device=device)
    u = torch.rand(2, count, length, generator=generator, device=device)
    stays = real & (u[0] >= lost).to(bags.device, non_blocking=True)
    joins = real[partner] & (u[1] < share).to(bags.device, non_blocking=True)
    both = torch.cat([own, own[partner]], 1)
    taken = torch.cat([stays, joins], 1)
    emptied = ~taken.any(1)
    taken[emptied, :length] = real[emptied]
    # Each to its place among those taken. What has none goes to a last column, which is cut off.
    places = taken.cumsum(1) - 1
    places = torch.where(taken, places, room).clamp_max(room)
    mixed = torch.full((count, room + 1), -1, dtype=bags.dtype, device=bags.device)
    return mixed.scatter_(1, places, both)[:, :room].contiguous()


def _differentiable_logits(logits_of: LogitsOf, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs as a leaf, and the teacher's logits of them with what their gradient needs."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        logits = logits_of(inputs)
    if not logits.requires_grad:
        raise ValueError(
            "the teacher's logits do not depend on its inputs; does it answer under torch.no_grad?"
        )
    return inputs, logits


def _direction(
    inputs: Tensor, logits: Tensor, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`ods`, once the teacher's logits are known."""
    p = torch.softmax(logits.detach().float() / temperature, dim=1)
    confidence, top = p.max(1, keepdim=True)
    # The slope by the logits is p_i (w_i - w . p) / temperature.  Of a teacher that is certain to
    # within rounding, the top class's would round to 0, but it is minus the sum of the others', for
    # softmax ignores a constant.
    slope = p * (weights - (weights * p).sum(1, keepdim=True))
    slope = slope.scatter(1, top, 0.0)
    slope = slope.scatter(1, top, -slope.sum(1, keepdim=True))
    # Only the direction matters, so each row is scaled to size 1 before it could underflow on its
    # way through the teacher.  The square of a small gradient underflows too, and so that is scaled
    # as well.
    (gradient,) = torch.autograd.grad(logits, inputs, _unit_peak(slope).to(logits.dtype))
    gradient = _unit_peak(gradient.float().flatten(1))
    norm = gradient.square().sum(1, keepdim=True).sqrt()
    # norm >= 1, or the gradient is 0.
    direction = gradient * (math.sqrt(gradient.shape[1]) / norm.clamp_min(0.5))
    return direction.view_as(inputs).to(inputs.dtype), confidence[:, 0]


def _unit_peak(rows: Tensor) -> Tensor:
    """Each row [B, n] divided by its largest absolute value. Rows of 0 stay 0."""
    peak = rows.abs().amax(1, keepdim=True)
    return rows / peak.where(peak > 0, 1.0)
