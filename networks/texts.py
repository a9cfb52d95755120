"""Texts to arrays.  No torch here."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np


def utf8_bytes(content: bytes) -> np.ndarray:
    """uint8 [bytes]: the text itself.  Raises UnicodeDecodeError if it is not UTF-8."""
    content.decode("utf-8")
    return np.frombuffer(content, np.uint8)


def hashed_ngrams(
    content: bytes, size: int = 2048, lengths: tuple[int, ...] = (2, 3, 4)
) -> np.ndarray:
    """float32 [size]: a phrase's character n-grams, counted in hashed bins and scaled to length 1.

    Case and spacing do not count.
    """
    phrase = " " + " ".join(content.decode("utf-8").lower().split()) + " "
    bins: list[int] = []
    for n in lengths:
        grams = [phrase[start : start + n] for start in range(len(phrase) - n + 1)]
        bins += [zlib.crc32(gram.encode()) % size for gram in grams]
    counts = np.bincount(bins, minlength=size).astype(np.float32)
    return counts / max(float(np.sqrt(counts @ counts)), 1.0)


# The names by which model.json says what made arrays of texts.
TEXTS: dict[str, Callable[[bytes], np.ndarray]] = {
    "bytes": utf8_bytes,
    "hashed_ngrams": hashed_ngrams,
}
