"""Groups of classes that the generalist confuses.  Hinton et al. 2015, section 5.1.

C classes, G groups, r dimensions of a column.
member_of: int32 [C, memberships], the groups of each class, -1 where it has fewer.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from .assignment import (
    Similarity,
    fill_empty,
    join_where_it_pays,
    local_search,
    place,
    random_blocks,
    sizes_of,
)
from .choices import CHOOSE_ALL_GROUPS, METHODS
from .embedding import affinity, mutual_confusion, unit_rows
from .groups import ClassGroups
from .methods import InitialGroups
from .statistics import PredictionStatistics, as_array

_TIE_WEIGHT = 0.01  # of the columns' similarity, against a class's mean affinity to all others


def group_classes(
    statistics: PredictionStatistics,
    num_groups: int,
    method: str = "kmeans",
    capacity: float | None = 1.3,
    overlap: int = 1,
    seed: int = 0,
    *,
    coverage: float | None = None,
    refine: bool | None = None,
    classifier_rows: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> ClassGroups:
    """Groups of classes that are confused with each other. No labels are needed.

    Parameters
    ----------
    statistics : PredictionStatistics
        Of the generalist's predictions of C classes, at least one example.
    num_groups : int
        G, from 1 to C.
    method : str
        A name of `clustering.METHODS`. "kmeans" or "minibatch": k-means on the scaled columns of
        the expected confusion. "correlation": on those of the prediction correlation. "raw": on
        the covariance's own, as in the paper. "agglomerative": Ward's linkage on the columns of
        "kmeans". "graph": the local search from a random start. "classifier": k-means on
        `classifier_rows`. "random": the floor.
    capacity : float or None
        No group holds more than max(capacity x mean size, the mean rounded up) classes. None: no
        bound. With `weights` sizes are sums of these.
    overlap : int
        Groups per class, so that the mean size is C x overlap / G.
    seed : int
    coverage : float or None
        If given, `overlap` is the maximum. Classes join further groups, those that gain most first,
        until the groups catch this share of the errors that the predictions expect
        (`captured_unlabelled`). It ends earlier where all of `overlap` catches less, or where
        nobody is confused with what is left. At the same share it is cheaper than a whole number
        for all: specialists learn, and are asked about, fewer classes.
    refine : bool or None
        Whether a local search on the expected confusion follows. None: yes, except for "raw" and
        "random". Further memberships always come from that search, except for "random".
    classifier_rows : array or tensor [C, D] or None
        For "classifier" alone: say the weights of the generalist's head.
    weights : int array [C] or None
        What each class counts for in the capacity, say its training examples. None: 1 each. The
        bound always holds where no class is heavier than (capacity - 1) x mean. Else a group may
        be above it, by a class that fits nowhere, and is at most mean + its heaviest class.

    Returns
    -------
    ClassGroups
        G groups. Every class is in at least one.

    Raises
    ------
    ValueError
        For statistics without examples, more groups than classes, or an argument out of range.

    References
    ----------
    Hinton, Vinyals & Dean 2015, Distilling the Knowledge in a Neural Network, section 5.1.
    """
    _check_arguments(statistics, num_groups, method, capacity, overlap, coverage, classifier_rows)
    num_classes = statistics.num_classes
    counts_for = _checked_weights(weights, num_classes, method)
    mutual = mutual_confusion(statistics)
    confused = affinity(mutual)
    inputs = {
        "statistics": statistics,
        "confused": confused,
        "num_groups": num_groups,
        "overlap": overlap,
        "seed": seed,
        "classifier_rows": classifier_rows,
    }
    initial = _initial_groups(method, inputs)
    _check_labels(initial.labels, method, num_classes, num_groups)

    bound = _Bound(num_groups, capacity, counts_for)
    member_of, centres = _within_capacity(initial, bound, seed)
    num_further = overlap - member_of.shape[1]
    if coverage is not None and num_further == 0:
        raise ValueError(
            "coverage decides who joins a second group and more, but "
            f"method {method!r} chooses all groups itself; take another method or no coverage"
        )
    if refine is None:
        refine = initial.refine
    if refine or num_further:
        ties = _ties(initial.columns, centres, confused)
        search = _Search(mutual, confused, bound, ties, seed)
        if refine:
            member_of = search.refine(member_of)
        if num_further:
            member_of = search.extend(member_of, num_further, coverage)
    return _class_groups(fill_empty(member_of, num_groups), num_groups)


def method_inputs(method: str) -> set[str]:
    """The inputs that a method declares. `clustering.choices` lists all that there are.

    Parameters
    ----------
    method : str
        A name of `clustering.METHODS`.
    """
    return set(inspect.signature(_function_of(method)).parameters)


@dataclass(frozen=True)
class _Bound:
    """How much a group may hold.

    weights: int [C], what each class counts for.
    """

    num_groups: int
    capacity: float | None
    weights: np.ndarray

    def max_size(self, wanted: np.ndarray) -> int:
        """The largest size when class c has wanted[c] memberships, int [C]."""
        total = int(self.weights @ wanted)
        if self.capacity is None:
            return total
        allowed = math.floor(self.capacity * total / self.num_groups + 1e-9)
        return max(allowed, math.ceil(total / self.num_groups))


@dataclass(frozen=True)
class _Search:
    """The local search on the expected confusion, within the capacity."""

    mutual: csr_array
    confused: csr_array
    bound: _Bound
    ties: Similarity | None
    seed: int

    def refine(self, member_of: np.ndarray) -> np.ndarray:
        """Better memberships [C, r], as many as there are places."""
        wanted = np.full(len(member_of), member_of.shape[1])
        return local_search(
            self.confused,
            member_of,
            self.bound.num_groups,
            self.bound.max_size(wanted),
            self.ties,
            seed=self.seed,
            weights=self.bound.weights,
        )

    def extend(self, member_of: np.ndarray, num_further: int, coverage: float | None) -> np.ndarray:
        """Up to num_further more memberships for each class: [C, r + num_further]."""
        missing = np.full((len(member_of), num_further), -1, dtype=np.int32)
        member_of = np.hstack([member_of, missing])
        if coverage is None:
            return self.refine(member_of)
        return join_where_it_pays(
            self.mutual,
            self.confused,
            member_of,
            self.bound.num_groups,
            coverage,
            self.bound.max_size,
            self.ties,
            self.seed,
            self.bound.weights,
        )


def _initial_groups(method: str, inputs: Mapping[str, object]) -> InitialGroups:
    """Call the method's function with those of the inputs that it declares."""
    declared = method_inputs(method)
    function = _function_of(method)
    return function(**{name: value for name, value in inputs.items() if name in declared})


