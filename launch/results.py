"""The table at the end of a run."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.report.results import count, duration, named_rows, number, percent, student_verdict, verdict
from trainer.run_directory import RunDirectory, read_json


def show_results(run: RunDirectory, console: Console) -> None:
    """Print RUN/results.json: whether the ensemble beats every control, then the figures, then where the report is."""
    results = read_json(run.root / "results.json")
    console.print(Text(verdict(results), style="bold"), soft_wrap=True)
    if student := student_verdict(results):
        console.print(Text(student), soft_wrap=True)
    console.print(results_table(results))
    console.print(Text(f"report: {os.path.abspath(run.root / 'report.html')}"), soft_wrap=True)


def results_table(results: dict) -> Table:
    """One row for each of generalist, controls, ensemble and students."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in ("top-1", "top-5", "NLL", "Brier", "ECE", "macro top-1", "time", "examples"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in named_rows(results).items():
        cost = row["cost"]
        figures = [percent(row["top1"]), percent(row["top5"])]
        figures += [number(row[key]) for key in ("nll", "brier", "ece")]
        figures += [percent(row["macro_top1"]), duration(cost["seconds"]), count(cost["examples_seen"])]
        table.add_row(Text(name), *figures, style="bold" if name == "ensemble" else "")
    return table
