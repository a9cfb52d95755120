"""Accuracy of rare and of frequent classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import plots, tables
from .evidence import Evidence
from .formatting import COLOURS
from .svg import whole_percent

SHOWN = ("generalist", "control_compute", "ensemble", "main")


@dataclass(frozen=True)
class Frequency:
    """split: whose examples are counted. same: the count that all classes have, else None.

    names: the rows shown. ties: whether classes of one count lie in two tenths.
    """

    split: str
    same: int | None
    rows: list[tables.FrequencyRow]
    names: tuple[str, ...] = ()
    svg: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    ties: bool = False


def frequency(evidence: Evidence) -> Frequency:
    """Accuracy by class-frequency decile, as a plot and as rows."""
    counts, split = evidence.class_counts
    tested = counts[np.unique(evidence.labels)]
    if len(np.unique(tested)) == 1:
        return Frequency(split, same=int(tested[0]), rows=[])
    rows = tables.frequency_deciles(counts, evidence.labels, evidence.correct)
    series = [
        plots.Series(
            name,
            COLOURS.get(name, "student"),
            [(tenth, row.accuracy[name]) for tenth, row in enumerate(rows, start=1)],
        )
        for name in SHOWN
        if name in evidence.correct
    ]
    drawing = plots.lines(
        series,
        f"tenth of the classes, rarest first (examples in {split})",
        "top-1",
        markers=True,
        y_text=whole_percent,
        x_ticks=[(tenth, row.most) for tenth, row in enumerate(rows, start=1)],
    )
    return Frequency(
        split=split,
        same=None,
        rows=rows,
        names=tuple(one.name for one in series),
        svg=drawing,
        legend=tuple((one.name, one.colour) for one in series),
        ties=any(rarer.most == next_.least for rarer, next_ in zip(rows, rows[1:], strict=False)),
    )
