"""Which specialists does an example need?"""

import threading
import weakref

import torch
from torch import Tensor


def gate(
    p_general: Tensor, groups, n: int = 1, max_specialists: int | None = None, available=None
) -> Tensor:
    """active [B, M] bool: the specialists whose S_m holds one of the n most probable classes.  Hinton et al. 2015,
    section 5.3.

    p_general: [B, C]; only the order of a row's entries and their sums matter.
    max_specialists: at most so many per row, those whose classes hold most of the generalist's mass (ties: the first).
    available: [M] bool, the specialists that there are to open; None is all.
    Raises ValueError if n or the limit is not positive, the width is not the groups', or a row has a NaN.
    """
    num_classes, specialists = groups.num_classes, len(groups.members)
    if p_general.dim() != 2 or p_general.shape[1] != num_classes:
        raise ValueError(
            f"p_general has shape {list(p_general.shape)}; it must be [B, {num_classes}] as the groups have it"
        )
    if not 1 <= n <= num_classes:
        raise ValueError(
            f"n = {n} most probable classes; it must be from 1 to {num_classes}, the number of classes"
        )
    if max_specialists is not None and max_specialists < 1:
        raise ValueError(
            f"max_specialists = {max_specialists}; it must be at least 1, or None for no limit"
        )
    p_general = p_general.detach()
    top, classes = (
        p_general.max(1, keepdim=True) if n == 1 else p_general.topk(n, dim=1, sorted=False)
    )
    if bool(torch.isnan(top).any()):
        row = int(torch.isnan(top).any(1).nonzero()[0])
        raise ValueError(
            f"p_general has a NaN in row {row}; look for it in the generalist's logits"
        )
    holders = _holders(groups, p_general.device)[classes].flatten(1)
    active = torch.zeros(len(p_general), specialists + 1, dtype=torch.bool, device=p_general.device)
    active = active.scatter_(1, holders, True)[:, :specialists]
    if available is not None:
        active = active & torch.as_tensor(available, dtype=torch.bool, device=active.device)
    if max_specialists is None or max_specialists >= specialists:
        return active
    crowded = (active.sum(1) > max_specialists).nonzero()[:, 0]
    if len(crowded):
        mass = torch.full(
            (len(crowded), specialists), -1.0, device=p_general.device, dtype=p_general.dtype
        )
        for m in active[crowded].any(0).nonzero()[:, 0].tolist():
            rows = active[crowded, m].nonzero()[:, 0]
            members = torch.tensor(groups.members[m], device=p_general.device)
            mass[rows, m] = p_general[crowded[rows][:, None], members].sum(1)
        kept = mass.sort(dim=1, descending=True, stable=True).indices[:, :max_specialists]
        active[crowded] = torch.zeros_like(active[crowded]).scatter_(1, kept, True)
    return active


_tables: dict[tuple, tuple[weakref.ref, Tensor]] = {}
_lock = threading.Lock()


def _holders(groups, device) -> Tensor:
    """int64 [C, most specialists that hold one class]: which they are, filled up with M."""
    key = (id(groups), str(device))
    found = _tables.get(key)
    if found is not None and found[0]() is groups:
        return found[1]
    owner = torch.cat([torch.full((len(members),), m) for m, members in enumerate(groups.members)])
    classes = torch.cat([torch.tensor(members) for members in groups.members])
    order = torch.argsort(classes, stable=True)
    owner, classes = owner[order], classes[order]
    held = torch.bincount(classes, minlength=groups.num_classes)
    rank = torch.arange(len(classes)) - (held.cumsum(0) - held)[classes]
    table = torch.full((groups.num_classes, max(1, int(held.max()))), len(groups.members))
    table[classes, rank] = owner
    table = table.to(device)
    with _lock:
        _tables[key] = (weakref.ref(groups, lambda _: _tables.pop(key, None)), table)
    return table
