"""Eq. 5 of Hinton, Vinyals and Dean 2015, solved exactly.  The derivation is in newton.py and docs/combining.md.

Legend: B rows, C classes, M specialists; in a block n rows, k active specialists, U classes in any of them, P patterns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .newton import EMPTY, pattern_masses
from .opinions import (
    Opinions,
    active_sets,
    check_no_negative,
    check_sums,
    checked_active,
    checked_general,
    checked_weights,
    read_opinions,
)
from .patterns import PaddedIndex, SharedIndex, set_patterns

METHODS = ("newton", "newton-fixed")
FIXED_STEPS = 16
# Of the optimum's conditions, as masses (newton.py).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-9}
# A factor beyond this would lift what is next to nothing: the pattern counts as one without mass.
LARGEST = {torch.float64: 1e190, torch.float32: 1e37}
# A set that so many rows share gets index tensors of its own; rows with rarer sets are padded to each other.
ROWS_TO_SHARE = 32


def combine_kl(p_general: Tensor, p_special, groups, active=None, weights=None, method: str = "newton") -> Tensor:
    """Distribution q minimising w_0 KL(p_g, q) + sum over active m of w_m KL(p_m, q).  Hinton et al. 2015, eq. 5.

    p_general: [B, C], rows sum to 1.  groups: ClassGroups.  p_special[m]: [B, |S_m| + 1], column j is class groups.members[m][j], the
    dustbin last; or (rows, [len(rows), |S_m| + 1]); or None where no row is active.  q's mass outside S_m is compared with m's dustbin.
    active: [B, M] bool, None is all; a specialist's rows that are not active are never read.  weights: [1 + M], None is all 1.
    method: "newton", or "newton-fixed": a fixed number of steps without a line search, for export; exact on all but conflicting inputs.
    Returns q [B, C] in p_general's dtype, differentiable in the probabilities; where nothing is active q is p_general.
    With S_m = every class the dustbin is dropped and the rest renormalised.  Dustbin mass where nobody else leaves any outside S_m is
    spread evenly over the classes outside.
    Raises ValueError for shapes that disagree, rows that do not sum to 1 (SUM_TOLERANCE), NaN in rows that are read, an empty group, an
    unknown method.  Negative entries are looked for in the specialists' rows and in sums over the generalist's.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r} is unknown; it must be one of {', '.join(METHODS)}")
    g, dtype = checked_general(p_general, groups)
    active = checked_active(active, p_special, len(g), groups, g.device)
    weights = checked_weights(weights, len(groups.members), g.device)
    opinions = read_opinions(p_special, groups, active, g.dtype)
    differentiable = torch.is_grad_enabled() and (g.requires_grad or opinions.table.requires_grad)
    job = Job(g, groups, active, weights, opinions, dtype, FIXED_STEPS if method == "newton-fixed" else None, differentiable)
    sets, which = active_sets(active)
    blocks, order = _blocks(sets, which)
    if order is None:
        q = _combined(job, g, blocks[0], None) if blocks else g.clone()
        return q.to(dtype)
    order = torch.from_numpy(order).to(g.device)
    sorted_g = g[order]
    lengths = [len(block.rows) for block in blocks]
    pieces = [_combined(job, piece, block, order) for piece, block in zip(sorted_g.split(lengths), blocks, strict=True)]
    if differentiable:
        sorted_g = torch.cat(pieces)
    return sorted_g[torch.argsort(order)].to(dtype)


@dataclass
class Job:
    g: Tensor
    groups: object
    active: Tensor
    weights: Tensor | None
    opinions: Opinions
    dtype: torch.dtype  # that the caller's probabilities had: it decides how far a sum may be off
    steps: int | None
    differentiable: bool


@dataclass
class Block:
    """Rows that are solved together: k specialists are active in each; one set for all, or a set per row."""

    rows: np.ndarray
    sets: list[tuple[int, ...]]
    which: np.ndarray | None  # int64 [n]: index into sets; None: all rows have sets[0]


def _blocks(sets: list[tuple[int, ...]], which: np.ndarray) -> tuple[list[Block], np.ndarray | None]:
    """The blocks, and the order of rows that makes each contiguous (None: the order they have)."""
    if len(sets) <= 1:
        return [Block(np.arange(len(which)), sets, None)] if sets else [], None
    order = np.argsort(which, kind="stable")
    per_set = np.split(order, np.cumsum(np.bincount(which, minlength=len(sets)))[:-1])
    blocks, rare = [], {}
    for chosen, rows in zip(sets, per_set, strict=True):
        if len(rows) >= ROWS_TO_SHARE or not chosen:
            blocks.append(Block(rows, [chosen], None))
        else:
            rare.setdefault(len(chosen), []).append((chosen, rows))
    for found in rare.values():
        rows = [rows for _, rows in found]
        which_of = np.repeat(np.arange(len(found)), [len(r) for r in rows])
        blocks.append(Block(np.concatenate(rows), [chosen for chosen, _ in found], which_of))
    return blocks, np.concatenate([block.rows for block in blocks])


