"""From what small pilots measured to what a lever gains in full, with an interval of 90 %.

Everything is about s = log(errors with the lever / errors of the generalist), on val.  Each lever
has a rule, (Evidence) -> s and its standard deviation; docs/advise.md derives them, and
benchmarks/advice, from whose sets the constants come, holds them against levers that were pulled in
full.  Pure functions of numbers.

What small pilots can and cannot show: a network that a few per cent of the steps have trained errs
far more than the generalist, so its own accuracy says little.  What carries over is how its errors
go together with the generalist's (a second generalist), what it heals of what it could (specialists,
which are short trainings even in full), and what the generalist itself says of train against val.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Record = Mapping[str, Any]  # measured.json of a pilot
LIKELY = 1.645  # standard deviations: an interval of 90 %
GENERALIST = "generalist"


class LogRatio(NamedTuple):
    """s = log(errors with a lever / errors without), and its standard deviation."""

    mean: float
    sd: float


class Gain(NamedTuple):
    """In points of top-1, and its 90 % interval."""

    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Evidence:
    """What is known of a generalist and of its pilots.

    error: of the generalist on val, a fraction above 0.
    fit: its error on train over that on val, inputs as they are: 1 of a network that errs alike on
        both, 0 of one that knows its training examples by heart.
    augmented: whether training inputs are augmented.
    records: of each family the records of its rounds, in order; those alone that measured something.
    """

    error: float
    fit: float
    augmented: bool = False
    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)

    def last(self, family: str) -> Record | None:
        """The record of the last round that measured something."""
        rounds = self.records.get(family)
        return rounds[-1] if rounds else None


def gains(evidence: Evidence) -> dict[str, Gain]:
    """What each lever with a rule is expected to gain; stop gains nothing."""
    if evidence.error <= 0:
        return {name: Gain(0.0, 0.0, 0.0) for name in RULES}
    expected = {}
    for name, rule in RULES.items():
        ratio = rule(evidence)
        if ratio is not None:
            expected[name] = gain_of(ratio, evidence.error)
    return expected


def gain_of(ratio: LogRatio, error: float) -> Gain:
    """Points of top-1 that errors times exp(s) gain."""

    def points(s: float) -> float:
        return 100 * error * (1 - math.exp(s))

    return Gain(
        points(ratio.mean),
        points(ratio.mean + LIKELY * ratio.sd),
        points(ratio.mean - LIKELY * ratio.sd),
    )


def measured_gain(record: Record, form: str) -> Gain:
    """What a pilot itself measured of one of its forms, in points."""
    measured = record["forms"][form]
    half = LIKELY * measured["gain_se"]
    gain = measured["gain"]
    return Gain(100 * gain, 100 * (gain - half), 100 * (gain + half))


def measured_ratio(record: Record, form: str, error: float) -> LogRatio:
    """s of what a pilot measured."""
    measured = record["forms"][form]
    left = max(error - measured["gain"], measured["gain_se"], 1e-6)
    return LogRatio(math.log(left / error), measured["gain_se"] / left)


# Rules


def stop(evidence: Evidence) -> LogRatio:
    return LogRatio(0.0, 0.0)


# Of the generalist trained on for as long again, where it errs alike on train and val.
TRAIN_ON = 0.2
TRAIN_ON_SD = (0.02, 0.07)  # of a network that knows train by heart, and what is added at fit 1


def train_on(evidence: Evidence) -> LogRatio:
    """What is left to learn is the fit's to say: nothing is, where train is known by heart.

    A pilot that gains already puts a floor to that: as long again gains no less.
    """
    fit = evidence.fit
    expected = LogRatio(-TRAIN_ON * fit * fit, TRAIN_ON_SD[0] + TRAIN_ON_SD[1] * fit)
    record = evidence.last("on")
    if record is None:
        return expected
    return at_least(expected, measured_ratio(record, "on", evidence.error))


WIDER, WIDER_OF_FIT, WIDER_OF_BRANCHES = 0.04, 0.1, 0.8
WIDER_SD = (0.05, 0.1)


def wider(evidence: Evidence) -> LogRatio:
    """A little everywhere, more of a network without room, most where branches heal much.

    Branches are wider where the confusion is; what they heal is what width can.
    """
    healed = branches(evidence)
    of_branches = 0.0 if healed is None else min(0.0, healed.mean)
    mean = -WIDER - WIDER_OF_FIT * evidence.fit + WIDER_OF_BRANCHES * of_branches
    expected = LogRatio(mean, WIDER_SD[0] + WIDER_SD[1] * evidence.fit + abs(of_branches) / 3)
    record = evidence.last("wide")
    if record is None or "grown" not in record["forms"]:
        return expected
    return at_least(expected, measured_ratio(record, "grown", evidence.error))


# d correlation / d log(Brier of the short network / of the generalist's), where one round is known.
CORRELATION_SLOPE = -0.3
CORRELATIONS = (0.4, 0.97)
FAR = 1.0  # log ratio beyond which a short network has hardly begun to learn
PRIOR_CORRELATION = 0.75
# s of joining two equal networks, per unit of 1 - correlation, at fit 0 and what fit 1 adds.
OF_DIVERSITY = {"average": (0.37, 0.4), "shortlist": (0.43, 0.5)}
DIVERSITY_SD = (0.02, 0.5)  # absolute, and of the mean


def correlation_in_full(rounds: Sequence[Record]) -> float:
    """Of the errors of two generalists, of which one has had a few per cent of its training.

    The better the short network, the more its residuals y - p go with the generalist's, about
    linearly in the log of their sizes' ratio, which is 0 of two equals.
    """
    points = []
    for record in rounds:
        forms = record["forms"]
        ratio = math.log(max(forms["alone"]["brier"], 1e-9) / max(forms[GENERALIST]["brier"], 1e-9))
        points.append((max(ratio, 0.0), record["residual_correlation"]))
    ratio, correlation = points[-1]
    learned = math.exp(-max(0.0, ratio - FAR) * 2)  # how much there is to extrapolate from
    expected = correlation - CORRELATION_SLOPE * ratio
    expected = learned * expected + (1 - learned) * PRIOR_CORRELATION
    return min(max(expected, CORRELATIONS[0]), CORRELATIONS[1])


def joined(form: str) -> Callable[[Evidence], LogRatio | None]:
    """Of two equal generalists: the less their errors go together, the more it gains."""

    def rule(evidence: Evidence) -> LogRatio | None:
        rounds = evidence.records.get("second")
        if not rounds:
            return None
        base, of_fit = OF_DIVERSITY[form]
        mean = -(base + of_fit * evidence.fit) * (1 - correlation_in_full(rounds))
        expected = LogRatio(mean, DIVERSITY_SD[0] - DIVERSITY_SD[1] * mean)
        return at_least(expected, measured_ratio(rounds[-1], form, evidence.error))

    return rule


KEPT, KEPT_AUGMENTED = 0.1, 0.5
STUDENT_SD = 0.03


def average_student(evidence: Evidence) -> LogRatio | None:
    """A part of what its teachers gain: little where they are sure of what the student sees."""
    teachers = joined("average")(evidence)
    if teachers is None:
        return None
    kept = KEPT
    if evidence.augmented:
        kept += (KEPT_AUGMENTED - KEPT) * (1 - evidence.fit)
    return LogRatio(kept * teachers.mean, STUDENT_SD + 0.3 * abs(teachers.mean))


RERANKER = 0.75  # of what a second generalist gains on a shortlist, for half its steps


def rerank(evidence: Evidence) -> LogRatio | None:
    """Its own pilot puts a floor to a part of what a second generalist gains on a shortlist."""
    second = joined("shortlist")(evidence)
    record = evidence.last("rerank")
    if second is None:
        return None if record is None else measured_ratio(record, "rerank", evidence.error)
    expected = LogRatio(RERANKER * second.mean, second.sd)
    if record is None:
        return expected
    return at_least(expected, measured_ratio(record, "rerank", evidence.error))


HEALED_SD = (0.01, 0.3)  # absolute, and of the mean


def specialists(family: str) -> Callable[[Evidence], LogRatio | None]:
    """All groups heal as large a part of what they could as the piloted ones did."""

    def rule(evidence: Evidence) -> LogRatio | None:
        record = evidence.last(family)
        if record is None or "healed" not in record:
            return None
        ceiling = min(record["ceiling_all"] / evidence.error, 1.0)
        healed = max(0.0, record["healed"]) * ceiling
        mean = math.log(max(1 - healed, 0.02))
        of_pilot = record["healed_se"] * ceiling / max(1 - healed, 0.02)
        return LogRatio(mean, math.hypot(HEALED_SD[0] - HEALED_SD[1] * mean, of_pilot))

    return rule


branches = specialists("branches")


def at_least(expected: LogRatio, measured: LogRatio) -> LogRatio:
    """What is expected, unless a pilot is surely better already."""
    if measured.mean + LIKELY * measured.sd < expected.mean:
        return LogRatio(measured.mean, max(measured.sd, expected.sd))
    return expected


RULES: dict[str, Callable[[Evidence], LogRatio | None]] = {
    "stop": stop,
    "train_on": train_on,
    "wider": wider,
    "average": joined("average"),
    "shortlist": joined("shortlist"),
    "average_student": average_student,
    "rerank": rerank,
    "copies": specialists("copies"),
    "branches": branches,
}
