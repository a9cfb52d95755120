"""The predictions of the generalist and of the specialists: reading and checking them.

Legend: B rows, C classes, M specialists, k of them active in a row, S_m the classes of group m.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TypeAlias, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from clustering.groups import ClassGroups, as_groups

from .host_reads import AT_ONCE, Checks, to_device

# How far a row's sum may be from one.  The result sums to one whatever the rows sum to within it.
SUM_TOLERANCE = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# The smallest weight beside the largest: below it float32's probabilities would underflow.
SMALLEST_WEIGHT = 1e-12
# The largest weight where weights are exponents, whose size counts.
LARGEST_EXPONENT = 1e6

RowIndices: TypeAlias = Tensor | np.ndarray | Sequence[int]
# [B, C] or [C]: a tensor, an array or (nested) lists.
Probabilities: TypeAlias = Tensor | ArrayLike
# Entry m: [B, |S_m| + 1], the dustbin last, or (rows, [len(rows), |S_m| + 1]), or None.
SpecialistInput: TypeAlias = Sequence[Tensor | tuple[RowIndices, Tensor] | None]
# The same, as a caller may hold it.
GivenSpecialists: TypeAlias = Sequence[Probabilities | tuple[RowIndices, Probabilities] | None]
Weights: TypeAlias = Tensor | Sequence[float]
Groups: TypeAlias = ClassGroups | Iterable[Iterable[int] | ArrayLike]
# Where in a tensor -> what that place is called in an error message.
Naming: TypeAlias = Callable[[tuple[int, ...]], str]


class SpecialistPredictions:
    """The specialists' predictions, checked for shape and on one device.

    values[m]: [R_m, |S_m| + 1], or None where no row is active.
    positions[m]: int64 [B], the row of values[m] that is about row b (-1: none).  None where
    values[m] is about every row, in order.
    """

    def __init__(
        self,
        values: list[Tensor | None],
        positions: list[Tensor | None],
        rows: int,
        device: torch.device,
    ):
        self.values = values
        self.positions = positions
        self.width = max((v.shape[1] for v in values if v is not None), default=1)
        self._rows = rows
        self._device = device

    @property
    def requires_grad(self) -> bool:
        return any(v is not None and v.requires_grad for v in self.values)

    def side_by_side(self, specialists: tuple[int, ...], rows: Tensor | None) -> list[Tensor]:
        """Each specialist's predictions [n, |S_m| + 1] about `rows` (None: every row, in order)."""
        parts = []
        for m in specialists:
            values = self.values[m]
            assert values is not None, "an active specialist has predictions"
            position = self.positions[m]
            if rows is not None:
                position = rows if position is None else position[rows]
            parts.append(values if position is None else values.index_select(0, position))
        return parts

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """All values one under the other, padded with zeros to `width`, and their rows [B, M]."""
        shape = (self._rows, len(self.values))
        table_rows = torch.full(shape, -1, dtype=torch.int64, device=self._device)
        every_row = torch.arange(self._rows, device=self._device)
        blocks = []
        height = 0
        for m, values in enumerate(self.values):
            if values is None:
                continue
            position = self.positions[m]
            table_rows[:, m] = height + (every_row if position is None else position)
            missing = self.width - values.shape[1]
            blocks.append(pad(values, (0, missing)) if missing else values)
            height += len(values)
        return torch.cat(blocks), table_rows

    def padded(self, slots: Tensor, rows: Tensor | None) -> Tensor:
        """[n, k, width] of the specialists `slots` [n, k] about `rows`."""
        table, table_rows = self._table
        if rows is not None:
            table_rows = table_rows[rows]
        return table[table_rows.gather(1, slots)]


class TabledPredictions(SpecialistPredictions):
    """SpecialistPredictions whose values stand one under the other already.

    table: [T, widest |S_m| + 1], padded with zeros.  rows: int64 [B, M], where in it specialist m's
    prediction about row b is. Read where m is active alone.  sizes: |S_m| of each.
    """

    def __init__(self, table: Tensor, rows: Tensor, sizes: np.ndarray):
        super().__init__([], [], len(rows), table.device)
        self.width = table.shape[1]
        self._sizes = sizes
        self._tabled = table, rows

    def side_by_side(self, specialists: tuple[int, ...], rows: Tensor | None) -> list[Tensor]:
        table, places = self._tabled
        chosen = places if rows is None else places[rows]
        return [table[chosen[:, m], : int(self._sizes[m]) + 1] for m in specialists]

    def padded(self, slots: Tensor, rows: Tensor | None) -> Tensor:
        table, places = self._tabled
        chosen = places if rows is None else places[rows]
        return table[chosen.gather(1, slots)]


