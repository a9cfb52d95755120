"""Groups of classes that the generalist confuses, from the statistics of its predictions.  Hinton et al. 2015, 5.1.

C classes, G groups, r dimensions of a column.  member_of: int32 [C, memberships], -1 where a class has fewer.
"""

import math
import warnings

import numpy as np

from .assignment import assign, fill_empty, join_where_it_pays, local_search, sizes_of
from .embedding import affinity, confusion_columns, covariance_columns, mutual_confusion, unit_rows
from .groups import ClassGroups
from .statistics import DENSE_BYTES

_BLOCK_SCORES = 2**25  # entries of a dense [classes, G] block of scores
_TIE_WEIGHT = 0.01  # of the columns' similarity, against a class's mean affinity to all others


def group_classes(
    statistics,
    num_groups: int,
    method: str = "kmeans",
    capacity: float | None = 1.3,
    overlap: int = 1,
    seed: int = 0,
    *,
    coverage: float | None = None,
    refine: bool | None = None,
    classifier_rows=None,
) -> ClassGroups:
    """num_groups groups of classes that are confused with each other; needs no labels.

    method: "kmeans" or "minibatch", k-means on the scaled columns of the expected confusion (low rank, unit rows);
        "correlation", on those of the prediction correlation; "raw", on the covariance's own, as in the paper;
        "agglomerative", Ward's on the columns of "kmeans"; "graph", the local search from a random start;
        "classifier", k-means on classifier_rows [C, D], say the weights of the generalist's head; "random".
    capacity: no group holds more than max(capacity x mean size, the mean rounded up) classes; None: no bound.
    overlap: groups per class, so that the mean size is C x overlap / G.
    coverage: with it `overlap` is the most: classes join further groups, those first that gain most, until the groups
        catch this share of the errors that the predictions expect (`captured_unlabelled`).  Where all of `overlap`
        catches less, or what is left is no confusion of anybody's, it ends there.  At the same share it is cheaper than
        a whole number for all: specialists learn, and are asked about, fewer classes.
    refine: whether a local search on the expected confusion follows; None: yes, except for "raw" and "random".
        Further memberships always come from that search, except for "random".
    Raises ValueError for statistics without examples, more groups than classes, an argument out of range.
    """
    _check(statistics, num_groups, method, capacity, overlap, coverage, classifier_rows)
    num_classes = statistics.num_classes
    mutual = mutual_confusion(statistics)
    confused = affinity(mutual)
    refine = method not in ("raw", "random") if refine is None else refine
    if method in ("random", "graph"):
        columns = centres = None
        member_of = _random_memberships(
            num_classes, num_groups, overlap if method == "random" else 1, seed
        )
    else:
        columns = _columns(statistics, confused, method, classifier_rows, seed)
        labels = _CLUSTERING[method](columns, num_groups, seed)
        centres = _centres(columns, labels, num_groups)
        member_of = _within(
            columns, centres, labels, _max_size(num_classes, num_groups, capacity), seed
        )
    if refine or overlap > member_of.shape[1]:
        ties = _ties(columns, centres, confused)
        if refine:
            size = _max_size(num_classes * member_of.shape[1], num_groups, capacity)
            member_of = local_search(confused, member_of, num_groups, size, ties, seed=seed)
        if overlap > member_of.shape[1]:
            missing = np.full((num_classes, overlap - member_of.shape[1]), -1, dtype=np.int32)
            member_of = np.hstack([member_of, missing])
            if coverage is None:
                size = _max_size(num_classes * overlap, num_groups, capacity)
                member_of = local_search(confused, member_of, num_groups, size, ties, seed=seed)
            else:
                member_of = join_where_it_pays(
                    mutual,
                    confused,
                    member_of,
                    num_groups,
                    coverage,
                    lambda n: _max_size(n, num_groups, capacity),
                    ties,
                    seed,
                )
    return _class_groups(fill_empty(member_of, num_groups), num_groups)


def _columns(statistics, confused, method: str, classifier_rows, seed: int) -> np.ndarray:
    if method in ("raw", "correlation"):
        return covariance_columns(statistics, scaled=method == "correlation", seed=seed)
    if method != "classifier":
        return confusion_columns(confused, seed=seed)
    rows = (
        classifier_rows.detach().cpu().float().numpy()
        if hasattr(classifier_rows, "detach")
        else classifier_rows
    )
    rows = np.asarray(rows, dtype=np.float32)
    if rows.ndim != 2 or len(rows) != statistics.num_classes or not np.isfinite(rows).all():
        raise ValueError(
            f"classifier_rows are {rows.shape}; they must be finite, [{statistics.num_classes}, features]"
        )
    return unit_rows(rows - rows.mean(axis=0))


