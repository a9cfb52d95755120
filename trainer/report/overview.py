"""The head of the page: its tiles, the table of metrics, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.results import (
    Cost,
    Results,
    Row,
    errors,
    number,
    percent,
    share_of_gain,
    worth,
)

from . import plots, tables
from .evidence import Evidence
from .formatting import Cell, Plot, best_of, cell, colours_of, signed
from .svg import short, whole_percent

MOST_STUDENTS = 3

# Key of a row -> how it is shown, and which value of a column is the best.
COLUMNS: dict[str, tuple[Callable[[float | None], str], Callable[..., float]]] = {
    "top1": (percent, max),
    "top5": (percent, max),
    "nll": (number, min),
    "brier": (number, min),
    "ece": (number, min),
    "macro_top1": (percent, max),
}


@dataclass(frozen=True)
class Tile:
    what: str
    value: str
    note: str = ""
    before: str = ""


@dataclass(frozen=True)
class MetricRow:
    """versus: the paired difference to the generalist's top-1 and half its 95 % interval."""

    name: str
    colour: str
    cells: list[Cell]
    errors: int
    versus: tuple[float, float] | None
    cost: Cost


def students_in_the_head(results: Results) -> list[str]:
    """The students that the head of the page speaks of: main, then in the config's order."""
    return sorted(results["students"], key=lambda name: name != "main")[:MOST_STUDENTS]


# Tiles


def headline_tiles(results: Results) -> list[Tile]:
    """The few metrics that say most."""
    tiles = [
        _errors_tile(results),
        _nll_tile(results),
        _student_tile(results),
        _dee_tile(results),
        _groups_tile(results),
    ]
    return [tile for tile in tiles if tile is not None]


def _errors_tile(results: Results) -> Tile:
    before, after = errors(results["generalist"]), errors(results["ensemble"])
    change = f"{signed(100 * (after - before) / before, 1)} %" if before else ""
    what = "top-1 errors, generalist to ensemble"
    return Tile(what, f"{after:,}", change, before=f"{before:,}")


def _nll_tile(results: Results) -> Tile | None:
    before, after = results["generalist"]["nll"], results["ensemble"]["nll"]
    if before is None or after is None:
        return None
    what = "NLL, generalist to ensemble"
    return Tile(what, f"{after:.3f}", signed(after - before, 3), before=f"{before:.3f}")


def _student_tile(results: Results) -> Tile | None:
    student = results["student"]
    if student is None:
        return None
    fraction = share_of_gain(student, results)
    what = "of the gain kept by one network, the student"
    kept = "–" if fraction is None else percent(fraction, 0)
    return Tile(what, kept, f"{percent(student['top1'])} top-1")


def _dee_tile(results: Results) -> Tile | None:
    students = results["students"]
    measured = [name for name, row in students.items() if "dee" in row or "dee_beyond" in row]
    if not measured:
        return None
    name = min(measured, key=lambda name: name != "main")
    what = f"networks of a deep ensemble have the calibrated NLL of the student {name} (DEE)"
    size = len(results.get("sizes") or [])
    return Tile(what, worth(students[name], results), f"of {size}")


def _groups_tile(results: Results) -> Tile | None:
    clusters = results.get("clusters")
    if not clusters or clusters["captured_confusion"] is None:
        return None
    captured, chance = clusters["captured_confusion"], clusters["chance"]
    what = "of the generalist's test errors lie inside a group"
    note = f"{captured / chance:.1f} × chance" if chance else ""
    return Tile(what, percent(captured, 0), note)


# The table


def metric_rows(evidence: Evidence) -> list[MetricRow]:
    """The table of metrics, with the best of each column marked."""
    rows = evidence.rows
    colours = colours_of(rows)
    best = {key: best_of(rows, key, better) for key, (_, better) in COLUMNS.items()}
    return [
        MetricRow(
            name=name,
            colour=colours[name],
            cells=[cell(row, key, best[key], text) for key, (text, _) in COLUMNS.items()],
            errors=errors(row),
            versus=_versus_generalist(evidence, name.removeprefix("student ")),
            cost=row["cost"],
        )
        for name, row in rows.items()
    ]


def _versus_generalist(evidence: Evidence, name: str) -> tuple[float, float] | None:
    correct = evidence.correct.get(name)
    if name == "generalist" or correct is None:
        return None
    return tables.paired_difference(evidence.correct["generalist"], correct)


# Cost


def cost_plots(evidence: Evidence) -> list[Plot]:
    """Top-1 against what it cost to train: examples, and seconds."""
    plotted = [
        _cost_plot(evidence.rows, "examples_seen", "training examples seen"),
        _cost_plot(evidence.rows, "seconds", "seconds of training"),
    ]
    return [plot for plot in plotted if plot.svg]


def _cost_plot(rows: dict[str, Row], key: Literal["examples_seen", "seconds"], label: str) -> Plot:
    colours, dots = colours_of(rows), []
    for name, row in rows.items():
        cost = row["cost"][key]
        if cost:
            text = f"{name}: {percent(row['top1'])}, {short(cost)}"
            dots.append(
                plots.Dot(text, colours[name], cost, row["top1"], name.removeprefix("student "))
            )
    costs = [dot.x for dot in dots]
    log_x = bool(costs) and max(costs) > 8 * min(costs)
    drawing = plots.scatter(dots, label, "top-1", log_x=log_x, y_text=whole_percent)
    scale = ", logarithmic" if log_x else ""
    return Plot(drawing, f"Top-1 against {label}{scale}")