def as_probabilities(values: object, name: str) -> Tensor:
    """A tensor of a tensor, an array or lists of numbers.  ValueError, with the name, for others.

    Numbers of Python are of float64, as in numpy.
    """
    if isinstance(values, Tensor):
        return values
    try:
        return torch.tensor(np.asarray(values))
    except (TypeError, ValueError):
        kind = type(values).__name__
        raise ValueError(
            f"{name} is a {kind}; it must be a tensor, an array or lists of probabilities"
        ) from None


def as_general(p_general: object, groups: Groups) -> tuple[Tensor, ClassGroups]:
    """The generalist's probabilities and the groups, whatever a caller holds them in."""
    tensor = as_probabilities(p_general, "p_general")
    if tensor.dim() == 0:
        raise ValueError("p_general is one number; it must be [B, C] probabilities")
    return tensor, as_groups(groups, tensor.shape[-1])


def checked_general(p_general: Tensor, groups: ClassGroups) -> tuple[Tensor, torch.dtype]:
    """p_general in float32 or float64, and the dtype it came in.

    ValueError for a wrong shape or dtype.  Sums are checked later.
    """
    if p_general.dim() != 2 or p_general.shape[1] != groups.num_classes:
        expected = f"[B, {groups.num_classes}] as the groups have it"
        raise ValueError(f"p_general has shape {list(p_general.shape)}; it must be {expected}")
    dtype = p_general.dtype
    if dtype not in SUM_TOLERANCE:
        raise ValueError(
            f"p_general has dtype {dtype}; it must be floating point (divide counts by their sum)"
        )
    return p_general.to(working_dtype(dtype)), dtype


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What eq. 5 computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_active(
    active: Tensor | None,
    p_special: GivenSpecialists,
    rows: int,
    groups: ClassGroups,
    device: torch.device,
) -> Tensor:
    """active as bool [B, M] on `device`. None means all."""
    specialists = len(groups.members)
    for m, classes in enumerate(groups.members):
        if len(classes) == 0:
            raise ValueError(f"group {m} is empty; leave it out of the groups, or give it a class")
    if len(p_special) != specialists:
        raise ValueError(
            f"p_special has {len(p_special)} entries for {specialists} groups; "
            "use None for one that nobody needs"
        )
    if active is None:
        return torch.ones(rows, specialists, dtype=torch.bool, device=device)
    active = to_device(torch.as_tensor(active), device)
    if active.dtype != torch.bool or active.shape != (rows, specialists):
        shape = f"dtype {active.dtype} and shape {list(active.shape)}"
        raise ValueError(
            f"active has {shape}; it must be bool [{rows}, {specialists}], as gate returns it"
        )
    return active


def checked_weights(
    weights: Weights | None, specialists: int, device: torch.device, are_exponents: bool = False
) -> Tensor | None:
    """weights as float64 [1 + M]: of the generalist and of each specialist.

    Only their ratios matter, so they are divided by a power of two that brings the largest to
    [1, 2): exactly, whatever they are.  are_exponents: their size matters, and they stay.

    Raises ValueError for NaN, infinity, negative weights, and for a weight that is neither 0 nor
    SMALLEST_WEIGHT of the largest.
    """
    if weights is None:
        return None
    weights = torch.as_tensor(weights, dtype=torch.float64)
    if weights.shape != (1 + specialists,):
        expected = f"[{1 + specialists}], the generalist's and one for each specialist"
        raise ValueError(f"weights has shape {list(weights.shape)}; it must be {expected}")
    known = weights.detach().cpu()
    weights = to_device(weights, device)
    if not bool(torch.isfinite(known).all() and (known >= 0).all()):
        raise ValueError(f"weights are {known.tolist()}; each must be a number, zero or more")
    largest = float(known.max())
    if are_exponents:
        if largest > LARGEST_EXPONENT:
            raise ValueError(f"a weight is {largest:g}; it must be at most {LARGEST_EXPONENT:g}")
        largest = 1.0
    if largest == 0:
        return weights
    # 2 ** -1074 to 2 ** 1023: a quotient by it is exact.
    scale = math.ldexp(1.0, math.frexp(largest)[1] - 1)
    weights = weights / scale
    smallest = float(known[known > 0].min() / scale)
    if smallest < SMALLEST_WEIGHT:
        of = "" if are_exponents else " of the largest"
        raise ValueError(
            f"a weight is {smallest:.3g}{of}; it must be 0 or at least {SMALLEST_WEIGHT:g}{of}"
        )
    return weights


