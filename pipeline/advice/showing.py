"""advice.json in words and cells, for the terminal and for the page alike."""

from __future__ import annotations

from typing import NamedTuple

from ..results.formats import ABSENT, milliseconds
from .choosing import (
    DEFAULT,
    STOP,
    amount,
    interval,
    multiple,
    points,
)
from .document import Advice, Interval, Lever
from .levers import LEVERS, SCARCITIES
from .outcomes import MeasuredGain, Outcome, Outcomes

GO_ON = "referral run --advised --run"


class LeverRow(NamedTuple):
    """A lever of the table, as text.

    piloted: what its pilot gained after which share of the generalist's steps.
    training, wall_clock, multiplications, parameters: × the generalist's own.  latency: of an
    example, in milliseconds.
    note: where its pilots ended, "" where they did not.
    """

    name: str
    advised: bool
    gain: str
    interval: str
    piloted: str
    training: str
    wall_clock: str
    multiplications: str
    parameters: str
    latency: str
    needs: str
    note: str


def lever_rows(advice: Advice) -> list[LeverRow]:
    """Every possible lever, in the order of advice.json."""
    return [_row(lever, advice) for lever in advice["levers"]]


def _row(lever: Lever, advice: Advice) -> LeverRow:
    own = advice["generalist"]

    def times(scarcity: str) -> str:
        taken = amount(lever, scarcity, own)
        return ABSENT if taken is None else f"× {multiple(taken)}"

    return LeverRow(
        name=lever["name"],
        advised=lever["name"] == advice["best"],
        gain=points(lever["gain"]),
        interval="" if lever["name"] == STOP else interval(lever),
        piloted=_piloted(lever),
        training=times("training"),
        wall_clock=times("wall_clock"),
        multiplications=times("multiplications"),
        parameters=times("parameters"),
        latency=milliseconds(lever.get("latency_ms")),
        needs=lever.get("needs", ""),
        note=_ended(lever["name"], advice),
    )


def _piloted(lever: Lever) -> str:
    measured = lever.get("measured")
    if not measured:
        return ABSENT
    return f"{points(measured['gain'])} at {100 * measured['share']:.2g} %"


def _ended(name: str, advice: Advice) -> str:
    """After which round the pilots of a lever went no further."""
    family = family_of(name, advice)
    for index, each in enumerate(advice["rounds"]):
        if family in each["dropped"]:
            return f"no pilot after round {index}"
    return ""


def family_of(name: str, advice: Advice) -> str | None:
    """The family of pilots that measured a lever. None where none did."""
    piloted = {family for each in advice["rounds"] for family in each["families"]}
    return next((family for family in LEVERS[name].families if family in piloted), None)


def words_of(scarcity: str) -> str:
    return SCARCITIES[scarcity].words


class UnderRow(NamedTuple):
    """What is best under one scarcity, as text.  chosen: whether it is the one that counts."""

    scarcity: str
    limit: str
    lever: str
    gain: str
    interval: str
    chosen: bool


def under_rows(advice: Advice) -> list[UnderRow]:
    """The best lever for each scarcity."""
    return [
        UnderRow(
            scarcity=words_of(name),
            limit="it alone" if best["limit"] is None else f"× {multiple(best['limit'])}",
            lever=best["lever"],
            gain=points(best["gain"]),
            interval="" if best["lever"] == STOP else interval(best),
            chosen=name == (advice["scarce"] or DEFAULT),
        )
        for name, best in advice["best_for"].items()
    ]


def round_lines(advice: Advice) -> list[str]:
    """What was piloted in each round, and what stopped there."""
    lines = []
    for index, each in enumerate(advice["rounds"]):
        line = f"round {index}: {', '.join(each['families'])} ({100 * each['share']:.2g} %)"
        if each["dropped"]:
            line += f"; stopped: {', '.join(each['dropped'])}"
        lines.append(line)
    return lines


def spent_line(advice: Advice) -> str:
    """The pilots took 27 % of the generalist's training. 30 % were allowed."""
    return (
        f"The pilots took {100 * advice['spent']:.2g} % of the generalist's training compute; "
        f"{100 * advice['budget']:.2g} % were allowed."
    )


def goes_on(advice: Advice, run: str) -> str | None:
    """The command that goes on with what is advised. None where that is to stop."""
    return None if advice["best"] == STOP else f"{GO_ON} {run}"


# What came of it


def outcome_sentence(outcomes: Outcomes) -> str:
    """The advised lever's gain, predicted and measured. "" where nothing was measured."""
    measured, predicted = outcomes["measured"], outcomes["predicted"]
    if measured is None:
        return ""
    place = place_of(Outcome(predicted=predicted, measured=measured))
    return (
        f"Predicted of {outcomes['best']}, on val: {points(predicted['gain'])} points "
        f"({interval(predicted)}). Measured on test: {measured_gain(measured)} points, {place} the "
        "predicted interval."
    )


def measured_gain(measured: MeasuredGain) -> str:
    """+4.2 (3.6 to 4.8), or the gain alone"""
    gain = points(measured["gain"])
    if "low" not in measured or "high" not in measured:
        return gain
    ends = Interval(gain=measured["gain"], low=measured["low"], high=measured["high"])
    return f"{gain} ({interval(ends)})"


def place_of(outcome: Outcome) -> str:
    """Where the measured gain lies of the predicted interval: below, inside or above."""
    assert outcome["measured"] is not None
    gain, predicted = outcome["measured"]["gain"], outcome["predicted"]
    if gain < predicted["low"]:
        return "below"
    return "above" if gain > predicted["high"] else "inside"