def _combined(job: Job, g: Tensor, block: Block, order: Tensor | None) -> Tensor:
    """q [n, C] of one block whose generalist rows are g [n, C]; without gradients g is overwritten if the rows were reordered."""
    n, device = len(g), g.device

    def named(position) -> str:
        return f"row {block.rows[position[0]]} of p_general"

    if not block.sets[0]:
        check_sums(g.sum(1), job.dtype, named)
        return g.clone() if order is None else g
    if block.which is None:
        index = set_patterns(job.groups, block.sets[0]).on(device, g.dtype, job.opinions.width, job.groups.num_classes)
        slots = torch.tensor(block.sets[0], device=device).expand(n, -1)
    else:
        which = torch.from_numpy(block.which).to(device)
        index = PaddedIndex([set_patterns(job.groups, s) for s in block.sets], which, device, job.opinions.width)
        slots = torch.tensor(block.sets, device=device)[which]
    own = order is not None  # the rows are a copy of ours
    rows = slice(None) if order is None else torch.from_numpy(block.rows).to(device)
    said = job.opinions.table[job.opinions.where[rows].gather(1, slots)]  # [n, k, W]
    sizes = torch.tensor([len(members) for members in job.groups.members], device=device)[slots]
    dustbin = said.gather(2, sizes[..., None])[..., 0].double()
    _check_said(said, job, block, slots)
    if bool((sizes == job.groups.num_classes).any()):
        said, dustbin = _without_dustbin(said, dustbin, sizes == job.groups.num_classes)
    w_general, w_special, total = 1.0, None, 1.0 + slots.shape[1]
    if job.weights is not None:
        w_general, w_special = job.weights[0], job.weights[1:][slots]
        total = (w_general + w_special.sum(1))[:, None]
        if bool((total <= 0).any()):
            row = int(block.rows[int((total <= 0).nonzero()[0, 0])])
            raise ValueError(f"the weights of the generalist and of row {row}'s active specialists are all 0; give one of them weight")
        said, dustbin = said * w_special[..., None].to(said.dtype), dustbin * w_special
    said = said.flatten(1)

    # a [n, U] on the union of the active groups; outside of it a is g times its weight.
    classes = index.classes.expand(n, -1)
    g_union = g.gather(1, classes)
    a = g_union if job.weights is None else g_union * w_general.to(g.dtype)
    a = a + said.gather(1, index.source.expand(n, -1))
    if index.more_at.shape[1]:
        more = said.gather(1, index.more_source.expand(n, -1))
        if index.more_weight is not None:
            more = more * index.more_weight
        a = a.scatter_add(1, index.more_at.expand(n, -1), more)
    if isinstance(index, SharedIndex):
        # Summed as such: one minus the rest would be noise where the generalist is sure of a class inside.
        outside, rest = g @ index.outside_all, g
        inside = torch.stack([part.sum(1) for part in a.split(index.sizes, 1)], 1)
    else:
        zeros = torch.zeros((), dtype=g.dtype, device=device).expand(classes.shape)
        rest = g.scatter(1, classes, zeros) if job.differentiable or not own else g.scatter_(1, classes, zeros)
        outside = rest.sum(1)
        inside = a.new_zeros(n, index.num_patterns + 1).scatter_add(1, index.pattern.expand(n, -1), a)[:, 1 : index.num_patterns]
    A = torch.cat([(outside.double() * w_general)[:, None], inside.double()], 1)
    general = outside + g_union.sum(1) if isinstance(index, SharedIndex) else outside + _without_padding(g_union, index).sum(1)
    check_sums(general, job.dtype, named)
    check_no_negative(A, named)
    # Dividing by the mass that is really there, and not by the weights' sum, makes q sum to one whatever the rows sum to.
    mass = A.sum(1, keepdim=True) + dustbin.sum(1, keepdim=True)
    Y = pattern_masses(A / mass, dustbin / mass, index.members, TOLERANCE[g.dtype], job.steps)
    factor = Y / A.clamp(min=EMPTY)
    starved = factor.detach() > LARGEST[g.dtype]
    factor = torch.where(starved, 0.0, factor) if bool(starved.any()) else factor
    on_union = torch.cat([factor, factor.new_zeros(n, 1)], 1).to(g.dtype).gather(1, index.pattern.expand(n, -1))
    on_general = (factor[:, :1] * w_general).to(g.dtype)
    q = rest * on_general if job.differentiable or not (own or rest is not g) else rest.mul_(on_general)
    if isinstance(index, SharedIndex):
        q = q.scatter(1, classes, a * on_union) if job.differentiable else q.scatter_(1, classes, a.mul_(on_union))
    else:
        q = q.scatter_add(1, classes, a * on_union) if job.differentiable else q.scatter_add_(1, classes, a.mul_(on_union))
    return _spread(q, Y, starved, index, classes) if bool(starved.any()) else q


def _without_padding(g_union: Tensor, index: PaddedIndex) -> Tensor:
    return g_union * (index.pattern < index.num_patterns)


def _check_said(said: Tensor, job: Job, block: Block, slots: Tensor) -> None:
    def named(position) -> str:
        return f"row {block.rows[position[0]]} of p_special[{int(slots[position[0], position[1]])}]"

    check_sums(said.sum(2), job.dtype, named)
    check_no_negative(said.amin(2), named)


def _without_dustbin(said: Tensor, dustbin: Tensor, complete: Tensor) -> tuple[Tensor, Tensor]:
    """For the specialists of every class (complete [n, k]): the dustbin dropped, the rest renormalised; uniform where nothing is left."""
    classes = said.shape[2] - 1  # a complete group is the widest
    kept = said[..., :-1] + torch.finfo(said.dtype).tiny
    kept = kept / kept.sum(2, keepdim=True)
    said = torch.where(complete[..., None], torch.nn.functional.pad(kept, (0, 1)), said)
    assert classes == kept.shape[2]
    return said, torch.where(complete, 0.0, dustbin)


def _spread(q: Tensor, Y: Tensor, starved: Tensor, index, classes: Tensor) -> Tensor:
    """Where nobody left a pattern any mass but a dustbin needs it, spread it evenly over the pattern's classes."""
    n = len(q)
    even = torch.where(starved, Y / index.members.counts.clamp(min=1), 0.0)
    even = torch.cat([even, even.new_zeros(n, 1)], 1).to(q.dtype)
    fill = even[:, :1].expand_as(q).scatter(1, classes, even.gather(1, index.pattern.expand(n, -1)))
    return q + fill