def read_predictions(
    p_special: GivenSpecialists,
    groups: ClassGroups,
    active: Tensor,
    dtype: torch.dtype,
    given_dtype: torch.dtype,
    on: np.ndarray,
    checks: Checks = AT_ONCE,
) -> SpecialistPredictions:
    """What active rows may need, as `dtype`.  on: active as the host has it.

    Values are not looked at here, but for specialists of every class: those lose their dustbin.
    """
    rows, specialists = active.shape
    values: list[Tensor | None] = [None] * specialists
    positions: list[Tensor | None] = [None] * specialists
    for m in np.flatnonzero(on.any(0)).tolist():
        columns = len(groups.members[m]) + 1
        given, position = _read_one(p_special[m], m, active[:, m], columns, checks)
        given = given.to(device=active.device, dtype=dtype)
        if columns == groups.num_classes + 1:
            read = to_device(np.flatnonzero(on[:, m]), active.device)
            if position is not None:
                read = position[read]
            sums = given[read].sum(1)
            check_sums(sums, given_dtype, lambda _, m=m: f"a row of p_special[{m}]", checks)
            given = without_dustbin(given)
        values[m] = given
        positions[m] = position
    return SpecialistPredictions(values, positions, rows, active.device)


def _read_one(
    given: Probabilities | tuple[RowIndices, Probabilities] | None,
    m: int,
    active: Tensor,
    columns: int,
    checks: Checks,
) -> tuple[Tensor, Tensor | None]:
    """(values, positions) of specialist m, as in SpecialistPredictions.  active: bool [B]."""
    if given is None:
        row = int(active.nonzero()[0])
        raise ValueError(
            f"p_special[{m}] is None, but row {row} is active for it; "
            f"give its prediction, or clear active[{row}, {m}]"
        )
    rows = len(active)
    position = None
    if not isinstance(given, tuple):
        values = as_probabilities(given, f"p_special[{m}]")
        if values.shape != (rows, columns):
            raise ValueError(
                f"p_special[{m}] has shape {list(values.shape)}; it must be [{rows}, {columns}]: "
                f"the {columns - 1} classes of its group and the dustbin last"
            )
    else:
        pair = cast(tuple[RowIndices, Probabilities], given)
        indices, values = _checked_rows(pair, m, rows, columns, active.device, checks)
        place = torch.arange(len(indices), device=active.device)
        position = torch.full((rows,), -1, dtype=torch.int64, device=active.device)
        position[indices] = place
        checks.require_none(position[indices] != place, lambda: _named_twice(m))
        missing = active & (position < 0)
        checks.require_none(missing, lambda: _row_missing(missing, m))
    if values.dtype not in SUM_TOLERANCE:
        raise ValueError(f"p_special[{m}] has dtype {values.dtype}; it must be floating point")
    return values, position


def _named_twice(m: int) -> ValueError:
    return ValueError(
        f"p_special[{m}] names a row more than once; give one prediction for each row"
    )


def _row_missing(missing: Tensor, m: int) -> ValueError:
    row = int(missing.nonzero()[0])
    return ValueError(
        f"row {row} is active for specialist {m}, but p_special[{m}] has no prediction "
        "for it; add the row to its rows"
    )


def _row_unknown(indices: Tensor, m: int, rows: int) -> ValueError:
    return ValueError(
        f"p_special[{m}] names row {int(indices.max())}; rows go from 0 to {rows - 1}"
    )


