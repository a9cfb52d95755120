"""In what order samples are seen: pure functions of (seed, position).

So a stream resumes at any position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .window import Need, number_of_windows


def generator(*words: int) -> np.random.Generator:
    """A counter-based generator of its own for each tuple of non-negative numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


@dataclass(frozen=True)
class Windows:
    """Shards that stream: each epoch divides them anew into windows, and mixes each by itself.

    start: int64 [S + 1], the first id of each shard, and behind the last.
    size: shards of a window, at most.
    """

    start: np.ndarray
    size: int

    def epoch(self, ids: np.ndarray, random: np.random.Generator) -> WindowedEpoch:
        """ids: int64 [L], some of them repeatedly."""
        if (ids[1:] < ids[:-1]).any():
            ids = np.sort(ids)
        begins = np.searchsorted(ids, self.start)
        present = random.permutation(np.flatnonzero(np.diff(begins)))
        windows = np.array_split(present, number_of_windows(len(present), self.size))
        mixed: list[np.ndarray] = []
        for shards in windows:
            own = [ids[begins[shard] : begins[shard + 1]] for shard in shards.tolist()]
            mixed.append(random.permutation(np.concatenate(own)))
        ends = np.cumsum([len(each) for each in mixed])
        return WindowedEpoch(np.concatenate(mixed), ends, [tuple(w.tolist()) for w in windows])


@dataclass(frozen=True)
class WindowedEpoch:
    """One epoch, window after window.

    ids: int64 [L].  ends: int64 [W], the offset behind each window.  shards: of each window.
    """

    ids: np.ndarray
    ends: np.ndarray
    shards: list[tuple[int, ...]]


