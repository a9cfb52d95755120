"""Reading and checking what the generalist and the specialists say.

Legend: B rows, C classes, M specialists, W columns: the widest specialist's classes and its dustbin.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# How far a row's sum may be from one.  The answer sums to one whatever the rows sum to within it.
SUM_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Opinions:
    """The specialists' rows, one under the other.

    table: [R, W]: classes of S_m in columns 0 ... |S_m| - 1, the dustbin after them, then zeros.
    where: int64 [B, M]: the row of the table that specialist m wrote about row b; -1 where it is not active.
    """

    table: Tensor
    where: Tensor
    width: int


def checked_general(p_general: Tensor, groups) -> tuple[Tensor, torch.dtype]:
    """p_general in float32 or float64, and the dtype it came in.  ValueError for a wrong shape or dtype; sums are checked later."""
    if not isinstance(p_general, Tensor):
        raise ValueError(f"p_general is a {type(p_general).__name__}; it must be a torch tensor of probabilities")
    if p_general.dim() != 2 or p_general.shape[1] != groups.num_classes:
        expected = f"[B, {groups.num_classes}] as the groups have it"
        raise ValueError(f"p_general has shape {list(p_general.shape)}; it must be {expected}")
    if p_general.dtype not in SUM_TOLERANCE:
        raise ValueError(f"p_general has dtype {p_general.dtype}; it must be floating point (divide counts by their sum)")
    dtype = p_general.dtype
    return (p_general if dtype in (torch.float32, torch.float64) else p_general.float()), dtype


def checked_active(active: Tensor | None, p_special, rows: int, groups, device) -> Tensor:
    """active as bool [B, M] on `device`; None means all."""
    specialists = len(groups.members)
    for m, members in enumerate(groups.members):
        if len(members) == 0:
            raise ValueError(f"group {m} is empty; leave it out of the groups, or give it a class")
    if len(p_special) != specialists:
        raise ValueError(f"p_special has {len(p_special)} entries for {specialists} groups; use None for one that nobody needs")
    if active is None:
        return torch.ones(rows, specialists, dtype=torch.bool, device=device)
    active = torch.as_tensor(active, device=device)
    if active.dtype != torch.bool or active.shape != (rows, specialists):
        shape = f"dtype {active.dtype} and shape {list(active.shape)}"
        raise ValueError(f"active has {shape}; it must be bool [{rows}, {specialists}], as gate returns it")
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


def read_opinions(p_special, groups, active: Tensor, dtype: torch.dtype) -> Opinions:
    """The table of everything that an active row may need.  Values are not looked at here."""
    rows, _ = active.shape
    device = active.device
    needed = active.any(0).nonzero()[:, 0].tolist()
    where = torch.full(active.shape, -1, dtype=torch.int64, device=device)
    width = 1 + max((len(groups.members[m]) for m in needed), default=0)
    blocks, height = [], 0
    for m in needed:
        given, columns = p_special[m], len(groups.members[m]) + 1
        if given is None:
            row = int(active[:, m].nonzero()[0])
            raise ValueError(f"p_special[{m}] is None, but row {row} is active for it; give its prediction, or clear active[{row}, {m}]")
        if isinstance(given, Tensor):
            about = None
            if given.shape != (rows, columns):
                raise ValueError(
                    f"p_special[{m}] has shape {list(given.shape)}; it must be [{rows}, {columns}]: "
                    f"the {columns - 1} classes of its group and the dustbin last"
                )
        else:
            about, given = _checked_rows(given, m, rows, columns, device)
        if given.dtype not in SUM_TOLERANCE:
            raise ValueError(f"p_special[{m}] has dtype {given.dtype}; it must be floating point")
        given = given.to(device=device, dtype=dtype)
        blocks.append(given if columns == width else pad(given, (0, width - columns)))
        places = torch.arange(height, height + len(given), device=device)
        where[slice(None) if about is None else about, m] = places
        height += len(given)
    if not blocks:
        return Opinions(torch.zeros(0, width, dtype=dtype, device=device), where, width)
    missing = active & (where < 0)
    if bool(missing.any()):
        row, m = missing.nonzero()[0].tolist()
        raise ValueError(f"row {row} is active for specialist {m}, but p_special[{m}] has no prediction for it; add the row to its rows")
    return Opinions(torch.cat(blocks) if len(blocks) > 1 else blocks[0], where, width)


def _checked_rows(given, m: int, rows: int, columns: int, device) -> tuple[Tensor, Tensor]:
    try:
        about, values = given
    except (TypeError, ValueError):
        raise ValueError(f"p_special[{m}] is a {type(given).__name__}; it must be a tensor, (rows, tensor) or None") from None
    about = torch.as_tensor(about, device=device)
    if about.dtype == torch.bool or about.is_floating_point() or about.dim() != 1:
        kind = f"dtype {about.dtype} and shape {list(about.shape)}"
        raise ValueError(f"the rows of p_special[{m}] have {kind}; they must be a flat list of row numbers")
    if not isinstance(values, Tensor) or values.shape != (len(about), columns):
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"p_special[{m}] has shape {shape}; with {len(about)} rows it must be [{len(about)}, {columns}]: "
            f"the {columns - 1} classes of its group and the dustbin last"
        )
    about = about.long()
    if len(about) and not (0 <= int(about.min()) and int(about.max()) < rows):
        raise ValueError(f"p_special[{m}] names row {int(about.max())}; rows go from 0 to {rows - 1}")
    if len(about) != len(torch.unique(about)):
        raise ValueError(f"p_special[{m}] names a row more than once; give one prediction for each row")
    return about, values


def check_sums(sums: Tensor, dtype: torch.dtype, name) -> None:
    """ValueError unless every entry of `sums` is one within SUM_TOLERANCE.  name: position -> what is called by its name.

    A NaN or an infinity anywhere in a row makes its sum one, so this finds them without another pass.
    """
    tolerance = SUM_TOLERANCE[dtype]
    wrong = ~((sums.detach() - 1).abs() <= tolerance)
    if bool(wrong.any()):
        position = tuple(wrong.nonzero()[0].tolist())
        value = float(sums[position])
        what = "has a NaN or an infinity" if not np.isfinite(value) else f"sums to {value:.6g}"
        raise ValueError(
            f"{name(position)} {what}; a row must sum to 1 within {tolerance:g}: pass probabilities (softmax of the logits)"
        )


def check_no_negative(lowest: Tensor, name) -> None:
    if bool((lowest.detach() < 0).any()):
        position = tuple((lowest < 0).nonzero()[0].tolist())
        raise ValueError(f"{name(position)} holds {float(lowest[position]):.3g}; probabilities are not negative: pass softmax outputs")


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
    return [tuple(np.flatnonzero(on[row]).tolist()) for row in first], which.reshape(-1)
