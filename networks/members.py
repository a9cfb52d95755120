"""Networks of several members that share weights: several heads on one body, or rank-one factors on every layer.

K members, B examples, C classes; the members' logits are [K, B, C].
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FACTOR_STD = 0.5  # of the fresh factors, whose mean is 1: Nam et al. 2021, section 4.1


class MemberHeads(nn.Module):
    """K heads that read the same features: [B, ...] -> [K, B, C].  Hydra, Tran et al. 2020, section 3."""

    def __init__(self, heads: Iterable[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self.heads])


def member_head(blocks: nn.Sequential, linear: nn.Linear) -> nn.Sequential:
    """One of MemberHeads: the end of a trunk that cut_trunk gave, and the linear layer."""
    return nn.Sequential(OrderedDict(blocks=blocks, linear=linear))


def cut_trunk(trunk: nn.Module, blocks: int) -> tuple[nn.Module, nn.Sequential]:
    """(body, end): the trunk without its last blocks, and these; both are made of the trunk's own modules.

    ValueError for more blocks than there are, and where the trunk is no plain Sequential and `blocks` is not 0.
    """
    if blocks == 0:
        return trunk, nn.Sequential()
    if not isinstance(trunk, nn.Sequential) or type(trunk).forward is not nn.Sequential.forward:
        raise ValueError(
            f"members.blocks = {blocks}: only a trunk that is an nn.Sequential can be cut, not {type(trunk).__name__}; "
            "take blocks = 0"
        )
    children = list(trunk.named_children())
    if blocks > len(children):
        names = ", ".join(name for name, _ in children)
        raise ValueError(
            f"members.blocks = {blocks}: the trunk has {len(children)} blocks ({names})"
        )
    body, end = (
        nn.Sequential(OrderedDict(part)) for part in (children[:-blocks], children[-blocks:])
    )
    first = next(module for module in end.modules() if not list(module.children()))
    if getattr(first, "inplace", False):  # every head reads the same features
        first.inplace = False
    return body, end


class RankOne(nn.Module):
    """A Linear or Conv2d of K members, member j's weight W o (s_j r_j^T): [K B, ...] -> [K B, ...], member by member.

    W [out, in, ...] is `shared.weight`; r [K, in] scales the inputs, s [K, out] the outputs, so no member's weight is
    ever built: s_j o (W (r_j o x)) + b_j.  Wen et al. 2020, eq. 2 to 5.  bias: [K, out] where the plain layer has one.
    """

    FACTORS = ("r", "s")

    def __init__(
        self,
        plain: nn.Linear | nn.Conv2d,
        count: int,
        std: float,
        generator: torch.Generator | None = None,
    ):
        """Takes `plain` over: its weight is W, its bias every member's; r and s are drawn from N(1, std)."""
        super().__init__()
        width_in, width_out = (
            (plain.in_features, plain.out_features)
            if isinstance(plain, nn.Linear)
            else (plain.in_channels, plain.out_channels)
        )
        self.r = _factors(count, width_in, std, generator, plain.weight)
        self.s = _factors(count, width_out, std, generator, plain.weight)
        bias = plain.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().repeat(count, 1))
        plain.bias = None
        self.shared = plain
        self.trailing = 0 if isinstance(plain, nn.Linear) else 2  # axes behind that of the units

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x * self._of_each(self.r, x))
        s = self._of_each(self.s, y)
        return y * s if self.bias is None else torch.addcmul(self._of_each(self.bias, y), y, s)

    def _of_each(self, factors: Tensor, x: Tensor) -> Tensor:
        """[K, units] -> [K B, ..., units, ...], as x has them; in x's type, which is low under autocast.

        Rows are repeated, though [K, B, ...] views would do without: torch.export makes no program of views on views.
        """
        rows = factors.to(x.dtype)[:, None].expand(-1, x.shape[0] // len(factors), -1).flatten(0, 1)
        between = x.dim() - 2 - self.trailing
        return rows.view(x.shape[0], *[1] * between, -1, *[1] * self.trailing)

    def extra_repr(self) -> str:
        return f"{len(self.r)} members"


def share_weights(module: nn.Module, count: int, std: float = FACTOR_STD, generator=None) -> None:
    """Make RankOne of every Linear and Conv2d below `module`, in place; ValueError for linear layers of other kinds."""
    made: dict[nn.Module, RankOne] = {}  # a layer that is used in two places stays one
    for path, parent in list(module.named_modules()):
        for name, child in list(parent._modules.items()):
            if type(child) in (nn.Linear, nn.Conv2d):
                if child not in made:
                    made[child] = RankOne(child, count, std, generator)
                setattr(parent, name, made[child])
            elif isinstance(child, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)):
                place = f"{path}.{name}" if path else name
                raise ValueError(
                    f"members.kind = 'batch' knows Linear and Conv2d; {place} is a {type(child).__name__}; "
                    "take members.kind = 'heads'"
                )


def member_log_probabilities(classifier: Callable[[Tensor], Tensor], raw: Tensor) -> Tensor:
    """[K, B, C], log-probabilities of each member; K = 1 for a plain classifier."""
    logits = classifier(raw)
    logits = logits if logits.dim() == 3 else logits[None]
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def mean_log_probabilities(classifier: Callable[[Tensor], Tensor], raw: Tensor) -> Tensor:
    """[B, C], the log of the members' arithmetic mean."""
    each = member_log_probabilities(classifier, raw)
    return each.logsumexp(0) - math.log(len(each))


def _factors(
    count: int, width: int, std: float, generator: torch.Generator | None, like: Tensor
) -> nn.Parameter:
    return nn.Parameter((1 + std * torch.randn(count, width, generator=generator)).to(like))
