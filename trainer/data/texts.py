"""Byte strings of any length in one buffer: memory in proportion to what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np


class Texts:
    """n byte strings: `buffer` uint8 [bytes], and text i at start[i] : start[i + 1] of it.

    A numpy array of dtype S or U gives every string the width of the longest one.
    """

    def __init__(self, buffer: np.ndarray, start: np.ndarray):
        self.buffer = buffer
        self.start = start

    @classmethod
    def of(cls, texts: Iterable[str | bytes]) -> Texts:
        """Pack byte strings, or texts whose undecodable bytes are surrogates."""
        encoded = [
            text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
            for text in texts
        ]
        start = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), start)

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.buffer[self.start[index] : self.start[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        content, start = self.buffer.tobytes(), self.start.tolist()
        for first, end in zip(start[:-1], start[1:], strict=True):
            yield content[first:end]

    def take(self, kept: np.ndarray) -> Texts:
        """The strings where `kept` (bool [n]) holds."""
        if kept.all():
            return self
        lengths = np.diff(self.start)
        bytes_kept = np.repeat(kept, lengths)
        start = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
        return Texts(self.buffer[bytes_kept], start)

    def decoded(self) -> list[str]:
        """The strings as texts. Undecodable bytes are surrogates."""
        return [text.decode("utf-8", "surrogateescape") for text in self]
