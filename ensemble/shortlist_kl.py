"""Eq. 5 over a row's shortlist: the generalist's k likeliest classes, specialists asked within it.

    B   rows of the batch
    C   classes
    k   classes of a row's shortlist K
    M   specialists, S_m the classes of specialist m
    A   slots: specialists that one row asks, at most

Every distribution is conditioned on K: g restricted to K, p_m over K's classes of S_m and, as its
dustbin, K's other classes.  Eq. 5 joins these.  The shortlist keeps the mass that the generalist
gives it, and outside of it the generalist's answer stands.

Pure functions of tensors.  docs/combiner.md has the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from networks import top_k
from networks.full_precision import full_precision

from .combine import TOLERANCE
from .gating import rows_of_specialists
from .host_reads import Checks, is_queued, to_device
from .newton import Membership, solve
from .predictions import (
    GivenSpecialists,
    Groups,
    Probabilities,
    Weights,
    as_general,
    check_no_negative,
    check_sums,
    checked_active,
    checked_general,
    checked_weights,
    read_predictions,
)


@full_precision
def combine_kl_on_shortlist(
    p_general: Probabilities,
    p_special: GivenSpecialists,
    groups: Groups,
    shortlist: int,
    active: Tensor | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """combine_kl within each row's `shortlist` most probable classes of the generalist.

    Of a specialist's dustbin the shortlist has the share that the generalist gives it: among the
    classes outside S_m the specialist says nothing.  One that gives the whole shortlist nothing is
    not heard.

    Parameters
    ----------
    p_general, p_special, groups, active, weights
        As in `combine_kl`.
    shortlist : int
        k. All classes where there are no more, and then it is combine_kl.

    Returns
    -------
    Tensor [B, C]
        q in p_general's dtype, differentiable in probabilities and weights.  On the shortlist it
        sums to p_general's mass there, elsewhere it is p_general, and in rows without an active
        specialist everywhere.

    Raises
    ------
    ValueError
        As `combine_kl`, and for a shortlist below 1.

    Examples
    --------
    >>> import torch
    >>> from clustering import ClassGroups
    >>> groups = ClassGroups([[0, 3]], num_classes=4)
    >>> p_general = torch.tensor([[0.4, 0.2, 0.3, 0.1]])
    >>> special = torch.tensor([[0.3, 0.1, 0.6]])

    On the shortlist of 0 and 2 the generalist has 4/7 and 3/7, the specialist .3 and 3/5 of its
    dustbin's .6, that is 5/11 and 6/11:

    >>> combine_kl_on_shortlist(p_general, [special], groups, 2)
    tensor([[0.3591, 0.2000, 0.3409, 0.1000]])
    """
    check_shortlist(shortlist)
    p_general, groups = as_general(p_general, groups)
    g, dtype = checked_general(p_general, groups)
    active = checked_active(active, p_special, len(g), groups, g.device)
    weights = checked_weights(weights, len(groups.members), g.device)
    on, checks = active.cpu().numpy(), Checks(is_queued(g.device))
    check_sums(g.sum(1), dtype, lambda at: f"row {at[0]} of p_general", checks)
    predictions = read_predictions(p_special, groups, active, g.dtype, dtype, on, checks)
    _, indices = top_k(g.detach(), min(shortlist, groups.num_classes), ordered=False)
    slots = Slots.of(active)
    parts: list[Part] = []
    for m, rows in rows_of_specialists(on, g.device):
        (values,) = predictions.side_by_side((m,), rows)
        check_sums(values.sum(1), dtype, lambda at, m=m, rows=rows: _named(rows, m, at), checks)
        check_no_negative(values.amin(1), lambda at, m=m, rows=rows: _named(rows, m, at), checks)
        classes = to_device(groups.members[m], g.device)
        place, inside = places_in(classes, indices[rows])
        share = listed_share(g[rows], classes, indices[rows], inside)
        own = values.gather(1, place) * inside
        part = torch.cat([own, (values[:, -1] * share.to(values.dtype))[:, None]], 1)
        parts.append(Part(m, rows, part, inside))
    checks.settle()
    asked = Asked.of(g, indices, slots, active, parts)
    return asked.join(weights).to(dtype)


def _named(rows: Tensor, m: int, at: tuple[int, ...]) -> str:
    return f"row {int(rows[at[0]])} of p_special[{m}]"


class Slots(NamedTuple):
    """Each row's active specialists side by side.

    specialists: int64 [B, A].  on: bool [B, A]. A slot that is not on names any specialist.
    """

    specialists: Tensor
    on: Tensor

    @classmethod
    def of(cls, active: Tensor) -> Slots:
        """active: bool [B, M]."""
        most = int(active.sum(1).max()) if active.numel() else 0
        order = active.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        return cls(order, active.gather(1, order))


class Part(NamedTuple):
    """What specialist m says about the shortlists of some rows, not normalised.

    rows: int64 [n].  values: [n, k + 1], dustbin last, 0 at classes that are not its own.
    inside: bool [n, k], which of the shortlist are its own.
    """

    m: int
    rows: Tensor
    values: Tensor
    inside: Tensor


class Asked(NamedTuple):
    """Everybody's answers about a batch's shortlists.

    p_general: [B, C].  indices: int64 [B, k].  special: [B, A, k + 1], each slot's distribution on
    the shortlist, dustbin last.  inside: bool [B, A, k].  slots: whose they are. on: heard there.
    active: bool [B, M], the specialists that were run.
    """

    p_general: Tensor
    indices: Tensor
    special: Tensor
    inside: Tensor
    slots: Slots
    active: Tensor

    @classmethod
    def of(
        cls, p_general: Tensor, indices: Tensor, slots: Slots, active: Tensor, parts: list[Part]
    ) -> Asked:
        """The parts put into slots, and normalised there."""
        B, A = slots.specialists.shape
        k = indices.shape[1]
        special = p_general.new_zeros(B, A, k + 1)
        inside = torch.zeros(B, A, k, dtype=torch.bool, device=p_general.device)
        slot_of = active.int().cumsum(1) - 1
        for part in parts:
            at = part.rows, slot_of[part.rows, part.m].long()
            special = special.index_put(at, part.values.to(special.dtype))
            inside[at] = part.inside
        total = special.sum(2)
        heard = slots.on & (total > 0)
        special = special / torch.where(heard, total, 1.0)[..., None]
        return cls(p_general, indices, special, inside, slots._replace(on=heard), active)

    @full_precision
    def join(self, weights: Weights | None) -> Tensor:
        """q [B, C]. weights: [1 + M], the generalist's first."""
        if weights is None:
            weights = [1.0] * (1 + self.active.shape[1])
        w = checked_weights(weights, self.active.shape[1], self.p_general.device)
        assert w is not None
        in_slots = w[1:][self.slots.specialists] * self.slots.on
        if not bool((w[0] + in_slots.sum(1) > 0).all()):
            row = int((w[0] + in_slots.sum(1) <= 0).nonzero()[0, 0])
            raise ValueError(
                f"the generalist and all specialists active in row {row} have weight 0; "
                "give one of them some"
            )
        own = self.p_general.gather(1, self.indices)
        mass = own.sum(1, keepdim=True)
        tolerance = TOLERANCE[torch.promote_types(own.dtype, torch.float32)]
        q = join_on_atoms(own / mass, self.special, self.inside, w[0], in_slots, tolerance)
        q = torch.where((in_slots > 0).any(1, keepdim=True), q * mass, own)
        return self.p_general.scatter(1, self.indices, q)


