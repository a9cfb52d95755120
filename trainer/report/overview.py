"""The head of the page: its tiles, the table of metrics, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.results import (
    Cost,
    MetricName,
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
NOT_MEASURABLE = "no measurable difference"

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
    """quiet: whether the note says that nothing was measured, and so has no colour."""

    what: str
    value: str
    note: str = ""
    before: str = ""
    quiet: bool = False


@dataclass(frozen=True)
class MetricRow:
    """versus: the paired difference to the generalist's top-1 and half its 95 % interval.

    times: its multiplications over the generalist's.  latency: ms an example, in the smallest batch
    that was measured.
    """

    name: str
    colour: str
    cells: list[Cell]
    errors: int
    versus: tuple[float, float] | None
    parameters: int | None
    multiplications: int | None
    times: float | None
    latency: float | None

    @property
    def is_measurable(self) -> bool:
        return self.versus is not None and abs(self.versus[0]) > self.versus[1]

    @property
    def is_same(self) -> bool:
        """Whether both are right and wrong on the very same examples."""
        return self.versus == (0, 0)


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
    what = f"top-1 errors on {results['ensemble']['n']:,} test examples, generalist to ensemble"
    value, was = f"{after:,}", f"{before:,}"
    if not _differ(results, "top1"):
        return Tile(what, value, NOT_MEASURABLE, before=was, quiet=True)
    if before < tables.FEWEST:
        return Tile(what, value, before=was)
    return Tile(what, value, f"{signed(100 * (after - before) / before, 1)} %", before=was)


def _differ(results: Results, metric: MetricName) -> bool:
    """Whether ensemble and generalist differ measurably."""
    ensemble, generalist = results["ensemble"], results["generalist"]
    return compare_paired(ensemble, "generalist", generalist, metric) != 0


def _nll_tile(results: Results) -> Tile | None:
    before, after = results["generalist"]["nll"], results["ensemble"]["nll"]
    if before is None or after is None:
        return None
    what, value, was = "NLL on test, generalist to ensemble", f"{after:.3f}", f"{before:.3f}"
    if not _differ(results, "nll"):
        return Tile(what, value, NOT_MEASURABLE, before=was, quiet=True)
    return Tile(what, value, signed(after - before, 3), before=was)


def _student_tile(results: Results) -> Tile | None:
    student = results["student"]
    generalist, ensemble = results["generalist"], results["ensemble"]
    if student is None:
        return None
    note = f"{percent(student['top1'])} top-1 on test"
    if is_of_another_size(student, generalist):
        return Tile(
            "test errors of the student, a network of another size",
            f"{errors(student):,}",
            note,
        )
    gained = errors(generalist) - errors(ensemble)
    if gained < tables.FEWEST:
        return Tile("test errors of one network, the student", f"{errors(student):,}", note)
    what = "of the gain in top-1 on test kept by one network, the student"
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
    what, total = (
        "of the generalist's test errors lie inside a group",
        errors(results["generalist"]),
    )
    if total < tables.FEWEST:
        return Tile(what, f"{round(captured * total)} of {total}")
    note = f"{captured / chance:.1f} × chance" if chance else ""
    return Tile(what, percent(captured, 0), note)


# The table


def metric_rows(evidence: Evidence) -> list[MetricRow]:
    """The table of metrics, with the best of each column marked."""
    rows = evidence.rows
    colours, alone = colours_of(rows), rows["generalist"].get("multiplications")
    smallest = measured_batches(rows)[:1]
    best = {key: best_of(rows, key, better) for key, (_, better) in COLUMNS.items()}
    return [
        MetricRow(
            name=name,
            colour=colours[name],
            cells=[cell(row, key, best[key], text) for key, (text, _) in COLUMNS.items()],
            errors=errors(row),
            versus=_versus_generalist(evidence, name.removeprefix("student ")),
            parameters=row.get("parameters"),
            multiplications=row.get("multiplications"),
            times=_times(row, alone),
            latency=_latency(row, smallest[0]) if smallest else None,
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
            times=_times(row, alone),
            asked=row.get("asked"),
            latencies=[_latency(row, batch) for batch in batches],
            cost=row["cost"],
        )
        for name, row in rows.items()
    ]


def _times(row: Row, alone: int | None) -> float | None:
    """A row's multiplications over the generalist's."""
    own = row.get("multiplications")
    return own / alone if own and alone else None


def _latency(row: Row, batch: str) -> float | None:
    return (row["cost"].get("latency_ms") or {}).get(batch)


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
        _time_plot(evidence),
        _cost_plot(rows, lambda row: row.get("multiplications"), "multiplications an example"),
    ]
    return [plot for plot in plotted if plot is not None and plot.svg]


def _time_plot(evidence: Evidence) -> Plot | None:
    """Against CPU seconds, or, where jobs did not disturb each other, against seconds."""
    rows = evidence.rows
    if all(row["cost"].get("cpu_seconds") for row in rows.values()):
        label = "CPU seconds of training"
        return _cost_plot(rows, lambda row: row["cost"].get("cpu_seconds"), label)
    if evidence.is_contended:
        return None
    return _cost_plot(rows, lambda row: row["cost"]["seconds"], "seconds of training")


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
