"""Eq. 5 of Hinton, Vinyals and Dean 2015, solved exactly: the passes over B x C.  newton.py has the mathematics.

Legend: B rows, C classes, M specialists; in a block n rows, k active specialists, U classes in any of them, P patterns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .newton import factors, pattern_masses
from .patterns import PaddedIndex, SharedIndex, set_patterns
from .predictions import (
    SpecialistPredictions,
    active_sets,
    check_no_negative,
    check_sums,
    checked_active,
    checked_general,
    checked_weights,
    read_predictions,
)

METHODS = ("newton", "newton-fixed")
FIXED_STEPS = 16
# How far the optimum's conditions may be off, as masses (newton.py).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-9}
# Rows that are read twice, or written twice, before the next ones push them out of the cache.
ROWS_IN_CACHE = 32
# A set that so many rows share gets index tensors of its own; rows with rarer sets are padded to each other.
ROWS_TO_SHARE = 32


def combine_kl(
    p_general: Tensor, p_special, groups, active=None, weights=None, method: str = "newton"
) -> Tensor:
    """Distribution q minimising w_0 KL(p_g, q) + sum over active m of w_m KL(p_m, q).  Hinton et al. 2015, eq. 5.

    In KL(p_m, q) the mass that q has outside S_m is compared with p_m's dustbin.
    p_general: [B, C], rows sum to 1.  groups: ClassGroups.
    p_special[m]: [B, |S_m| + 1], column j is class groups.members[m][j], the dustbin last; or (rows, [len(rows), |S_m|
    + 1]); or None where no row is active.  With S_m = every class the dustbin is dropped and the rest renormalised.
    active: [B, M] bool, None is all.  A specialist's rows that are not active are never read.
    weights: [1 + M], the generalist's first; None is all 1.
    method: "newton", or "newton-fixed": FIXED_STEPS steps without a line search, the same for every input.
    Returns q [B, C] in p_general's dtype, differentiable in probabilities and weights; where nothing is active q is
    p_general.
    Dustbin mass where nobody else leaves any outside S_m is spread evenly over the classes outside.
    Raises ValueError for shapes that disagree, rows that do not sum to 1 (opinions.SUM_TOLERANCE), NaN in rows that are
    read, an empty group, an unknown method.  Negative entries are looked for in the specialists' rows and the
    generalist's sums.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r} is unknown; it must be one of {', '.join(METHODS)}")
    g, dtype = checked_general(p_general, groups)
    active = checked_active(active, p_special, len(g), groups, g.device)
    weights = checked_weights(weights, len(groups.members), g.device)
    opinions = read_predictions(p_special, groups, active, g.dtype, dtype)
    steps = FIXED_STEPS if method == "newton-fixed" else None
    return combined(Job(groups, weights, opinions, dtype, steps), g, active).to(dtype)


@dataclass
class Job:
    """What all blocks have in common.

    dtype: that the caller's probabilities had; it decides how far a sum may be off.  steps: of "newton-fixed", else
    None.
    columns: where a generalist's row does not hold the C classes in order: (classes [n, U], rows) -> their columns in
    it.
    stands_for: [B, columns], how many classes a column is the sum of; None is one.
    """

    groups: object
    weights: Tensor | None
    opinions: SpecialistPredictions
    dtype: torch.dtype
    steps: int | None = None
    columns: Callable[[Tensor, Tensor], Tensor] | None = None
    stands_for: Tensor | None = None


def combined(job: Job, g: Tensor, active: Tensor) -> Tensor:
    """q of every row, block by block."""
    blocks, order = _blocks(*active_sets(active))
    if not blocks:
        return g.clone()
    if order is None:
        return _combined(job, g, blocks[0], ours=False)
    order = torch.from_numpy(order).to(g.device)
    pieces = g.index_select(0, order).split([len(block.rows) for block in blocks])
    done = [
        _combined(job, piece, block, ours=True) for piece, block in zip(pieces, blocks, strict=True)
    ]
    return torch.cat(done).index_select(0, torch.argsort(order))


@dataclass
class Block:
    """Rows that are solved together: k specialists are active in each; one set for all, or a set per row."""

    rows: np.ndarray
    sets: list[tuple[int, ...]]
    which: np.ndarray | None  # int64 [n]: index into sets; None: all rows have sets[0]