@full_precision
def join_on_atoms(
    general: Tensor,
    special: Tensor,
    inside: Tensor,
    general_weight: Tensor | float,
    weights: Tensor,
    tolerance: float | None,
    portable: bool = False,
) -> Tensor:
    """Eq. 5 among the k classes of each row's shortlist.

    Parameters
    ----------
    general : Tensor [B, k]
        Sums to 1.
    special : Tensor [B, A, k + 1]
        Each slot's distribution, dustbin last, 0 at classes that are not its own.
    inside : bool Tensor [B, A, k]
        Which classes are a slot's own.
    general_weight : Tensor [] or float
    weights : Tensor float64 [B, A]
        0 where a slot is not heard.
    tolerance, portable
        As in newton.pattern_masses.

    Returns
    -------
    Tensor [B, k]
        q, which sums to 1. `general` where no slot is heard.
    """
    if special.shape[1] == 0:
        return general
    heard = weights > 0
    joined = (weights[..., None] * special[..., :-1]).sum(1) + general_weight * general.double()
    dustbins = weights * special[..., -1].double()
    # A slot that is not heard holds every class: nothing is outside of it.
    pattern, membership = _patterns(inside | ~heard[..., None])
    masses = joined.new_zeros(membership.counts.shape).scatter_add(1, pattern, joined)
    scaling = solve(masses, dustbins, membership, tolerance, portable)
    q = joined * scaling.factor.gather(1, pattern) + scaling.even.gather(1, pattern)
    return torch.where(heard.any(1, keepdim=True), q.to(general.dtype), general)


