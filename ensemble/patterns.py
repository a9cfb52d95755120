"""Index tensors that say, for a set of active specialists, which classes share a pattern.

They depend on the groups and the set alone.  So they are made once per set and kept with the groups
object (which must not change).
"""

import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clustering.groups import ClassGroups

from .host_reads import to_device
from .newton import Membership
from .predictions import SpecialistPredictions

SETS_KEPT = 2048
FLOATS_KEPT = 2**24  # numbers in all sets that are kept, about: 128 MiB
# Patterns of so many classes are summed each by a call of its own, smaller ones by one product.
LARGE = 64
# Entries of that product's matrix. Larger ones are added up one by one.
PRODUCT_UP_TO = 2**23


@dataclass
class SetPatterns:
    """One active set of k specialists.  Its union: the U classes in any of them, ascending.

    specialists: their numbers.
    classes: S_m of each, ascending.
    union: [4, U], for each class of the union: the class. Its pattern, from 1. The first specialist
    of the set (0 ... k - 1) that holds it, and its column there.
    more: [3, X], for every further specialist that holds a class: position in the union, specialist
    of the set, column.
    outside: [P, k], 1 where the pattern lies outside.  Pattern 0 is outside all of them.
    counts: [P], classes per pattern.
    """

    specialists: tuple[int, ...]
    classes: list[np.ndarray]
    union: np.ndarray
    more: np.ndarray
    outside: np.ndarray
    counts: np.ndarray

    def __post_init__(self):
        self._shared: dict[tuple[torch.device, torch.dtype], SharedIndex] = {}
        self.sizes = [len(classes) for classes in self.classes]
        # With the pairs and the sums over patterns that a SharedIndex makes of them.
        self.floats = 4 * self.outside.size + self.union.size + self.more.size

    def on(self, device: torch.device, dtype: torch.dtype, num_classes: int) -> "SharedIndex":
        """These indices as tensors on a device. Kept, for a set that returns."""
        key = device, dtype
        if key not in self._shared:
            self._shared[key] = SharedIndex(self, device, dtype, num_classes)
        return self._shared[key]


class SpecialRows(NamedTuple):
    """What the k active specialists of n rows predict.

    values: [n, L], L columns in the order of an index.  dustbins: [n, k], float64.
    sums: [n, k], of each prediction.  lowest: [n, 1 or k], the smallest entries.
    """

    values: Tensor
    dustbins: Tensor
    sums: Tensor
    lowest: Tensor


class PatternIndex:
    """Index tensors of n rows that have k active specialists each.

    Every tensor has a row per row, or one row for all, to be expanded.  Sizes are read as shape[0],
    not by len: torch.export follows the former to other batch sizes.

    slots [., k]            the active specialists
    classes [., U]          the classes of the union
    pattern [., U]          the pattern of each
    source [., U]           the column of its first specialist's prediction, in the values [n, L]
    more_at [., X]          of every further prediction: position in the union
    more_source [., X]      and column in the values
    """

    slots: Tensor
    classes: Tensor
    pattern: Tensor
    source: Tensor
    more_at: Tensor
    more_source: Tensor
    membership: Membership

    def first(self, values: Tensor) -> Tensor:
        """The first specialist's prediction of each class of the union: [n, L] -> [n, U]."""
        return values.gather(1, self.source.expand(values.shape[0], -1))

    def add_further(self, joined: Tensor, values: Tensor) -> Tensor:
        """Add every further specialist's prediction to `joined` [n, U], in place."""
        if self.more_at.shape[1] == 0:
            return joined
        more = self._further(values)
        return joined.scatter_add_(1, self.more_at.expand(values.shape[0], -1), more)

    def _further(self, values: Tensor) -> Tensor:
        return values.gather(1, self.more_source.expand(values.shape[0], -1))

    def of_union(self, per_pattern: Tensor) -> Tensor:
        """[n, P] -> [n, U]: each class its pattern's number, 0 for padding."""
        n = per_pattern.shape[0]
        padded = torch.cat([per_pattern, per_pattern.new_zeros(n, 1)], 1)
        return padded.gather(1, self.pattern.expand(n, -1))

    def read(self, special: SpecialistPredictions, rows: Tensor | None) -> SpecialRows:
        """The active specialists' predictions about `rows` (None: every row, in order)."""
        raise NotImplementedError

    def per_column(self, weights: Tensor) -> Tensor:
        """[n, k] -> [n, L]: each specialist's weight at every column of its prediction."""
        raise NotImplementedError

    def pattern_sums(self, joined: Tensor) -> Tensor:
        """[n, U] -> [n, P - 1], the sums over each pattern inside."""
        raise NotImplementedError

    def without_padding(self, on_union: Tensor) -> Tensor:
        """[n, U] with 0 at entries that repeat a class of their row."""
        raise NotImplementedError


