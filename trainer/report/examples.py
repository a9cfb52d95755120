"""Test examples that the ensemble fixed, and those that it broke."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from . import tables
from .evidence import Evidence
from .groups import GroupCards
from .predictions import Predictions

MOST_EXAMPLES = 12


@dataclass(frozen=True)
class Prediction:
    """The class c that `who` predicts. row: a typical test example of it, for its picture."""

    who: str
    c: int
    probability: float
    right: bool
    row: int | None


@dataclass(frozen=True)
class Example:
    """A test row of the true class c."""

    row: int
    c: int
    predictions: list[Prediction]


@dataclass(frozen=True)
class ChangedExamples:
    """examples: some of the `total`."""

    colour: str
    title: str
    total: int
    examples: list[Example]


def changed_examples(evidence: Evidence) -> list[ChangedExamples]:
    """What the ensemble fixed, and what it broke: an evenly spaced sample of each."""
    was, now = evidence.correct["generalist"], evidence.correct["ensemble"]
    return [
        _changed(evidence, "good", "Fixed", np.flatnonzero(now & ~was)),
        _changed(evidence, "bad", "Broken", np.flatnonzero(was & ~now)),
    ]


def _changed(evidence: Evidence, colour: str, title: str, rows: np.ndarray) -> ChangedExamples:
    shown = tables.spread(rows, MOST_EXAMPLES).tolist()
    return ChangedExamples(colour, title, len(rows), [_example(evidence, row) for row in shown])


def _example(evidence: Evidence, row: int) -> Example:
    def prediction(who: str, predictions: Predictions) -> Prediction:
        c = int(predictions.top5[row, 0])
        return Prediction(
            who=who,
            c=c,
            probability=float(predictions.top5_probability[row, 0]),
            right=bool(evidence.correct[who][row]),
            row=evidence.typical_examples.get(c),
        )

    both = [prediction("generalist", evidence.before), prediction("ensemble", evidence.after)]
    return Example(row, int(evidence.labels[row]), both)


def picture_rows(groups: GroupCards | None, changed: list[ChangedExamples]) -> set[int]:
    """Every test row of which the page shows a picture."""
    rows: set[int | None] = set()
    if groups is not None:
        for family in itertools.chain.from_iterable(card.families for card in groups.cards):
            rows.update(tile.row for tile in family)
    for part in changed:
        for example in part.examples:
            rows.add(example.row)
            rows.update(prediction.row for prediction in example.predictions)
    return {row for row in rows if row is not None}
