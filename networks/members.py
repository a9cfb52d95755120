"""Members that share weights: several heads on one body, or rank-one factors on every layer.

K members, B examples, C classes. The members' logits are [K, B, C].
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from .cosine import UnitTrunk

FACTOR_STD = 0.5  # of the fresh factors, whose mean is 1: Nam et al. 2021, section 4.1


class MemberHeads(nn.Module):
    """K heads that read the same features: [B, ...] -> [K, B, C].

    Hydra, Tran et al. 2020, section 3.
    """

    def __init__(self, heads: Iterable[nn.Module]):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self.heads])


def member_head(blocks: nn.Sequential, linear: nn.Module) -> nn.Sequential:
    """One of MemberHeads: the end of a trunk that cut_trunk gave, and the linear layer."""
    return nn.Sequential(OrderedDict(blocks=blocks, linear=linear))


def cut_trunk(trunk: nn.Module, blocks: int) -> tuple[nn.Module, nn.Sequential]:
    """(body, end): the trunk without its last blocks, and these. Made of the trunk's own modules.

    ValueError for more blocks than there are, and where the trunk is no plain Sequential and
    `blocks` is not 0.
    """
    if blocks == 0:
        return trunk, nn.Sequential()
    if isinstance(trunk, UnitTrunk):
        body, end = cut_trunk(trunk.net, blocks)
        end.add_module("unit", trunk.unit)
        return body, end
    if not isinstance(trunk, nn.Sequential) or type(trunk).forward is not nn.Sequential.forward:
        raise ValueError(
            f"members.blocks = {blocks}: only a trunk that is an nn.Sequential can be cut, "
            f"not {type(trunk).__name__}; take blocks = 0"
        )
    children = list(trunk.named_children())
    if blocks > len(children):
        names = ", ".join(name for name, _ in children)
        raise ValueError(
            f"members.blocks = {blocks}: the trunk has {len(children)} blocks ({names})"
        )
    body = nn.Sequential(OrderedDict(children[:-blocks]))
    end = nn.Sequential(OrderedDict(children[-blocks:]))
    # Every head reads the same features, so the first layer must not change them in place.
    first = next(module for module in end.modules() if not list(module.children()))
    if getattr(first, "inplace", False):
        vars(first)["inplace"] = False
    return body, end


class RankOne(nn.Module):
    """A Linear or Conv2d of K members: [K B, ...] -> [K B, ...], member by member.

    Member j's weight is W o (s_j r_j^T), and none is ever built: s_j o (W (r_j o x)) + b_j.
    Wen et al. 2020, eq. 2 to 5.

    shared  the plain layer. W [out, in, ...] is shared.weight
    r       [K, in], scales the inputs
    s       [K, out], scales the outputs
    bias    [K, out] where the plain layer has one, else None
    """

    FACTORS = ("r", "s")

    def __init__(
        self,
        plain: nn.Linear | nn.Conv2d,
        count: int,
        std: float,
        generator: torch.Generator | None = None,
    ):
        """Takes `plain` over: its weight is W, its bias every member's.

        r and s are drawn from N(1, std).
        """
        super().__init__()
        if isinstance(plain, nn.Linear):
            width_in, width_out = plain.in_features, plain.out_features
            self.trailing = 0  # axes behind that of the units
        else:
            width_in, width_out = plain.in_channels, plain.out_channels
            self.trailing = 2
        self.r = _factors(count, width_in, std, generator, plain.weight)
        self.s = _factors(count, width_out, std, generator, plain.weight)
        bias = plain.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().repeat(count, 1))
        plain.register_parameter("bias", None)
        self.shared = plain

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x * self._per_row(self.r, x))
        s = self._per_row(self.s, y)
        if self.bias is None:
            return y * s
        return torch.addcmul(self._per_row(self.bias, y), y, s)

    def _per_row(self, factors: Tensor, x: Tensor) -> Tensor:
        """[K, units] -> [K B, ..., units, ...], as in x. In x's type, low under autocast."""
        # Views [K, B, ...] need no copies, but torch.export makes no program of views on views.
        rows = factors.to(x.dtype)[:, None].expand(-1, x.shape[0] // len(factors), -1).flatten(0, 1)
        between = x.dim() - 2 - self.trailing
        return rows.view(x.shape[0], *[1] * between, -1, *[1] * self.trailing)

    def extra_repr(self) -> str:
        return f"{len(self.r)} members"


def share_weights(
    module: nn.Module,
    count: int,
    std: float = FACTOR_STD,
    generator: torch.Generator | None = None,
) -> None:
    """Make RankOne of every Linear and Conv2d below `module`, in place.

    ValueError for linear layers of other kinds.
    """
    made: dict[nn.Module, RankOne] = {}  # a layer that is used in two places stays one
    for path, parent in list(module.named_modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear or type(child) is nn.Conv2d:
                if child not in made:
                    made[child] = RankOne(child, count, std, generator)
                setattr(parent, name, made[child])
            elif isinstance(child, (nn.Linear, nn.Bilinear, _ConvNd)):
                full_name = f"{path}.{name}" if path else name
                raise ValueError(
                    f"members.kind = 'batch' knows Linear and Conv2d; "
                    f"{full_name} is a {type(child).__name__}; take members.kind = 'heads'"
                )


def member_log_probabilities(classifier: Callable[[Tensor], Tensor], raw: Tensor) -> Tensor:
    """Log-probabilities of each member.

    Parameters
    ----------
    classifier : callable
        A Classifier: raw inputs -> logits [B, C], or [K, B, C] of one with members.
    raw : Tensor [B, *input.shape]

    Returns
    -------
    Tensor [K, B, C]
        At least float32. K = 1 for a plain classifier.
    """
    logits = classifier(raw)
    if logits.dim() == 2:
        logits = logits[None]
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def mean_log_probabilities(classifier: Callable[[Tensor], Tensor], raw: Tensor) -> Tensor:
    """The log of the arithmetic mean of the members' probabilities.

    Parameters
    ----------
    classifier : callable
        A Classifier: raw inputs -> logits [B, C], or [K, B, C] of one with members.
    raw : Tensor [B, *input.shape]

    Returns
    -------
    Tensor [B, C]
        At least float32.
    """
    return mean_of_members(member_log_probabilities(classifier, raw))


def mean_of_members(log_p: Tensor) -> Tensor:
    """The log of the arithmetic mean of probabilities, [K, B, C] -> [B, C]."""
    if len(log_p) == 1:  # of huge label sets the sum would be a quarter of an evaluation
        return log_p[0]
    return log_p.logsumexp(0) - math.log(len(log_p))


def _factors(
    count: int, width: int, std: float, generator: torch.Generator | None, like: Tensor
) -> nn.Parameter:
    return nn.Parameter((1 + std * torch.randn(count, width, generator=generator)).to(like))
