"""Group classes when some have no training examples, so that none stands alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from .grouping import group_classes
from .groups import ClassGroups
from .statistics import PredictionStatistics


def group_trained_classes(
    statistics: PredictionStatistics,
    trained: ArrayLike,
    num_groups: int,
    *,
    classifier_rows: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    **options,
) -> ClassGroups:
    """Groups of the classes that have training examples. Each other class joins its nearest group.

    Parameters
    ----------
    statistics : PredictionStatistics
        Of the predictions of all C classes.
    trained : bool array [C]
        Whether a class has training examples.  Where all have, this is `group_classes`.
    num_groups, classifier_rows, weights, options
        Of `group_classes`.

    Returns
    -------
    ClassGroups
        G groups. Every class is in at least one, and a class with examples in each.

    Raises
    ------
    ValueError
        As `group_classes`, for the classes that have examples.
    """
    trained = np.asarray(trained, bool)
    if trained.all():
        return group_classes(
            statistics, num_groups, classifier_rows=classifier_rows, weights=weights, **options
        )
    own = np.flatnonzero(trained)
    if classifier_rows is not None:
        classifier_rows = np.asarray(classifier_rows)[own]
    if weights is not None:
        weights = np.asarray(weights)[own]
    groups = group_classes(
        statistics.restricted(own),
        num_groups,
        classifier_rows=classifier_rows,
        weights=weights,
        **options,
    )
    members = [own[classes] for classes in groups.members]
    joined = join_nearest(members, np.flatnonzero(~trained), statistics.expected_confusion)
    return ClassGroups(joined, statistics.num_classes)


def join_nearest(
    members: list[NDArray[np.int64]], classes: NDArray[np.int64], confusion: csr_array
) -> list[NDArray[np.int64]]:
    """The groups with each of `classes` in the one that it is confused with most.

    confusion: [C, C], both directions count.  Of groups that it is confused with alike, or not at
    all, it joins the smallest.
    """
    assert confusion.shape is not None
    groups = ClassGroups(members, confusion.shape[0])
    mutual = (confusion + confusion.T).tocsr()[classes]
    masses = (mutual @ groups.membership().astype(np.float64)).toarray()
    sizes, joined = groups.sizes, [list(group) for group in members]
    for index, mass in zip(classes.tolist(), masses, strict=True):
        nearest = np.lexsort((sizes, -mass))[0]
        joined[nearest].append(index)
        sizes[nearest] += 1
    return [np.array(sorted(group), np.int64) for group in joined]
