"""Numbers as text, and the colour of each row: what every section of the page shares."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.redaction import redacted
from pipeline.results import Row, count, duration, milliseconds, number, percent

# Rows whose colour is fixed. Other students and candidates take turns.
COLOURS = {
    "generalist": "generalist",
    "ensemble": "ensemble",
    "control_wall": "wall",
    "control_compute": "compute",
    "student_hard": "hard",
}
OTHER_COLOURS = 6
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Cell:
    """A number of a table as text. best: whether it is the best of its column."""

    text: str
    best: bool


@dataclass(frozen=True)
class Plot:
    """legend: (name, colour) of each curve."""

    svg: str
    caption: str
    legend: tuple[tuple[str, str], ...] = ()


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """The CSS colour of each row by its name in the table. `student main` has its own."""
    fixed = {"student main": "student"} | COLOURS
    others = itertools.cycle(f"other{i}" for i in range(OTHER_COLOURS))
    return {name: fixed.get(name) or next(others) for name in names}


def best_of(rows: dict[str, Row], key: str, better: Callable[..., float] = min) -> float | None:
    """The best value of a column, by min or max. Where all are equal none is best."""
    values = [value for row in rows.values() if (value := row.get(key)) is not None]
    if len(set(values)) < 2:
        return None
    return better(values)


def cell(row: Row, key: str, best: float | None, text: Callable[[float | None], str]) -> Cell:
    value = row.get(key)
    return Cell(text(value), best=value is not None and value == best)


def signed(value: float, digits: int) -> str:
    """+1.5 or −1.5, with a minus sign of the digits' width. No sign on what is shown as zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"+{text}" if value > 0 else f"−{text}"


def points(fraction: float | None, digits: int = 2) -> str:
    """A difference of two fractions in percentage points."""
    return "–" if fraction is None else signed(100 * fraction, digits)


def memory(num_bytes: float | None) -> str:
    if not num_bytes:
        return "–"
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB"


def keep_together(text: str) -> str:
    """Text whose `top-1` no line break tears apart: a word joiner behind the hyphen."""
    return text.replace("top-1", "top-\N{WORD JOINER}1")


def printable(page: str) -> str:
    """A page that can be written as UTF-8 HTML, with percentages that no line break tears apart.

    Class names may hold lone surrogates, which have no UTF-8, and NUL, which HTML has not.  URLs in
    it, as of the data, hold no secret.
    """
    page = redacted(page)
    page = re.sub(r"(?<=\d)\s(?=%)", "\N{NO-BREAK SPACE}", page)
    page = UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page)
    return page.encode("utf-8", "replace").decode("utf-8")


FILTERS = {
    "percent": percent,
    "number": number,
    "count": count,
    "duration": duration,
    "milliseconds": milliseconds,
    "points": points,
    "memory": memory,
    "keep_together": keep_together,
}
