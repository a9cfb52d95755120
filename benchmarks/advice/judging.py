"""Predicted gains and advised levers against levers that were pulled: pure functions.

Gains are in points of top-1 on test, over the generalist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

import numpy as np

from pipeline.advice.choosing import STOP
from pipeline.advice.extrapolation import LIKELY, Gain

from .gains import mean_and_error

# scarcity -> how much of it a lever may have taken in truth, multiples of the generalist's own
ALLOWED = {"training": 1.05, "multiplications": 1.1}
RULES = (
    STOP,
    "average",
    "shortlist",
    "wider",
    "copies",
    "branches",
    "train_on",
    "average_student",
)


@dataclass(frozen=True)
class Pulled:
    """A lever in full.

    gain, error: points on test and their paired standard error.  correct: bool, test's examples.
    taken: by scarcity, in multiples of the generalist's own.
    """

    gain: float
    error: float
    correct: np.ndarray
    taken: Mapping[str, float]

    def is_allowed(self, scarcity: str) -> bool:
        return self.taken[scarcity] <= ALLOWED[scarcity]


class Verdict(NamedTuple):
    """What came of an advice under one scarcity.

    regret: points that the best lever gains over the advised one.  error: its paired standard
    error.  by_rule: the regret of each of RULES.
    """

    advised: str
    best: str
    gain: float
    best_gain: float
    regret: float
    error: float
    by_rule: dict[str, float]

    @property
    def is_as_good(self) -> bool:
        """Whether the best lever is the advised one, or not surely better."""
        return self.regret <= LIKELY * self.error


def verdict(advised: str, pulled: Mapping[str, Pulled], scarcity: str) -> Verdict:
    """pulled: every lever by its name, STOP among them, which takes nothing."""
    allowed = {name: lever for name, lever in pulled.items() if lever.is_allowed(scarcity)}
    best = max(allowed, key=lambda name: allowed[name].gain)
    followed = {rule: rule if rule in allowed else STOP for rule in RULES}
    regret, error = difference(pulled[best], pulled[advised])
    return Verdict(
        advised=advised,
        best=best,
        gain=pulled[advised].gain,
        best_gain=pulled[best].gain,
        regret=regret,
        error=error,
        by_rule={
            rule: difference(pulled[best], pulled[lever])[0] for rule, lever in followed.items()
        },
    )


def difference(one: Pulled, other: Pulled) -> tuple[float, float]:
    """Points that one gains over the other on the same examples, and their standard error."""
    return mean_and_error(100 * (one.correct.astype(float) - other.correct))


class Held(NamedTuple):
    """Whether an interval holds the gain that was measured, and with that one's own error."""

    exactly: bool
    with_error: bool


def held(predicted: Gain, pulled: Pulled) -> Held:
    """with_error: the interval widened at both ends by the 90 % of the measured gain."""
    half = LIKELY * pulled.error
    exactly = predicted.low <= pulled.gain <= predicted.high
    return Held(exactly, predicted.low - half <= pulled.gain <= predicted.high + half)


class Coverage(NamedTuple):
    """Of n intervals: shares of 1, mean points."""

    n: int
    exactly: float
    with_error: float
    width: float
    predicted: float
    measured: float
    error: float  # mean |predicted - measured|


def coverage(pairs: Sequence[tuple[Gain, Pulled]]) -> Coverage:
    each = [held(predicted, pulled) for predicted, pulled in pairs]
    return Coverage(
        len(pairs),
        mean(row.exactly for row in each),
        mean(row.with_error for row in each),
        mean(predicted.high - predicted.low for predicted, _ in pairs),
        mean(predicted.gain for predicted, _ in pairs),
        mean(pulled.gain for _, pulled in pairs),
        mean(abs(predicted.gain - pulled.gain) for predicted, pulled in pairs),
    )


class Account(NamedTuple):
    """Of all verdicts under one scarcity: how many, counts, and mean regrets in points."""

    n: int
    best: int
    as_good: int
    regret: float
    worst: float
    by_rule: dict[str, float]


def account(verdicts: Iterable[Verdict]) -> Account:
    every = list(verdicts)
    return Account(
        n=len(every),
        best=sum(row.advised == row.best for row in every),
        as_good=sum(row.is_as_good for row in every),
        regret=mean(row.regret for row in every),
        worst=max(row.regret for row in every),
        by_rule={rule: mean(row.by_rule[rule] for row in every) for rule in RULES},
    )