def _function_of(method: str) -> Callable[..., InitialGroups]:
    module, name = METHODS[method].split(":")
    return getattr(import_module(module), name)


def _within_capacity(
    initial: InitialGroups, bound: _Bound, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """member_of, and the groups' centres [G, r] where the method has columns.

    Each class stays in its group or, where that is full, goes to the nearest with room.
    """
    labels, columns = initial.labels, initial.columns
    if labels.ndim == 2:
        return labels, None
    num_groups, weights = bound.num_groups, bound.weights
    centres = None
    if columns is not None:
        centres = _centres(columns, labels, num_groups)
    room = np.full(num_groups, bound.max_size(np.ones(len(labels), np.int64)))
    member_of = np.full((len(labels), 1), -1, dtype=np.int32)
    for block in random_blocks(len(labels), num_groups, seed):
        if columns is None or centres is None:
            scores = np.zeros((len(block), num_groups), dtype=np.float32)
            bonus = 1.0
        else:
            scores = 2 * columns[block] @ centres.T - (centres**2).sum(axis=1)
            bonus = 1e-6 * np.abs(scores).max(initial=0)
        scores[np.arange(len(block)), labels[block]] += bonus
        member_of[block, 0] = place(scores, room, weights[block])
        room = room - sizes_of(member_of[block], num_groups, weights[block])
    return member_of, centres


def _centres(columns: np.ndarray, labels: np.ndarray, num_groups: int) -> np.ndarray:
    """Mean column of each cluster, [G, r]. Zero where it is empty."""
    sizes = np.bincount(labels, minlength=num_groups)
    ones = np.ones(len(labels), np.float32)
    shape = (num_groups, len(labels))
    one_hot = csr_array((ones, (labels, np.arange(len(labels)))), shape=shape)
    return (one_hot @ columns) / np.maximum(sizes, 1)[:, None].astype(np.float32)


def _ties(
    columns: np.ndarray | None, centres: np.ndarray | None, confused: csr_array
) -> Similarity | None:
    """classes [B] -> [B, G], how near their columns are to the groups' centres.

    Too small to outweigh confusion that was seen.
    """
    if columns is None or centres is None:
        return None
    unit = unit_rows(columns)
    directions = unit_rows(centres) * np.float32(_TIE_WEIGHT * confused.sum() / len(columns))
    return lambda classes: unit[classes] @ directions.T


def _class_groups(member_of: np.ndarray, num_groups: int) -> ClassGroups:
    classes, turns = np.nonzero(member_of >= 0)
    groups = member_of[classes, turns]
    ends = np.cumsum(np.bincount(groups, minlength=num_groups))
    by_group = np.split(classes[np.argsort(groups, kind="stable")], ends[:-1])
    return ClassGroups(by_group, len(member_of))


def _check_labels(labels: np.ndarray, method: str, num_classes: int, num_groups: int) -> None:
    if labels.ndim == 2:
        return
    if labels.shape != (num_classes,) or labels.min() < 0 or labels.max() >= num_groups:
        raise ValueError(
            f"method {method!r} returned labels {labels.shape} from {labels.min()} to "
            f"{labels.max()}; they must be [{num_classes}], from 0 to {num_groups - 1}"
        )


def _checked_weights(weights: ArrayLike | None, num_classes: int, method: str) -> np.ndarray:
    """What each class counts for, int64 [C]. ValueError for others than non-negative integers."""
    if weights is None:
        return np.ones(num_classes, np.int64)
    if method in CHOOSE_ALL_GROUPS:
        raise ValueError(
            f"weights bound what groups hold, but method {method!r} chooses all groups itself; "
            "take another method or no weights"
        )
    counts_for = as_array(weights)
    if counts_for.shape != (num_classes,) or counts_for.dtype.kind not in "iu":
        raise ValueError(
            f"weights are {counts_for.dtype} {counts_for.shape}; they must be integers, one for "
            f"each of {num_classes} classes, [{num_classes}]"
        )
    if counts_for.min() < 0 or not counts_for.any():
        raise ValueError(
            f"weights are {counts_for.min()} to {counts_for.max()}; none may be negative, and one "
            "must be above 0"
        )
    return counts_for.astype(np.int64)


def _check_arguments(
    statistics: PredictionStatistics,
    num_groups: int,
    method: str,
    capacity: float | None,
    overlap: int,
    coverage: float | None,
    classifier_rows: ArrayLike | None,
) -> None:
    num_classes = statistics.num_classes
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if not 1 <= num_groups <= num_classes or int(num_groups) != num_groups:
        raise ValueError(
            f"num_groups is {num_groups}; "
            f"for {num_classes} classes it must be an integer from 1 to {num_classes}"
        )
    if not 1 <= overlap <= num_groups or int(overlap) != overlap:
        raise ValueError(
            f"overlap is {overlap}; "
            f"with {num_groups} groups a class can be in 1 to {num_groups} of them"
        )
    if capacity is not None and not capacity >= 1:
        raise ValueError(
            f"capacity is {capacity}; below 1 the groups cannot hold every class, "
            "so give 1.3 or None"
        )
    if coverage is not None and not 0 < coverage <= 1:
        raise ValueError(
            f"coverage is {coverage}; it is a share of the expected errors, above 0 and at most 1"
        )
    if coverage is not None and overlap < 2:
        raise ValueError(
            "coverage decides who joins a second group and more, "
            f"but overlap is {overlap} and method {method!r}; "
            "give an overlap of 2 or more, or no coverage"
        )
    reads_rows = "classifier_rows" in method_inputs(method)
    if reads_rows != (classifier_rows is not None):
        raise ValueError(
            'classifier_rows [C, features] go with method="classifier", and with no other'
        )
    if statistics.num_examples == 0:
        raise ValueError("the statistics hold no predictions; call update first")
