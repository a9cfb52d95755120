"""What a trained generalist is short of: pure functions of arrays.  n examples, k validations.

The rule is `state_of`.  Its thresholds:

    LEARNT     errors on train are at most so large a part of those on val: it knows train
               better
    ALIKE      or at least so large a part: what it has learnt holds for val as well
    FALLING    that twice the steps would lower the loss by, as it fell before the rate
               went down
    SURE       standard errors that an estimate must be away from the threshold on the
               other side
    FEWEST     errors on val: of fewer nothing is told
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEARNT = 0.5
ALIKE = 0.8
FALLING = 0.1
SURE = 1.645
FEWEST = 20
ANNEALED = 0.5  # of the peak rate: below it the loss falls because the rate does
FEWEST_ROWS = 3  # of metrics.jsonl, for a slope and its standard error
STATES = ("capacity", "data", "steps", "none")


class Mean(NamedTuple):
    """A mean of n numbers and its standard error."""

    value: float
    se: float


class Fit(NamedTuple):
    """How good a network is on n examples.  top1: a fraction.  loss: nats."""

    n: int
    top1: Mean
    loss: Mean

    @property
    def errors(self) -> float:
        """Errors as a fraction."""
        return 1 - self.top1.value


class Fall(NamedTuple):
    """How the loss of a split fell before the rate went down: as steps^-exponent."""

    split: str
    exponent: float
    se: float

    @property
    def by_twice(self) -> float:
        """The fraction that twice the steps would lower the loss by."""
        return 1 - 2**-self.exponent

    @property
    def goes_on(self) -> bool:
        return self.by_twice >= FALLING and self.exponent > SURE * self.se


def mean(values: np.ndarray) -> Mean:
    """The mean of numbers [n], n at least 1."""
    values = np.asarray(values, np.float64)
    return Mean(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def fit_of(correct: np.ndarray, nll: np.ndarray) -> Fit:
    """correct: bool [n].  nll: [n], nats."""
    return Fit(len(correct), mean(correct), mean(nll))


def unpaired(one: Mean, other: Mean) -> Mean:
    """The difference of the means of two samples that have nothing to do with each other."""
    return Mean(one.value - other.value, math.hypot(one.se, other.se))


def paired(one: np.ndarray, other: np.ndarray) -> Mean:
    """The mean difference of two measurements [n] of the same examples."""
    return mean(np.asarray(one, np.float64) - np.asarray(other, np.float64))


def error_ratio(train: Fit, val: Fit) -> Mean:
    """Errors on train as a fraction of those on val, by the delta method. Val has some errors."""
    ratio = train.errors / val.errors
    # log r = log e_train - log e_val, and d log e = d e / e, with e_train = 0 the first is 0.
    se = math.hypot(train.top1.se / val.errors, ratio * val.top1.se / val.errors)
    return Mean(ratio, se)


def enough_errors(val: Fit) -> bool:
    """Whether val has errors enough to tell anything by."""
    return round(val.errors * val.n) >= FEWEST


def state_of(train: Fit, val: Fit, fall: Fall | None, taught: bool = True) -> str:
    """What the generalist is short of, one of STATES.

    "data": it errs at most LEARNT times as often on train as on val.  "capacity": at least ALIKE
    times.  "steps": its loss still fell before its rate went down, on val, or on train where it is
    not short of data (on memorised examples the loss falls for ever).  "none": none of these, or
    there are too few examples to tell.

    fall: None where nobody knows how it was trained.  taught: whether it learned from these
    training examples. Where it did not, train is as hard as val for any network.
    """
    if not enough_errors(val):
        return "none"
    ratio = error_ratio(train, val)
    knows_train = ratio.value <= LEARNT and ratio.value + SURE * ratio.se < ALIKE
    if fall is not None and fall.goes_on and (fall.split == "val" or not knows_train):
        return "steps"
    if knows_train:
        return "data"
    as_bad = ratio.value >= ALIKE and ratio.value - SURE * ratio.se > LEARNT
    return "capacity" if as_bad and taught else "none"


# How the loss fell


class Line(NamedTuple):
    """A least-squares line through points: its slope, and that one's standard error."""

    slope: float
    se: float


def line(x: np.ndarray, y: np.ndarray) -> Line:
    """The line through points [k], k at least FEWEST_ROWS, of two or more different x."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    centred = x - x.mean()
    spread = float((centred**2).sum())
    slope = float((centred * y).sum()) / spread
    left = y - y.mean() - slope * centred
    return Line(slope, math.sqrt(float((left**2).sum()) / (len(x) - 2) / spread))


def last_fifth(rows: Sequence[dict]) -> Mean | None:
    """Nats by which the training loss fell over the last fifth of the steps, by a line through it.

    rows: of metrics.jsonl.  None where it has fewer than FEWEST_ROWS rows there.
    """
    trained = [row for row in rows if "loss" in row]
    if not trained:
        return None
    total = trained[-1]["step"]
    last = [row for row in trained if row["step"] > 0.8 * total]
    if len(last) < FEWEST_ROWS:
        return None
    of_step = line(*_points(last, "loss"))
    return Mean(-of_step.slope * total / 5, of_step.se * total / 5)


def fall_of(rows: Sequence[dict]) -> Fall | None:
    """How the loss fell in the last half of the steps whose rate is at least ANNEALED of its peak.

    A rate that goes down lowers the loss by itself, and that cannot be had again.  Before, a loss
    falls about as a power of the steps, so that a line through the logarithms tells what further
    steps would do.  The validations count where there are enough of them, else the training loss.

    rows: of metrics.jsonl.  None where it has fewer than FEWEST_ROWS rows there.
    """
    trained = [row for row in rows if "loss" in row]
    if not trained:
        return None
    steps = np.array([row["step"] for row in trained])
    rates = np.array([row["lr"] for row in trained])
    high = steps[rates >= ANNEALED * rates.max()]
    end = high[-1]
    validated = [row for row in rows if "val/loss" in row]
    for split, of_split, key in (("val", validated, "val/loss"), ("train", trained, "loss")):
        window = [row for row in of_split if end / 2 <= row["step"] <= end and row["step"] > 0]
        if len(window) >= FEWEST_ROWS and all(row[key] > 0 for row in window):
            of_log = line(*np.log(_points(window, key)))
            return Fall(split, -of_log.slope, of_log.se)
    return None


def _points(rows: Sequence[dict], key: str) -> np.ndarray:
    """(steps, values), [2, k]."""
    return np.array([[row["step"] for row in rows], [row[key] for row in rows]], np.float64)


# Where the true class is


def among_likeliest(
    top: np.ndarray, labels: np.ndarray, counts: Sequence[int]
) -> dict[int, float | None]:
    """The fraction of the errors whose true class is among the k likeliest, for each k.

    top: int [n, K], the likeliest first.  labels: [n].  counts: the k, each at most K.  None
    where there are no errors.
    """
    holds = top == labels[:, None]
    wrong = ~holds[:, 0]
    if not wrong.any():
        return dict.fromkeys(counts)
    return {k: float(holds[wrong, :k].any(axis=1).mean()) for k in counts}
