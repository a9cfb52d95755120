"""What came of an advice: the gain that was predicted on val beside what a run measured on test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NotRequired, TypedDict

from .document import Advice, Interval, Lever

if TYPE_CHECKING:
    from ..config import Config
    from ..results.rows import Row

OF_95, OF_90 = 1.960, 1.645  # standard errors on either side of an interval
PAIR = 2  # generalists


class MeasuredGain(TypedDict):
    """A row's top-1 on test less the generalist's, in points, and its paired 90 % interval.

    low, high: absent where the evaluation kept no predictions to pair.
    """

    row: str
    gain: float
    low: NotRequired[float]
    high: NotRequired[float]


class Outcome(TypedDict):
    """A lever's gain as it was predicted, and as it was measured. None where no row has it."""

    predicted: Interval
    measured: MeasuredGain | None


class Outcomes(TypedDict):
    """What results.json has of an advice.  levers: each that was possible."""

    best: str
    predicted: Interval
    measured: MeasuredGain | None
    levers: dict[str, Outcome]


def outcomes(advice: Advice, config: Config, rows: Mapping[str, Row]) -> Outcomes:
    """The outcomes of an advice. rows: of the run's results, by the names of `named_rows`."""
    levers = {}
    for lever in advice["levers"]:
        row = row_of(lever["name"], config, rows)
        measured = None if row is None else _measured(row, rows)
        levers[lever["name"]] = Outcome(predicted=_predicted(lever), measured=measured)
    best = levers[advice["best"]]
    return Outcomes(
        best=advice["best"],
        predicted=best["predicted"],
        measured=best["measured"],
        levers=levers,
    )


def _predicted(lever: Lever) -> Interval:
    return Interval(gain=lever["gain"], low=lever["low"], high=lever["high"])


def _measured(name: str, rows: Mapping[str, Row]) -> MeasuredGain:
    row = rows[name]
    paired = row.get("versus", {}).get("generalist")
    if paired is None:
        gain = row["top1"] - rows["generalist"]["top1"]
        return MeasuredGain(row=name, gain=100 * gain)
    gain, half = 100 * paired["top1"], 100 * paired["top1_half"] * OF_90 / OF_95
    return MeasuredGain(row=name, gain=gain, low=gain - half, high=gain + half)


# Which row is which lever


def row_of(lever: str, config: Config, rows: Mapping[str, Row]) -> str | None:
    """The row of a run's results that is this lever, pulled in full. None where there is none."""
    for name, is_it in PULLED.get(lever, []):
        if name in rows and is_it(config):
            return name
    return None


def _is_pair(kind: str) -> Callable[[Config], bool]:
    """Two networks of the run's own."""

    def is_it(config: Config) -> bool:
        ensemble = config.ensemble
        return (ensemble.kind, ensemble.members, ensemble.networks) == (kind, PAIR, [])

    return is_it


def _are_specialists(kind: str) -> Callable[[Config], bool]:
    """Specialists that start as the run's generalist, for all classes."""

    def is_it(config: Config) -> bool:
        section = config.specialists
        others = config.extend.run or section.starts_elsewhere
        return config.ensemble.kind == "specialists" and section.kind == kind and not others

    return is_it


def _is_student_of_pair(config: Config) -> bool:
    """One network like the generalist that two of them teach."""
    student = config.students["main"]
    return _is_pair("deep")(config) and student.teacher == "ensemble" and not student.model


def _is_control(config: Config) -> bool:
    return True


# Lever -> its rows, each with what must be so. The first that there is counts.
PULLED: dict[str, list[tuple[str, Callable[[Config], bool]]]] = {
    "train_on": [("train_on", _is_control)],
    "wider": [("wider", _is_control)],
    "average": [("ensemble", _is_pair("deep")), ("average", _is_control)],
    "shortlist": [("ensemble", _is_pair("shortlist")), ("shortlist", _is_control)],
    "average_student": [("student main", _is_student_of_pair)],
    "rerank": [("ensemble", _is_pair("rerank"))],
    "copies": [("ensemble", _are_specialists("copy"))],
    "branches": [("ensemble", _are_specialists("branch"))],
}
