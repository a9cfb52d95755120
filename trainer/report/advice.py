"""The advice of pilots: every lever's gain against its cost, and its measured gain."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from pipeline.advice.choosing import STOP, amount, pareto
from pipeline.advice.document import Advice, Lever
from pipeline.advice.levers import SCARCITIES
from pipeline.advice.outcomes import Outcome, Outcomes
from pipeline.advice.showing import (
    LeverRow,
    UnderRow,
    lever_rows,
    measured_gain,
    outcome_sentence,
    place_of,
    round_lines,
    spent_line,
    under_rows,
)

from . import plots
from .formatting import Plot

# Of the costs that gains are drawn against: a scarcity's name -> the axis.
DRAWN = {
    "training": "training, × the generalist's",
    "multiplications": "multiplications of an answer, × the generalist's",
    "parameters": "parameters, × the generalist's",
}
LEGEND = (
    ("predicted, with its 90 % interval", "generalist"),
    ("nothing else gains as much for less", "ensemble"),
)
FAR = 4  # times as much: costs so far apart are drawn on a logarithmic axis
OF_MEASURED = ("measured on test", "compute")


@dataclass(frozen=True)
class AdvisedRow:
    """A lever of the table.  fronts: what it is on the front of gain against.

    measured: on test, by the run that pulled the lever, and verdict, how that compares.
    """

    row: LeverRow
    fronts: list[str]
    measured: str
    verdict: str


@dataclass(frozen=True)
class AdviceSection:
    advice: Advice
    rows: list[AdvisedRow]
    under: list[UnderRow]
    plots: list[Plot]
    spent: str
    rounds: list[str]
    has_outcome: bool
    outcome: str
    command: str


def advice_section(advice: Advice, outcomes: Outcomes | None = None) -> AdviceSection:
    """outcomes: of a run that measured levers in full, where there is one."""
    known = outcomes["levers"] if outcomes else {}
    measured = {name: each for name, each in known.items() if each["measured"] is not None}
    return AdviceSection(
        advice=advice,
        rows=[
            _row(row, lever, measured.get(row.name))
            for row, lever in zip(lever_rows(advice), advice["levers"], strict=True)
        ],
        under=under_rows(advice),
        plots=[plot for name in DRAWN if (plot := _plot(advice, name, measured)).svg],
        spent=spent_line(advice),
        rounds=round_lines(advice),
        has_outcome=bool(measured),
        outcome=outcome_sentence(outcomes) if outcomes else "",
        command=_command(advice),
    )


def _command(advice: Advice) -> str:
    """The line that goes on with what is advised. "" where that is to stop."""
    if advice["best"] == STOP:
        return ""
    best = next(lever for lever in advice["levers"] if lever["name"] == advice["best"])
    return best.get("command", "")


def _row(row: LeverRow, lever: Lever, outcome: Outcome | None) -> AdvisedRow:
    fronts = lever.get("pareto", [])
    if outcome is None or outcome["measured"] is None:
        return AdvisedRow(row, fronts, "", "")
    return AdvisedRow(row, fronts, measured_gain(outcome["measured"]), place_of(outcome))


# The drawing


def _plot(advice: Advice, scarcity: str, measured: dict[str, Outcome]) -> Plot:
    """Gains against one cost, the front that nothing beats, and what was measured on test."""
    front = pareto(advice["levers"], scarcity)
    values = []
    for lever in advice["levers"]:
        taken = amount(lever, scarcity, advice["generalist"])
        if taken is None:
            continue
        values.append(_estimate(lever, taken, lever["name"] in front, advice["best"]))
        if lever["name"] in measured:
            values.append(_measured(lever["name"], taken, measured[lever["name"]]))
    costs = [value.x for value in values]
    drawing, log_x = Markup(""), False
    if len(set(costs)) > 1:
        log_x = min(costs) > 0 and max(costs) > FAR * min(costs)
        drawing = plots.estimates(values, front, DRAWN[scarcity], "points", log_x=log_x)
    legend = LEGEND + ((OF_MEASURED,) if measured else ())
    scale = f"{SCARCITIES[scarcity].words}{' (log)' if log_x else ''}"
    return Plot(drawing, f"Gain against {scale}; the advice is ringed", legend)


def _estimate(lever: Lever, taken: float, on_front: bool, best: str) -> plots.Estimate:
    return plots.Estimate(
        name=lever["name"],
        colour="ensemble" if on_front else "generalist",
        x=taken,
        y=lever["gain"],
        low=lever["low"],
        high=lever["high"],
        label="" if lever["name"] == STOP and taken else lever["name"],
        style="ringed" if lever["name"] == best else "dot",
    )


def _measured(name: str, taken: float, outcome: Outcome) -> plots.Estimate:
    measured = outcome["measured"]
    assert measured is not None
    gain = measured["gain"]
    return plots.Estimate(
        name=f"{name}, measured",
        colour="compute",
        x=taken,
        y=gain,
        low=measured.get("low", gain),
        high=measured.get("high", gain),
        style="hollow",
    )
