"""How long an answer takes, measured: one thread, medians, in a fraction of a second.

On a CPU the clock is the thread's own, which other processes do not slow down. On a GPU it is the
wall's, around a call and all that it started.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Answer = Callable[[Tensor], object]  # raw inputs [b, ...] -> probabilities [b, C]
LARGE_BATCH = 256
BUDGET_S = 0.15  # for the calls at one batch size, beyond which no further one begins
MOST_CALLS = 25
CALL_S = 0.5  # that one call with a large batch may take, were its rows asked one by one


def latencies_ms(answer: Answer, raw: Tensor, batches: list[int]) -> dict[str, float]:
    """Milliseconds of an example, the median over calls, by the size of the batch.

    Parameters
    ----------
    answer : callable
        Raw inputs [b, ...] -> probabilities.
    raw : Tensor [n, ...]
        Inputs to ask about, n at least the largest batch.  Each call takes others.
    batches : list of int

    Returns
    -------
    dict
        {"1": milliseconds, ...}
    """
    with torch.inference_mode(), one_thread():
        return {str(size): median_ms(answer, raw, size) / size for size in batches}


def median_ms(answer: Answer, raw: Tensor, size: int) -> float:
    """The median time of a call with `size` rows. The first call, which warms up, is left out."""
    parts = raw[: len(raw) // size * size].split(size)
    answer(parts[0])
    times: list[float] = []
    clock = time.thread_time if raw.device.type == "cpu" else time.perf_counter
    began = time.perf_counter()
    while len(times) < MOST_CALLS and (not times or time.perf_counter() - began < BUDGET_S):
        part = parts[len(times) % len(parts)]
        synchronize(raw.device)
        start = clock()
        answer(part)
        synchronize(raw.device)
        times.append(1000 * (clock() - start))
    return statistics.median(times)


def batches_to_measure(answer: Answer, raw: Tensor) -> list[int]:
    """1, and the largest power of two up to LARGE_BATCH that can be measured cheaply.

    raw: as many inputs as may be in a batch, or more.
    """
    with torch.inference_mode(), one_thread():
        alone_s = median_ms(answer, raw, 1) / 1000
    size = LARGE_BATCH
    while size > 1 and (size > len(raw) or size * alone_s > CALL_S):
        size //= 2
    return [1, size] if size > 1 else [1]


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
