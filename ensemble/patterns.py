"""Index tensors that say, for a set of active specialists, which classes share a membership pattern.

They depend on the groups and the set alone, so they are made once per set and kept with the groups object (which must
not change).
"""

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .newton import Membership

SETS_KEPT = 2048
# Patterns of so many classes are summed each by a call of its own, smaller ones by one matrix product.
LARGE = 64


@dataclass
class SetPatterns:
    """One active set of k specialists.  Its union: the U classes in any of them, ascending.  Pattern 0: outside all of
    them."""

    specialists: tuple[int, ...]
    members: list[np.ndarray]  # S_m of each, ascending
    # [4, U] for each class of the union: the class; its pattern, from 1; the first specialist of the set (0 ... k - 1)
    # that holds it, and its column there.
    union: np.ndarray
    # [3, X] for every further specialist that holds a class: position in the union, specialist of the set, column.
    more: np.ndarray
    outside: np.ndarray  # [P, k]: 1 where the pattern lies outside
    counts: np.ndarray  # [P]: classes per pattern

    def __post_init__(self):
        self._on = {}
        self.sizes = [len(classes) for classes in self.members]

    def on(self, device: torch.device, dtype: torch.dtype, num_classes: int) -> "SharedIndex":
        """As tensors; kept, for a set that returns."""
        key = device, dtype
        if key not in self._on:
            self._on[key] = SharedIndex(self, device, dtype, num_classes)
        return self._on[key]


class SharedIndex:
    """For rows that have the same active set.  Their opinions stand side by side, each as wide as it is: [n, L].

    Every tensor has a leading dimension of 1, to be expanded.
    """

    def __init__(self, patterns: SetPatterns, device, dtype, num_classes: int):
        def tensor(x):
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        classes, pattern, slot, column = patterns.union
        self.widths = [size + 1 for size in patterns.sizes]
        start = np.cumsum([0, *self.widths[:-1]])
        self.dustbins = tensor(start + np.array(patterns.sizes))
        self.classes = tensor(classes)[None]
        self.pattern = tensor(pattern)[None]
        self.source = tensor(start[slot] + column)[None]
        at, more_slot, more_column = patterns.more
        self.more_at = tensor(at)[None]
        self.more_source = tensor(start[more_slot] + more_column)[None]
        # Classes ascend, so that a row of C probabilities is read and written in one sweep (ten times faster than
        # pattern by pattern); a row of the union is small, and put into the order of the patterns to be summed.
        self.by_pattern = tensor(np.argsort(pattern, kind="stable"))[None]
        sizes = np.bincount(pattern)[1:]
        large = int((sizes >= LARGE).sum())
        self.large_sizes = sizes[:large].tolist()
        small = np.repeat(np.arange(len(sizes) - large), sizes[large:])
        self.of_small = torch.zeros(len(small), len(sizes) - large, dtype=dtype, device=device)
        self.of_small[torch.arange(len(small)), torch.from_numpy(small)] = 1
        self.members = Membership(tensor(patterns.outside), tensor(patterns.counts))
        self.outside_all = torch.ones(num_classes, dtype=dtype, device=device)
        self.outside_all[self.classes[0]] = 0

    def pattern_sums(self, a: Tensor) -> Tensor:
        """a [n, U] -> [n, P - 1], the sums over each pattern inside."""
        *large, small = a.gather(1, self.by_pattern.expand(len(a), -1)).split(
            [*self.large_sizes, len(self.of_small)], dim=1
        )
        return torch.cat([*[part.sum(1, keepdim=True) for part in large], small @ self.of_small], 1)


class PaddedIndex:
    """For rows with different active sets of equal size k; opinions [n, k, width] flattened.  Every tensor has a row
    per row.

    A padded entry of the union names the row's first class and the pattern `num_patterns`; a padded further specialist
    weighs 0.
    """

    def __init__(self, sets: list[SetPatterns], which: Tensor, device, width: int):
        count, k = len(sets), len(sets[0].specialists)
        lengths = np.array([s.union.shape[1] for s in sets])
        further = np.array([s.more.shape[1] for s in sets])
        self.num_patterns = max(len(s.counts) for s in sets)
        union = np.zeros((4, count, lengths.max()), dtype=np.int64)
        more = np.zeros((3, count, further.max()), dtype=np.int64)
        outside = np.zeros((count, self.num_patterns, k))
        counts = np.zeros((count, self.num_patterns))
        for row, s in enumerate(sets):
            union[:, row, : lengths[row]] = s.union
            more[:, row, : further[row]] = s.more
            outside[row, : len(s.counts)] = s.outside
            counts[row, : len(s.counts)] = s.counts
        padding = np.arange(union.shape[2]) >= lengths[:, None]
        classes = np.where(padding, union[0, :, :1], union[0])
        pattern = np.where(padding, self.num_patterns, union[1])

        def per_row(x):
            return torch.from_numpy(x).to(device).index_select(0, which)

        self.classes, self.pattern = per_row(classes), per_row(pattern)
        self.source = per_row(union[2] * width + union[3])
        self.real = per_row(~padding)
        self.more_at, self.more_source = per_row(more[0]), per_row(more[1] * width + more[2])
        self.more_real = per_row(np.arange(more.shape[2]) < further[:, None])
        self.members = Membership(per_row(outside), per_row(counts))

    def pattern_sums(self, a: Tensor) -> Tensor:
        """a [n, U] -> [n, P - 1], the sums over each pattern inside."""
        sums = a.new_zeros(len(a), self.num_patterns + 1).scatter_add(1, self.pattern, a)
        return sums[:, 1 : self.num_patterns]


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
    # The largest pattern first: they are summed one by one, and the many small ones together.
    by_size = np.argsort(-np.bincount(pattern.reshape(-1)), kind="stable")
    first, pattern = first[by_size], np.argsort(by_size)[pattern.reshape(-1)]
    firsts = np.unique(of_entry, return_index=True)[1]
    rest = np.setdiff1d(np.arange(len(of_entry)), firsts)
    outside = np.concatenate([np.ones((1, len(chosen))), (~inside[first]).astype(float)])
    counts = np.concatenate([[groups.num_classes - len(classes)], np.bincount(pattern)]).astype(
        float
    )
    if counts[0] == 0:
        outside[0] = 0  # no class is there to take a dustbin's mass
    return SetPatterns(
        specialists=specialists,
        members=chosen,
        union=np.stack([classes, pattern + 1, slot[firsts], column[firsts]]),
        more=np.stack([of_entry[rest], slot[rest], column[rest]]),
        outside=outside,
        counts=counts,
    )


_caches: dict[int, tuple[weakref.ref, OrderedDict, threading.Lock]] = {}


def _cache_of(groups) -> tuple[OrderedDict, threading.Lock]:
    # ClassGroups compares by value and so has no hash; the cache belongs to the object.
    key = id(groups)
    found = _caches.get(key)
    if found is None or found[0]() is not groups:
        found = (
            weakref.ref(groups, lambda _: _caches.pop(key, None)),
            OrderedDict(),
            threading.Lock(),
        )
        _caches[key] = found
    return found[1], found[2]
