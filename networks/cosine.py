"""Heads of cosines: logits are scale * cos(features, row), with margins while labels are learnt.

    x   features of an example, [D]
    w   the row of a class, [D]
    s   the scale, a number
    y   the label; m, the margin

    z_c = s <x / |x|, w_c / |w_c|>

What is done to the features, s x / |x|, is the trunk's last layer.  The rows are divided by their
norms while they learn, and stay of norm 1.  So a network that has learnt has a plain linear layer
of unit rows, and whatever reads one (specialists, exports, ensembles) needs to know nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear_logits import LinearLogits

LEAST_SINE = 1e-6  # of ArcFace: a sine's derivative is infinite where it is 0


def default_scale(num_classes: int) -> float:
    """The scale to start with by default: sqrt(2) log(C - 1), at least 1.

    At it the softmax of C - 1 classes that are all at right angles is neither flat nor saturated:
    Zhang et al. 2019, AdaCos, eq. 11.
    """
    return max(1.0, math.sqrt(2) * math.log(max(1, num_classes - 1)))


class Unit(nn.Module):
    """[B, D] -> scale * x / |x|, in float32 at least.

    scale: [1], a parameter where it is learned, else a buffer.
    """

    scale: Tensor

    def __init__(self, scale: float, learned: bool):
        super().__init__()
        value = torch.tensor([scale])
        if learned:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32))) * self.scale

    def extra_repr(self) -> str:
        return "learned scale" if isinstance(self.scale, nn.Parameter) else "fixed scale"


class UnitTrunk(nn.Module):
    """A trunk whose features have the norm `scale`: [B, *shape] -> [B, D].

    net: the trunk itself.  unit: what comes behind it. No block, where blocks are counted.
    """

    def __init__(self, net: nn.Module, unit: Unit):
        super().__init__()
        self.net = net
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.net(x))


def unit_trunk(trunk: nn.Module, cosine: dict[str, Any] | None) -> nn.Module:
    """Wrap a trunk as spec.cosine says. None returns it as it is."""
    if cosine is None:
        return trunk
    return UnitTrunk(trunk, Unit(cosine["scale"], cosine["learned"]))


class UnitRows(nn.Module):
    """A linear layer while its rows learn on the sphere: features [B, D] -> logits [B, C].

    It takes over the plain layer's rows as `direction`, of any norm. The bias, which is 0 unless
    somebody raised it, stays as it is.

    in_blocks: return LinearLogits in training, so that a loss can move the label's logit.
    """

    bias: Tensor

    def __init__(self, linear: nn.Linear, in_blocks: bool = False):
        super().__init__()
        self.in_features = linear.in_features
        self.in_blocks = in_blocks
        self.direction = nn.Parameter(linear.weight.detach(), linear.weight.requires_grad)
        self.register_buffer("bias", linear.bias.detach(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """[C, D], each row of norm 1."""
        return F.normalize(self.direction)

    def forward(self, features: Tensor) -> Tensor | LinearLogits:
        if self.training and self.in_blocks:
            return LinearLogits(features, self.weight, self.bias, len(self.direction))
        return F.linear(features, self.weight, self.bias)

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """The trained rows as a plain linear layer."""
        classes, features = self.direction.shape
        linear = nn.Linear(features, classes, device="meta")
        linear.weight = nn.Parameter(self.weight)
        linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {len(self.direction)} classes, rows of norm 1"


@torch.no_grad()
def to_unit_rows(linear: nn.Linear) -> None:
    """Divide the rows by their norms and set the bias to 0."""
    linear.weight.copy_(F.normalize(linear.weight))
    linear.bias.zero_()


def cosface(z: Tensor, scale: Tensor, margin: float) -> Tensor:
    """s (cos - m): Wang et al. 2018, CosFace, eq. 4.

    z: the label's logits s cos, [n].  scale: s, [n].
    """
    return z - scale * margin


def arcface(z: Tensor, scale: Tensor, margin: float) -> Tensor:
    """s cos(angle + m): Deng et al. 2019, ArcFace, eq. 3. s (cos - m sin m) beyond pi - m.

    There cos(angle + m) would rise again as the angle grows. The line goes on falling, as in the
    authors' code.
    """
    cosine = z / scale
    sine = (1 - cosine.square()).clamp_min(LEAST_SINE**2).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    beyond = cosine - margin * math.sin(margin)
    return scale * torch.where(cosine > -math.cos(margin), turned, beyond)


Margin = Callable[[Tensor, Tensor, float], Tensor]


def with_margin(
    logits: LinearLogits, labels: Tensor, margin: float, function: Margin
) -> LinearLogits:
    """Move the label's logit by a margin, for a loss on labels.

    Parameters
    ----------
    logits : LinearLogits
        Its features have the scale as their norm, and its rows have norm 1. The bias (a prior, the
        correction for sampled classes) is added after the margin.
    labels : Tensor int64 [n]
        A label of -1 has none.
    margin : float
    function : callable
        (the label's logits [n], scale [n], margin) -> these logits with the margin, [n].
    """
    known = labels.clamp_min(0)[:, None]
    # Not the product with a norm of 0: its derivative is none.
    scale = logits.features.float().norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    z = logits.without_bias().logits_at(known)[:, 0]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    moved = torch.where(labels < 0, 0.0, function(z, scale.to(z), margin) - z)
    return logits.move(known, moved[:, None])
