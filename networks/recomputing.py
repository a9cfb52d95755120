"""Blocks whose activations are computed again in the backward pass instead of being kept.

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .freezing import trunk_blocks


class Recomputed:
    """Mixed into a block's class in training: a forward pass keeps its inputs alone."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        plain = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        if not (getattr(self, "training", False) and torch.is_grad_enabled()):
            return plain(*inputs, **named)

        def contexts():
            return nullcontext(), _norms_kept(self)  # pyright: ignore[reportArgumentType]

        return checkpoint(plain, *inputs, use_reentrant=False, context_fn=contexts, **named)


@cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Recomputed, kind), {"__module__": kind.__module__})


@contextmanager
def recomputing(trunk: nn.Module) -> Iterator[None]:
    """While it is open, a trunk's blocks (as "last-N-blocks" counts) keep no activations."""
    changed = [block for block in trunk_blocks(trunk).values() if _is_plain(block)]
    for block in changed:
        block.__class__ = _recomputed(type(block))
    try:
        yield
    finally:
        for block in changed:
            if isinstance(block, Recomputed):
                block.__class__ = type(block).__mro__[2]


def _is_plain(block: nn.Module) -> bool:
    """Whether its class can be changed: Python allows it where the layout is the same."""
    return not isinstance(block, Recomputed) and type(block).__dictoffset__ != 0


@contextmanager
def _norms_kept(block: nn.Module) -> Iterator[None]:
    """Inside, a second forward pass leaves running statistics as the first one made them."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked = count