class SharedIndex(PatternIndex):
    """For rows that have the same active set.  Every tensor has one row.

    The predictions stand side by side, each as wide as it is.
    """

    def __init__(
        self, patterns: SetPatterns, device: torch.device, dtype: torch.dtype, num_classes: int
    ):
        def tensor(x: np.ndarray) -> Tensor:
            return to_device(np.ascontiguousarray(x), device)

        self.specialists = patterns.specialists
        self.slots = tensor(np.array([patterns.specialists], dtype=np.int64))
        self.widths = [size + 1 for size in patterns.sizes]
        start = np.cumsum([0, *self.widths[:-1]])
        self.dustbin_columns = tensor(start + np.array(patterns.sizes))
        self.owner = tensor(np.repeat(np.arange(len(self.widths)), self.widths))

        classes, pattern, slot, column = patterns.union
        self.classes = tensor(classes)[None]
        self.pattern = tensor(pattern)[None]
        self.source = tensor(start[slot] + column)[None]
        at, more_slot, more_column = patterns.more
        self.more_at = tensor(at)[None]
        self.more_source = tensor(start[more_slot] + more_column)[None]
        self.membership = Membership(tensor(patterns.outside), tensor(patterns.counts))

        # Classes ascend, so that a row of C probabilities is read and written in one sweep (ten
        # times faster than pattern by pattern).  A row of the union is small, and put into the
        # order of the patterns to be summed.
        self.by_pattern = tensor(np.argsort(pattern, kind="stable"))[None]
        sizes = np.bincount(pattern)[1:]
        large = int((sizes >= LARGE).sum())
        self.large_sizes = sizes[:large].tolist()
        small = np.repeat(np.arange(len(sizes) - large), sizes[large:])
        self.small = tensor(small)
        self.small_count = len(sizes) - large
        self.of_small: Tensor | None = None
        if len(small) * self.small_count <= PRODUCT_UP_TO:
            of_small = torch.zeros(len(small), self.small_count, dtype=dtype)
            of_small[torch.arange(len(small)), torch.from_numpy(small)] = 1
            self.of_small = to_device(of_small, device)
        self._dtype, self._num_classes = dtype, num_classes

    @cached_property
    def outside_all(self) -> Tensor:
        """[C], 0 at the union, else 1.  Sparse rows do without it."""
        outside = torch.ones(self._num_classes, dtype=self._dtype, device=self.classes.device)
        return outside.index_fill_(0, self.classes[0], 0)

    def read(self, special: SpecialistPredictions, rows: Tensor | None) -> SpecialRows:
        parts = special.side_by_side(self.specialists, rows)
        values = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if len(set(self.widths)) == 1:
            sums = values.unflatten(1, (len(parts), -1)).sum(2)
        else:
            sums = torch.stack([part.sum(1) for part in parts], 1)
        # One lowest entry for all of a row's predictions.
        return SpecialRows(values, self.dustbins(values), sums, values.amin(1, keepdim=True))

    def dustbins(self, values: Tensor) -> Tensor:
        """[n, k], float64."""
        return values.index_select(1, self.dustbin_columns).double()

    def per_column(self, weights: Tensor) -> Tensor:
        return weights.index_select(1, self.owner)

    def pattern_sums(self, joined: Tensor) -> Tensor:
        ordered = joined.gather(1, self.by_pattern.expand(joined.shape[0], -1))
        *large, small = ordered.split([*self.large_sizes, self.small.shape[0]], dim=1)
        if self.of_small is not None:
            of_small = small @ self.of_small
        else:
            of_small = small.new_zeros(small.shape[0], self.small_count)
            of_small = of_small.index_add(1, self.small, small)
        return torch.cat([*[part.sum(1, keepdim=True) for part in large], of_small], 1)

    def without_padding(self, on_union: Tensor) -> Tensor:
        return on_union


class PaddedIndex(PatternIndex):
    """For rows with different active sets of equal size k.  Every tensor has a row per row.

    The predictions are padded to one width, [n, k, width], and flattened.  A padded entry of the
    union names the row's first class and the pattern `num_patterns`. A padded further specialist
    weighs 0.
    """

    def __init__(
        self,
        sets: list[SetPatterns],
        set_of_row: Tensor,
        device: torch.device,
        width: int,
        groups: ClassGroups,
    ):
        def per_row(x: np.ndarray) -> Tensor:
            return to_device(x, device).index_select(0, set_of_row)

        lengths = np.array([s.union.shape[1] for s in sets])
        further = np.array([s.more.shape[1] for s in sets])
        self.num_patterns = max(len(s.counts) for s in sets)
        self.width = width
        self.slots = per_row(np.array([s.specialists for s in sets], dtype=np.int64))
        self._sizes = to_device(np.array([len(classes) for classes in groups.members]), device)

        union = np.zeros((4, len(sets), lengths.max()), dtype=np.int64)
        more = np.zeros((3, len(sets), further.max()), dtype=np.int64)
        outside = np.zeros((len(sets), self.num_patterns, self.slots.shape[1]))
        counts = np.zeros((len(sets), self.num_patterns))
        for row, s in enumerate(sets):
            union[:, row, : lengths[row]] = s.union
            more[:, row, : further[row]] = s.more
            outside[row, : len(s.counts)] = s.outside
            counts[row, : len(s.counts)] = s.counts

        padding = np.arange(union.shape[2]) >= lengths[:, None]
        self.real = per_row(~padding)
        self.classes = per_row(np.where(padding, union[0, :, :1], union[0]))
        self.pattern = per_row(np.where(padding, self.num_patterns, union[1]))
        self.source = per_row(union[2] * width + union[3])
        self.more_at = per_row(more[0])
        self.more_source = per_row(more[1] * width + more[2])
        self.more_real = per_row(np.arange(more.shape[2]) < further[:, None])
        self.membership = Membership(per_row(outside), per_row(counts))

    def read(self, special: SpecialistPredictions, rows: Tensor | None) -> SpecialRows:
        values = special.padded(self.slots, rows)
        dustbins = values.gather(2, self._sizes[self.slots][..., None])[..., 0].double()
        return SpecialRows(values.flatten(1), dustbins, values.sum(2), values.amin(2))

    def _further(self, values: Tensor) -> Tensor:
        return super()._further(values) * self.more_real

    def per_column(self, weights: Tensor) -> Tensor:
        return weights.repeat_interleave(self.width, dim=1)

    def pattern_sums(self, joined: Tensor) -> Tensor:
        sums = joined.new_zeros(len(joined), self.num_patterns + 1)
        sums = sums.scatter_add(1, self.pattern, joined)
        return sums[:, 1 : self.num_patterns]

    def without_padding(self, on_union: Tensor) -> Tensor:
        return on_union * self.real