def _checked_rows(
    given: tuple[RowIndices, Probabilities],
    m: int,
    rows: int,
    columns: int,
    device: torch.device,
    checks: Checks,
) -> tuple[Tensor, Tensor]:
    try:
        indices, values = given
    except (TypeError, ValueError):
        kind = type(given).__name__
        raise ValueError(
            f"p_special[{m}] is a {kind}; it must be a tensor, (rows, tensor) or None"
        ) from None
    values = as_probabilities(values, f"p_special[{m}]")
    indices = to_device(torch.as_tensor(indices), device)
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.dim() != 1:
        kind = f"dtype {indices.dtype} and shape {list(indices.shape)}"
        raise ValueError(
            f"the rows of p_special[{m}] have {kind}; they must be a flat list of row numbers"
        )
    if values.shape != (len(indices), columns):
        expected = f"[{len(indices)}, {columns}]"
        raise ValueError(
            f"p_special[{m}] has shape {list(values.shape)}; "
            f"with {len(indices)} rows it must be {expected}: "
            f"the {columns - 1} classes of its group and the dustbin last"
        )
    indices = indices.long()
    unknown = (indices < 0) | (indices >= rows)
    checks.require_none(unknown, lambda: _row_unknown(indices, m, rows))
    if checks.is_deferred:  # until it is looked at, nothing may be read from afar
        return indices.clamp(0, rows - 1), values
    return indices, values


def without_dustbin(values: Tensor) -> Tensor:
    """The rest [n, C] renormalised, the dustbin 0: nothing is outside of every class.

    Uniform where nothing is left.
    """
    kept = values[:, :-1]
    # By the largest first: a sum of numbers near the smallest there are would be inexact.
    largest = kept.amax(1, keepdim=True)
    is_some = largest > 0
    kept = torch.where(is_some, kept / torch.where(is_some, largest, 1.0), 1.0)
    return pad(kept / kept.sum(1, keepdim=True), (0, 1))


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature), in float32 for half precision."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return torch.softmax(logits, dim=1)


def check_sums(sums: Tensor, dtype: torch.dtype, name: Naming, checks: Checks = AT_ONCE) -> None:
    """ValueError unless every entry of `sums` is one within SUM_TOLERANCE.

    A NaN or an infinity anywhere in a row makes its sum one, so this finds them without another
    pass.
    """
    tolerance = SUM_TOLERANCE[dtype]
    wrong = ~((sums.detach() - 1).abs() <= tolerance)

    def error() -> ValueError:
        position = tuple(wrong.nonzero()[0].tolist())
        value = float(sums[position])
        problem = f"sums to {value:.6g}" if np.isfinite(value) else "has a NaN or an infinity"
        return ValueError(
            f"{name(position)} {problem}; a row must sum to 1 within {tolerance:g}: "
            "pass probabilities (softmax of the logits)"
        )

    checks.require_none(wrong, error)


def check_no_negative(lowest: Tensor, name: Naming, checks: Checks = AT_ONCE) -> None:
    negative = lowest.detach() < 0

    def error() -> ValueError:
        position = tuple(negative.nonzero()[0].tolist())
        return ValueError(
            f"{name(position)} holds {float(lowest[position]):.3g}; "
            "probabilities are not negative: pass softmax outputs"
        )

    checks.require_none(negative, error)


def active_sets(on: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The distinct active sets of bool [B, M], and which of them each row has, int64 [B]."""
    if len(on) == 0:
        return [], np.zeros(0, dtype=np.int64)
    if (on == on[0]).all():
        return [tuple(np.flatnonzero(on[0]).tolist())], np.zeros(len(on), dtype=np.int64)
    packed = np.ascontiguousarray(np.packbits(on, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, set_of_row = np.unique(keys, return_index=True, return_inverse=True)
    specialists = np.nonzero(on[first])[1].tolist()
    ends = np.cumsum(on[first].sum(1)).tolist()
    starts = [0, *ends[:-1]]
    sets = [tuple(specialists[a:b]) for a, b in zip(starts, ends, strict=True)]
    return sets, set_of_row.reshape(-1)