def _patterns(inside: Tensor) -> tuple[Tensor, Membership]:
    """(the pattern of each class int64 [B, k], which patterns lie outside which slots).

    A pattern is a set of slots, or, where there are more sets than classes, a class by itself.
    """
    B, A, k = inside.shape
    number = torch.arange(2**A if 2**A < k else k, device=inside.device)
    if 2**A < k:
        powers = 2 ** torch.arange(A, device=inside.device)
        pattern = (inside.long() * powers[:, None]).sum(1)
        outside = 1.0 - (number[:, None] // powers % 2).double()
        ones = torch.ones_like(pattern, dtype=torch.float64)
        counts = ones.new_zeros(B, 2**A).scatter_add(1, pattern, ones)
        # A pattern that no class of the row has can take no mass of a dustbin.
        outside = outside * (counts > 0)[..., None]
    else:
        pattern = number.expand(B, k)
        outside = (~inside).mT.double()
        counts = torch.ones_like(pattern, dtype=torch.float64)
    return pattern, Membership(outside, counts)


def places_in(classes: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(how many of `classes` are below each index, at most the last, whether it is one of them).

    classes: int64 [|S|], ascending.  indices: int64 [n, k].  Returns int64 and bool [n, k].
    """
    place = torch.searchsorted(classes, indices.contiguous())
    clamped = place.clamp(max=len(classes) - 1)
    return clamped, classes[clamped] == indices


def listed_share(p: Tensor, classes: Tensor, indices: Tensor, inside: Tensor) -> Tensor:
    """The listed share of the generalist's mass outside `classes`, float64 [n].

    p: [n, C].  classes: int64 [|S|].  indices: int64, inside: bool [n, k].  Where the generalist
    gives the others nothing: 1 if the shortlist has any of them, else 0.
    """
    listed = (p.gather(1, indices) * ~inside).sum(1, dtype=torch.float64)
    others = torch.ones(p.shape[1], dtype=torch.bool, device=p.device)
    others[classes] = False
    everywhere = (p * others).sum(1, dtype=torch.float64)
    some = (~inside).any(1).double()
    return torch.where(everywhere > 0, listed / torch.where(everywhere > 0, everywhere, 1.0), some)


def log_sum(z: Tensor) -> Tensor:
    """logsumexp over the last axis, -inf of nothing, in operations that runtimes agree about."""
    largest = z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)
    return (z - largest).exp().sum(-1).log() + largest[..., 0]


def check_shortlist(shortlist: int) -> None:
    if shortlist < 1:
        raise ValueError(f"shortlist = {shortlist}; at least 1 class has to be on it")
