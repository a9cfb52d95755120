"""Eq. 5 of Hinton, Vinyals and Dean 2015, solved exactly: read, solve, write.

The passes over B x C are here.  newton.py has the mathematics of the solution, and patterns.py the
index tensors that lead from classes to the few unknowns and back.

Legend: B rows, C classes, M specialists.  In a block n rows, k active specialists, U classes in any
of them (their union), P patterns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from clustering.groups import ClassGroups
from networks.full_precision import full_precision

from .host_reads import (
    AT_ONCE,
    Asking,
    Checks,
    answered,
    answered_together,
    is_queued,
    to_device,
)
from .newton import Membership, Scaling, solve, solving
from .patterns import PaddedIndex, PatternIndex, SharedIndex, set_patterns
from .predictions import (
    GivenSpecialists,
    Groups,
    Naming,
    Probabilities,
    SpecialistPredictions,
    Weights,
    active_sets,
    as_general,
    check_no_negative,
    check_sums,
    checked_active,
    checked_general,
    checked_weights,
    read_predictions,
    without_dustbin,
)

METHODS = ("newton", "newton-fixed")
# How far the optimum's conditions may be off, as masses (newton.py).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-9}
# Rows that are read twice, or written twice, before the next ones push them out of the cache.
ROWS_IN_CACHE = 32
# A set that so many rows share gets index tensors of its own. Rows with rarer sets are padded.
ROWS_TO_SHARE = 32
# Numbers of float64 that the rows which are solved together may take: 256 MiB.
FLOATS_AT_ONCE = 2**25
# The same on a device with a queue, and all that it works on between two looks: 2 GiB.
FLOATS_OF_A_DEVICE = 2**28


@full_precision
def combine_kl(
    p_general: Probabilities,
    p_special: GivenSpecialists,
    groups: Groups,
    active: Tensor | None = None,
    weights: Weights | None = None,
    method: str = "newton",
) -> Tensor:
    """Distribution q minimising w_0 KL(p_g, q) + sum over active m of w_m KL(p_m, q).

    In KL(p_m, q) the mass that q has outside S_m is compared with p_m's dustbin.

    Parameters
    ----------
    p_general : Tensor, array or lists [B, C]
        The generalist's probabilities.  Each row sums to 1.
    p_special : sequence of M entries
        Entry m is [B, |S_m| + 1].  Column j is class `groups.members[m][j]`. The dustbin is last.
        Or `(rows, [len(rows), |S_m| + 1])`, or None where no row is active for m.
        With S_m = every class the dustbin is dropped and the rest renormalised.
    groups : ClassGroups, or lists of class indices
        The classes of each specialist.
    active : bool Tensor [B, M], optional
        Which specialists count in which row.  None is all.  A specialist's rows that are not active
        are never read.
    weights : [1 + M], optional
        w, the generalist's first.  None means all ones.
    method : str
        "newton", or "newton-fixed", which takes a fixed number of steps without a line search:
        the same operations for every input.

    Returns
    -------
    Tensor [B, C]
        q in p_general's dtype, differentiable in probabilities and weights.  A row without an
        active specialist is p_general's.  Dustbin mass where nobody else leaves any outside S_m is
        spread evenly over the classes outside.

    Raises
    ------
    ValueError
        For shapes that disagree, rows that do not sum to 1 (within `predictions.SUM_TOLERANCE`),
        NaN in rows that are read, an empty group and an unknown method.  Negative entries are
        looked for in the specialists' rows and the generalist's sums.

    References
    ----------
    Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural network", eq. 5.

    Examples
    --------
    >>> import torch
    >>> from clustering import ClassGroups
    >>> groups = ClassGroups([[0, 1]], num_classes=4)
    >>> p_general = torch.tensor([[0.4, 0.2, 0.3, 0.1]])
    >>> combine_kl(p_general, [torch.tensor([[0.5, 0.3, 0.2]])], groups)
    tensor([[0.4500, 0.2500, 0.2250, 0.0750]])
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r} is unknown; it must be one of {', '.join(METHODS)}")
    p_general, groups = as_general(p_general, groups)
    g, dtype = checked_general(p_general, groups)
    active = checked_active(active, p_special, len(g), groups, g.device)
    weights = checked_weights(weights, len(groups.members), g.device)
    on, checks = active.cpu().numpy(), Checks(is_queued(g.device))
    special = read_predictions(p_special, groups, active, g.dtype, dtype, on, checks)
    tolerance = TOLERANCE[g.dtype] if method == "newton" else None
    problem = Problem(groups, special, weights, dtype, tolerance, checks=checks)
    return combine_rows(problem, g, on).to(dtype)


