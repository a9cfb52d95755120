"""In what order samples are seen: pure functions of (seed, position), so that a stream resumes at any position."""

from __future__ import annotations

import numpy as np


def generator(*words: int) -> np.random.Generator:
    """A counter-based generator of its own for each tuple of non-negative numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


class Order:
    """Positions int64[n] of an endless stream -> ids int64[n].  An epoch is len(order) positions, permuted anew.

    ids: int64[L].  repeats(epoch): int64[L] summing to L, how often each id occurs in that epoch; None is once each.
    """

    KEPT = 2  # epochs in memory: a batch may lie across the seam of two

    def __init__(self, ids: np.ndarray, seed: int, repeats=None):
        self.ids, self.seed, self.repeats = np.asarray(ids, np.int64), seed, repeats
        self._epochs: dict[int, np.ndarray] = {}
        if not len(self.ids):
            raise ValueError("an order needs at least one id")

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, positions) -> np.ndarray:
        epochs, places = np.divmod(np.asarray(positions, np.int64), len(self))
        ids = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = self.epoch(epoch)[places[here]]
        return ids

    def epoch(self, epoch: int) -> np.ndarray:
        """int64[L]: one whole epoch in order."""
        if epoch not in self._epochs:
            ids = self.ids if self.repeats is None else np.repeat(self.ids, self.repeats(epoch))
            assert len(ids) == len(self), (len(ids), len(self))
            while len(self._epochs) >= self.KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = generator(self.seed, 1, epoch).permutation(ids)
        return self._epochs[epoch]

    def expected(self, first: int, last: int) -> np.ndarray:
        """int64[k]: the ids at positions first .. last - 1, all within one epoch, each id once."""
        epoch, place = divmod(first, len(self))
        assert last - first <= len(self) - place, (first, last)
        if place or last - first < len(self):
            return np.unique(self.epoch(epoch)[place : place + last - first])
        return self.ids if self.repeats is None else self.ids[self.repeats(epoch) > 0]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_epochs": {}}


def shuffled(ids, seed: int) -> Order:
    """Every id exactly once per epoch.  ids: int64[n], or the number of samples."""
    return Order(np.arange(ids) if isinstance(ids, int) else ids, seed)


def balanced(labels, seed: int, exponent: float, ids=None) -> Order:
    """Class c is drawn in proportion to count_c^(1 - exponent), as by `weighted`.

    exponent: 0 natural frequencies (every id once per epoch), 1 every class equally often.
    No class goes missing: count_c^(1 - exponent) rises with count_c, so the smallest share is the rarest class's, and
    that is at least its natural one.
    """
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent {exponent} is not between 0 (natural) and 1 (uniform)")
    chosen = np.asarray(labels) if ids is None else np.asarray(labels)[np.asarray(ids, np.int64)]
    return weighted(labels, seed, np.bincount(chosen).astype(float) ** (1 - exponent), ids)


def weighted(labels, seed: int, weights, ids=None) -> Order:
    """Class c is drawn in proportion to weights[c]; its members take turns, evenly over the epochs.

    labels: int64[N], of all samples.  weights: [C], not negative.  ids: the ones to draw from, all by default.
    An epoch has as many positions as there are ids; each class has the same number of them in every epoch, within one
    of its exact share.
    """
    ids = np.arange(len(labels)) if ids is None else np.asarray(ids, np.int64)
    present, classes, counts = np.unique(
        np.asarray(labels)[ids], return_inverse=True, return_counts=True
    )
    weights = np.asarray(weights, float)[present]
    edges = np.cumsum(weights) / weights.sum() * len(ids)
    edges[-1] = len(ids)
    # Systematic sampling: class c gets the points 1/2, 3/2, ... that fall between its edges.
    shares = np.diff(np.concatenate([[0], np.floor(edges + 0.5).astype(np.int64)]))
    # Each member's place in a fixed random sequence of its class: draw number d of the class goes to place d mod count.
    shuffle = generator(seed, 2).permutation(len(ids))
    by_class = shuffle[np.argsort(classes[shuffle], kind="stable")]
    places = np.empty(len(ids), np.int64)
    places[by_class] = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Order(ids, seed, _Turns(places, shares[classes], counts[classes]))


class _Turns:
    """How often each member occurs in an epoch when its class (of `counts`) has `shares` draws per epoch."""

    def __init__(self, places, shares, counts):
        self.places, self.shares, self.counts = places, shares, counts

    def __call__(self, epoch: int) -> np.ndarray:
        # Of the class's draws epoch * share + k, k < share, each place gets share // count, and one more if it is among
        # the (share mod count) places that follow the epoch's first.
        behind = (self.places - epoch * self.shares) % self.counts
        return self.shares // self.counts + (behind < self.shares % self.counts)


def expected_distinct(class_counts, batch: int) -> float:
    """Distinct classes expected in a fair draw of `batch` samples without replacement: how well an order mixes.

    class_counts: [C].  A class of n among N samples is missed with probability C(N - n, batch) / C(N, batch).
    """
    counts = np.asarray(class_counts, float)
    rest = counts.sum() - counts
    draws = np.arange(batch)[:, None]
    missed = np.prod(np.maximum(rest - draws, 0) / (counts.sum() - draws), axis=0)
    return float((1 - missed).sum())
