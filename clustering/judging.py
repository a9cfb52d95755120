"""What groups of classes capture, and what specialists for them could gain."""

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array, sparray, spmatrix

from .groups import ClassGroups
from .statistics import PredictionStatistics

_BLOCK_ENTRIES = 2**22

Confusion = ArrayLike | sparray | spmatrix


class GroupForecast(TypedDict):
    """What a perfect specialist for one group could fix. None where it needs labels.

    classes: |S|.
    examples: those with a label in S.
    errors_inside: of these, those whose most probable class is a wrong one of S.
    gain: errors_inside / examples with any label.
    gain_unlabelled: the same share of all examples, as the predictions expect it.
    """

    classes: int
    examples: int | None
    errors_inside: int | None
    gain: float | None
    gain_unlabelled: float


def captured_confusion(groups: ClassGroups, confusion: Confusion) -> tuple[float, float]:
    """Share of the errors whose true and predicted class share a group, and its chance level.

    Parameters
    ----------
    groups : ClassGroups
        Of C classes.
    confusion : sparse or dense array [C, C]
        Counts or masses, true class x predicted class. The diagonal is not read.
        `statistics.confusion` judges with labels, `statistics.expected_confusion` without.

    Returns
    -------
    share : float
        In 0 ... 1. nan without errors.
    chance : float
        The mean share over random relabellings of the classes: the same sizes, the same overlap.

    Raises
    ------
    ValueError
        If the confusion is not [C, C].
    """
    cells = _checked_confusion(confusion, groups).tocoo()
    rows, columns = cells.coords
    errors = (rows != columns) & (cells.data != 0)
    rows, columns, masses = rows[errors], columns[errors], cells.data[errors]
    membership = csr_array(groups.membership(), dtype=np.int32)
    captured = 0.0
    for start in range(0, len(rows), _BLOCK_ENTRIES):
        block = slice(start, start + _BLOCK_ENTRIES)
        shared = membership[rows[block]].multiply(membership[columns[block]]).sum(axis=1) > 0
        captured += float(masses[block][shared].sum())
    total = float(masses.sum())
    share = captured / total if total else float("nan")
    return share, _chance(groups)


def captured_unlabelled(
    groups: ClassGroups, statistics: PredictionStatistics
) -> tuple[float, float]:
    """`captured_confusion` of the errors that the predictions themselves expect.

    Parameters
    ----------
    groups : ClassGroups
    statistics : PredictionStatistics
        No labels are needed.

    Returns
    -------
    share, chance : float
    """
    return captured_confusion(groups, statistics.expected_confusion)


def forecast(groups: ClassGroups, statistics: PredictionStatistics) -> list[GroupForecast]:
    """What a perfect specialist for each group could fix.

    Parameters
    ----------
    groups : ClassGroups
    statistics : PredictionStatistics

    Returns
    -------
    list of GroupForecast
        One for each group. Without labels what needs them is None. Gains of overlapping groups may
        count an error twice.

    Raises
    ------
    ValueError
        If groups and statistics are of different numbers of classes.
    """
    num_labelled, num_examples = statistics.num_labelled, statistics.num_examples
    inside, examples = _masses_inside(groups, statistics.confusion)
    expected, _ = _masses_inside(groups, statistics.expected_confusion)
    rows: list[GroupForecast] = []
    for group, size in enumerate(groups.sizes):
        row: GroupForecast = {
            "classes": int(size),
            "examples": None,
            "errors_inside": None,
            "gain": None,
            "gain_unlabelled": float(expected[group]) / max(num_examples, 1),
        }
        if num_labelled:
            row["examples"] = round(float(examples[group]))
            row["errors_inside"] = round(float(inside[group]))
            row["gain"] = float(inside[group]) / num_labelled
        rows.append(row)
    return rows


def _masses_inside(groups: ClassGroups, confusion: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """Per group [G]: mass of errors with both classes inside. Mass of all whose true class is."""
    confusion = csr_array(_checked_confusion(confusion, groups), dtype=np.float64)
    membership = csr_array(groups.membership(), dtype=np.float64)
    truths = membership.T @ confusion.sum(axis=1)
    errors = csr_array(confusion - _diagonal(confusion))
    inside = csr_array(errors @ membership).multiply(membership).sum(axis=0)
    return np.asarray(inside).ravel(), np.asarray(truths).ravel()


def _diagonal(matrix: csr_array) -> csr_array:
    diagonal = matrix.diagonal()
    indices = np.arange(len(diagonal))
    return csr_array((diagonal, (indices, indices)), shape=matrix.shape)


def _chance(groups: ClassGroups) -> float:
    """Share of the unordered pairs of classes that have a group in common.

    Classes with the same memberships behave alike, so it counts pairs of membership patterns, not
    pairs of classes.
    """
    num_classes = groups.num_classes
    if num_classes < 2:
        return float("nan")
    patterns, counts = _patterns(groups.membership(), len(groups))
    pairs = float((counts * (counts - 1)).sum())  # ordered, inside one pattern
    patterns_per_block = max(1, _BLOCK_ENTRIES // max(1, int(groups.sizes.max())))
    transposed = patterns.T.tocsr()
    for start in range(0, len(counts), patterns_per_block):
        met = (patterns[start : start + patterns_per_block] @ transposed).tocoo()
        i, j = met.coords
        i = i + start
        pairs += float((counts[i] * counts[j])[i != j].sum())
    return pairs / (num_classes * (num_classes - 1))


def _patterns(membership: csr_array, num_groups: int) -> tuple[csr_array, np.ndarray]:
    """The distinct non-empty rows of a bool csr [C, G], and how often each occurs, float64 [K].

    Returns the rows as int32 csr [K, G].
    """
    membership.sort_indices()
    columns, starts = membership.indices, membership.indptr
    assert columns is not None and starts is not None
    lengths = np.diff(starts)
    patterns, counts = [], []
    for length in np.unique(lengths[lengths > 0]):
        first = starts[:-1][lengths == length]
        rows, count = np.unique(
            columns[first[:, None] + np.arange(length)], axis=0, return_counts=True
        )
        patterns.append(rows)
        counts.append(count)
    lengths = np.concatenate([np.full(len(rows), rows.shape[1]) for rows in patterns])
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.concatenate([rows.ravel() for rows in patterns])
    ones = np.ones(len(indices), np.int32)
    matrix = csr_array((ones, indices, pointers), shape=(len(lengths), num_groups))
    return matrix, np.concatenate(counts).astype(float)


def _checked_confusion(confusion: Confusion, groups: ClassGroups) -> csr_array:
    matrix = csr_array(confusion)
    if matrix.shape != (groups.num_classes, groups.num_classes):
        raise ValueError(
            f"the confusion is {matrix.shape}, the groups are of {groups.num_classes} classes"
        )
    return matrix
