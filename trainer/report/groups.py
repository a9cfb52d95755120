"""The groups of classes: how much confusion they hold, and cards of the classes confused most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import tables
from .evidence import Changes, Conditional, Evidence

MOST_GROUPS, MOST_TILES = 24, 16


@dataclass(frozen=True)
class Bar:
    label: str
    fraction: float
    colour: str


@dataclass(frozen=True)
class CapturedConfusion:
    """bars: fractions of the errors inside a group. in_none, in_several: numbers of classes."""

    bars: list[Bar]
    groups: int
    smallest: int
    largest: int
    in_none: int
    in_several: int
    num_classes: int


@dataclass(frozen=True)
class Tile:
    """A class, and the test row of its picture.

    short: its name without the words that all classes of its family share.
    """

    c: int
    row: int | None
    short: str


@dataclass(frozen=True)
class GroupCard:
    """families: classes that are confused with each other. rest: classes of the group not shown.

    errors: the generalist's test errors inside the group. conditional: None where not measured.
    """

    index: int
    size: int
    errors: int
    families: list[list[Tile]]
    rest: int
    forecast: float | None
    conditional: Conditional | None
    changes: Changes | None
    missing: bool
    skipped: bool


@dataclass(frozen=True)
class GroupCards:
    cards: list[GroupCard]
    rest: int


def captured_confusion(evidence: Evidence) -> CapturedConfusion:
    """Captured confusion: of errors on test and val, expected from predictions, by chance."""
    clusters = evidence.results.get("clusters")
    assert clusters is not None, "a run of specialists has groups"
    split = evidence.judged_on
    fractions = [
        ("test errors inside a group", clusters["captured_confusion"], "ensemble"),
        ("chance: random groups of these sizes", clusters["chance"], "chance"),
        (f"{split} errors inside a group", evidence.clusters.get("captured"), "generalist"),
        (
            f"expected on {split} without labels, from predictions alone",
            clusters["captured_unlabelled"],
            "generalist",
        ),
    ]
    sizes = clusters["sizes"] or [len(classes) for classes in evidence.groups]
    groups_of_class = np.bincount(np.concatenate(evidence.groups), minlength=evidence.num_classes)
    return CapturedConfusion(
        bars=[Bar(*fraction) for fraction in fractions if fraction[1] is not None],
        groups=len(sizes),
        smallest=min(sizes),
        largest=max(sizes),
        in_none=int((groups_of_class == 0).sum()),
        in_several=int((groups_of_class > 1).sum()),
        num_classes=evidence.num_classes,
    )


def group_cards(evidence: Evidence) -> GroupCards:
    """Groups by how much confusion they hold, each with its families of look-alikes."""
    errors = _errors_inside(evidence)
    order = sorted(range(len(errors)), key=lambda index: (-errors[index], index))
    cards = [_group_card(evidence, index, errors[index]) for index in order[:MOST_GROUPS]]
    return GroupCards(cards, rest=max(len(order) - MOST_GROUPS, 0))


def _errors_inside(evidence: Evidence) -> list[int]:
    """The generalist's test errors whose true and predicted class are both in a group, by group."""
    labels, predicted = evidence.labels, evidence.before.top5[:, 0]
    wrong = predicted != labels
    errors = []
    for classes in evidence.groups:
        inside = np.zeros(evidence.num_classes, dtype=bool)
        inside[classes] = True
        errors.append(int((wrong & inside[labels] & inside[predicted]).sum()))
    return errors


def _group_card(evidence: Evidence, index: int, errors: int) -> GroupCard:
    classes = evidence.groups[index]
    families = _shown_families(classes, evidence.confusion_weights)
    return GroupCard(
        index=index,
        size=len(classes),
        errors=errors,
        families=[_tiles(evidence, family) for family in families],
        rest=len(classes) - sum(map(len, families)),
        forecast=evidence.forecast(index),
        conditional=evidence.conditional(index),
        changes=evidence.changes(index),
        missing=index in evidence.missing,
        skipped=index in evidence.skipped,
    )


def _tiles(evidence: Evidence, family: list[int]) -> list[Tile]:
    typical = evidence.typical_examples
    short = tables.distinctive([evidence.names[c] for c in family])
    return [Tile(c, typical.get(c), name) for c, name in zip(family, short, strict=True)]


def _shown_families(classes: np.ndarray, weights: dict[tables.Pair, float]) -> list[list[int]]:
    """The first families, of MOST_TILES classes at most. Without families the first classes."""
    families, tiles = [], 0
    for family in tables.families(classes, weights):
        tiles += len(family)
        if tiles > MOST_TILES:
            break
        families.append(family)
    return families or [[int(c)] for c in classes[:MOST_TILES]]
