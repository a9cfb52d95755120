"""Initial groups of confused classes, one function for each method of `clustering.choices`.

C classes, G groups, r dimensions of a column.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from .assignment import assign, random_blocks, sizes_of
from .embedding import confusion_columns, covariance_columns, unit_rows
from .statistics import DENSE_BYTES, PredictionStatistics, as_array


class InitialGroups(NamedTuple):
    """What a method finds. `group_classes` bounds the groups' sizes and refines them.

    labels: int [C], each class's group in 0 ... G - 1. Or int [C, overlap], -1 for none, where the
        method chooses all groups of a class. It then keeps to the capacity itself.
    columns: float32 [C, r], or None. A class moves from a full group to the nearest by columns,
        and their similarity breaks the ties of the local search.
    refine: whether a local search follows unless the caller decides.
    """

    labels: np.ndarray
    columns: np.ndarray | None = None
    refine: bool = True


def kmeans(confused: csr_array, num_groups: int, seed: int) -> InitialGroups:
    """k-means on the scaled columns of the expected confusion (low rank, unit rows)."""
    columns = confusion_columns(confused, seed=seed)
    return InitialGroups(_kmeans_labels(columns, num_groups, seed), columns)


def minibatch(confused: csr_array, num_groups: int, seed: int) -> InitialGroups:
    """The columns of `kmeans`, clustered in mini-batches: the paper's online form."""
    from sklearn.cluster import MiniBatchKMeans

    columns = confusion_columns(confused, seed=seed)
    batch_size = max(4096, 4 * num_groups)
    labels = _fitted_labels(
        MiniBatchKMeans,
        columns,
        n_clusters=num_groups,
        batch_size=batch_size,
        n_init=3,
        random_state=seed,
    )
    return InitialGroups(labels, columns)


def correlation(statistics: PredictionStatistics, num_groups: int, seed: int) -> InitialGroups:
    """k-means on the columns of the correlation matrix of the predictions."""
    columns = covariance_columns(statistics, scaled=True, seed=seed)
    return InitialGroups(_kmeans_labels(columns, num_groups, seed), columns)


def raw(statistics: PredictionStatistics, num_groups: int, seed: int) -> InitialGroups:
    """k-means on the covariance's own columns, as in Hinton et al. 2015, section 5.1."""
    columns = covariance_columns(statistics, scaled=False, seed=seed)
    return InitialGroups(_kmeans_labels(columns, num_groups, seed), columns, refine=False)


def agglomerative(confused: csr_array, num_groups: int, seed: int) -> InitialGroups:
    """Ward's linkage on the columns of `kmeans`. ValueError where all pairs are too many."""
    from sklearn.cluster import AgglomerativeClustering

    columns = confusion_columns(confused, seed=seed)
    if 8 * len(columns) ** 2 > DENSE_BYTES:
        raise ValueError(
            f"agglomerative grouping compares all pairs of {len(columns)} classes, "
            f"above the limit of {DENSE_BYTES >> 20} MiB; "
            'use method="kmeans" or "minibatch"'
        )
    if len(columns) == 1:
        labels = np.zeros(1, dtype=np.int64)
    else:
        labels = _fitted_labels(
            AgglomerativeClustering, columns, n_clusters=num_groups, linkage="ward"
        )
    return InitialGroups(labels, columns)


def graph(statistics: PredictionStatistics, num_groups: int, seed: int) -> InitialGroups:
    """A random start, so that the local search alone finds the groups."""
    memberships = _random_memberships(statistics.num_classes, num_groups, 1, seed)
    return InitialGroups(memberships[:, 0])


def classifier(
    statistics: PredictionStatistics, num_groups: int, seed: int, classifier_rows: ArrayLike
) -> InitialGroups:
    """k-means on the directions of classifier_rows [C, D], say the weights of the head."""
    rows = np.asarray(as_array(classifier_rows), dtype=np.float32)
    if rows.ndim != 2 or len(rows) != statistics.num_classes or not np.isfinite(rows).all():
        raise ValueError(
            f"classifier_rows are {rows.shape}; "
            f"they must be finite, [{statistics.num_classes}, features]"
        )
    columns = unit_rows(rows - rows.mean(axis=0))
    return InitialGroups(_kmeans_labels(columns, num_groups, seed), columns)


def random(
    statistics: PredictionStatistics, num_groups: int, overlap: int, seed: int
) -> InitialGroups:
    """Every class in `overlap` random groups of equal sizes: the floor for the others."""
    memberships = _random_memberships(statistics.num_classes, num_groups, overlap, seed)
    return InitialGroups(memberships, refine=False)


def _kmeans_labels(columns: np.ndarray, num_groups: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    restarts = 3 if columns.size * num_groups < 10**8 else 1
    return _fitted_labels(
        KMeans, columns, n_clusters=num_groups, n_init=restarts, max_iter=100, random_state=seed
    )


def _fitted_labels(estimator: type, columns: np.ndarray, **options: object) -> np.ndarray:
    """The labels [C] that a scikit-learn estimator of these options gives to the columns."""
    from scipy.cluster.hierarchy import ClusterWarning
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct columns than groups leaves clusters empty. The capacity and fill_empty
        # give them classes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", ClusterWarning)
        return estimator(**options).fit_predict(columns)


def _random_memberships(num_classes: int, num_groups: int, overlap: int, seed: int) -> np.ndarray:
    """`overlap` different groups for each class, int32 [C, overlap]. None above the mean size."""
    rng = np.random.default_rng(seed)
    member_of = np.full((num_classes, overlap), -1, dtype=np.int32)
    for turn in range(overlap):
        max_size = math.ceil((turn + 1) * num_classes / num_groups)
        room = np.full(num_groups, max_size) - sizes_of(member_of, num_groups)
        for block in random_blocks(num_classes, num_groups, seed + turn):
            scores = rng.random((len(block), num_groups), dtype=np.float32)
            for previous in range(turn):
                scores[np.arange(len(block)), member_of[block, previous]] = -np.inf
            member_of[block, turn] = assign(scores, room)
            room = room - sizes_of(member_of[block, turn], num_groups)
    return member_of
