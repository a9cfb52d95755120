"""The head of the page: its tiles, the table of metrics, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.results import (
    Cost,
    Results,
    Row,
    compare_paired,
    errors,
    is_of_another_size,
    milliseconds,
    number,
    percent,
    share_kept,
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

    @property
    def is_measurable(self) -> bool:
        return self.versus is not None and abs(self.versus[0]) > self.versus[1]


@dataclass(frozen=True)
class CostRow:
    """What a row is and takes.  times: its multiplications over the generalist's.

    latencies: milliseconds of an example, for each size of a batch that was measured.
    """

    name: str
    colour: str
    top1: float
    parameters: int | None
    multiplications: int | None
    times: float | None
    asked: float | None
    latencies: list[float | None]
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
    generalist, ensemble = results["generalist"], results["ensemble"]
    if student is None:
        return None
    note = f"{percent(student['top1'])} top-1"
    if is_of_another_size(student, generalist):
        return Tile(
            "errors of the student, a network of another size", f"{errors(student):,}", note
        )
    what = "of the gain kept by one network, the student"
    gains = compare_paired(ensemble, "generalist", generalist, "top1") > 0
    keeps = compare_paired(student, "generalist", generalist, "top1")
    fraction = share_kept(student, results)
    if not gains or fraction is None:
        return Tile(what, "–", note)
    return Tile(what, percent(fraction, 0) if keeps > 0 else "none", note)


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
        )
        for name, row in rows.items()
    ]


def cost_rows(evidence: Evidence) -> list[CostRow]:
    """Size, latency and training cost of each row."""
    rows, batches = evidence.rows, measured_batches(evidence.rows)
    colours = colours_of(rows)
    alone = rows["generalist"].get("multiplications")
    return [
        CostRow(
            name=name,
            colour=colours[name],
            top1=row["top1"],
            parameters=row.get("parameters"),
            multiplications=row.get("multiplications"),
            times=row["multiplications"] / alone if alone and "multiplications" in row else None,
            asked=row.get("asked"),
            latencies=[(row["cost"].get("latency_ms") or {}).get(batch) for batch in batches],
            cost=row["cost"],
        )
        for name, row in rows.items()
    ]


def measured_batches(rows: dict[str, Row]) -> list[str]:
    """The batch sizes at which latency was measured, the smallest first."""
    sizes = {size for row in rows.values() for size in row["cost"].get("latency_ms") or {}}
    return sorted(sizes, key=int)


def softmax_note(evidence: Evidence) -> str | None:
    """How much of the generalist's time goes to what multiplications do not count."""
    cost = evidence.results["generalist"]["cost"]
    softmax, latency = cost.get("softmax_ms"), cost.get("latency_ms")
    if not softmax or not latency:
        return None
    parts = [
        f"{milliseconds(softmax[size])} of {milliseconds(latency[size])} ms at batch {size}"
        for size in softmax
    ]
    return (
        f"A softmax over the {evidence.num_classes:,} classes by itself takes {' and '.join(parts)}"
        " of the generalist's time an example."
    )


def _versus_generalist(evidence: Evidence, name: str) -> tuple[float, float] | None:
    correct = evidence.correct.get(name)
    if name == "generalist" or correct is None:
        return None
    return tables.paired_difference(evidence.correct["generalist"], correct)


# Cost


def cost_plots(evidence: Evidence) -> list[Plot]:
    """Top-1 against what it cost to train, and against what an answer takes."""
    rows = evidence.rows
    plotted = [
        _cost_plot(rows, lambda row: row["cost"]["examples_seen"], "training examples seen"),
        _cost_plot(rows, lambda row: row["cost"]["seconds"], "seconds of training"),
        _cost_plot(rows, lambda row: row.get("multiplications"), "multiplications an example"),
    ]
    return [plot for plot in plotted if plot.svg]


def _cost_plot(rows: dict[str, Row], cost_of: Callable[[Row], float | None], label: str) -> Plot:
    colours, dots = colours_of(rows), []
    for name, row in rows.items():
        cost = cost_of(row)
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
