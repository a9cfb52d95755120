"""Which specialists does an example need?"""

import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clustering.groups import ClassGroups
from networks import top_k
from networks.full_precision import full_precision

from .host_reads import to_device
from .predictions import Groups, Probabilities, as_general

MANY_CLASSES = 2**14  # from which on torch's maximum takes several times as long as networks.top_k


@full_precision
def gate(
    p_general: Probabilities,
    groups: Groups,
    n: int = 1,
    max_specialists: int | None = None,
    available: Tensor | Sequence[bool] | None = None,
) -> Tensor:
    """The specialists whose S_m holds one of the n most probable classes.

    Parameters
    ----------
    p_general : Tensor or array [B, C]
        The generalist's probabilities.  Only the order of a row's entries and their sums matter.
    groups : ClassGroups, or lists of class indices
        The classes of each specialist.
    n : int
        How many of the most probable classes count.
    max_specialists : int, optional
        At most so many per row: those whose classes hold most of the generalist's mass (ties: the
        first).  None means no limit.
    available : bool [M], optional
        The specialists that exist. None means all.

    Returns
    -------
    bool Tensor [B, M]
        Which specialists are active in each row.

    Raises
    ------
    ValueError
        If n or the limit is not positive, the width is not the groups', or a row has a NaN.

    References
    ----------
    Hinton, Vinyals and Dean 2015, section 5.3, where n = 1.
    """
    p_general, groups = as_general(p_general, groups)
    _check(p_general, groups, n, max_specialists)
    p_general = p_general.detach()
    classes = _most_probable(p_general, n)
    specialists = len(groups.members)
    holders = holders_of(groups, p_general.device)[classes].flatten(1)
    shape = (len(p_general), specialists + 1)
    active = torch.zeros(shape, dtype=torch.bool, device=p_general.device)
    active = active.scatter_(1, holders, True)[:, :specialists]
    if available is not None:
        active = active & torch.as_tensor(available, dtype=torch.bool, device=active.device)
    if max_specialists is not None and max_specialists < specialists:
        _limit(active, p_general, groups, max_specialists)
    return active


@full_precision
def static_gate(p_general: Tensor, membership: Tensor, n: int, limit: int | None) -> Tensor:
    """gate by operations that depend on shapes alone, for torch.export.

    membership: [C, k], 1 where the class belongs to the specialist.
    Returns [B, k], 1 where the specialist is active, else 0.  Ties under the limit: any of them.
    """
    classes = p_general.topk(n, dim=1).indices
    active = membership[classes].amax(1)
    if limit is None or limit >= membership.shape[1]:
        return active
    mass = torch.where(active > 0, p_general @ membership, -1.0)
    kept = mass.topk(limit, dim=1).indices
    return active * torch.zeros_like(active).scatter(1, kept, 1.0)


def _check(p_general: Tensor, groups: ClassGroups, n: int, max_specialists: int | None) -> None:
    num_classes = groups.num_classes
    if p_general.dim() != 2 or p_general.shape[1] != num_classes:
        expected = f"[B, {num_classes}] as the groups have it"
        raise ValueError(f"p_general has shape {list(p_general.shape)}; it must be {expected}")
    if not 1 <= n <= num_classes:
        raise ValueError(
            f"n = {n} most probable classes; "
            f"it must be from 1 to {num_classes}, the number of classes"
        )
    if max_specialists is not None and max_specialists < 1:
        raise ValueError(
            f"max_specialists = {max_specialists}; it must be at least 1, or None for no limit"
        )


def _most_probable(p_general: Tensor, n: int) -> Tensor:
    """[B, n], in any order."""
    if n == 1 and p_general.shape[1] < MANY_CLASSES:
        top, classes = p_general.max(1, keepdim=True)
    else:
        top, classes = top_k(p_general, n, ordered=False)
    if bool(torch.isnan(top).any()):
        row = int(torch.isnan(top).any(1).nonzero()[0])
        raise ValueError(
            f"p_general has a NaN in row {row}; look for it in the generalist's logits"
        )
    return classes


def _limit(active: Tensor, p_general: Tensor, groups: ClassGroups, limit: int) -> None:
    """Leave at most `limit` specialists active per row, in place."""
    device = p_general.device
    on = active.cpu().numpy()
    of_crowd = np.flatnonzero(on.sum(1) > limit)
    if len(of_crowd) == 0:
        return
    crowded = to_device(of_crowd, device)
    mass = torch.full((len(of_crowd), on.shape[1]), -1.0, device=device, dtype=p_general.dtype)
    for m, rows in rows_of_specialists(on[of_crowd], device):
        classes = to_device(groups.members[m], device)
        mass[rows, m] = p_general[crowded[rows][:, None], classes].sum(1)
    kept = mass.sort(dim=1, descending=True, stable=True).indices[:, :limit]
    active[crowded] = torch.zeros_like(active[crowded]).scatter_(1, kept, True)


def rows_of_specialists(on: np.ndarray, device: torch.device) -> list[tuple[int, Tensor]]:
    """(m, its rows int64 [n] on the device) of each specialist that is active anywhere.

    on: bool [B, M], as the host has it.
    """
    return [
        (m, to_device(np.flatnonzero(on[:, m]), device)) for m in np.flatnonzero(on.any(0)).tolist()
    ]


def most_active(groups: ClassGroups, n: int, max_specialists: int | None) -> int:
    """How many specialists a row has at most."""
    of_class = holders_of(groups, torch.device("cpu")).shape[1]
    most = min(len(groups.members), n * of_class)
    return most if max_specialists is None else min(most, max_specialists)


def asked_specialists(active: Tensor, most: int) -> Tensor:
    """The numbers of each row's active specialists, ascending, then -1: int32 [B, most].

    active: bool [B, M].  Of thousands of groups a row of it is long, and nearly all of it is False.
    """
    row, specialist = active.nonzero(as_tuple=True)
    first = active.sum(1).cumsum(0) - active.sum(1)
    place = torch.arange(len(row), device=row.device) - first[row]
    asked = torch.full((len(active), most), -1, dtype=torch.int32, device=active.device)
    asked[row, place] = specialist.int()
    return asked


_tables: dict[tuple[int, str], tuple[weakref.ref, Tensor]] = {}
_lock = threading.Lock()


def holders_of(groups: ClassGroups, device: torch.device) -> Tensor:
    """int64 [C, most specialists that hold one class]: which they are, filled up with M."""
    key = (id(groups), str(device))
    entry = _tables.get(key)
    if entry is not None and entry[0]() is groups:
        return entry[1]
    owners = [torch.full((len(classes),), m) for m, classes in enumerate(groups.members)]
    owner = torch.cat(owners)
    classes = torch.cat([torch.tensor(classes) for classes in groups.members])
    order = torch.argsort(classes, stable=True)
    owner = owner[order]
    classes = classes[order]
    counts = torch.bincount(classes, minlength=groups.num_classes)
    rank = torch.arange(len(classes)) - (counts.cumsum(0) - counts)[classes]
    table = torch.full((groups.num_classes, max(1, int(counts.max()))), len(groups.members))
    table[classes, rank] = owner
    table = table.to(device)
    with _lock:
        _tables[key] = (weakref.ref(groups, lambda _: _tables.pop(key, None)), table)
    return table
