"""Which shards are held while a set is read that does not fit on the disk: pure functions.

A reader says at every place of its order which shards it reads now and which come next.  The
directory holds those of all readers, and of the others as many as fit, those used last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Need:
    """Shards by number, in the order in which they are read. None is in both.

    now: read at this place.  ahead: read next.
    """

    now: tuple[int, ...] = ()
    ahead: tuple[int, ...] = ()

    def __add__(self, other: Need) -> Need:
        """What two readers need together."""
        now = tuple(dict.fromkeys(self.now + other.now))
        ahead = dict.fromkeys(self.ahead + other.ahead)
        return Need(now, tuple(number for number in ahead if number not in now))


class Passage:
    """Samples read once, in a given order: the shards of any stretch of them.

    shards: int64 [n], the shard of each sample.  size: how many shards to fetch ahead.
    """

    def __init__(self, shards: np.ndarray, size: int):
        self.begins = np.flatnonzero(np.diff(shards, prepend=-1))  # of each run of one shard
        self.shards = shards[self.begins].tolist()
        self.size = size

    def need(self, first: int, last: int, end: int | None = None) -> Need:
        """What samples first .. last - 1 need, for a reader that stops before `end`."""
        begin, behind = np.searchsorted(self.begins, [first, last - 1], side="right").tolist()
        until = behind + self.size
        if end is not None:
            until = min(until, int(np.searchsorted(self.begins, end, side="left")))
        now = tuple(dict.fromkeys(self.shards[begin - 1 : behind]))
        return Need(now) + Need((), tuple(self.shards[behind:until]))

    def divided(self, parts: int, samples: int) -> list[int]:
        """[parts + 1]: where each part begins, of about as many samples, none within a shard."""
        starts = [*self.begins.tolist(), samples]
        wanted = [samples * part // parts for part in range(parts + 1)]
        return [starts[int(np.searchsorted(starts, place))] for place in wanted]


class Window:
    """What one process holds of a set: what its readers need, and what else it read last.

    most: shards that are read without being announced, at most.
    """

    def __init__(self, most: int):
        self.most = most
        self.kept: set[int] = set()
        self._needs: dict[object, Need] = {}
        self._recent: list[int] = []

    def announce(self, reader: object, need: Need) -> None:
        """What a reader needs from here on, in place of what it needed before."""
        self._needs[reader] = need
        self._recent.clear()

    def leave(self, reader: object) -> None:
        """The reader has ended."""
        self._needs.pop(reader, None)

    def read(self, number: int) -> None:
        """A shard is read that may not have been announced."""
        if number in self.held():
            return
        self._recent = [*self._recent, number][-self.most :]

    def held(self) -> dict[int, bool]:
        """{shard: whether it is read now, not only ahead}, in the order of need."""
        total = sum(self._needs.values(), Need())
        now = dict.fromkeys([*total.now, *self._recent, *sorted(self.kept)], True)
        return now | {number: False for number in total.ahead if number not in now}


class Copy(NamedTuple):
    """A file that may be evicted: its bytes, its index's among them, and when it was used."""

    size: int
    used: float


def evictions(idle: Mapping[str, Copy], excess: int) -> list[str] | None:
    """Which idle copies go, those used least recently, for `excess` bytes. None if too few do."""
    gone: list[str] = []
    for name in sorted(idle, key=lambda name: idle[name].used):
        if excess <= 0:
            break
        gone.append(name)
        excess -= idle[name].size
    return gone if excess <= 0 else None


def reserved(leased: Mapping[str, int], present: Iterable[str]) -> int:
    """Bytes that are left free for what readers need now and has not come yet.

    leased: {name: its bytes, 0 where it is needed later}.
    """
    there = set(present)
    return sum(size for name, size in leased.items() if name not in there)


def most_at_once(sizes: Sequence[int], counts: Sequence[int], mixed: int, span: int) -> int:
    """Bytes of the shards in the windows that `span` neighbouring positions of an order may touch.

    sizes: bytes of each shard.  counts: positions of each.  mixed: shards of a window.
    """
    windows = number_of_windows(len(sizes), mixed)
    smallest = sum(sorted(counts)[: len(sizes) // windows])
    touched = 2 + max(0, span - 1) // max(1, smallest)
    shards = min(touched * mixed, len(sizes))
    return sum(sorted(sizes)[len(sizes) - shards :])


def number_of_windows(shards: int, mixed: int) -> int:
    """Into how many windows of at most `mixed` so many shards are divided."""
    return max(1, -(-shards // mixed))