def _kmeans(columns: np.ndarray, num_groups: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    restarts = 3 if columns.size * num_groups < 10**8 else 1
    return _quietly(KMeans(num_groups, n_init=restarts, max_iter=100, random_state=seed), columns)


def _minibatch(columns: np.ndarray, num_groups: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(
        num_groups, batch_size=max(4096, 4 * num_groups), n_init=3, random_state=seed
    )
    return _quietly(model, columns)


def _agglomerative(columns: np.ndarray, num_groups: int, seed: int) -> np.ndarray:
    from sklearn.cluster import AgglomerativeClustering

    if 8 * len(columns) ** 2 > DENSE_BYTES:
        raise ValueError(
            f"agglomerative grouping compares all pairs of {len(columns)} classes, "
            f"above the limit of {DENSE_BYTES >> 20} MiB; "
            'use method="kmeans" or "minibatch"'
        )
    if len(columns) == 1:
        return np.zeros(1, dtype=np.int64)
    return _quietly(AgglomerativeClustering(num_groups, linkage="ward"), columns)


_CLUSTERING = {
    "kmeans": _kmeans,
    "minibatch": _minibatch,
    "correlation": _kmeans,
    "raw": _kmeans,
    "agglomerative": _agglomerative,
    "classifier": _kmeans,
}
METHODS = (*_CLUSTERING, "graph", "random")


def _quietly(model, columns: np.ndarray) -> np.ndarray:
    from scipy.cluster.hierarchy import ClusterWarning
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct columns than groups leaves clusters empty; the capacity and fill_empty give them classes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", ClusterWarning)
        return model.fit_predict(columns)


def _centres(columns: np.ndarray, labels: np.ndarray, num_groups: int) -> np.ndarray:
    """Mean column of each cluster, [G, r]; zero where it is empty."""
    from scipy.sparse import csr_array

    sizes = np.bincount(labels, minlength=num_groups)
    one_hot = csr_array(
        (np.ones(len(labels), np.float32), (labels, np.arange(len(labels)))),
        (num_groups, len(labels)),
    )
    return (one_hot @ columns) / np.maximum(sizes, 1)[:, None].astype(np.float32)


def _within(columns, centres, labels, max_size: int, seed: int) -> np.ndarray:
    """member_of [C, 1]: each class in its cluster or, where that is full, in the nearest with room."""
    room = np.full(len(centres), max_size)
    norms = (centres**2).sum(axis=1)
    member_of = np.full((len(columns), 1), -1, dtype=np.int32)
    for block in _blocks(len(columns), len(centres), seed):
        scores = 2 * columns[block] @ centres.T - norms
        scores[np.arange(len(block)), labels[block]] += 1e-6 * np.abs(scores).max(initial=0)
        member_of[block, 0] = assign(scores, room)
        room = room - sizes_of(member_of[block], len(centres))
    return member_of


def _random_memberships(
    num_classes: int, num_groups: int, memberships: int, seed: int
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    member_of = np.full((num_classes, memberships), -1, dtype=np.int32)
    for turn in range(memberships):
        room = np.full(num_groups, math.ceil((turn + 1) * num_classes / num_groups)) - sizes_of(
            member_of, num_groups
        )
        for block in _blocks(num_classes, num_groups, seed + turn):
            scores = rng.random((len(block), num_groups), dtype=np.float32)
            for previous in range(turn):
                scores[np.arange(len(block)), member_of[block, previous]] = -np.inf
            member_of[block, turn] = assign(scores, room)
            room = room - sizes_of(member_of[block, turn], num_groups)
    return member_of


def _ties(columns, centres, confused):
    """classes -> [B, G] similarity of their columns to the groups' centres, too small to outweigh confusion seen."""
    if columns is None:
        return None
    unit = unit_rows(columns)
    directions = unit_rows(centres) * np.float32(_TIE_WEIGHT * confused.sum() / confused.shape[0])
    return lambda classes: unit[classes] @ directions.T


def _blocks(num_classes: int, num_groups: int, seed: int) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(num_classes)
    return np.array_split(order, max(1, math.ceil(num_classes * num_groups / _BLOCK_SCORES)))


def _max_size(memberships: int, num_groups: int, capacity: float | None) -> int:
    if capacity is None:
        return memberships
    return max(
        math.floor(capacity * memberships / num_groups + 1e-9), math.ceil(memberships / num_groups)
    )


def _class_groups(member_of: np.ndarray, num_groups: int) -> ClassGroups:
    classes, turns = np.nonzero(member_of >= 0)
    groups = member_of[classes, turns]
    ends = np.cumsum(np.bincount(groups, minlength=num_groups))
    return ClassGroups(
        np.split(classes[np.argsort(groups, kind="stable")], ends[:-1]), len(member_of)
    )


def _check(statistics, num_groups, method, capacity, overlap, coverage, classifier_rows) -> None:
    num_classes = statistics.num_classes
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if not 1 <= num_groups <= num_classes or int(num_groups) != num_groups:
        raise ValueError(
            f"num_groups is {num_groups}; for {num_classes} classes it must be an integer from 1 to {num_classes}"
        )
    if not 1 <= overlap <= num_groups or int(overlap) != overlap:
        raise ValueError(
            f"overlap is {overlap}; with {num_groups} groups a class can be in 1 to {num_groups} of them"
        )
    if capacity is not None and not capacity >= 1:
        raise ValueError(
            f"capacity is {capacity}; below 1 the groups cannot hold every class, so give 1.3 or None"
        )
    if coverage is not None and not 0 < coverage <= 1:
        raise ValueError(
            f"coverage is {coverage}; it is a share of the expected errors, above 0 and at most 1"
        )
    if coverage is not None and (overlap < 2 or method == "random"):
        raise ValueError(
            f"coverage decides who joins a second group and more, but overlap is {overlap} and method {method!r}; "
            'give an overlap of 2 or more and another method than "random", or no coverage'
        )
    if (method == "classifier") != (classifier_rows is not None):
        raise ValueError(
            'classifier_rows [C, features] go with method="classifier", and with no other'
        )
    if statistics.num_examples == 0:
        raise ValueError("the statistics hold no predictions; call update first")
