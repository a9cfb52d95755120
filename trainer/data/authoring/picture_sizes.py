"""One size for pictures of many."""

from __future__ import annotations

from collections.abc import Mapping

LARGEST = 64  # larger only on request: work grows with the square
STEP = 8


def suggested_size(sizes: Mapping[tuple[int, int], int]) -> int:
    """The side of squares that loses little of pictures of these sizes and stays cheap.

    sizes: {(width, height): how many}.

    Returns the shorter side of the median picture, rounded down to a multiple of 8 where it is
    larger than that, at most 64.
    """
    shorter = sorted((min(size), count) for size, count in sizes.items())
    half = sum(sizes.values()) / 2
    seen = 0
    median = LARGEST
    for side, count in shorter:
        seen += count
        if seen >= half:
            median = side
            break
    return min(LARGEST, median // STEP * STEP or median)
