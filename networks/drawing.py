"""Classes drawn at random."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def draw_classes(num_classes: int, count: int, seed: int) -> Tensor:
    """`count` distinct classes, each as likely as any other. All where there are no more.

    Costs `count`, not `num_classes`.

    Returns
    -------
    Tensor int64 [count], ascending
    """
    if count >= num_classes:
        return torch.arange(num_classes)
    drawn = np.random.default_rng(seed).choice(num_classes, count, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn).astype(np.int64))
