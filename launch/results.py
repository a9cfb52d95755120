"""What a run shows on the terminal: its groups, and at its end the table of results."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from pipeline.advice.showing import outcome_sentence
from pipeline.compare import METRICS, ComparedRow, Comparison, cell
from pipeline.files import picking_from
from pipeline.graph import RunDirectory
from pipeline.results import (
    Results,
    Row,
    classes_line,
    count,
    dropped_line,
    duration,
    milliseconds,
    missing_line,
    named_rows,
    number,
    percent,
    read_file,
    read_results,
    student_verdict,
    verdict,
    worth,
)
from pipeline.results.forecasts import captured_text, judged_on
from pipeline.results.formats import ABSENT, mean_words
from pipeline.results.training import val_top1
from pipeline.store import Stage, read_json
from pipeline.terminal import Console

LATENCY = "an example in batches of so many, measured on one thread"
GAP = 2  # between two columns of a table


def show_results(run: RunDirectory, console: Console) -> None:
    """Print RUN/results.json: the verdict, the metrics, and where the report is."""
    path = run.root / "results.json"
    results = read_results(path)
    with picking_from(path):
        _show_results(results, run, console)


def _show_results(results: Results, run: RunDirectory, console: Console) -> None:
    console.say(verdict(results), "bold")
    lines = [student_verdict(results), classes_line(results), shortlist_line(run), start_line(run)]
    for line in [*lines, dropped_line(results), advice_line(results)]:
        if line:
            console.say(line)
    for columns in (COLUMNS, cost_columns(results)):
        console.print(results_table(results, columns, console.width))
        console.say(legend(shown_columns(results, columns, console.width)), "dim")
    missing = missing_line(results, shlex.quote(near(run.root)))
    if missing is not None:
        words, _, command = missing.partition(": referral ")
        console.say(f"{words}:")
        console.print(Text(f"  referral {command}"), soft_wrap=True)
    report = os.path.abspath(run.root / "report.html")
    console.print(Text(f"report: {report}"), soft_wrap=True)
    console.say_next(f"referral predict {shlex.quote(near(run.root))} FILES")


def advice_line(results: Results) -> str | None:
    """What came of the advice that pilots gave. None of a run that asked for none."""
    return outcome_sentence(results["advice"]) if "advice" in results else None


def near(path: Path) -> str:
    """A path relative to the working directory, or absolute if it is not below it."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative


class Column(NamedTuple):
    """needs: a key that some row must have, or the column is left out. "" is always shown.

    rank: the columns with the highest are left out first, where the terminal is too narrow.
    meaning: what it says, for the line below the table.
    """

    title: str
    text: Callable[[Row, Results], str]
    needs: str = ""
    rank: int = 0
    meaning: str = ""


COLUMNS = [
    Column("top-1", lambda row, _: percent(row["top1"])),
    Column("top-5", lambda row, _: percent(row["top5"]), rank=2),
    Column("NLL", lambda row, _: number(row["nll"]), meaning="nats"),
    Column(
        "cNLL",
        lambda row, _: number(row.get("cnll")),
        needs="cnll",
        rank=1,
        meaning="after temperature scaling",
    ),
    Column("Brier", lambda row, _: number(row["brier"]), rank=4),
    Column("ECE", lambda row, _: number(row["ece"]), rank=1),
    Column("DEE", worth, needs="dee", rank=1, meaning="worth in networks of a deep ensemble"),
    Column("macro top-1", lambda row, _: percent(row["macro_top1"]), rank=3),
]


def cost_columns(results: Results) -> list[Column]:
    """Size, latency an example and training. Latency at each batch that was measured."""
    rows = named_rows(results).values()
    batches = {size for row in rows for size in row["cost"].get("latency_ms") or {}}

    def latency(batch: str) -> Column:
        def text(row: Row, _: Results) -> str:
            return milliseconds((row["cost"].get("latency_ms") or {}).get(batch))

        return Column(f"ms ({batch})", text, rank=1, meaning=LATENCY)

    return [
        Column("params", lambda row, _: count(row.get("parameters")), "parameters"),
        Column(
            "mults",
            lambda row, _: count(row.get("multiplications")),
            "multiplications",
            meaning="multiplications of an example, softmax not counted",
        ),
        Column(
            "asked",
            lambda row, _: _decimal(row.get("asked")),
            "asked",
            rank=2,
            meaning="networks beside the generalist",
        ),
        *map(latency, sorted(batches, key=int)),
        Column(
            "examples",
            lambda row, _: count(row["cost"]["examples_seen"]),
            meaning="seen in training, with all that a row starts from",
        ),
        Column(
            "time",
            lambda row, _: duration(row["cost"]["seconds"]),
            rank=3,
            meaning="of that training on the clock, summed over jobs that may run side by side",
        ),
    ]


