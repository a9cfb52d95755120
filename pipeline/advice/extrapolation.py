"""From what small pilots measured to what a lever gains in full, with an interval of 90 %.

Everything is about s = log(errors with the lever / errors of the generalist), on val.  Each lever
has a rule, (Evidence) -> s and its standard deviation. docs/advise.md derives them, and
benchmarks/advice, from whose sets the constants come, holds them against levers that were pulled in
full.  Pure functions of numbers.

What small pilots can and cannot show: a network that a few per cent of the steps have trained errs
far more than the generalist, so its own accuracy says little.  What carries over is how its errors
go together with the generalist's (a second generalist), what it heals of what it could
(specialists, which are short trainings even in full), and what the generalist itself says of train
against val.
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
    """s = log(errors with a lever / errors without).

    mean: what is expected, below 0 where the lever gains.  sd: its standard deviation.  spread:
    that of log(-s): how many times as much or as little it may be.  beyond: how far below all that
    s may still be, since nothing has shown that it is not.
    """

    mean: float
    sd: float
    spread: float = 0.0
    beyond: float = 0.0


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
        both, 0 of one that has memorised its training examples.
    fall: by what part twice the steps would lower the loss, as it fell before its rate went down.
        None where nothing says.
    has_bags: whether its inputs are bags of n-grams, which a student of it sees mixed.
    records: of each family the records of its rounds, in order. Those that measured something.
    """

    error: float
    fit: float
    records: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    has_bags: bool = False
    fall: float | None = None

    def last(self, family: str) -> Record | None:
        """The record of the last round that measured something."""
        rounds = self.records.get(family)
        return rounds[-1] if rounds else None


