"""Arithmetic of probabilities that losses and targets share.  B batch, C classes, K members."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def to_float32(values: Tensor) -> Tensor:
    """`values` in float32. float64 stays float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def safe_log(probabilities: Tensor) -> Tensor:
    """log p, finite where p is 0: the log of the smallest normal number, -87.3 in float32."""
    p = to_float32(probabilities)
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """softmax(log p / T) over the last dimension: p at temperature T."""
    if temperature == 1:
        return probabilities
    return F.softmax(safe_log(probabilities) / temperature, dim=-1)


def average_members(probabilities: Tensor, mean: str = "arithmetic") -> Tensor:
    """The mean [B, C] of K members' probabilities [K, B, C].

    Hinton et al. 2015, section 1, take either mean.

    Parameters
    ----------
    probabilities : Tensor [K, B, C]
    mean : {"arithmetic", "geometric"}
        geometric: the softmax of the mean of log p. A p of 0 counts as in `safe_log`.

    Raises
    ------
    ValueError
        For another `mean`.
    """
    if mean == "arithmetic":
        return probabilities.mean(0)
    if mean == "geometric":
        return F.softmax(safe_log(probabilities).mean(0), dim=-1)
    raise ValueError(
        f"mean {mean!r} of the members' probabilities must be 'arithmetic' or 'geometric'"
    )
