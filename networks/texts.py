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
    phrase = _phrase(content)
    bins: list[int] = []
    for n in lengths:
        grams = [phrase[start : start + n] for start in range(len(phrase) - n + 1)]
        bins += [zlib.crc32(gram.encode()) % size for gram in grams]
    counts = np.bincount(bins, minlength=size).astype(np.float32)
    return counts / max(float(np.sqrt(counts @ counts)), 1.0)


def ngram_bag(
    content: bytes,
    bins: int = 8192,
    lengths: tuple[int, ...] = (2, 3, 4),
    max_ngrams: int = 256,
) -> np.ndarray:
    """int32 [max_ngrams]: the hashed bin of each character n-gram, then -1 to the end.

    The n-grams and their bins are those of `hashed_ngrams`.  They are listed by where they begin,
    so a text that has more of them is read up to a place: by default its first 85 characters.
    """
    phrase = _phrase(content)
    grams = [
        phrase[start : start + n]
        for start in range(len(phrase))
        for n in lengths
        if start + n <= len(phrase)
    ]
    bag = np.full(max_ngrams, -1, np.int32)
    kept = grams[:max_ngrams]
    bag[: len(kept)] = [zlib.crc32(gram.encode()) % bins for gram in kept]
    return bag


def _phrase(content: bytes) -> str:
    """The text in lower case, one space between words and at both ends."""
    return " " + " ".join(content.decode("utf-8").lower().split()) + " "


# The names by which model.json says what made arrays of texts.
TEXTS: dict[str, Callable[[bytes], np.ndarray]] = {
    "bytes": utf8_bytes,
    "hashed_ngrams": hashed_ngrams,
    "ngram_bag": ngram_bag,
}
# Of these, the ones whose numbers are indices: a network looks them up, and cannot calculate with
# them.
INDICES = frozenset({"ngram_bag"})