def gains(evidence: Evidence) -> dict[str, Gain]:
    """What each lever with a rule is expected to gain. Stop gains nothing."""
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

    times = math.exp(LIKELY * ratio.spread)
    least, most = sorted((ratio.mean / times, ratio.mean * times), reverse=True)
    return Gain(
        points(ratio.mean),
        points(least + LIKELY * ratio.sd),
        points(most - LIKELY * ratio.sd - ratio.beyond),
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


def at_least(expected: LogRatio, measured: LogRatio) -> LogRatio:
    """What is expected, unless a pilot is surely better already."""
    if measured.mean + LIKELY * measured.sd < expected.mean:
        return LogRatio(measured.mean, max(measured.sd, expected.sd), expected.spread)
    return expected


# Rules.  Every constant is fitted to benchmarks/advice. docs/advise.md has the table.


def stop(evidence: Evidence) -> LogRatio:
    return LogRatio(0.0, 0.0)


TRAIN_ON = (0.01, 0.2)  # - s at fit 0, and what fit 1 adds, by the cube of the fit
QUIET_FALL = 0.1  # a loss that falls less by twice the steps leaves training on as much less
USUAL_FALL = 0.25  # a loss that falls more by twice the steps lets training on gain as much more
TRAIN_ON_SD = 0.065


def train_on(evidence: Evidence) -> LogRatio:
    """The fit says how much is left to learn: next to nothing if train is memorised.

    It is more where the loss still fell fast, and less where it hardly fell any more. A network
    that errs on train as on val, for want of room or because labels are wrong, learns nothing by
    more steps. A pilot warms its rate up again and errs more at first, so it says little. A pilot
    that gains already is a lower bound for the whole training.
    """
    faster = 1.0
    if evidence.fall is not None:
        faster = max(min(evidence.fall / QUIET_FALL, 1.0), evidence.fall / USUAL_FALL, 0.0)
    expected = LogRatio(-TRAIN_ON[0] - TRAIN_ON[1] * evidence.fit**3 * faster, TRAIN_ON_SD)
    record = evidence.last("on")
    if record is None:
        return expected
    return at_least(expected, measured_ratio(record, "on", evidence.error))


WIDER = (0.05, 0.25)  # - s at fit 0, and what fit 1 adds
WIDER_OF_BRANCHES = 0.8
WIDER_SD, WIDER_SPREAD = 0.03, 0.8


def wider(evidence: Evidence) -> LogRatio:
    """A little everywhere, more for a network short of capacity, most where branches help.

    Branches are wider where the confusion is. What they heal, width can.  A fresh wider network
    learns faster at first whether it ends better or not, so that its own pilot says nothing.
    """
    healed = branches(evidence)
    of_branches = 0.0 if healed is None else min(0.0, healed.mean)
    mean = min(-WIDER[0] - WIDER[1] * evidence.fit, WIDER_OF_BRANCHES * of_branches)
    return LogRatio(mean, WIDER_SD, WIDER_SPREAD)


# Of d correlation / d log(Brier of the short network / of the generalist's) between two rounds what
# holds up to the end, where the log is 0, and what it is taken for where there is one round.
SLOPE_KEPT, STEEPEST, ONE_ROUND = 0.75, 0.35, 0.2
CORRELATIONS = (0.1, 0.98)
# - s of joining two equal networks per unit of 1 - correlation: of networks that soon learn, and of
# those that have hardly begun to at the pilots' end.
OF_DIVERSITY = {"average": 0.55, "shortlist": 0.7}
LATE = {"average": 1.0, "shortlist": 1.4}
BEGUN = (0.98, 0.88)  # the Brier score of a network that has not learned, and of one that has
LATE_AT = 0.03  # of the steps, after which it is seen whether a network learns soon or late
JOINED_SD, JOINED_SPREAD, LATE_SPREAD = 0.015, 0.42, 0.45


def correlation_in_full(rounds: Sequence[Record]) -> float:
    """Correlation of two generalists' residuals y - p, from one that was trained only briefly.

    The better the short network, the more its residuals go with the generalist's, about linearly in
    the log of their sizes' ratio, which is 0 of two equals.  One that has not begun to learn says
    only what the generalist's own residuals are like. The correlation stays about that.
    """
    ratios = [log_brier_ratio(record) for record in rounds]
    correlations = [record["residual_correlation"] for record in rounds]
    slope = ONE_ROUND
    if len(rounds) > 1 and ratios[-2] - ratios[-1] > 0:
        slope = (correlations[-1] - correlations[-2]) / (ratios[-2] - ratios[-1])
        slope = SLOPE_KEPT * min(max(slope, 0.0), STEEPEST)
    expected = correlations[-1] + begun(rounds[-1]) * slope * ratios[-1]
    return min(max(expected, CORRELATIONS[0]), CORRELATIONS[1])


def log_brier_ratio(record: Record) -> float:
    """log(Brier of the short network / of the generalist's), at least 0."""
    short, own = (record["forms"][form]["brier"] for form in ("alone", GENERALIST))
    return max(0.0, math.log(max(short, 1e-9) / max(own, 1e-9)))


def begun(record: Record) -> float:
    """0 for a short network that predicts nothing yet, 1 for one that has begun to learn."""
    none, enough = BEGUN
    return min(max((none - record["forms"]["alone"]["brier"]) / (none - enough), 0.0), 1.0)


def learns_soon(rounds: Sequence[Record]) -> float:
    """`begun` of the network in the round that ended nearest to LATE_AT."""
    return begun(min(rounds, key=lambda record: abs(math.log(record["share"] / LATE_AT))))


def joined(form: str) -> Callable[[Evidence], LogRatio | None]:
    """Two equal generalists joined: the less their errors correlate, the larger the gain.

    Networks that learn late gain more: their errors are near misses, which a mean undoes.
    """

    def rule(evidence: Evidence) -> LogRatio | None:
        rounds = evidence.records.get("second")
        if not rounds:
            return None
        soon = learns_soon(rounds)
        per_unit = soon * OF_DIVERSITY[form] + (1 - soon) * LATE[form]
        mean = per_unit * (1 - correlation_in_full(rounds))
        spread = soon * JOINED_SPREAD + (1 - soon) * LATE_SPREAD
        expected = LogRatio(-mean, JOINED_SD, spread)
        return at_least(expected, measured_ratio(rounds[-1], form, evidence.error))

    return rule


STUDENT = 0.03  # - s, whatever its teachers gain
OF_TEACHERS = 0.25  # of what they gain, where the generalist has memorised train
STUDENT_SD = 0.065
OF_MIXED = 1.0  # of what they gain, where it learns of mixed bags
MIXED_SD, MIXED_SPREAD = 0.02, 0.45


def average_student(evidence: Evidence) -> LogRatio | None:
    """Little, as its teachers are sure of what it sees. With mixed bags nearly all of the mean's.

    The student starts as the generalist. Where that still errs on train, answers that are as sure
    as labels teach it what training on would, and no more.
    """
    teachers = joined("average")(evidence)
    if teachers is None:
        return None
    if evidence.has_bags:
        return LogRatio(OF_MIXED * teachers.mean, MIXED_SD, MIXED_SPREAD)
    mean = -STUDENT + OF_TEACHERS * (1 - evidence.fit) * teachers.mean
    return LogRatio(mean, STUDENT_SD)


RERANKER = 0.7  # of what a second generalist gains on a shortlist, for half its steps


def rerank(evidence: Evidence) -> LogRatio | None:
    """A part of what a second generalist gains on a shortlist. Its own pilot is a lower bound."""
    second = joined("shortlist")(evidence)
    record = evidence.last("rerank")
    if second is None:
        return None if record is None else measured_ratio(record, "rerank", evidence.error)
    expected = LogRatio(RERANKER * second.mean, second.sd, second.spread)
    if record is None:
        return expected
    return at_least(expected, measured_ratio(record, "rerank", evidence.error))


# What specialists heal of what perfect ones would, where nothing was piloted: nothing at a fit
# below the first, the second at fit 1. Its standard deviation there, and what fit 1 adds.
HEALED_FROM, HEALED = 0.3, 0.12
HEALED_SD = (0.03, 0.15)
# And the most that they may heal then, at fit 1 and where hardly a step was piloted. The least: an
# ensemble's weights are fitted on val, so that specialists which do not help are not listened to.
MAY_HEAL = {"copies": 0.0, "branches": 1.2}
LEAST_HEALED = -0.1
FROM_PILOT_SD = (0.04, 0.3)  # of all groups' from the piloted ones', absolute and of what they heal
# What is healed grows with the share of the steps to this power, where it is surely so.
GROWTH = 0.8
MOST_HEALED = 0.98


def specialists(family: str) -> Callable[[Evidence], LogRatio | None]:
    """All groups heal as large a part of what they could as the piloted ones did.

    A specialist's first steps heal nothing yet, even where it heals much in the end.  So a pilot
    counts by the square of the share of a specialist's steps that it has taken. By the share itself
    where it surely heals something already.  Where the generalist lacks room, what was not piloted
    may still heal much.
    """

    def rule(evidence: Evidence) -> LogRatio | None:
        piloted = latest_of_groups(evidence.records.get(family, ()))
        if not piloted:
            return None
        weights = [max(record["ceiling"], 1e-9) for record in piloted]

        def mean_of(key: str) -> float:
            pairs = zip(weights, piloted, strict=True)
            return sum(weight * record[key] for weight, record in pairs) / sum(weights)

        share, healed, se = (mean_of(key) for key in ("full_share", "healed", "healed_se"))
        share = min(max(share, 1e-3), 1.0)
        is_sure = healed > LIKELY * se
        known = share if is_sure else share**2
        times = share**-GROWTH if is_sure else 1.0
        without_room = max(0.0, evidence.fit - HEALED_FROM) / (1 - HEALED_FROM)
        expected = max(0.0, known * times * healed + (1 - known) * HEALED * without_room)
        error = math.hypot(
            known * times * se,
            (1 - known) * (HEALED_SD[0] + HEALED_SD[1] * without_room),
            FROM_PILOT_SD[0] + FROM_PILOT_SD[1] * expected,
        )
        ceiling = min(piloted[-1]["ceiling_all"] / evidence.error, 1.0)
        left = 1 - min(expected * ceiling, MOST_HEALED)
        # The log of the interval's end: near 0 a derivative would stretch it beyond all errors.
        less = min(LIKELY * error, expected - LEAST_HEALED)
        sd = math.log1p(less * ceiling / left) / LIKELY
        untried = (1 - share**2) * MAY_HEAL[family] * without_room
        most = max(expected + LIKELY * error, untried)
        least_left = 1 - min(most, MOST_HEALED) * ceiling
        beyond = math.log(left) - LIKELY * sd - math.log(least_left)
        return LogRatio(math.log(left), sd, beyond=max(0.0, beyond))

    return rule


def latest_of_groups(rounds: Sequence[Record]) -> list[Record]:
    """The last record of each set of groups."""
    latest = {tuple(record["groups"]): record for record in rounds if "healed" in record}
    return list(latest.values())


branches = specialists("branches")


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
