"""Reading and checking what the generalist and the specialists say.

Legend: B rows, C classes, M specialists, k of them active in a row.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# How far a row's sum may be from one.  The answer sums to one whatever the rows sum to within it.
SUM_TOLERANCE = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


class SpecialistPredictions:
    """What the specialists say.

    values[m]: [R_m, |S_m| + 1], or None where no row is active.  places[m]: int64 [B], the row of values[m] that is
    about row b (-1: none); None where values[m] is about every row, in order.
    """

    def __init__(
        self,
        values: list[Tensor | None],
        places: list[Tensor | None],
        rows: int,
        dtype: torch.dtype,
        device,
    ):
        self.values, self.places = values, places
        self.width = max((v.shape[1] for v in values if v is not None), default=1)
        self._rows, self._dtype, self._device = rows, dtype, device

    @property
    def requires_grad(self) -> bool:
        return any(v is not None and v.requires_grad for v in self.values)

    def side_by_side(self, specialists: tuple[int, ...], rows: Tensor | None) -> list[Tensor]:
        """Of each of `specialists` [n, |S_m| + 1] about `rows` (None: every row, in order)."""
        parts = []
        for m in specialists:
            place = self.places[m]
            if rows is not None:
                place = rows if place is None else place[rows]
            parts.append(self.values[m] if place is None else self.values[m].index_select(0, place))
        return parts

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """All values one under the other, padded with zeros to `width`, and where [B, M] in it."""
        where = torch.full(
            (self._rows, len(self.values)), -1, dtype=torch.int64, device=self._device
        )
        blocks, height = [], 0
        every_row = torch.arange(self._rows, device=self._device)
        for m, values in enumerate(self.values):
            if values is None:
                continue
            where[:, m] = height + (every_row if self.places[m] is None else self.places[m])
            blocks.append(
                values
                if values.shape[1] == self.width
                else pad(values, (0, self.width - values.shape[1]))
            )
            height += len(values)
        return torch.cat(blocks), where

    def padded(self, slots: Tensor, rows: Tensor | None) -> Tensor:
        """[n, k, width] of the specialists `slots` [n, k] about `rows`."""
        table, where = self._table
        return table[(where if rows is None else where[rows]).gather(1, slots)]


def checked_general(p_general: Tensor, groups) -> tuple[Tensor, torch.dtype]:
    """p_general in float32 or float64, and the dtype it came in.  ValueError for a wrong shape or dtype; sums are
    checked later."""
    if not isinstance(p_general, Tensor):
        raise ValueError(
            f"p_general is a {type(p_general).__name__}; it must be a torch tensor of probabilities"
        )
    if p_general.dim() != 2 or p_general.shape[1] != groups.num_classes:
        expected = f"[B, {groups.num_classes}] as the groups have it"
        raise ValueError(f"p_general has shape {list(p_general.shape)}; it must be {expected}")
    if p_general.dtype not in SUM_TOLERANCE:
        raise ValueError(
            f"p_general has dtype {p_general.dtype}; it must be floating point (divide counts by their sum)"
        )
    dtype = p_general.dtype
    return (p_general if dtype in (torch.float32, torch.float64) else p_general.float()), dtype


def checked_active(active: Tensor | None, p_special, rows: int, groups, device) -> Tensor:
    """active as bool [B, M] on `device`; None means all."""
    specialists = len(groups.members)
    for m, members in enumerate(groups.members):
        if len(members) == 0:
            raise ValueError(f"group {m} is empty; leave it out of the groups, or give it a class")
    if len(p_special) != specialists:
        raise ValueError(
            f"p_special has {len(p_special)} entries for {specialists} groups; use None for one that nobody needs"
        )
    if active is None:
        return torch.ones(rows, specialists, dtype=torch.bool, device=device)
    active = torch.as_tensor(active, device=device)
    if active.dtype != torch.bool or active.shape != (rows, specialists):
        shape = f"dtype {active.dtype} and shape {list(active.shape)}"
        raise ValueError(
            f"active has {shape}; it must be bool [{rows}, {specialists}], as gate returns it"
        )
    return active


def checked_weights(weights, specialists: int, device) -> Tensor | None:
    """weights as float64 [1 + M]: of the generalist and of each specialist."""
    if weights is None:
        return None
    weights = torch.as_tensor(weights, dtype=torch.float64, device=device)
    if weights.shape != (1 + specialists,):
        expected = f"[{1 + specialists}], the generalist's and one for each specialist"
        raise ValueError(f"weights has shape {list(weights.shape)}; it must be {expected}")
    if not bool(torch.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(f"weights are {weights.tolist()}; each must be a number, zero or more")
    return weights


def read_predictions(
    p_special, groups, active: Tensor, dtype: torch.dtype, given_dtype: torch.dtype
) -> SpecialistPredictions:
    """What active rows may need, as `dtype`.  Values are not looked at here, but for specialists of every class."""
    rows, specialists = active.shape
    device = active.device
    values: list[Tensor | None] = [None] * specialists
    places: list[Tensor | None] = [None] * specialists
    for m in active.any(0).nonzero()[:, 0].tolist():
        given, columns = p_special[m], len(groups.members[m]) + 1
        if given is None:
            row = int(active[:, m].nonzero()[0])
            raise ValueError(
                f"p_special[{m}] is None, but row {row} is active for it; "
                f"give its prediction, or clear active[{row}, {m}]"
            )
        if isinstance(given, Tensor):
            if given.shape != (rows, columns):
                raise ValueError(
                    f"p_special[{m}] has shape {list(given.shape)}; it must be [{rows}, {columns}]: "
                    f"the {columns - 1} classes of its group and the dustbin last"
                )
        else:
            about, given = _checked_rows(given, m, rows, columns, device)
            places[m] = torch.full((rows,), -1, dtype=torch.int64, device=device)
            places[m][about] = torch.arange(len(about), device=device)
            missing = active[:, m] & (places[m] < 0)
            if bool(missing.any()):
                row = int(missing.nonzero()[0])
                raise ValueError(
                    f"row {row} is active for specialist {m}, but p_special[{m}] has no prediction for it; "
                    "add the row to its rows"
                )
        if given.dtype not in SUM_TOLERANCE:
            raise ValueError(f"p_special[{m}] has dtype {given.dtype}; it must be floating point")
        values[m] = given.to(device=device, dtype=dtype)
        if columns == groups.num_classes + 1:
            asked = active[:, m] if places[m] is None else places[m][active[:, m]]
            check_sums(
                values[m][asked].sum(1), given_dtype, lambda _, m=m: f"a row of p_special[{m}]"
            )
            values[m] = without_dustbin(values[m])
    return SpecialistPredictions(values, places, rows, dtype, device)


def without_dustbin(values: Tensor) -> Tensor:
    """The rest [n, C] renormalised, dustbin 0: nothing is outside of every class.  Uniform where nothing is left."""
    kept = values[:, :-1] + torch.finfo(values.dtype).tiny
    return pad(kept / kept.sum(1, keepdim=True), (0, 1))


def _checked_rows(given, m: int, rows: int, columns: int, device) -> tuple[Tensor, Tensor]:
    try:
        about, values = given
    except (TypeError, ValueError):
        raise ValueError(
            f"p_special[{m}] is a {type(given).__name__}; it must be a tensor, (rows, tensor) or None"
        ) from None
    about = torch.as_tensor(about, device=device)
    if about.dtype == torch.bool or about.is_floating_point() or about.dim() != 1:
        kind = f"dtype {about.dtype} and shape {list(about.shape)}"
        raise ValueError(
            f"the rows of p_special[{m}] have {kind}; they must be a flat list of row numbers"
        )
    if not isinstance(values, Tensor) or values.shape != (len(about), columns):
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"p_special[{m}] has shape {shape}; with {len(about)} rows it must be [{len(about)}, {columns}]: "
            f"the {columns - 1} classes of its group and the dustbin last"
        )
    about = about.long()
    if len(about) and not (0 <= int(about.min()) and int(about.max()) < rows):
        raise ValueError(
            f"p_special[{m}] names row {int(about.max())}; rows go from 0 to {rows - 1}"
        )
    if len(about) != len(torch.unique(about)):
        raise ValueError(
            f"p_special[{m}] names a row more than once; give one prediction for each row"
        )
    return about, values


def check_sums(sums: Tensor, dtype: torch.dtype, name) -> None:
    """ValueError unless every entry of `sums` is one within SUM_TOLERANCE.  name: position -> what is called by its
    name.

    A NaN or an infinity anywhere in a row makes its sum one, so this finds them without another pass.
    """
    tolerance = SUM_TOLERANCE[dtype]
    wrong = ~((sums.detach() - 1).abs() <= tolerance)
    if bool(wrong.any()):
        position = tuple(wrong.nonzero()[0].tolist())
        value = float(sums[position])
        what = "has a NaN or an infinity" if not np.isfinite(value) else f"sums to {value:.6g}"
        raise ValueError(
            f"{name(position)} {what}; a row must sum to 1 within {tolerance:g}: "
            "pass probabilities (softmax of the logits)"
        )


def check_no_negative(lowest: Tensor, name) -> None:
    if bool((lowest.detach() < 0).any()):
        position = tuple((lowest < 0).nonzero()[0].tolist())
        raise ValueError(
            f"{name(position)} holds {float(lowest[position]):.3g}; probabilities are not negative: "
            "pass softmax outputs"
        )


def active_sets(active: Tensor) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The distinct active sets, and which of them each row has, int64 [B]."""
    on = active.cpu().numpy()
    if len(on) == 0:
        return [], np.zeros(0, dtype=np.int64)
    if (on == on[0]).all():
        return [tuple(np.flatnonzero(on[0]).tolist())], np.zeros(len(on), dtype=np.int64)
    packed = np.ascontiguousarray(np.packbits(on, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    sizes = on[first].sum(1)
    members = np.nonzero(on[first])[1].tolist()
    ends = np.cumsum(sizes).tolist()
    starts = [0, *ends[:-1]]
    return [tuple(members[a:b]) for a, b in zip(starts, ends, strict=True)], which.reshape(-1)
