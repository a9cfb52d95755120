"""What a run shows on the terminal: its groups, and at its end the table of results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.compare import METRICS, ComparedRow, Comparison, cell
from pipeline.graph import RunDirectory
from pipeline.results import (
    Results,
    Row,
    classes_line,
    count,
    duration,
    named_rows,
    number,
    percent,
    read_results,
    student_verdict,
    verdict,
    worth,
)
from pipeline.results.forecasts import captured_text, judged_on
from pipeline.results.training import val_top1
from pipeline.store import Stage, read_json


def show_results(run: RunDirectory, console: Console) -> None:
    """Print RUN/results.json: the verdict, the metrics, and where the report is."""
    results = read_results(run.root / "results.json")
    console.print(Text(verdict(results), style="bold"), soft_wrap=True)
    for line in (student_verdict(results), classes_line(results), shortlist_line(run)):
        if line is not None:
            console.print(Text(line), soft_wrap=True)
    console.print(results_table(results))
    console.print(Text(f"report: {os.path.abspath(run.root / 'report.html')}"), soft_wrap=True)


class Column(NamedTuple):
    """needs: a key that some row must have, or the column is left out; "" is always shown."""

    title: str
    text: Callable[[Row, Results], str]
    needs: str = ""


COLUMNS = [
    Column("top-1", lambda row, _: percent(row["top1"])),
    Column("top-5", lambda row, _: percent(row["top5"])),
    Column("NLL", lambda row, _: number(row["nll"])),
    Column("cNLL", lambda row, _: number(row.get("cnll")), needs="cnll"),
    Column("Brier", lambda row, _: number(row["brier"])),
    Column("ECE", lambda row, _: number(row["ece"])),
    Column("DEE", worth, needs="dee"),
    Column("macro top-1", lambda row, _: percent(row["macro_top1"])),
    Column("time", lambda row, _: duration(row["cost"]["seconds"])),
    Column("examples", lambda row, _: count(row["cost"]["examples_seen"])),
]


def results_table(results: Results) -> Table:
    """One row for each of generalist, controls, ensemble and students.

    cNLL is after temperature scaling, DEE a row's worth in networks of a deep ensemble.  Both are
    shown only where a run has them.
    """
    rows = named_rows(results)
    known = {"", *(key for row in rows.values() for key in row)}
    columns = [column for column in COLUMNS if column.needs in known]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = [column.text(row, results) for column in columns]
        table.add_row(Text(name), *cells, style=_style(name))
    return table


def comparison_table(comparison: Comparison) -> Table:
    """One row for each row of the results and each variant."""
    sizes = {variant["name"]: variant["runs"] for variant in comparison["variants"]}
    columns = ["runs", *(METRICS[metric].label for metric in comparison["metrics"])]
    if len(sizes) > 1:
        columns.insert(0, "variant")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in comparison["rows"]:
        cells = _compared_cells(row, comparison, sizes)
        name = row["row"] if row["row"] != last else ""
        table.add_row(Text(name), *cells, style=_style(row["row"]))
        last = row["row"]
    return table


def _compared_cells(row: ComparedRow, comparison: Comparison, sizes: dict[str, int]) -> list[str]:
    """sizes: the runs of each variant."""
    n, size = row["runs"], sizes[row["variant"]]
    cells = [row["variant"]] if len(sizes) > 1 else []
    cells.append(str(n) if n == size else f"{n} of {size}")
    for metric in comparison["metrics"]:
        spread = row["figures"][metric]
        text = cell(spread, metric, signed=comparison["versus"] is not None)
        if 0 < spread["n"] < n:
            text += f" ({spread['n']})"
        cells.append(text)
    return cells


def _style(name: str) -> str:
    return "bold" if name == "ensemble" else ""


def shortlist_line(run: RunDirectory) -> str | None:
    """How further networks were asked; None of a run that asks them about every class."""
    if run.config.ensemble.kind != "shortlist":
        return None
    settings = read_json(run.root / "ensemble.json")
    networks = settings["members"] - 1
    asked = "one further network was" if networks == 1 else f"{networks} further networks were"
    return (
        f"{asked} asked about the generalist's {settings['shortlist']} likeliest classes of each "
        f"example, joined by a mean of order {settings['order']:g} (0 geometric, 1 arithmetic)"
    )


def groups_line(run: RunDirectory) -> str | None:
    """What the groups hold, for whoever watches the specialists begin.

    None of a run without groups, and while none are found.
    """
    if not run.method.has_groups:
        return None
    directory = run.cluster.directory
    if not (directory / "summary.json").exists():
        return None
    summary = read_json(directory / "summary.json")
    sizes, skipped = summary["sizes"], len(summary["skipped"])
    caught = captured_text(summary["captured"], summary["chance"], judged_on(run))
    line = f"{len(sizes)} groups of {min(sizes)} to {max(sizes)} classes {caught}"
    if skipped:
        line += f"; {skipped} are not worth a specialist (clusters.min_gain)"
    return f"{line}; what each can gain at most: {directory / 'log-0.txt'}"


def metrics_of(stages: Sequence[Stage]) -> list[str]:
    """`val top-1 76.1 %` of a job's trained stages, or the smallest and the largest of several."""
    measured = [val_top1(stage.path("summary.json").parent) for stage in stages if stage.is_done]
    values = [value for value in measured if value is not None]
    if not values:
        return []
    text = f"val top-1 {percent(min(values), 1)}"
    if len(values) > 1:
        text += f" to {percent(max(values), 1)}"
    return [text]
