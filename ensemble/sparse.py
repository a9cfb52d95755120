"""Eq. 5 where C is too large for a row of C numbers: the generalist's largest probabilities, and the rest as one
sum."""

import numpy as np
import torch
from torch import Tensor

from .combine import Job, combined
from .predictions import SUM_TOLERANCE, checked_active, checked_weights, read_predictions


def combine_kl_sparse(
    indices: Tensor, values: Tensor, tail: Tensor, p_special, groups, active=None, weights=None
) -> tuple[Tensor, Tensor, Tensor]:
    """combine_kl of a generalist given as values [B, k] of the classes indices [B, k] and the sum of all others, tail
    [B].

    indices: int64, distinct in a row, in any order; they hold every class of the row's active groups.  Then the answer
    is exact: classes outside all of them keep their proportions, so their sum suffices.  p_special, active, weights: as
    combine_kl has them.
    Returns (indices, values, tail) of q.  Memory grows with B k, not with C.
    Raises ValueError as combine_kl does, and for a class of an active group that indices lack, with the row and the
    class.
    """
    if not isinstance(values, Tensor) or values.dim() != 2 or values.dtype not in SUM_TOLERANCE:
        raise ValueError(
            f"values must be a floating point tensor [B, k]; they are {_described(values)}"
        )
    rows, kept = values.shape
    if (
        not isinstance(indices, Tensor)
        or indices.shape != values.shape
        or indices.dtype not in (torch.int64, torch.int32)
    ):
        raise ValueError(
            f"indices must be int64 [{rows}, {kept}] as values are; they are {_described(indices)}"
        )
    if not isinstance(tail, Tensor) or tail.shape != (rows,):
        raise ValueError(f"tail must be [{rows}], one number per row; it is {_described(tail)}")
    dtype = values.dtype
    work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    active = checked_active(active, p_special, rows, groups, values.device)
    weights = checked_weights(weights, len(groups.members), values.device)
    opinions = read_predictions(p_special, groups, active, work, dtype)
    ascending, position = _sorted(indices.long())
    _check_indices(ascending, groups.num_classes)

    def columns(classes: Tensor, chosen) -> Tensor:
        there = ascending[chosen]
        found = torch.searchsorted(there, classes.contiguous()).clamp(max=kept - 1)
        absent = there.gather(1, found) != classes
        if bool(absent.any()):
            row, place = absent.nonzero()[0].tolist()
            number = torch.arange(rows, device=values.device)[chosen][row]
            raise ValueError(
                f"indices of row {int(number)} lack class {int(classes[row, place])} of a group that is active there; "
                "gather every class of the active groups beside the largest probabilities"
            )
        return position[chosen].gather(1, found)

    stands_for = torch.ones(1, kept + 1, dtype=work, device=values.device)
    stands_for[0, -1] = groups.num_classes - kept
    job = Job(
        groups, weights, opinions, dtype, columns=columns, stands_for=stands_for.expand(rows, -1)
    )
    q = combined(job, torch.cat([values, tail[:, None].to(values.dtype)], 1).to(work), active).to(
        dtype
    )
    return indices, q[:, :-1], q[:, -1]


def _sorted(indices: Tensor) -> tuple[Tensor, Tensor]:
    if indices.device.type != "cpu":
        return indices.sort(dim=1)
    order = np.argsort(indices.numpy(), axis=1)  # four times as fast as torch's sort
    order = torch.from_numpy(order)
    return indices.gather(1, order), order


def _check_indices(ascending: Tensor, num_classes: int) -> None:
    if ascending.numel() == 0:
        return
    lowest, highest = int(ascending[:, 0].min()), int(ascending[:, -1].max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"indices hold class {lowest if lowest < 0 else highest}; classes go from 0 to {num_classes - 1}"
        )
    twice = ascending[:, 1:] == ascending[:, :-1]
    if bool(twice.any()):
        row, place = twice.nonzero()[0].tolist()
        raise ValueError(
            f"indices of row {row} hold class {int(ascending[row, place])} more than once; list each class once"
        )


def _described(x) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