class GeneralLayout(Protocol):
    """Where a generalist's rows do not hold the C classes in order."""

    def columns(self, classes: Tensor, rows: Tensor | None) -> Tensor:
        """The columns of `classes` [n, U] in `rows` (None: every row, in order)."""
        ...

    def classes_per_column(self, rows: Tensor | None) -> Tensor:
        """[n, columns], how many classes each column is the sum of."""
        ...


@dataclass
class Problem:
    """What all blocks have in common.

    dtype: that the caller's probabilities had. It decides how far a sum may be off.
    tolerance: None is a fixed number of steps (newton.py).
    checks: of everything that is read.
    """

    groups: ClassGroups
    special: SpecialistPredictions
    weights: Tensor | None
    dtype: torch.dtype
    tolerance: float | None
    layout: GeneralLayout | None = None
    checks: Checks = AT_ONCE

    def is_learning(self, g: Tensor) -> bool:
        """Whether somebody may ask for the gradient."""
        if not torch.is_grad_enabled():
            return False
        weights_learn = self.weights is not None and self.weights.requires_grad
        return g.requires_grad or self.special.requires_grad or weights_learn


def combine_rows(problem: Problem, g: Tensor, on: np.ndarray) -> Tensor:
    """q of every row.  on: bool [B, M], the specialists that are active, as the host has it."""
    blocks, order = _blocks(*active_sets(on))
    if not blocks:
        problem.checks.settle()
        return g.clone()
    if order is None:
        pieces, row_order = (g,), None
    else:
        row_order = to_device(order, g.device)
        pieces = g.index_select(0, row_order).split([len(block.rows) for block in blocks])
    parts = (
        part
        for piece, block in zip(pieces, blocks, strict=True)
        for part in _parts(problem.groups, piece, block, owned=order is not None)
    )
    combined = _combine_parts(problem, parts)
    q = torch.cat(combined) if len(combined) > 1 else combined[0]
    return q if row_order is None else q.index_select(0, torch.argsort(row_order))


# ---- blocks of rows


@dataclass
class Block:
    """Rows that are solved together.  As many specialists are active in each.

    rows: their numbers.  set_of_row: int64 [n], index into sets. None: all rows have sets[0].
    """

    rows: np.ndarray
    sets: list[tuple[int, ...]]
    set_of_row: np.ndarray | None

    def part(self, rows: slice) -> "Block":
        """Some of the rows, with the sets that they have."""
        if self.set_of_row is None:
            return Block(self.rows[rows], self.sets, None)
        used, own = np.unique(self.set_of_row[rows], return_inverse=True)
        return Block(self.rows[rows], [self.sets[index] for index in used], own.reshape(-1))


def _blocks(
    sets: list[tuple[int, ...]], set_of_row: np.ndarray
) -> tuple[list[Block], np.ndarray | None]:
    """The blocks, and the order of rows that makes each contiguous.

    The order is None where there is one block and its rows stay where they are.
    """
    if not sets:
        return [], None
    if len(sets) == 1:
        return [Block(np.arange(len(set_of_row)), sets, None)], None
    sets_of_block = _sets_of_blocks(sets, np.bincount(set_of_row, minlength=len(sets)))
    block_of_set = np.empty(len(sets), dtype=np.int64)
    index_in_block = np.empty(len(sets), dtype=np.int64)
    for block, indices in enumerate(sets_of_block):
        block_of_set[indices] = block
        index_in_block[indices] = np.arange(len(indices))
    block_of_row = block_of_set[set_of_row]
    order = np.argsort(block_of_row, kind="stable")
    ends = np.cumsum(np.bincount(block_of_row, minlength=len(sets_of_block)))
    blocks = []
    for indices, rows in zip(sets_of_block, np.split(order, ends[:-1]), strict=True):
        own = index_in_block[set_of_row[rows]] if len(indices) > 1 else None
        blocks.append(Block(rows, [sets[index] for index in indices], own))
    return blocks, order if len(blocks) > 1 else None


