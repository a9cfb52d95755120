"""Accuracy of each class, and the pairs that are confused most. The same for programs as csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import tables
from .evidence import Evidence, Names
from .formatting import UNPRINTABLE

CLASSES_FILE, CONFUSED_FILE = "classes.csv", "confused.csv"
MOST_WORST, MOST_BEST, MOST_PAIRS = 40, 20, 40  # rows of the page. The files have all
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would begin to calculate at


@dataclass(frozen=True)
class ClassRow:
    """A class: its test examples, how many are right, and what the ensemble takes them for.

    mistaken: a class and how many examples are taken for it. None where all are right.
    """

    c: int
    n: int
    before: int
    after: int
    mistaken: tuple[int, int] | None


@dataclass(frozen=True)
class PairRow:
    """Examples of the class c, of n, that are predicted as `other`: by generalist and ensemble.

    together: whether one group holds both classes. None in a run without groups.
    """

    c: int
    other: int
    before: int
    after: int
    n: int
    together: bool | None


@dataclass(frozen=True)
class ClassSection:
    """worst and best: by the ensemble's accuracy.  left_out, pairs_left_out: rows of the files."""

    worst: list[ClassRow]
    best: list[ClassRow]
    left_out: int
    tested: int
    pairs: list[PairRow]
    pairs_left_out: int


def class_section(evidence: Evidence) -> ClassSection:
    """The classes with the lowest and the highest accuracy, and the commonest confusions."""
    table = _class_table(evidence)
    order = np.lexsort((table.classes, -table.n, table.right["ensemble"] / table.n))
    most = MOST_WORST + MOST_BEST
    worst, best = order, order[:0]
    if len(order) > most:
        worst, best = order[:MOST_WORST], order[-MOST_BEST:]
    confusions = _confusions(evidence)
    pairs = [_pair_row(evidence, table, pair, counts) for pair, counts in confusions[:MOST_PAIRS]]
    return ClassSection(
        worst=[_class_row(table, int(i)) for i in worst],
        best=[_class_row(table, int(i)) for i in best],
        left_out=max(len(order) - most, 0),
        tested=len(order),
        pairs=pairs,
        pairs_left_out=max(len(confusions) - MOST_PAIRS, 0),
    )


def _class_table(evidence: Evidence) -> tables.ClassTable:
    predicted = evidence.after.top5[:, 0]
    return tables.class_table(evidence.labels, predicted, evidence.correct)


def _class_row(table: tables.ClassTable, i: int) -> ClassRow:
    mistaken = None
    if table.times[i]:
        mistaken = (int(table.mistaken_for[i]), int(table.times[i]))
    return ClassRow(
        c=int(table.classes[i]),
        n=int(table.n[i]),
        before=int(table.right["generalist"][i]),
        after=int(table.right["ensemble"][i]),
        mistaken=mistaken,
    )


Counts = tuple[int, int]  # of the generalist's examples, and of the ensemble's


def _confusions(evidence: Evidence) -> list[tuple[tables.Pair, Counts]]:
    """((true class, predicted class), counts), what the ensemble does most often first."""
    labels = evidence.labels
    before = tables.confused_pairs(labels, evidence.before.top5[:, 0])
    after = tables.confused_pairs(labels, evidence.after.top5[:, 0])
    counts = {pair: (before.get(pair, 0), after.get(pair, 0)) for pair in before | after}
    return sorted(counts.items(), key=lambda item: (-item[1][1], -item[1][0], item[0]))


def _pair_row(
    evidence: Evidence, table: tables.ClassTable, pair: tables.Pair, counts: Counts
) -> PairRow:
    c, other = pair
    n = int(table.n[np.searchsorted(table.classes, c)])
    return PairRow(c, other, *counts, n=n, together=_share_a_group(evidence, c, other))


def _share_a_group(evidence: Evidence, c: int, other: int) -> bool | None:
    if not evidence.groups:
        return None
    return not evidence.groups_of(c).isdisjoint(evidence.groups_of(other))


# The files


def class_files(evidence: Evidence) -> dict[str, str]:
    """classes.csv and confused.csv as text, by name."""
    return {
        CLASSES_FILE: _csv(_class_lines(evidence)),
        CONFUSED_FILE: _csv(_confused_lines(evidence)),
    }


def _class_lines(evidence: Evidence) -> list[list[object]]:
    """Every class with test examples: how many rows of results get right, in its own order."""
    table, names = _class_table(evidence), _written_names(evidence)
    rows: Mapping[str, np.ndarray] = table.right
    head = ["class", "name", "examples", *(f"right_{name}" for name in rows)]
    lines: list[list[object]] = [[*head, "ensemble_mistakes_for", "times"]]
    for i, c in enumerate(table.classes.tolist()):
        mistaken = names[table.mistaken_for[i]] if table.times[i] else ""
        right = [int(each[i]) for each in rows.values()]
        lines.append([c, names[c], int(table.n[i]), *right, mistaken, int(table.times[i])])
    return lines


def _confused_lines(evidence: Evidence) -> list[list[object]]:
    names = _written_names(evidence)
    head = ["class", "name", "predicted_class", "predicted_name", "generalist", "ensemble"]
    lines: list[list[object]] = [[*head]]
    for (c, other), counts in _confusions(evidence):
        lines.append([c, names[c], other, names[other], *counts])
    return lines


def _written_names(evidence: Evidence) -> Sequence[str]:
    """Whole names, without what no csv holds. No name begins as a spreadsheet's formula does."""
    return Names(evidence.class_names, evidence.num_classes, _harmless)


def _harmless(name: str, c: int) -> str:
    name = UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", name)
    name = name.encode("utf-8", "replace").decode("utf-8")
    return f"'{name}" if name.startswith(FORMULA) else name


def _csv(lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
