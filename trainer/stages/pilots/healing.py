"""What specialists of a few groups heal, and how much of them is affordable: pure functions.

n   examples of val
C   classes
S   the classes of a group
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.results.paired import mean_and_error


def by_ceiling(gains: Sequence[float], skipped: set[int]) -> list[int]:
    """The groups that a specialist could correct something in, the highest forecast first.

    gains: of all groups.  skipped: those that get no specialist.
    """
    possible = [m for m, gain in enumerate(gains) if gain > 0 and m not in skipped]
    return sorted(possible, key=lambda m: (-gains[m], m))


def share_a_group(
    labels: np.ndarray, predicted: np.ndarray, members: Sequence[np.ndarray], num_classes: int
) -> np.ndarray:
    """Whether an example's two classes are different ones of one group, bool [n].

    These are the errors that perfect specialists would correct, each counted once however many
    groups hold it.

    labels, predicted: int [n].  members: S of each group.
    """
    shared = np.zeros(len(labels), bool)
    for classes in members:
        inside = np.zeros(num_classes, bool)
        inside[classes] = True
        shared |= inside[labels] & inside[predicted]
    return shared & (labels != predicted)


def opened(top: np.ndarray, members: Sequence[np.ndarray]) -> np.ndarray:
    """Whether the gate opens one of the groups, bool [n].  top: the classes it looks at, [n, k]."""
    return np.asarray(np.isin(top, np.concatenate(list(members))).any(axis=1))


def healed(before: np.ndarray, after: np.ndarray, possible: np.ndarray) -> tuple[float, float]:
    """Net errors corrected / errors that perfect specialists would correct, and its error.

    It is below 0 where more is lost than corrected.  The standard error is the ratio's, by the
    delta method: both sums vary with the examples.

    before, after: bool [n], whether an example is answered right.  possible: bool [n], of which
    some are true.
    """
    difference = after.astype(float) - before.astype(float)
    ratio = float(difference.sum() / possible.sum())
    _, error = mean_and_error(difference - ratio * possible)
    return ratio, error / float(possible.mean())


def mixture_log_prior(
    class_counts: np.ndarray, classes: np.ndarray, fraction: float, balance: float
) -> np.ndarray:
    """log(fraction in the batches / natural fraction) of each class, [C].

    It is 0 of one without examples.

    A `fraction` of a batch is of `classes`, balanced by the exponent `balance`. The rest is of the
    others at natural frequencies.
    """
    counts = np.asarray(class_counts, np.float64)
    own = np.zeros(len(counts), bool)
    own[classes] = True
    drawn = np.where(own, np.where(counts > 0, counts ** (1 - balance), 0), 0)
    inside = drawn / drawn.sum()
    others = np.where(own, 0, counts)
    outside = others / max(1.0, others.sum())
    sampled = fraction * inside + (1 - fraction) * outside
    natural = counts / counts.sum()
    ratio = np.divide(sampled, natural, out=np.ones_like(natural), where=natural > 0)
    return np.log(ratio)


SMALLEST = 64  # examples of a batch


def pilot_batch(batch: int, examples: float, steps: int, parts: int) -> int:
    """Examples of a batch of which so many make about as many steps as a whole training takes.

    At least SMALLEST, and a multiple of `parts`. Never more than the training's own.

    batch, steps: of the whole training.  examples: that a pilot may see.
    """
    wanted = max(SMALLEST, examples / steps)
    return min(batch, math.ceil(wanted / parts) * parts)


class FeaturePlan(NamedTuple):
    """Which examples' features branches learn from.

    groups: how many of those offered.  views: of each example.  part: of the groups' training
    examples, and of those that stand for all others.
    """

    groups: int
    views: int
    part: float


def plan_features(
    train: Sequence[int],
    val: Sequence[int],
    left: Sequence[float],
    otherwise: float,
    views: int,
    least: int,
) -> FeaturePlan:
    """Plan as many groups as can be trained in full, and views for the passes that are left.

    train: training examples that the first 1, 2, ... groups need.  val: those of val, seen once.
    left: passes of the generalist that are left beside the full training of so many groups.
    otherwise: passes for the `least` groups where not even these can be trained in full. Too few
    for one view are spent on a part of the examples.
    """
    for groups in range(len(train), least - 1, -1):
        affordable = math.floor((left[groups - 1] - val[groups - 1]) / train[groups - 1])
        if affordable >= 1:
            return FeaturePlan(groups, min(views, affordable), 1.0)
    affordable = max(0.0, otherwise - val[least - 1]) / train[least - 1]
    return FeaturePlan(least, min(views, max(1, math.floor(affordable))), min(1.0, affordable))