def _blocks(
    sets: list[tuple[int, ...]], which: np.ndarray
) -> tuple[list[Block], np.ndarray | None]:
    """The blocks, and the order of rows that makes each contiguous (None: there is one block, and the order is what it
    was)."""
    if len(sets) <= 1:
        return [Block(np.arange(len(which)), sets, None)] if sets else [], None
    # Of each block, its sets: a frequent one is alone, rare ones are together with others of their size.
    members: dict = {}
    rows_of_set = np.bincount(which, minlength=len(sets))
    for number, chosen in enumerate(sets):
        shared = rows_of_set[number] >= ROWS_TO_SHARE or not chosen
        members.setdefault(chosen if shared else len(chosen), []).append(number)
    block_of_set, place_in_block = (
        np.empty(len(sets), dtype=np.int64),
        np.empty(len(sets), dtype=np.int64),
    )
    for block, numbers in enumerate(members.values()):
        block_of_set[numbers], place_in_block[numbers] = block, np.arange(len(numbers))
    order = np.argsort(block_of_set[which], kind="stable")
    lengths = np.bincount(block_of_set[which], minlength=len(members))
    blocks, start = [], 0
    for numbers, length in zip(members.values(), lengths, strict=True):
        rows = order[start : start + length]
        start += length
        which_of = place_in_block[which[rows]] if len(numbers) > 1 else None
        blocks.append(Block(rows, [sets[number] for number in numbers], which_of))
    return blocks, order if len(blocks) > 1 else None


def _combined(job: Job, g: Tensor, block: Block, ours: bool) -> Tensor:
    """q [n, C] of one block whose generalist rows are g [n, C].  ours: g is a copy that may be overwritten."""
    n, device = len(g), g.device
    learning = (
        g.requires_grad
        or job.opinions.requires_grad
        or (job.weights is not None and job.weights.requires_grad)
    )
    differentiable = torch.is_grad_enabled() and learning

    def named(position) -> str:
        return f"row {block.rows[position[0]]} of p_general"

    if not block.sets[0]:
        check_sums(g.sum(1), job.dtype, named)
        return g if ours else g.clone()
    rows = torch.from_numpy(block.rows).to(device) if ours else None
    if block.which is None:
        index = set_patterns(job.groups, block.sets[0]).on(device, g.dtype, job.groups.num_classes)
        slots = torch.tensor(block.sets, device=device).expand(n, -1)
        parts = job.opinions.side_by_side(block.sets[0], rows)
        said = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        same_width = len(set(index.widths)) == 1
        sums = (
            said.unflatten(1, (len(parts), -1)).sum(2)
            if same_width
            else torch.stack([x.sum(1) for x in parts], 1)
        )
        dustbin = said.index_select(1, index.dustbins).double()
        lowest = said.amin(1, keepdim=True)  # one for all of a row's opinions
    else:
        which = torch.from_numpy(block.which).to(device)
        index = PaddedIndex(
            [set_patterns(job.groups, s) for s in block.sets], which, device, job.opinions.width
        )
        slots = torch.tensor(block.sets, device=device).index_select(0, which)
        said = job.opinions.padded(slots, rows)
        sizes = torch.tensor([len(members) for members in job.groups.members], device=device)
        dustbin = said.gather(2, sizes[slots][..., None])[..., 0].double()
        sums, lowest = said.sum(2), said.amin(2)
        said = said.flatten(1)

    def specialist_named(position) -> str:
        return f"row {block.rows[position[0]]} of p_special[{int(slots[position])}]"

    check_sums(sums, job.dtype, specialist_named)
    check_no_negative(lowest, lambda position: f"row {block.rows[position[0]]} of p_special")
    w_general = 1.0
    if job.weights is not None:
        w_general, w_special = job.weights[0], job.weights[1:][slots]
        _check_some_weight(w_general + w_special.sum(1), block)
        dustbin = dustbin * w_special
        said = said * _per_column(w_special.to(said.dtype), index, job.opinions.width)

    # a [n, U]: what generalist and specialists say together, on the union of the active groups.
    # Its columns are unique in a row, but for padding, which names a column of the row again and must add nothing
    # there.
    columns = index.classes.expand(n, -1)
    if job.columns is not None:
        columns = job.columns(columns, slice(None) if rows is None else rows)
    one_sweep = isinstance(index, SharedIndex) and job.columns is None
    if one_sweep and not differentiable:
        outside, on_union = _read(g, index)
    else:
        on_union = g.gather(1, columns)
    a = said.gather(1, index.source.expand(n, -1))
    a = (
        a + w_general * on_union
        if differentiable
        else a.add_(on_union if job.weights is None else w_general * on_union)
    )
    if index.more_at.shape[1]:
        more = said.gather(1, index.more_source.expand(n, -1))
        more = more if isinstance(index, SharedIndex) else more * index.more_real
        a = a.scatter_add_(1, index.more_at.expand(n, -1), more)
    # The generalist's mass outside is summed as such: one minus the rest would be noise where it is sure of a class
    # inside.
    inside = index.pattern_sums(a)
    if isinstance(index, PaddedIndex):
        on_union = on_union * index.real
    if one_sweep:
        rest, outside = g, g @ index.outside_all if differentiable else outside
    else:
        nothing = torch.zeros((), dtype=g.dtype, device=device).expand(columns.shape)
        rest = (
            g.scatter_(1, columns, nothing)
            if ours and not differentiable
            else g.scatter(1, columns, nothing)
        )
        ours, outside = True, rest.sum(1)
    general = outside + on_union.sum(1)
    A = torch.cat([(outside.double() * w_general)[:, None], inside.double()], 1)
    check_sums(general, job.dtype, named)
    check_no_negative(A, named)

    # Divided by the mass that is really there, and not by the sum of the weights, q sums to one whatever the rows sum
    # to.
    mass = A.sum(1, keepdim=True) + dustbin.sum(1, keepdim=True)
    Y = pattern_masses(A / mass, dustbin / mass, index.members, TOLERANCE[g.dtype], job.steps)
    factor, even = factors(A / mass, Y, index.members)
    factor = factor / mass
    on_rest = (factor[:, :1] * w_general).to(g.dtype)
    factor_of = (
        torch.cat([factor, factor.new_zeros(n, 1)], 1)
        .to(g.dtype)
        .gather(1, index.pattern.expand(n, -1))
    )
    if differentiable:
        rest, a = rest * on_rest, a * factor_of
        q = rest.scatter(1, columns, a) if one_sweep else rest.scatter_add(1, columns, a)
    elif one_sweep:
        q = _written(
            rest, on_rest, a.mul_(factor_of), index, rest if ours else torch.empty_like(rest)
        )
    else:
        rest, a = rest.mul_(on_rest) if ours else rest * on_rest, a.mul_(factor_of)
        q = rest.scatter_add_(1, columns, a)
    if not bool((even > 0).any()):
        return q
    stands_for = (
        None if job.stands_for is None else job.stands_for[slice(None) if rows is None else rows]
    )
    return _spread(q, even.to(q.dtype), index, columns, stands_for)


