"""Sum probabilities in full precision, whatever precision the caller computes in.

Autocast makes products of float32 tensors bfloat16's, and torch.set_float32_matmul_precision those
of TF32: a row of probabilities then sums to one within a percent, and not within a millionth.
Trunks want both.  Here is the one rule for heads that answer, and for everything behind them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

EXACT = "highest"  # of torch.set_float32_matmul_precision


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: the function, run inside `in_full_precision`."""

    @wraps(function)
    def exactly(*args: P.args, **kwargs: P.kwargs) -> R:
        # What is traced for a program is traced as it is.
        if torch.compiler.is_compiling() or not is_lowered():
            return function(*args, **kwargs)
        with in_full_precision():
            return function(*args, **kwargs)

    return exactly


def exact_answer(function: Callable[P, R]) -> Callable[P, R]:
    """`full_precision` only where no gradient is asked, so that training keeps fast products."""
    exactly = full_precision(function)

    @wraps(function)
    def answered(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():
            return function(*args, **kwargs)
        return exactly(*args, **kwargs)

    return answered


def features_to(dtype: torch.dtype, features: Tensor) -> Tensor:
    """A trunk's features in the type of an `exact_answer`'s weights."""
    if torch.is_grad_enabled() or features.dtype == dtype:
        return features
    return features.to(dtype)


def is_lowered() -> bool:
    """Whether products of float32 tensors may be computed in a lower precision here."""
    return bool(_lowered_kinds()) or torch.get_float32_matmul_precision() != EXACT


@contextmanager
def in_full_precision() -> Iterator[None]:
    """Inside, products of float32 tensors are float32's: no autocast, no TF32."""
    with ExitStack() as stack:
        for kind in _lowered_kinds():
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_products.exact())
        yield


def _lowered_kinds() -> list[str]:
    """The kinds of devices under autocast."""
    kinds = {"cpu"}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        kinds.add(accelerator.type)
    return [kind for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]


class _Products:
    """torch's setting for products is the process's: the first thread in changes it, and the last
    one out changes it back.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._inside = 0
        self._before = EXACT

    @contextmanager
    def exact(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._before = torch.get_float32_matmul_precision()
                _set(self._before, EXACT)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    _set(EXACT, self._before)


def _set(before: str, after: str) -> None:
    if before != after:
        torch.set_float32_matmul_precision(after)


_products = _Products()
