"""What a run tells on the terminal: of its groups, and at its end the table of results."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.compare import METRICS, cell
from pipeline.graph import RunDirectory
from pipeline.results import (
    classes_line,
    count,
    duration,
    named_rows,
    number,
    percent,
    student_verdict,
    verdict,
    worth,
)
from pipeline.store import read_json


def show_results(run: RunDirectory, console: Console) -> None:
    """Print RUN/results.json: whether the ensemble beats every control, then the figures, then where the report is."""
    results = read_json(run.root / "results.json")
    console.print(Text(verdict(results), style="bold"), soft_wrap=True)
    if student := student_verdict(results):
        console.print(Text(student), soft_wrap=True)
    if line := classes_line(results):
        console.print(Text(line), soft_wrap=True)
    console.print(results_table(results))
    console.print(Text(f"report: {os.path.abspath(run.root / 'report.html')}"), soft_wrap=True)


def results_table(results: dict) -> Table:
    """One row for each of generalist, controls, ensemble and students.

    cNLL is after temperature scaling, DEE a row's worth in networks of a deep ensemble; only where a run has them.
    """
    table, rows = Table(box=None, pad_edge=False, header_style="bold"), named_rows(results)
    calibrated, deep = (any(key in row for row in rows.values()) for key in ("cnll", "dee"))
    table.add_column("", no_wrap=True)
    for column in (
        "top-1",
        "top-5",
        "NLL",
        *(["cNLL"] if calibrated else []),
        "Brier",
        "ECE",
        *(["DEE"] if deep else []),
        "macro top-1",
        "time",
        "examples",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        cost = row["cost"]
        figures = [percent(row["top1"]), percent(row["top5"]), number(row["nll"])]
        figures += [number(row.get("cnll"))] if calibrated else []
        figures += [number(row["brier"]), number(row["ece"])]
        figures += [worth(row, results)] if deep else []
        figures += [
            percent(row["macro_top1"]),
            duration(cost["seconds"]),
            count(cost["examples_seen"]),
        ]
        table.add_row(Text(name), *figures, style="bold" if name == "ensemble" else "")
    return table


def comparison_table(found: dict) -> Table:
    """One row for each row of the results and each variant; found: what pipeline.compare.compare says."""
    sizes = {variant["name"]: variant["runs"] for variant in found["variants"]}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in (["variant"] if len(sizes) > 1 else []) + [
        "runs",
        *(METRICS[m].label for m in found["metrics"]),
    ]:
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in found["rows"]:
        n, of = row["runs"], sizes[row["variant"]]
        cells = [row["variant"]] if len(sizes) > 1 else []
        cells.append(str(n) if n == of else f"{n} of {of}")
        for metric in found["metrics"]:
            over = row["figures"][metric]
            fewer = f" ({over['n']})" if 0 < over["n"] < n else ""
            cells.append(cell(over, metric, signed=found["versus"] is not None) + fewer)
        name = row["row"] if row["row"] != last else ""
        table.add_row(Text(name), *cells, style="bold" if row["row"] == "ensemble" else "")
        last = row["row"]
    return table


def groups_line(run: RunDirectory) -> str | None:
    """What the groups hold, for whoever watches the specialists begin; None where none were found yet."""
    if not (run.cluster.directory / "summary.json").exists():
        return None
    found = read_json(run.cluster.directory / "summary.json")
    sizes, left_out = found["sizes"], len(found["skipped"])
    skipped = f"; {left_out} are not worth a specialist (clusters.min_gain)" if left_out else ""
    caught = ""  # without errors there is no share
    if found["captured"] is not None:
        share, chance = 100 * found["captured"], 100 * found["chance"]
        caught = f" hold {share:.1f} % of the generalist's errors on val (chance {chance:.1f} %)"
    where = run.cluster.directory / "log-0.txt"
    return f"{len(sizes)} groups of {min(sizes)} to {max(sizes)} classes{caught}{skipped}; what each can gain: {where}"
