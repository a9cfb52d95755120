"""Eq. 5 where C is too large for a row of C numbers.

The generalist is given as its largest probabilities, and the rest as one sum.
"""

import numpy as np
import torch
from torch import Tensor

from clustering.groups import ClassGroups
from networks.full_precision import full_precision

from .combine import TOLERANCE, Problem, combine_rows
from .host_reads import Checks, is_queued
from .predictions import (
    SUM_TOLERANCE,
    SpecialistInput,
    SpecialistPredictions,
    Weights,
    checked_active,
    checked_weights,
    read_predictions,
    working_dtype,
)


@full_precision
def combine_kl_sparse(
    indices: Tensor,
    values: Tensor,
    tail: Tensor,
    p_special: SpecialistInput,
    groups: ClassGroups,
    active: Tensor | None = None,
    weights: Weights | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """combine_kl of a generalist that is given for some classes, and as one sum for all others.

    The answer is exact: classes outside all active groups keep their proportions, so that their sum
    suffices.  Memory grows with B k, not with C.

    Parameters
    ----------
    indices : int64 Tensor [B, k]
        Classes, distinct in a row, in any order.  They hold every class of the row's active groups.
    values : Tensor [B, k]
        Their probabilities.
    tail : Tensor [B]
        The sum of all others' probabilities.
    p_special, groups, active, weights
        As in `combine_kl`.

    Returns
    -------
    indices : int64 Tensor [B, k]
        As given.
    values : Tensor [B, k]
        q of these classes.
    tail : Tensor [B]
        The sum of q over all others.

    Raises
    ------
    ValueError
        As `combine_kl` does, and for a class of an active group that indices lack, with the row and
        the class.
    """
    _check_arguments(indices, values, tail)
    rows, k = values.shape
    dtype = values.dtype
    work = working_dtype(dtype)
    active = checked_active(active, p_special, rows, groups, values.device)
    weights = checked_weights(weights, len(groups.members), values.device)
    on, checks = active.cpu().numpy(), Checks(is_queued(values.device))
    special = read_predictions(p_special, groups, active, work, dtype, on, checks)
    values, tail = join_listed(indices, values, tail, special, groups, active, weights)
    checks.settle()
    return indices, values, tail


@full_precision
def join_listed(
    indices: Tensor,
    values: Tensor,
    tail: Tensor,
    special: SpecialistPredictions,
    groups: ClassGroups,
    active: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(values [B, k], tail [B]) of q, of arguments that are read already.

    special, active, weights: as SpecialistPredictions, checked_active and checked_weights give
    them.
    """
    dtype, k = values.dtype, values.shape[1]
    work = working_dtype(dtype)
    checks = Checks(is_queued(values.device))
    ascending, position = _sorted(indices.long())
    _check_indices(ascending, groups.num_classes, checks)
    classes_per_column = torch.ones(1, k + 1, dtype=work, device=values.device)
    classes_per_column[0, -1] = groups.num_classes - k
    layout = SparseLayout(ascending, position, classes_per_column, checks)
    problem = Problem(groups, special, weights, dtype, TOLERANCE[work], layout, checks)
    p_general = torch.cat([values, tail[:, None].to(values.dtype)], 1).to(work)
    q = combine_rows(problem, p_general, active.cpu().numpy()).to(dtype)
    return q[:, :-1], q[:, -1]


class SparseLayout:
    """Rows of k classes in any order and a last column that is the sum of all others.

    ascending, position: int64 [B, k], the classes of each row in order and their columns.
    """

    def __init__(
        self, ascending: Tensor, position: Tensor, classes_per_column: Tensor, checks: Checks
    ):
        self._checks = checks
        self._ascending = ascending
        self._position = position
        self._classes_per_column = classes_per_column

    def columns(self, classes: Tensor, rows: Tensor | None) -> Tensor:
        ascending = self._ascending
        position = self._position
        if rows is not None:
            ascending = ascending[rows]
            position = position[rows]
        last = ascending.shape[1] - 1
        order = torch.searchsorted(ascending, classes.contiguous()).clamp(max=last)
        absent = ascending.gather(1, order) != classes

        def error() -> ValueError:
            row, entry = absent.nonzero()[0].tolist()
            original = row if rows is None else int(rows[row])
            return ValueError(
                f"indices of row {original} lack class {int(classes[row, entry])} of a group that "
                "is active there; gather every class of the active groups beside the largest "
                "probabilities"
            )

        self._checks.require_none(absent, error)
        return position.gather(1, order)

    def classes_per_column(self, rows: Tensor | None) -> Tensor:
        count = len(self._ascending) if rows is None else len(rows)
        return self._classes_per_column.expand(count, -1)


def _sorted(indices: Tensor) -> tuple[Tensor, Tensor]:
    if indices.device.type != "cpu":
        return indices.sort(dim=1)
    # Four times as fast as torch's sort.
    order = torch.from_numpy(np.argsort(indices.numpy(), axis=1))
    return indices.gather(1, order), order


def _check_arguments(indices: Tensor, values: Tensor, tail: Tensor) -> None:
    if not isinstance(values, Tensor) or values.dim() != 2 or values.dtype not in SUM_TOLERANCE:
        raise ValueError(
            f"values must be a floating point tensor [B, k]; they are {_described(values)}"
        )
    rows, k = values.shape
    integers = (torch.int64, torch.int32)
    same_shape = isinstance(indices, Tensor) and indices.shape == values.shape
    if not same_shape or indices.dtype not in integers:
        raise ValueError(
            f"indices must be int64 [{rows}, {k}] as values are; they are {_described(indices)}"
        )
    if not isinstance(tail, Tensor) or tail.shape != (rows,):
        raise ValueError(f"tail must be [{rows}], one number per row; it is {_described(tail)}")


def _check_indices(ascending: Tensor, num_classes: int, checks: Checks) -> None:
    if ascending.numel() == 0:
        return
    twice = ascending[:, 1:] == ascending[:, :-1]
    unknown = (ascending[:, 0] < 0) | (ascending[:, -1] >= num_classes)

    def is_unknown() -> ValueError:
        lowest, highest = int(ascending[:, 0].min()), int(ascending[:, -1].max())
        wrong = lowest if lowest < 0 else highest
        return ValueError(f"indices hold class {wrong}; classes go from 0 to {num_classes - 1}")

    def is_twice() -> ValueError:
        row, entry = twice.nonzero()[0].tolist()
        return ValueError(
            f"indices of row {row} hold class {int(ascending[row, entry])} more than once; "
            "list each class once"
        )

    checks.require_none(unknown, is_unknown)
    checks.require_none(twice, is_twice)


def _described(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)}"
    return type(x).__name__