def set_patterns(groups: ClassGroups, specialists: tuple[int, ...]) -> SetPatterns:
    """The patterns of one active set, from the cache of `groups`."""
    cache = _cache_of(groups)
    with cache.lock:
        if specialists in cache.sets:
            cache.sets.move_to_end(specialists)
            return cache.sets[specialists]
    patterns = _make(groups, specialists)
    with cache.lock:
        cache.put(specialists, patterns)
    return patterns


def _make(groups: ClassGroups, specialists: tuple[int, ...]) -> SetPatterns:
    chosen = [np.asarray(groups.members[m], dtype=np.int64) for m in specialists]
    sizes = [len(classes) for classes in chosen]
    # An entry is a class of one specialist: `slot` says of which, `column` where.
    slot = np.repeat(np.arange(len(chosen)), sizes)
    column = np.concatenate([np.arange(size) for size in sizes])
    # An entry among `firsts` is the first of its class.
    classes, firsts, of_entry = np.unique(
        np.concatenate(chosen), return_index=True, return_inverse=True
    )
    inside = np.zeros((len(classes), len(chosen)), dtype=bool)
    inside[of_entry, slot] = True

    packed = np.packbits(inside, axis=1)
    # A row of bytes as one value, which takes a fifth of the time of np.unique along an axis.
    of_row = packed.reshape(-1)
    if packed.shape[1] > 1:
        of_row = packed.view(np.dtype((np.void, packed.shape[1]))).reshape(-1)
    _, first, pattern = np.unique(of_row, return_index=True, return_inverse=True)
    # The largest pattern first: they are summed one by one, and the many small ones together.
    by_size = np.argsort(-np.bincount(pattern), kind="stable")
    first = first[by_size]
    pattern = np.argsort(by_size)[pattern]

    is_further = np.ones(len(of_entry), dtype=bool)
    is_further[firsts] = False
    rest = np.flatnonzero(is_further)
    outside = np.concatenate([np.ones((1, len(chosen))), (~inside[first]).astype(float)])
    counts = np.concatenate([[groups.num_classes - len(classes)], np.bincount(pattern)])
    if counts[0] == 0:
        outside[0] = 0  # no class is there to take a dustbin's mass
    return SetPatterns(
        specialists=specialists,
        classes=chosen,
        union=np.stack([classes, pattern + 1, slot[firsts], column[firsts]]),
        more=np.stack([of_entry[rest], slot[rest], column[rest]]),
        outside=outside,
        counts=counts.astype(float),
    )


class _Cache:
    """Sets in the order of their last use.  floats: numbers in all of them, about."""

    def __init__(self):
        self.sets: OrderedDict[tuple[int, ...], SetPatterns] = OrderedDict()
        self.floats = 0
        self.lock = threading.Lock()

    def put(self, specialists: tuple[int, ...], patterns: SetPatterns) -> None:
        """The last one stays, however large."""
        if specialists in self.sets:  # another thread was quicker
            return
        self.sets[specialists] = patterns
        self.floats += patterns.floats
        while len(self.sets) > SETS_KEPT or (self.floats > FLOATS_KEPT and len(self.sets) > 1):
            _, oldest = self.sets.popitem(last=False)
            self.floats -= oldest.floats


_caches: dict[int, tuple[weakref.ref, _Cache]] = {}


def _cache_of(groups: ClassGroups) -> _Cache:
    # ClassGroups compares by value and so has no hash. The cache belongs to the object.
    key = id(groups)
    entry = _caches.get(key)
    if entry is None or entry[0]() is not groups:
        owner = weakref.ref(groups, lambda _: _caches.pop(key, None))
        entry = (owner, _Cache())
        _caches[key] = entry
    return entry[1]
