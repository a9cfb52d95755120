"""Index tensors that say, for a set of active specialists, which classes share a membership pattern.

They depend on the groups and the set alone, so they are made once per set and kept with the groups object (which must not change).
"""

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .newton import Membership

SETS_KEPT = 2048


@dataclass
class SetPatterns:
    """One active set of k specialists.  Union: the U classes in any of them, sorted by pattern.  Pattern 0: outside all of them.

    Position (slot, column) of the opinions, each padded to `width` columns, is written slot * width + column.
    """

    specialists: tuple[int, ...]
    classes: np.ndarray  # int64 [U]
    pattern: np.ndarray  # int64 [U], ascending, from 1
    slot: np.ndarray  # int64 [U]: the first specialist of the set that holds the class
    column: np.ndarray  # int64 [U]: and the class's column there
    more: np.ndarray  # int64 [3, X]: position in the union, slot, column of every further specialist that holds a class
    outside: np.ndarray  # float64 [P, k]
    counts: np.ndarray  # float64 [P]: classes per pattern

    def __post_init__(self):
        self._on = {}

    def on(self, device: torch.device, dtype: torch.dtype, width: int, num_classes: int) -> "SharedIndex":
        """As tensors; kept, for a set that returns."""
        key = (device, dtype, width)
        if key not in self._on:
            self._on[key] = SharedIndex(self, device, dtype, width, num_classes)
        return self._on[key]


class SharedIndex:
    """The index of rows that have the same active set; leading dimensions of 1 are broadcast."""

    def __init__(self, patterns: SetPatterns, device, dtype, width: int, num_classes: int):
        def tensor(x):
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        self.specialists = patterns.specialists
        self.classes = tensor(patterns.classes)[None]
        self.source = tensor(patterns.slot * width + patterns.column)[None]
        self.more_at = tensor(patterns.more[0])[None]
        self.more_source = tensor(patterns.more[1] * width + patterns.more[2])[None]
        self.more_weight = None
        self.pattern = tensor(patterns.pattern)[None]
        self.sizes = patterns.counts[1:].astype(int).tolist()
        self.members = Membership(tensor(patterns.outside), tensor(patterns.counts))
        self.outside_all = torch.ones(num_classes, dtype=dtype, device=device)
        self.outside_all[self.classes[0]] = 0

    @cached_property
    def num_patterns(self) -> int:
        return len(self.sizes) + 1


class PaddedIndex:
    """The same for rows with different active sets of equal size, padded to the largest: every tensor has a row per row.

    A padded entry of the union names the row's first class, and the pattern `num_patterns`, whose factor is 0.
    """

    def __init__(self, sets: list[SetPatterns], which: Tensor, device, width: int):
        def stacked(arrays, fill):
            longest = max(1, max(len(array) for array in arrays))
            out = np.empty((len(arrays), longest), dtype=np.int64)
            for row, array in enumerate(arrays):
                out[row, : len(array)] = array
                out[row, len(array) :] = fill(row)
            return torch.from_numpy(out).to(device)[which]

        self.num_patterns = max(len(s.counts) for s in sets)
        self.classes = stacked([s.classes for s in sets], lambda row: sets[row].classes[0])
        self.pattern = stacked([s.pattern for s in sets], lambda row: self.num_patterns)
        self.source = stacked([s.slot * width + s.column for s in sets], lambda row: 0)
        self.more_at = stacked([s.more[0] for s in sets], lambda row: 0)
        self.more_source = stacked([s.more[1] * width + s.more[2] for s in sets], lambda row: 0)
        real = [len(s.more[0]) for s in sets]
        used = np.arange(self.more_at.shape[1]) < np.array(real)[:, None]
        self.more_weight = torch.from_numpy(used).to(device)[which]
        outside = np.zeros((len(sets), self.num_patterns, sets[0].outside.shape[1]))
        counts = np.zeros((len(sets), self.num_patterns))
        for row, s in enumerate(sets):
            outside[row, : len(s.counts)] = s.outside
            counts[row, : len(s.counts)] = s.counts
        self.members = Membership(torch.from_numpy(outside).to(device)[which], torch.from_numpy(counts).to(device)[which])


def set_patterns(groups, specialists: tuple[int, ...]) -> SetPatterns:
    """The patterns of one active set, from the cache of `groups`."""
    cache, lock = _cache_of(groups)
    with lock:
        if specialists in cache:
            cache.move_to_end(specialists)
            return cache[specialists]
    made = _make(groups, specialists)
    with lock:
        cache[specialists] = made
        while len(cache) > SETS_KEPT:
            cache.popitem(last=False)
    return made


def _make(groups, specialists: tuple[int, ...]) -> SetPatterns:
    chosen = [np.asarray(groups.members[m], dtype=np.int64) for m in specialists]
    sizes = [len(classes) for classes in chosen]
    slot = np.repeat(np.arange(len(chosen)), sizes)
    column = np.concatenate([np.arange(size) for size in sizes])
    classes, of_entry = np.unique(np.concatenate(chosen), return_inverse=True)
    inside = np.zeros((len(classes), len(chosen)), dtype=bool)
    inside[of_entry, slot] = True
    packed = np.packbits(inside, axis=1)
    _, first, pattern = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    pattern = pattern.reshape(-1)
    order = np.argsort(pattern, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    at = place[of_entry]
    firsts = np.unique(at, return_index=True)[1]
    rest = np.setdiff1d(np.arange(len(at)), firsts)
    outside = np.concatenate([np.ones((1, len(chosen))), (~inside[first]).astype(float)])
    counts = np.concatenate([[groups.num_classes - len(classes)], np.bincount(pattern)]).astype(float)
    if counts[0] == 0:
        outside[0] = 0  # no class is there to take a dustbin's mass
    return SetPatterns(
        specialists=specialists,
        classes=classes[order],
        pattern=pattern[order] + 1,
        slot=slot[firsts],
        column=column[firsts],
        more=np.stack([at[rest], slot[rest], column[rest]]),
        outside=outside,
        counts=counts,
    )


_caches: dict[int, tuple[weakref.ref, OrderedDict, threading.Lock]] = {}


def _cache_of(groups) -> tuple[OrderedDict, threading.Lock]:
    # ClassGroups compares by value and so has no hash; the cache belongs to the object.
    key = id(groups)
    found = _caches.get(key)
    if found is None or found[0]() is not groups:
        found = (weakref.ref(groups, lambda _: _caches.pop(key, None)), OrderedDict(), threading.Lock())
        _caches[key] = found
    return found[1], found[2]