def _read(g: Tensor, index: SharedIndex) -> tuple[Tensor, Tensor]:
    """The generalist's mass outside the union [n], and its probabilities in it [n, U], while a few rows are in the
    cache."""
    outside, on_union = g.new_empty(len(g)), g.new_empty(len(g), index.classes.shape[1])
    for rows, left, there in zip(
        *(x.split(ROWS_IN_CACHE) for x in (g, outside, on_union)), strict=True
    ):
        torch.mv(rows, index.outside_all, out=left)
        torch.gather(rows, 1, index.classes.expand(len(rows), -1), out=there)
    return outside, on_union


def _written(g: Tensor, factor: Tensor, on_union: Tensor, index: SharedIndex, q: Tensor) -> Tensor:
    """q = g times factor [n, 1], but for the union, where it is on_union; likewise."""
    parts = zip(*(x.split(ROWS_IN_CACHE) for x in (g, factor, on_union, q)), strict=True)
    for rows, by, there, to in parts:
        torch.mul(rows, by, out=to)
        to.scatter_(1, index.classes.expand(len(rows), -1), there)
    return q


def _per_column(w_special: Tensor, index, width: int) -> Tensor:
    """Each active specialist's weight [n, k], at every column of its opinion."""
    if isinstance(index, SharedIndex):
        return w_special[:1].repeat_interleave(
            torch.tensor(index.widths, device=w_special.device), dim=1
        )
    return w_special.repeat_interleave(width, dim=1)


def _check_some_weight(total: Tensor, block: Block) -> None:
    if bool((total <= 0).any()):
        row = int(block.rows[int((total <= 0).nonzero()[0, 0])])
        raise ValueError(
            f"the generalist and all specialists active in row {row} have weight 0; give one of them some"
        )


def _spread(q: Tensor, even: Tensor, index, columns: Tensor, stands_for: Tensor | None) -> Tensor:
    """q and, for every class, what its pattern's classes get beside: even [n, P]."""
    on_union = torch.cat([even, even.new_zeros(len(q), 1)], 1).gather(
        1, index.pattern.expand(len(q), -1)
    )
    fill = even[:, :1] * (torch.ones_like(q) if stands_for is None else stands_for)
    return q + fill.scatter(1, columns, 0.0).scatter_add(1, columns, on_union)