class Order:
    """Positions int64 [n] of an endless stream -> ids int64 [n].

    An epoch is len(order) positions, permuted anew.

    ids: int64 [L].
    repeats: repeats(epoch) is int64 [L], summing to L: how often each id occurs in that epoch.
    None is once each.
    windows: of shards that stream. None permutes all ids together.
    """

    KEPT = 2  # epochs in memory: a batch may lie across the seam of two

    def __init__(
        self,
        ids: np.ndarray,
        seed: int,
        repeats: Callable[[int], np.ndarray] | None = None,
        windows: Windows | None = None,
    ):
        self.ids = np.asarray(ids, np.int64)
        self.seed = seed
        self.repeats = repeats
        self.windows = windows
        self._epochs: dict[int, WindowedEpoch] = {}
        if not len(self.ids):
            raise ValueError("an order needs at least one id")

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), len(self))
        ids = np.empty(len(offsets), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = self.epoch(epoch)[offsets[here]]
        return ids

    def epoch(self, epoch: int) -> np.ndarray:
        """int64 [L]: one whole epoch in order."""
        return self._epoch(epoch).ids

    def _epoch(self, epoch: int) -> WindowedEpoch:
        if epoch not in self._epochs:
            ids = self.ids
            if self.repeats is not None:
                ids = np.repeat(ids, self.repeats(epoch))
            assert len(ids) == len(self), (len(ids), len(self))
            while len(self._epochs) >= self.KEPT:
                del self._epochs[next(iter(self._epochs))]
            random = generator(self.seed, 1, epoch)
            if self.windows is None:
                self._epochs[epoch] = WindowedEpoch(random.permutation(ids), np.zeros(0), [])
            else:
                self._epochs[epoch] = self.windows.epoch(ids, random)
        return self._epochs[epoch]

    def streaming(self, windows: Windows) -> Order:
        """An order of the same ids, as often, window after window."""
        return Order(self.ids, self.seed, self.repeats, windows)

    def need(self, first: int, last: int, end: int | None = None) -> Need:
        """The shards of positions first .. last - 1 of a reader that stops before `end`.

        Of every window that they touch. Ahead is the one behind the first of these.
        """
        shards, behind = self._window(first)
        if behind >= last and (end is None or behind < end):
            ahead, _ = self._window(behind)
        else:
            ahead = ()
        total = Need(shards)
        while behind < last:
            shards, behind = self._window(behind)
            total += Need(shards)
        return total + Need((), ahead)

    def _window(self, position: int) -> tuple[tuple[int, ...], int]:
        """(the shards of the window that a position is in, the first position behind it)."""
        number, offset = divmod(position, len(self))
        epoch = self._epoch(number)
        window = int(np.searchsorted(epoch.ends, offset, side="right"))
        return epoch.shards[window], number * len(self) + int(epoch.ends[window])

    def expected(self, first: int, last: int) -> np.ndarray:
        """int64 [k]: the ids at positions first .. last - 1, all within one epoch, each id once."""
        epoch, offset = divmod(first, len(self))
        assert last - first <= len(self) - offset, (first, last)
        if offset or last - first < len(self):
            return np.unique(self.epoch(epoch)[offset : offset + last - first])
        if self.repeats is None:
            return self.ids
        return self.ids[self.repeats(epoch) > 0]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_epochs": {}}


class ComputedOrder:
    """Positions int64 [n] of an endless stream -> ids int64 [n], as an Order without its arrays.

    An epoch is a permutation of 0 .. num_samples - 1 without `excluded`: a Feistel network with
    keys of its own, walked on from numbers that are too large (Black & Rogaway 2002).  Branches
    draw few of nearly all samples, each by itself: permutations in memory would be many times the
    data's size.

    excluded: int64 [k], sorted, distinct.
    """

    ROUNDS = 6

    def __init__(self, num_samples: int, excluded: np.ndarray, seed: int):
        self.seed = seed
        self.length = num_samples - len(excluded)
        # Of the ids that stay, how many stand before each excluded one.
        self.before = np.asarray(excluded, np.int64) - np.arange(len(excluded))
        if self.length < 1:
            raise ValueError("an order needs at least one id")

    def __len__(self) -> int:
        return self.length

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.length)
        places = np.empty(len(offsets), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            keys = generator(self.seed, 1, epoch).integers(2**63, size=self.ROUNDS, dtype=np.uint64)
            places[here] = permuted(offsets[here], self.length, keys)
        return places + np.searchsorted(self.before, places, side="right")


def permuted(numbers: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0 .. length - 1 at `numbers`, int64 [n] both. keys: uint64 [rounds]."""
    bits = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    images = numbers.astype(np.uint64)
    left = np.arange(len(images))
    while len(left):
        images[left] = _feistel(images[left], bits, mask, keys)
        left = left[images[left] >= length]
    return images.astype(np.int64)


def _feistel(x: np.ndarray, bits: np.uint64, mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0 .. 4^bits - 1."""
    high, low = x >> bits, x & mask
    for key in keys:
        mixed = (low + key) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        high, low = low, high ^ ((mixed >> np.uint64(32)) & mask)
    return high << bits | low


def shuffled(ids: int | Sequence[int] | np.ndarray, seed: int) -> Order:
    """Every id exactly once per epoch.

    Parameters
    ----------
    ids : int64 [n] or int
        The ids, or the number of samples.
    seed : int

    Returns
    -------
    Order
    """
    if isinstance(ids, int):
        return Order(np.arange(ids), seed)
    return Order(np.asarray(ids, np.int64), seed)


def balanced(
    labels: np.ndarray, seed: int, exponent: float, ids: Sequence[int] | np.ndarray | None = None
) -> Order:
    """Class c is drawn in proportion to count_c^(1 - exponent), as by `weighted`.

    No class goes missing: count_c^(1 - exponent) rises with count_c, so the smallest share is the
    rarest class's, and that is at least its natural one.

    Parameters
    ----------
    labels : int64 [N]
        Of all samples.
    seed : int
    exponent : float
        0: natural frequencies, every id once per epoch.  1: every class equally often.
    ids : int64 [n], optional
        The samples to draw from, all by default.

    Returns
    -------
    Order

    Raises
    ------
    ValueError
        If the exponent is not between 0 and 1.
    """
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent {exponent} is not between 0 (natural) and 1 (uniform)")
    chosen = np.asarray(labels)
    if ids is not None:
        chosen = chosen[np.asarray(ids, np.int64)]
    return weighted(labels, seed, np.bincount(chosen).astype(float) ** (1 - exponent), ids)


def weighted(
    labels: np.ndarray,
    seed: int,
    weights: np.ndarray | Sequence[float],
    ids: Sequence[int] | np.ndarray | None = None,
) -> Order:
    """Class c is drawn in proportion to weights[c]. Its samples take turns, evenly over the epochs.

    An epoch has as many positions as there are ids.  Each class has the same number of them in
    every epoch, within one of its exact share.

    labels: int64 [N], of all samples.  weights: [C], not negative.
    ids: int64 [n], the samples to draw from, all by default.
    """
    ids = np.arange(len(labels)) if ids is None else np.asarray(ids, np.int64)
    present, classes, counts = np.unique(
        np.asarray(labels)[ids], return_inverse=True, return_counts=True
    )
    weights = np.asarray(weights, float)[present]
    edges = np.cumsum(weights) / weights.sum() * len(ids)
    edges[-1] = len(ids)
    # Systematic sampling: class c gets the points 1/2, 3/2, ... that fall between its edges.
    draws = np.diff(np.concatenate([[0], np.floor(edges + 0.5).astype(np.int64)]))
    # Each sample's place in a fixed random sequence of its class: draw number d of the class goes
    # to place d mod count.
    shuffle = generator(seed, 2).permutation(len(ids))
    by_class = shuffle[np.argsort(classes[shuffle], kind="stable")]
    places = np.empty(len(ids), np.int64)
    places[by_class] = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Order(ids, seed, _Turns(places, draws[classes], counts[classes]))


class _Turns:
    """How often each sample occurs in an epoch.

    Its class has `counts` samples and `draws` draws per epoch. It stands at `places` of its class's
    sequence.  All int64 [L].
    """

    def __init__(self, places: np.ndarray, draws: np.ndarray, counts: np.ndarray):
        self.places = places
        self.draws = draws
        self.counts = counts

    def __call__(self, epoch: int) -> np.ndarray:
        # Of the class's draws epoch * draws + k, k < draws, each place gets draws // count, and one
        # more if it is among the (draws mod count) places that follow the epoch's first.
        behind = (self.places - epoch * self.draws) % self.counts
        return self.draws // self.counts + (behind < self.draws % self.counts)


def part_of_each_class(labels: np.ndarray, ids: np.ndarray, part: float, seed: int) -> np.ndarray:
    """A part of each class's examples, drawn at random, at least one: int64 [n], ascending.

    labels: int64 [N], of all.  ids: int64, those to draw from.
    """
    permuted = np.random.default_rng(seed).permutation(ids)
    by_class = permuted[np.argsort(labels[permuted], kind="stable")]  # in random order
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    taken = np.maximum(1, np.round(part * counts)).astype(int)
    chosen = [by_class[a : a + n] for a, n in zip(first, taken, strict=True)]
    return np.sort(np.concatenate(chosen))


def expected_distinct(class_counts: np.ndarray | Sequence[int], batch: int) -> float:
    """Distinct classes expected in a fair draw of `batch` samples without replacement.

    How well an order mixes is measured against this.  A class of n among N samples is missed with
    probability C(N - n, batch) / C(N, batch).

    class_counts: [C].
    """
    counts = np.asarray(class_counts, float)
    others = counts.sum() - counts
    drawn = np.arange(batch)[:, None]
    missed = np.prod(np.maximum(others - drawn, 0) / (counts.sum() - drawn), axis=0)
    return float((1 - missed).sum())
