"""Ensemble size and diversity: what networks disagree in, and what a student is worth in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.results import Results, Row, number, percent, worth

from . import plots
from .evidence import Evidence
from .formatting import colours_of

MOST_SIZES = 10
ABSENT = "–"


@dataclass(frozen=True)
class DiversityRow:
    name: str
    colour: str
    cells: list[str]


@dataclass(frozen=True)
class DiversityTable:
    """members, ood: whether any row has metrics of several members, or of data.ood."""

    columns: list[str]
    rows: list[DiversityRow]
    members: bool
    ood: bool


@dataclass(frozen=True)
class SizePlot:
    """off: the networks too far above the plot to be drawn, as text."""

    svg: str
    off: str


def diversity_table(evidence: Evidence) -> DiversityTable | None:
    """What members disagree in, a row's DEE, and how well it tells inputs of other kinds.

    Columns and rows that nothing fills are left out. None where nothing is left.
    """
    columns, rows = _columns(evidence.results), evidence.rows
    texts = {name: [text(row) for text in columns.values()] for name, row in rows.items()}
    filled = [
        index
        for index in range(len(columns))
        if any(cells[index] != ABSENT for cells in texts.values())
    ]
    if not filled:
        return None
    colours = colours_of(rows)
    shown = {name: [cells[index] for index in filled] for name, cells in texts.items()}
    return DiversityTable(
        columns=[list(columns)[index] for index in filled],
        rows=[
            DiversityRow(name, colours[name], cells)
            for name, cells in shown.items()
            if any(text != ABSENT for text in cells)
        ],
        members=any("members" in row for row in rows.values()),
        ood=any("ood_auroc" in row for row in rows.values()),
    )


def _columns(results: Results) -> dict[str, Callable[[Row], str]]:
    """Title -> the text of a row's cell."""

    def nested(part: str, key: str, text: Callable[[float | None], str]) -> Callable[[Row], str]:
        return lambda row: text((row.get(part) or {}).get(key))

    return {
        "members": nested("members", "count", _whole),
        "DEE": lambda row: worth(row, results),
        "MU": nested("members", "mu", number),
        "pairwise KL": nested("members", "pairwise_kl", number),
        "disagreement": nested("members", "disagreement", percent),
        "AUROC by confidence": nested("ood_auroc", "confidence", number),
        "AUROC by entropy": nested("ood_auroc", "entropy", number),
        "AUROC by MU": nested("ood_auroc", "mu", number),
    }


def _whole(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def size_rows(results: Results) -> list[dict]:
    """The metrics of the ensemble's first 1, 2, ... members together.

    MOST_SIZES at most, evenly spaced, the first and the last among them.
    """
    sizes = results.get("sizes") or []
    if len(sizes) > MOST_SIZES:
        step = (len(sizes) - 1) / (MOST_SIZES - 1)
        sizes = [sizes[index] for index in sorted({round(i * step) for i in range(MOST_SIZES)})]
    keys = ("size", "top1", "nll", "cnll", "temperature")
    return [{key: row.get(key) for key in keys} for row in sizes]


def size_plot(evidence: Evidence) -> SizePlot | None:
    """Calibrated NLL over the ensemble's size, students and their twin at their DEE.

    A network that is worse than one member by more than the whole ensemble is better would press
    all else flat: it is named as `off`. None without sizes.
    """
    sizes = [
        (row["size"], cnll)
        for row in evidence.results.get("sizes") or []
        if (cnll := row.get("cnll")) is not None
    ]
    if not sizes:
        return None
    worst, best = max(y for _, y in sizes), min(y for _, y in sizes)
    edge = worst + (worst - best) if worst > best else math.inf
    colours = colours_of(evidence.rows)
    dots, off = [], []
    for name, row in evidence.rows.items():
        cnll = row.get("cnll")
        if name in ("generalist", "ensemble") or cnll is None or not _has_equivalent(row):
            continue
        if cnll > edge:
            off.append(f"{name.removeprefix('student ')} ({cnll:.3f})")
        else:
            dee = worth(row, evidence.results)
            dots.append(_equivalent(name, row.get("dee"), cnll, colours[name], dee))
    drawing = plots.equivalents(sizes, dots, "networks in the ensemble", "calibrated NLL")
    return SizePlot(drawing, ", ".join(off))


def _has_equivalent(row: Row) -> bool:
    return row.get("dee") is not None or bool(row.get("dee_beyond"))


def _equivalent(name: str, size: float | None, cnll: float, colour: str, dee: str) -> plots.Dot:
    """size: the row's DEE, None beyond the largest ensemble.  dee: the same as text."""
    return plots.Dot(
        name=f"{name}: cNLL {cnll:.4f}, DEE {dee}",
        colour=colour,
        x=math.inf if size is None else size,
        y=cnll,
        label=f"{name.removeprefix('student ')} {dee}",
    )
