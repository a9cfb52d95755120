"""Calibration: metrics before and after temperature scaling, and reliability diagrams."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.results import Evaluation, Row, number, read_evaluation

from . import plots
from .evidence import Evidence
from .formatting import Cell, best_of, cell, colours_of

MOST_PANELS = 8
KEYS = ("nll", "cnll", "brier", "cbrier", "ece", "cece")


@dataclass(frozen=True)
class CalibrationRow:
    name: str
    colour: str
    temperature: float | None
    cells: list[Cell]


@dataclass(frozen=True)
class Diagram:
    title: str
    ece: float | None
    svg: str


@dataclass(frozen=True)
class Panel:
    """A row's reliability diagrams: as predicted, and calibrated where it has a temperature."""

    name: str
    colour: str
    diagrams: list[Diagram]


@dataclass(frozen=True)
class Panels:
    """rest: rows that have diagrams but no panel. fewest: examples of a bin that is not pale."""

    panels: list[Panel]
    rest: int
    fewest: int = plots.FEWEST


def calibration_rows(evidence: Evidence) -> list[CalibrationRow]:
    """NLL, Brier and ECE before and after temperature scaling. None where none was fitted."""
    rows = evidence.rows
    if all(row.get("temperature") is None for row in rows.values()):
        return []
    best = {key: best_of(rows, key) for key in KEYS}
    colours = colours_of(rows)
    return [
        CalibrationRow(
            name=name,
            colour=colours[name],
            temperature=row.get("temperature"),
            cells=[cell(row, key, best[key], number) for key in KEYS],
        )
        for name, row in rows.items()
    ]


def reliability_panels(evidence: Evidence) -> Panels:
    """Reliability diagrams of at most MOST_PANELS rows, in the table's order.

    Generalist and ensemble have precedence, then students, then controls.
    """
    evaluations = _evaluations_with_bins(evidence)
    precedence = {"generalist": 0, "ensemble": 0} | dict.fromkeys(evidence.results["controls"], 2)
    ranked = sorted(evaluations, key=lambda name: precedence.get(name, 1))
    chosen = set(ranked[:MOST_PANELS])
    colours = colours_of(evidence.rows)
    panels = [
        _panel(name, colours[name], evidence.rows[name], evaluation)
        for name, evaluation in evaluations.items()
        if name in chosen
    ]
    return Panels(panels, rest=len(evaluations) - len(panels))


def _evaluations_with_bins(evidence: Evidence) -> dict[str, Evaluation]:
    """The files of evaluation/ that have a reliability diagram, by the row's name."""
    evaluations = {}
    for name in evidence.rows:
        evaluation = read_evaluation(evidence.run.evaluate, name.removeprefix("student "))
        if evaluation and evaluation.get("reliability"):
            evaluations[name] = evaluation
    return evaluations


def _panel(name: str, colour: str, row: Row, evaluation: Evaluation) -> Panel:
    bins = evaluation.get("reliability", [])
    drawing = plots.reliability(bins, colour, f"Reliability of {name}")
    diagrams = [Diagram("as predicted", row["ece"], drawing)]
    calibrated = evaluation.get("reliability_calibrated")
    temperature = row.get("temperature")
    if calibrated and temperature is not None:
        title = f"Reliability of {name}, calibrated"
        drawing = plots.reliability(calibrated, colour, title)
        diagrams.append(Diagram(f"at T = {temperature:.2f}", row.get("cece"), drawing))
    return Panel(name, colour, diagrams)
