"""What `referral advise` shows: the advice, what speaks for it, and the command that goes on."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from pipeline.advice.document import FILE, Advice, read_advice
from pipeline.advice.showing import (
    LeverRow,
    goes_on,
    lever_rows,
    round_lines,
    spent_line,
    under_rows,
)
from pipeline.config import UserError
from pipeline.files import picking_from
from pipeline.graph import RunDirectory
from pipeline.terminal import Console

from .results import GAP, near

ADVISED = "▸ "  # before the lever that is advised
FRONT = " ●"  # behind what no other lever beats in both gain and this amount
NEEDS_WIDTH = 24  # a column of needs that is narrower is a list instead
WIDE = 100  # columns of a terminal that has room for all columns of the table


NONE_PAYS = (
    "Nothing pays, so the generalist is the network to use. To train what the config asks for "
    "all the same"
)


def show_advice(run: RunDirectory, console: Console) -> None:
    """Print RUN/advice.json: the sentence, the table, and the command that goes on.

    Raises UserError where there is no advice.
    """
    advice = read_advice(run.root / FILE)
    if advice is None:
        raise UserError(
            f"{run.root} has no {FILE}: nothing was piloted there; "
            f"`referral advise {shlex.quote(near(run.root))}` does so"
        )
    with picking_from(run.root / FILE):
        _show_advice(advice, run, console)


def _show_advice(advice: Advice, run: RunDirectory, console: Console) -> None:
    console.print(Text(advice["sentence"], style="bold"))
    for line in [advice.get("elsewhere"), *advice["diagnosis"]["sentences"]]:
        if line:
            console.print(Text(line))
    console.print()
    _show_levers(advice, console)
    console.print()
    console.print(under_table(advice))
    console.print()
    for line in [spent_line(advice), *round_lines(advice)]:
        console.print(Text(line, style="dim"))
    command = goes_on(advice, shlex.quote(near(run.root)))
    if command:
        console.say_next(command)
    else:
        console.say_next(f"referral run --run {shlex.quote(near(run.root))}", NONE_PAYS)


class Column(NamedTuple):
    """scarcity: its front is marked in this column.  wide: whether narrow terminals go without."""

    title: str
    text: Callable[[LeverRow], str]
    scarcity: str = ""
    wide: bool = False


COLUMNS = [
    Column("points", lambda row: row.gain),
    Column("90 %", lambda row: row.interval),
    Column("training", lambda row: row.training, "training"),
    Column("time", lambda row: row.wall_clock, "wall_clock", wide=True),
    Column("mults", lambda row: row.multiplications, "multiplications"),
    Column("params", lambda row: row.parameters, "parameters"),
    Column("ms", lambda row: row.latency, "latency"),
]


# Of the table of scarcities: title, and on which side its cells stand.
UNDER: list[tuple[str, Literal["left", "right"]]] = [
    ("where scarce", "left"),
    ("best", "left"),
    ("points", "right"),
    ("90 %", "right"),
    ("at most", "left"),
]
LEGEND = (
    "points of top-1 over the generalist's; training, time, mults, params: × its own, of the whole "
    "predictor; ●: nothing else gains as much for less"
)


def _show_levers(advice: Advice, console: Console) -> None:
    """The table of levers, what each needs, and why others are not in it.

    What levers need is the table's last column, or a list below it where that is too narrow.
    """
    rows = lever_rows(advice)
    names = ["", *(f"{ADVISED if row.advised else '  '}{row.name}" for row in rows)]
    columns = [names, *_columns(advice, console.width)]
    room = console.width - sum(GAP + max(map(len, cells)) for cells in columns)
    needs = ["needs", *map(_needs, rows)]
    is_listed = room < NEEDS_WIDTH or not any(needs[1:])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, *_ in columns:
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    if not is_listed:
        table.add_column(needs[0])
        columns.append(needs)
    for row, *cells in zip(rows, *(cells for _, *cells in columns), strict=True):
        table.add_row(*map(Text, cells), style="bold" if row.advised else "")
    console.print(table)
    for row, need in zip(rows, needs[1:], strict=True):
        if is_listed and need:
            console.print(Text(f"  {row.name}: {need}"))
    for lever, why in advice["not_possible"].items():
        console.print(Text(f"  {lever} is not possible: {why}", style="dim"))
    console.print(Text(LEGEND, style="dim"))


def _columns(advice: Advice, width: int) -> list[list[str]]:
    """The columns of numbers, each its title and its cells. A mark stands behind those of a front.

    width: of the terminal.
    """
    rows = lever_rows(advice)
    fronts = [lever.get("pareto", []) for lever in advice["levers"]]
    shown = [column for column in COLUMNS if width >= WIDE or not column.wide]
    columns = []
    for column in shown:
        blank = " " * len(FRONT) if column.scarcity else ""
        marks = [FRONT if column.scarcity in front else blank for front in fronts]
        cells = [column.text(row) + mark for row, mark in zip(rows, marks, strict=True)]
        columns.append([column.title + blank, *cells])
    return columns


def _needs(row: LeverRow) -> str:
    return "; ".join(part for part in (row.needs, row.note) if part)


def under_table(advice: Advice) -> Table:
    """The best lever under each scarcity. The one that counts is bold."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in UNDER:
        table.add_column(title, justify=justify, no_wrap=True)
    for row in under_rows(advice):
        cells = (row.scarcity, row.lever, row.gain, row.interval, row.limit)
        table.add_row(*map(Text, cells), style="bold" if row.chosen else "")
    return table