def _decimal(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def legend(columns: Sequence[Column]) -> str:
    """What columns say whose title does not. Those of one meaning together."""
    titles: dict[str, list[str]] = {}
    for column in columns:
        titles.setdefault(column.meaning, []).append(column.title)
    titles.pop("", None)
    return "; ".join(f"{', '.join(each)}: {meaning}" for meaning, each in titles.items())


def results_table(
    results: Results, columns: Sequence[Column] = COLUMNS, width: int | None = None
) -> Table:
    """One row for each of generalist, controls, ensemble and students.

    cNLL is after temperature scaling, DEE a row's worth in networks of a deep ensemble.  Both are
    shown only where a run has them.  width: of the terminal. Columns that do not fit are left out.
    """
    rows = named_rows(results)
    cells = _cells(results, columns)
    shown = shown_columns(results, columns, width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for column in shown:
        table.add_column(column.title, justify="right", no_wrap=True)
    for index, name in enumerate(rows):
        table.add_row(Text(name), *(cells[column][index] for column in shown), style=_style(name))
    return table


def shown_columns(
    results: Results, columns: Sequence[Column], width: int | None = None
) -> list[Column]:
    """The columns that the run has, as far as they fit on a terminal of that width."""
    return _fitting(_cells(results, columns), max(map(len, named_rows(results))), width)


def _cells(results: Results, columns: Sequence[Column]) -> dict[Column, list[str]]:
    """The texts of each column that some row fills, from the first row to the last."""
    rows = named_rows(results)
    known = {"", *(key for row in rows.values() for key in row)}
    return {
        column: [column.text(row, results) for row in rows.values()]
        for column in columns
        if column.needs in known
    }


def _fitting(cells: dict[Column, list[str]], names: int, width: int | None) -> list[Column]:
    """The columns that fit beside the rows' names. Of those that do not, the least first."""
    widths = {column: max(map(len, [column.title, *texts])) for column, texts in cells.items()}
    shown = list(cells)
    while width and names + sum(GAP + widths[column] for column in shown) > width:
        least = max(shown, key=lambda column: column.rank)
        if not least.rank:
            break
        shown.remove(least)
    return shown


def comparison_tables(comparison: Comparison, width: int | None = None) -> list[Table]:
    """One row for each row of the results and each variant. Several tables of as many metrics as
    fit side by side on a terminal of that width."""
    sizes = {variant["name"]: variant["runs"] for variant in comparison["variants"]}
    leading = ["variant", "runs"] if len(sizes) > 1 else ["runs"]
    titles = [*leading, *(METRICS[metric].label for metric in comparison["metrics"])]
    cells = [_compared_cells(row, comparison, sizes) for row in comparison["rows"]]
    columns = [[title, *texts] for title, *texts in zip(titles, *cells, strict=True)]
    names = _names_once(comparison)
    taken = max(map(len, names)) + sum(map(_width, columns[: len(leading)]))
    parts = _side_by_side(columns[len(leading) :], width and width - taken)
    styles = [_style(row["row"]) for row in comparison["rows"]]
    return [_table_of(names, [*columns[: len(leading)], *part], styles) for part in parts]


def _width(column: Sequence[str]) -> int:
    return GAP + max(map(len, column))


def _names_once(comparison: Comparison) -> list[str]:
    """The name of each row. Empty where it is the one above's."""
    names = [row["row"] for row in comparison["rows"]]
    return [name if i == 0 or name != names[i - 1] else "" for i, name in enumerate(names)]


def _side_by_side(columns: list[list[str]], width: int | None) -> list[list[list[str]]]:
    """The columns in parts that are no wider than `width`, of one column at least."""
    parts: list[list[list[str]]] = [[]]
    for column in columns:
        is_full = width is not None and sum(map(_width, [*parts[-1], column])) > width
        if parts[-1] and is_full:
            parts.append([])
        parts[-1].append(column)
    return parts


def _table_of(names: list[str], columns: list[list[str]], styles: list[str]) -> Table:
    """columns: a title, and a cell for each name."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for title, *_ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    texts = [texts for _, *texts in columns]
    for name, *cells, style in zip(names, *texts, styles, strict=True):
        table.add_row(Text(name), *cells, style=style)
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
    """How others were asked than the generalist. None of a run that asks about every class."""
    config = run.config.ensemble
    if config.kind == "specialists" and config.shortlist is not None:
        return (
            f"Specialists were asked about each example's {config.shortlist} likeliest classes by "
            "the generalist."
        )
    if not config.asks_shortlists:
        return None
    settings = read_json(run.root / "ensemble.json")
    networks = settings["members"] - 1
    asked = "One further network was" if networks == 1 else f"{networks} further networks were"
    return (
        f"{asked} asked about each example's {settings['shortlist']} likeliest classes by the "
        f"generalist, and joined with it by {mean_words(settings['order'])}."
    )


def start_line(run: RunDirectory) -> str | None:
    """What specialists start as. None where that is the generalist, or there are none."""
    section = run.config.specialists
    if not (run.method.has_groups and section.starts_elsewhere):
        return None
    if section.given_start:
        return f"specialists start as the network of {section.given_start}"
    others = ", ".join(stage.place for stage in run.members)
    return f"specialists start as another generalist, trained from another seed ({others})"


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
        line += f"; {skipped} get no specialist (clusters.min_gain, clusters.specialists)"
    return f"{line}; what each can gain at most: {directory / 'log-0.txt'}"


def diagnosis_lines(stages: Sequence[Stage]) -> list[str]:
    """What a job's diagnosis says of the generalist. None of a job that has none."""
    found = [stage for stage in stages if stage.name == "diagnosis" and stage.is_done]
    contents = [read_file(stage, "diagnosis.json") or {} for stage in found]
    return [line for content in contents for line in content.get("sentences", [])]


def metrics_of(stages: Sequence[Stage]) -> list[str]:
    """`val top-1 76.1 %` of a job's trained stages, or the smallest and the largest of several."""
    measured = [val_top1(stage.folder("summary.json")) for stage in stages if stage.is_done]
    values = [value for value in measured if value is not None]
    if not values:
        return []
    text = f"val top-1 {percent(min(values), 1)}"
    if len(values) > 1:
        text += f" to {percent(max(values), 1)}"
    return [text]
