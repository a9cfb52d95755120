"""Figures that the report works out from predictions: numpy in, numbers out.

n test examples, C classes, M specialists; `right` is bool [n], `labels` and `predicted` are integers [n].
"""

from __future__ import annotations

from collections import Counter

import numpy as np


def coverage_table(labels, before, after, covering, most: int = 10) -> list[dict]:
    """Gain by the number of specialists that cover the true class.  Hinton et al. 2015, table 4.

    before, after: bool [n], right without and with specialists.  covering: int [C], specialists per class.
    Rows {specialists, or_more, n, before, after, delta, relative}; `most` and above share a row, as in the paper.
    """
    number = np.minimum(np.asarray(covering)[labels], most)
    rows = []
    for k in np.unique(number):
        here = number == k
        was, now = int(before[here].sum()), int(after[here].sum())
        relative = (now - was) / was if was else None
        rows.append(
            {
                "specialists": int(k),
                "or_more": bool(k == most),
                "n": int(here.sum()),
                "before": was,
                "after": now,
                "delta": now - was,
                "relative": relative,
            }
        )
    return rows


def covering_specialists(members: list, num_classes: int, missing=()) -> np.ndarray:
    """How many specialists cover each class: int [C].  Missing specialists cover nothing."""
    covering = np.zeros(num_classes, dtype=np.int64)
    for index, classes in enumerate(members):
        if index not in missing:
            covering[np.asarray(classes, dtype=np.int64)] += 1
    return covering


def frequency_deciles(class_counts, labels, right: dict, parts: int = 10) -> list[dict]:
    """Accuracy by how often a class occurs in training, from the rarest tenth of the classes to the most frequent.

    class_counts: [C].  right: name -> bool [n].  Only classes with test examples count.  Rows {classes, least, most, n,
    accuracy: {name: share}}.  Classes that occur equally often are told apart by their number alone.
    """
    class_counts = np.asarray(class_counts)
    tested = np.unique(labels)
    ordered = tested[np.argsort(class_counts[tested], kind="stable")]
    part_of = np.full(len(class_counts), -1)
    rows = []
    for part, classes in enumerate(piece for piece in np.array_split(ordered, parts) if len(piece)):
        part_of[classes] = part
        here = part_of[labels] == part
        rows.append(
            {
                "classes": len(classes),
                "least": int(class_counts[classes].min()),
                "most": int(class_counts[classes].max()),
                "n": int(here.sum()),
                "accuracy": {name: float(hits[here].mean()) for name, hits in right.items()},
            }
        )
    return rows


def paired_difference(before, after) -> tuple[float, float]:
    """Difference of two accuracies on the same examples, and half its 95 % interval (normal approximation)."""
    gained, lost, n = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    difference = (gained - lost) / n
    return difference, 1.96 * np.sqrt(max((gained + lost) / n - difference**2, 0) / n)


def confusion_weights(
    labels, top5, top5_probability, most: int = 100_000
) -> dict[tuple[int, int], float]:
    """(a, b), a < b -> probability that the generalist puts on b at examples of a and the other way round, summed.

    Only the `most` heaviest pairs.  An entry of top5 below 0 stands for no class.
    """
    labels, other = np.repeat(labels, top5.shape[1]), top5.reshape(-1).astype(np.int64)
    wrong = (other != labels) & (other >= 0)
    labels, other, mass = labels[wrong], other[wrong], top5_probability.reshape(-1)[wrong]
    if not len(other):
        return {}
    base = int(max(labels.max(), other.max())) + 1
    pairs, where = np.unique(
        np.minimum(labels, other) * base + np.maximum(labels, other), return_inverse=True
    )
    weights = np.bincount(where, weights=mass)
    heaviest = np.argsort(-weights, kind="stable")[:most]
    return {(int(pairs[i] // base), int(pairs[i] % base)): float(weights[i]) for i in heaviest}


def families(members, weights: dict[tuple[int, int], float], most: int = 4) -> list[list[int]]:
    """Classes of one group joined to families of look-alikes, the most confused family first.

    Pairs are joined from the heaviest down, as in Kruskal's spanning tree, as long as a family keeps to `most` classes.
    Classes that are confused with nothing in the group are in no family.
    """
    inside = set(int(c) for c in members)
    family_of = {c: [c] for c in inside}
    total: Counter = Counter()
    pairs = [
        (pair, weight)
        for pair, weight in weights.items()
        if pair[0] in inside and pair[1] in inside
    ]
    for (a, b), weight in sorted(pairs, key=lambda item: (-item[1], item[0])):
        one, two = family_of[a], family_of[b]
        if one is not two:
            if len(one) + len(two) > most:
                continue
            weight += total.pop(id(one), 0) + total.pop(id(two), 0)
            one.extend(two)
            for c in two:
                family_of[c] = one
        total[id(one)] += weight
    distinct = {id(family): family for family in family_of.values() if len(family) > 1}
    return sorted(distinct.values(), key=lambda family: (-total[id(family)], family))


def spread(rows, number: int) -> np.ndarray:
    """`number` of rows, evenly spaced: a sample that nobody picked."""
    rows = np.asarray(rows)
    if len(rows) <= number:
        return rows
    return rows[(np.arange(number) * len(rows)) // number]


def typical_examples(labels, label_probability) -> dict[int, int]:
    """Per class the test example that the generalist is surest of: class -> row."""
    order = np.lexsort((-np.asarray(label_probability), labels))
    classes, first = np.unique(np.asarray(labels)[order], return_index=True)
    return dict(zip(classes.tolist(), order[first].tolist(), strict=True))


def curve(points: list[tuple[float, float]], most: int = 160) -> list[tuple[float, float]]:
    """At most `most` points: neighbours are averaged, the last one stays."""
    points = [(x, y) for x, y in points if np.isfinite(x) and np.isfinite(y)]
    if len(points) <= most:
        return points
    pieces = np.array_split(np.asarray(points), most)
    return [tuple(piece.mean(axis=0)) for piece in pieces[:-1]] + [points[-1]]
