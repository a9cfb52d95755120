"""A specialist's logits about a row's shortlist, from as few rows of its head as that takes.

    n, k   rows of a batch, classes of a row's shortlist K
    S      the specialist's classes
    D      features

The last logit, the dustbin, is of K's classes outside S.  A head that keeps the rows of these
classes is asked about them: k rows in all, not C.  Where one row stands for many classes, of which
only some are in K, they share it as the generalist's softmax has it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from networks import Branch
from networks.full_precision import full_precision
from networks.gathered_rows import DENSE_FROM
from networks.heads import DustbinHead
from networks.linear_logits import LinearLogits

from .shortlist_kl import listed_share, log_sum, places_in


class Places(NamedTuple):
    """Where a head has a row for each class of a shortlist.

    rows: int64 [n, k], 0 where it has none of its own.  known: bool, whether it has one.
    inside: bool, whether the class is the specialist's. Its row is then its column.
    """

    rows: Tensor
    known: Tensor
    inside: Tensor


def places_on(head: nn.Module, classes: Tensor, indices: Tensor) -> Places:
    """The rows of a copy's head: those of S first, then others, each part in ascending order.

    classes: int64 [|S|], S, ascending.  indices: int64 [n, k], the shortlist.
    """
    place, inside = places_in(classes, indices)
    size = len(classes)
    if has_every_row(head):
        below = torch.where(indices > classes[-1], size, place)  # of S, below each index
        rows = torch.where(inside, place, size + indices - below)
        return Places(rows, torch.ones_like(inside), inside)
    kept = kept_classes(head, indices.device)
    if not len(kept):
        return Places(torch.where(inside, place, 0), inside, inside)
    other, listed = places_in(kept, indices)
    known = inside | listed
    rows = torch.where(inside, place, size + other)
    return Places(torch.where(known, rows, 0), known, inside)


@full_precision
def logits_on_shortlist(
    head: nn.Module,
    features: Tensor,
    classes: Tensor,
    indices: Tensor,
    places: Places,
    p_general: Tensor | None,
) -> Tensor:
    """A copy's logits at its own classes of the shortlist and of the shortlist's others.

    Parameters
    ----------
    head : DustbinHead or nn.Linear
        An nn.Linear has |S| + 1 rows, the dustbin last.
    features : Tensor [n, D]
    classes : int64 Tensor [|S|]
    indices : int64 Tensor [n, k]
    places : Places
        Of the shortlist.
    p_general : Tensor [n, C]
        The generalist's softmax. Not read where every class has a row.

    Returns
    -------
    Tensor [n, k + 1]
        In float32 at least. -inf at classes that are not its own.  The dustbin is last, -inf where
        the shortlist has no class outside S.
    """
    weight, bias = head.get_parameter("weight"), head.get_parameter("bias")
    features = features.to(weight.dtype)
    asked = LinearLogits(features, weight, bias, len(weight)).logits_at(places.rows)
    asked = asked.to(torch.promote_types(asked.dtype, torch.float32))
    others = places.known & ~places.inside
    outside = log_sum(torch.where(others, asked, -torch.inf))
    if not has_every_row(head):
        assert p_general is not None, "it says how classes share a row"
        alone = torch.cat([classes, kept_classes(head, indices.device)])
        share = listed_share(p_general, alone, indices, places.known)
        rest = (features @ weight[-1] + bias[-1]).double() + share.log()
        outside = log_sum(torch.stack([outside.double(), rest], 1)).to(asked.dtype)
    own = torch.where(places.inside, asked, -torch.inf)
    return torch.cat([own, outside[:, None]], 1)


def has_every_row(head: nn.Module) -> bool:
    """Whether each class has a row. Otherwise the last row stands for all that have none."""
    return isinstance(head, DustbinHead) and head.kept is None


def kept_classes(head: nn.Module, device: torch.device) -> Tensor:
    """int64: those outside S that have a row of their own, where not all have."""
    kept = head.kept if isinstance(head, DustbinHead) else None
    return torch.tensor(kept or [], dtype=torch.int64, device=device)


def rows_asked(head: nn.Module, shortlist: int) -> int:
    """Rows of a copy's head that are multiplied for one example."""
    rows = len(head.get_parameter("weight"))
    if shortlist * DENSE_FROM >= rows:
        return rows
    return shortlist if has_every_row(head) else shortlist + 1


def branch_on_shortlist(
    branch: Branch, at_cut: Tensor, general: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """A branch's logits on the shortlist, and which classes are its own, bool [n, k].

    at_cut: [n, ...].  general: [n, k], the generalist's logits at the shortlist, indices [n, k].
    """
    place, inside = places_in(branch.classes, indices)
    correction = branch.correct(at_cut)
    correction = torch.cat([correction.gather(1, place), correction[:, -1:]], 1)
    return corrected_on_shortlist(general, correction, inside), inside


def corrected_on_shortlist(general: Tensor, correction: Tensor, inside: Tensor) -> Tensor:
    """[..., k + 1], dustbin last, of the generalist's logits [..., k] and of r [..., k + 1].

    inside: bool [..., k], which classes are the branch's. r is of no meaning at others.
    """
    correction = correction.to(general.dtype)
    own = general + correction[..., :-1]
    outside = log_sum(torch.where(inside, -torch.inf, general)) + correction[..., -1]
    return torch.cat([torch.where(inside, own, -torch.inf), outside[..., None]], -1)