def _sets_of_blocks(sets: list[tuple[int, ...]], rows_of_set: np.ndarray) -> list[list[int]]:
    """The indices of each block's sets.

    A frequent set is alone. Rare ones are together with others of their size.
    """
    by_key: dict[tuple[int, ...] | int, list[int]] = {}
    for index, specialists in enumerate(sets):
        alone = rows_of_set[index] >= ROWS_TO_SHARE or not specialists
        by_key.setdefault(specialists if alone else len(specialists), []).append(index)
    return list(by_key.values())


@dataclass
class Part:
    """Rows of a block that are solved together, and their rows of the generalist, [n, C].

    owned: g is a copy that may be overwritten.  some_rows: g is not every row, in order.
    floats: numbers of float64 that they take, about.
    """

    g: Tensor
    block: Block
    owned: bool
    some_rows: bool
    floats: int


def _parts(groups: ClassGroups, g: Tensor, block: Block, owned: bool) -> Iterator[Part]:
    """The block in parts of as many rows as there is room for."""
    per_row = _floats_per_row(groups, block)
    room = FLOATS_OF_A_DEVICE if is_queued(g.device) else FLOATS_AT_ONCE
    count = max(1, room // max(1, per_row))
    if not per_row or count >= len(block.rows):
        yield Part(g, block, owned, owned, per_row * len(block.rows))
        return
    for first in range(0, len(block.rows), count):
        rows = slice(first, first + count)
        yield Part(g[rows], block.part(rows), owned, True, per_row * count)


def _floats_per_row(groups: ClassGroups, block: Block) -> int:
    specialists = len(block.sets[0])
    if not specialists:
        return 0
    patterns = max(len(set_patterns(groups, each).counts) for each in block.sets)
    return Membership.floats_per_row(patterns, specialists, is_shared=block.set_of_row is None)


def _combine_parts(problem: Problem, parts: Iterator[Part]) -> list[Tensor]:
    """q [n, C] of each part.  Those of a device go on side by side, and the host looks seldom."""
    if not problem.checks.is_deferred:
        # One after the other, while the sets of its rows are in their cache.
        return [answered(_combining(problem, part)) for part in parts]
    q: list[Tensor] = []
    together: list[Part] = []
    for part in parts:
        if together and sum(each.floats for each in [*together, part]) > FLOATS_OF_A_DEVICE:
            q += answered_together([_combining(problem, each) for each in together], problem.checks)
            together = []
        together.append(part)
    q += answered_together([_combining(problem, each) for each in together], problem.checks)
    problem.checks.settle()
    return q


def _combining(problem: Problem, part: Part) -> Asking[Tensor]:
    """q [n, C] of one part. Asks the host what depends on the numbers."""
    g, block = part.g, part.block
    if not block.sets[0]:
        check_sums(g.sum(1), problem.dtype, _row_naming(block), problem.checks)
        return g if part.owned else g.clone()
    rows = to_device(block.rows, g.device) if part.some_rows else None
    index = _index_of(problem, block, g)
    mode = Mode(
        owned=part.owned,
        learning=problem.is_learning(g),
        sweep=isinstance(index, SharedIndex) and problem.layout is None,
    )
    joined = _read(problem, g, block, rows, index, mode)
    if problem.checks.is_deferred and problem.tolerance is not None:
        scaling = yield from solving(
            joined.masses, joined.dustbins, index.membership, problem.tolerance
        )
    else:
        scaling = solve(joined.masses, joined.dustbins, index.membership, problem.tolerance)
    q = _write(joined, scaling, index, mode)
    if not (yield (scaling.even > 0).any()):
        return q
    classes_per_column = torch.ones_like(q)
    if problem.layout is not None:
        classes_per_column = problem.layout.classes_per_column(rows)
    return _spread(q, scaling, index, joined.columns, classes_per_column)


def _index_of(problem: Problem, block: Block, g: Tensor) -> PatternIndex:
    groups = problem.groups
    if block.set_of_row is None:
        return set_patterns(groups, block.sets[0]).on(g.device, g.dtype, groups.num_classes)
    sets = [set_patterns(groups, specialists) for specialists in block.sets]
    set_of_row = to_device(block.set_of_row, g.device)
    return PaddedIndex(sets, set_of_row, g.device, problem.special.width, groups)


@dataclass
class Mode:
    """How a block's [n, C] rows are read and written. The results are the same.

    owned: the generalist's rows are a copy that may be overwritten.
    learning: nothing may be overwritten that the gradient needs.
    sweep: the union's columns are the same in every row and ascend, so that a row is read and
    written in one go.
    """

    owned: bool
    learning: bool
    sweep: bool


# ---- read


class General(NamedTuple):
    """What the generalist predicts: on_union [n, U], and outside [n], the sum over all others.

    rest: [n, C], its rows.  Without a sweep the union's columns are 0.
    """

    on_union: Tensor
    outside: Tensor
    rest: Tensor


class Joined(NamedTuple):
    """What generalist and specialists predict together, weighted and added.

    columns: [n, U], where the union's classes are in a row of the generalist.  They are distinct,
        but for padding, which names a column of the row again and adds nothing there.
    on_union: [n, U], of each class.
    rest: [n, C], as in General, not weighted.  general_weight: of the generalist. None is 1.
    masses: A [n, P], summed over each pattern, float64.
    dustbins: d [n, k], float64.
    """

    columns: Tensor
    on_union: Tensor
    rest: Tensor
    general_weight: Tensor | float | None
    masses: Tensor
    dustbins: Tensor


def _read(
    problem: Problem,
    g: Tensor,
    block: Block,
    rows: Tensor | None,
    index: PatternIndex,
    mode: Mode,
) -> Joined:
    """Gather and check a block's predictions, weigh them and add them."""
    values, dustbins, sums, lowest = index.read(problem.special, rows)
    checks = problem.checks
    check_sums(sums, problem.dtype, _specialist_naming(block, index), checks)
    check_no_negative(lowest, lambda at: f"row {block.rows[at[0]]} of p_special", checks)
    general_weight = None
    if problem.weights is not None:
        general_weight = problem.weights[0]
        w_special = problem.weights[1:][index.slots.expand(len(g), -1)]
        _check_some_weight(general_weight + w_special.sum(1), block, checks)
        dustbins = dustbins * w_special
        if isinstance(index, SharedIndex):
            w_special = w_special[:1]  # the same in every row
        values = values * index.per_column(w_special.to(values.dtype))

    columns = index.classes.expand(len(g), -1)
    if problem.layout is not None:
        columns = problem.layout.columns(columns, rows)
    general = _read_general(g, columns, index, mode)
    joined = _join(general, general_weight, values, dustbins, columns, index)
    total = general.outside + index.without_padding(general.on_union).sum(1)
    check_sums(total, problem.dtype, _row_naming(block), checks)
    check_no_negative(joined.masses, _row_naming(block), checks)
    return joined


def _read_general(g: Tensor, columns: Tensor, index: PatternIndex, mode: Mode) -> General:
    # The generalist's mass outside is summed as such: one minus the rest would be noise where it is
    # sure of a class inside.
    if mode.sweep:
        assert isinstance(index, SharedIndex)
        if not mode.learning:
            return _sweep_read(g, index)
        # As a matrix: onnxruntime multiplies no rows by a matrix, but not by a vector.
        return General(g.gather(1, columns), (g @ index.outside_all[:, None])[:, 0], g)
    on_union = g.gather(1, columns)
    zeros = g.new_zeros(()).expand(columns.shape)
    if mode.owned and not mode.learning:
        rest = g.scatter_(1, columns, zeros)
    else:
        rest = g.scatter(1, columns, zeros)
    return General(on_union, rest.sum(1), rest)


def _rows_swept(device: torch.device) -> int:
    """Rows that are read twice, or written twice, together: a GPU's cache needs no help."""
    return 2**31 if is_queued(device) else ROWS_IN_CACHE


def _sweep_read(g: Tensor, index: SharedIndex) -> General:
    """Read twice while a few rows are in the cache."""
    on_union = g.new_empty(len(g), index.classes.shape[1])
    outside = g.new_empty(len(g))
    count = _rows_swept(g.device)
    parts = zip(*(x.split(count) for x in (g, outside, on_union)), strict=True)
    for rows, rows_outside, rows_on_union in parts:
        torch.mv(rows, index.outside_all, out=rows_outside)
        torch.gather(rows, 1, index.classes.expand(len(rows), -1), out=rows_on_union)
    return General(on_union, outside, g)


def _join(
    general: General,
    general_weight: Tensor | float | None,
    values: Tensor,
    dustbins: Tensor,
    columns: Tensor,
    index: PatternIndex,
) -> Joined:
    """Add the generalist's predictions and the specialists', values [n, L] that are weighted."""
    first = index.first(values)
    weighted = general.on_union if general_weight is None else general_weight * general.on_union
    on_union = index.add_further(first.add_(weighted), values)
    inside = index.pattern_sums(on_union)
    outside = general.outside.double()
    if general_weight is not None:
        outside = outside * general_weight
    masses = torch.cat([outside[:, None], inside.double()], 1)
    return Joined(columns, on_union, general.rest, general_weight, masses, dustbins)


def _check_some_weight(total: Tensor, block: Block, checks: Checks) -> None:
    nothing = total <= 0

    def error() -> ValueError:
        row = int(block.rows[int(nothing.nonzero()[0, 0])])
        return ValueError(
            f"the generalist and all specialists active in row {row} have weight 0; "
            "give one of them some"
        )

    checks.require_none(nothing, error)


def _row_naming(block: Block) -> Naming:
    return lambda position: f"row {block.rows[position[0]]} of p_general"


def _specialist_naming(block: Block, index: PatternIndex) -> Naming:
    def naming(position: tuple[int, ...]) -> str:
        specialist = int(index.slots.expand(len(block.rows), -1)[position])
        return f"row {block.rows[position[0]]} of p_special[{specialist}]"

    return naming


# ---- write


def _write(joined: Joined, scaling: Scaling, index: PatternIndex, mode: Mode) -> Tensor:
    """q [n, C]: what was joined, each pattern multiplied by its factor."""
    columns, on_union, rest = joined.columns, joined.on_union, joined.rest
    factor = scaling.factor
    on_rest = factor[:, :1]
    if joined.general_weight is not None:
        on_rest = on_rest * joined.general_weight
    on_rest = on_rest.to(rest.dtype)
    factors = index.of_union(factor.to(rest.dtype))
    if mode.learning:
        rest = rest * on_rest
        on_union = on_union * factors
        if mode.sweep:
            return rest.scatter(1, columns, on_union)
        return rest.scatter_add(1, columns, on_union)
    on_union = on_union.mul_(factors)
    if mode.sweep:
        q = rest if mode.owned else torch.empty_like(rest)
        return _sweep_write(rest, on_rest, on_union, columns, q)
    # Reading without a sweep has made a copy of the rows.
    return rest.mul_(on_rest).scatter_add_(1, columns, on_union)


def _sweep_write(g: Tensor, factor: Tensor, on_union: Tensor, columns: Tensor, q: Tensor) -> Tensor:
    """q = g times factor [n, 1], but for the union: written twice while rows are in the cache."""
    count = _rows_swept(g.device)
    parts = zip(*(x.split(count) for x in (g, factor, on_union, columns, q)), strict=True)
    for rows, rows_factor, rows_on_union, rows_columns, out in parts:
        torch.mul(rows, rows_factor, out=out)
        out.scatter_(1, rows_columns, rows_on_union)
    return q


def _spread(
    q: Tensor,
    scaling: Scaling,
    index: PatternIndex,
    columns: Tensor,
    classes_per_column: Tensor,
) -> Tensor:
    """q and, for every class, what its pattern's classes get beside (Scaling.even)."""
    even = scaling.even.to(q.dtype)
    outside = even[:, :1] * classes_per_column
    return q + outside.scatter(1, columns, 0.0).scatter_add(1, columns, index.of_union(even))


# ---- in a program


@full_precision
def combine_unrolled(
    p_general: Tensor,
    p_special: list[Tensor],
    general_weight: float,
    special_weights: Tensor,
    index: SharedIndex,
    portable: bool,
) -> Tensor:
    """Eq. 5 by operations that depend on shapes alone, for torch.export.  Nothing is checked.

    p_general: [B, C].  p_special: [B, |S_m| + 1] of every specialist of `index`, on every row.
    special_weights: [B, k], float64, 0 where a specialist is not active.
    portable: as in newton.pattern_masses.
    """
    of_all = p_general.shape[1] + 1
    values = torch.cat([without_dustbin(p) if p.shape[1] == of_all else p for p in p_special], 1)
    dustbins = index.dustbins(values) * special_weights
    values = values * index.per_column(special_weights.to(values.dtype))
    columns = index.classes.expand(p_general.shape[0], -1)
    # What may not overwrite anything is what an exporter can follow.
    mode = Mode(owned=False, learning=True, sweep=True)
    general = _read_general(p_general, columns, index, mode)
    joined = _join(general, general_weight, values, dustbins, columns, index)
    scaling = solve(joined.masses, joined.dustbins, index.membership, None, portable)
    q = _write(joined, scaling, index, mode)
    return _spread(q, scaling, index, columns, torch.ones_like(q))
