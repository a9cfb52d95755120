"""What the report works out from predictions: numpy in, numbers out.

n test examples, C classes, M specialists, k predictions kept of each example. `labels` are integers
[n]. `before`, `after` and `correct` are bool [n].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Pair = tuple[int, int]
FEWEST = 20  # examples: what fewer say is no percentage, and no colour


@dataclass(frozen=True)
class CoverageRow:
    """Test examples whose true class is covered by `specialists` specialists, or by more.

    before, after: how many are right without and with specialists. delta: after - before.
    relative: delta / before, None where nothing was right before. measurable: whether there are
    FEWEST examples and the paired interval of the change holds no zero.
    """

    specialists: int
    or_more: bool
    n: int
    before: int
    after: int
    delta: int
    relative: float | None
    measurable: bool = False


def coverage_table(
    labels: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    covering: np.ndarray,
    most: int = 10,
) -> list[CoverageRow]:
    """Gain by the number of specialists that cover the true class. Hinton et al. 2015, table 4.

    covering: int [C], specialists per class. `most` and above share a row, as in the paper.
    """
    coverage = np.minimum(np.asarray(covering)[labels], most)
    rows = []
    for specialists in np.unique(coverage):
        here = coverage == specialists
        was, now = int(before[here].sum()), int(after[here].sum())
        rows.append(
            CoverageRow(
                specialists=int(specialists),
                or_more=bool(specialists == most),
                n=int(here.sum()),
                before=was,
                after=now,
                delta=now - was,
                relative=(now - was) / was if was else None,
                measurable=is_measurable(before[here], after[here]),
            )
        )
    return rows


def covering_specialists(
    groups: Iterable[Sequence[int] | np.ndarray], num_classes: int, missing: Collection[int] = ()
) -> np.ndarray:
    """How many specialists cover each class: int [C]. Missing specialists cover nothing."""
    covering = np.zeros(num_classes, dtype=np.int64)
    for index, classes in enumerate(groups):
        if index not in missing:
            covering[np.asarray(classes, dtype=np.int64)] += 1
    return covering


@dataclass(frozen=True)
class FrequencyRow:
    """A tenth of the classes. least, most: training examples of its rarest and its commonest class.

    n: its test examples. accuracy: name -> fraction of them that are right.
    """

    classes: int
    least: int
    most: int
    n: int
    accuracy: dict[str, float]


def frequency_deciles(
    class_counts: Sequence[int] | np.ndarray,
    labels: np.ndarray,
    correct: Mapping[str, np.ndarray],
    parts: int = 10,
) -> list[FrequencyRow]:
    """Accuracy by how often a class occurs in training, from the rarest tenth of the classes up.

    class_counts: [C]. correct: name -> bool [n]. Only classes with test examples count. Classes
    that occur equally often are told apart by their index alone.
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
            FrequencyRow(
                classes=len(classes),
                least=int(class_counts[classes].min()),
                most=int(class_counts[classes].max()),
                n=int(here.sum()),
                accuracy={name: float(hits[here].mean()) for name, hits in correct.items()},
            )
        )
    return rows


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Difference of two accuracies on the same examples, and half its 95 % interval.

    The interval is the normal approximation.
    """
    n = len(before)
    gained = int((after & ~before).sum())
    lost = int((before & ~after).sum())
    difference = (gained - lost) / n
    return difference, 1.96 * np.sqrt(max((gained + lost) / n - difference**2, 0) / n)


def is_measurable(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether two accuracies differ on the same examples, of which there are FEWEST."""
    if len(before) < FEWEST:
        return False
    difference, half = paired_difference(before, after)
    return abs(difference) > half


@dataclass(frozen=True)
class ClassTable:
    """Each class with test examples, k of them: int64 [k].

    right: name of a row -> how many examples it gets right. mistaken_for: the class that the
    examples are taken for most often, `times` times. Where `times` is 0 it means nothing.
    """

    classes: np.ndarray
    n: np.ndarray
    right: dict[str, np.ndarray]
    mistaken_for: np.ndarray
    times: np.ndarray


def class_table(
    labels: np.ndarray, predicted: np.ndarray, correct: Mapping[str, np.ndarray]
) -> ClassTable:
    """What each class comes to.  predicted: int [n], whose mistakes count."""
    classes, class_of, n = np.unique(labels, return_inverse=True, return_counts=True)
    right = {
        name: np.bincount(class_of, weights=hits, minlength=len(classes)).astype(np.int64)
        for name, hits in correct.items()
    }
    mistaken_for, times = np.full(len(classes), -1), np.zeros(len(classes), dtype=np.int64)
    for (label, other), count in confused_pairs(labels, predicted).items():
        i = np.searchsorted(classes, label)
        if count > times[i]:  # of equals the first, whose index is the lowest
            mistaken_for[i], times[i] = other, count
    return ClassTable(classes, n, right, mistaken_for, times)


def confused_pairs(labels: np.ndarray, predicted: np.ndarray) -> dict[Pair, int]:
    """(true class, predicted class) -> examples, of the wrong ones, in the order of the pairs."""
    wrong = labels != predicted
    stacked = np.stack([labels[wrong], predicted[wrong].astype(np.int64)], axis=1)
    pairs, counts = np.unique(stacked, axis=0, return_counts=True)
    return {(int(a), int(b)): int(count) for (a, b), count in zip(pairs, counts, strict=True)}


def distinctive(names: Sequence[str]) -> list[str]:
    """Names without the words that all have, which tell nobody apart. No name gets empty."""
    if len(names) < 2:
        return list(names)
    words = [name.split() for name in names]
    shared = set(words[0]).intersection(*words[1:])
    shorter = [" ".join(word for word in each if word not in shared) for each in words]
    return [short or name for short, name in zip(shorter, names, strict=True)]


def confusion_weights(
    labels: np.ndarray, top5: np.ndarray, top5_probability: np.ndarray, most: int = 100_000
) -> dict[Pair, float]:
    """How much the generalist confuses two classes: (a, b) with a < b -> probability.

    The probability that it puts on b at examples of a, and on a at examples of b, summed. Only the
    `most` heaviest pairs. top5, top5_probability: [n, k]. A class below 0 stands for none.
    """
    labels = np.repeat(labels, top5.shape[1])
    other = top5.reshape(-1).astype(np.int64)
    wrong = (other != labels) & (other >= 0)
    labels, other = labels[wrong], other[wrong]
    mass = top5_probability.reshape(-1)[wrong]
    if not len(other):
        return {}
    base = int(max(labels.max(), other.max())) + 1
    codes = np.minimum(labels, other) * base + np.maximum(labels, other)
    pairs, pair_of = np.unique(codes, return_inverse=True)
    weights = np.bincount(pair_of, weights=mass)
    heaviest = np.argsort(-weights, kind="stable")[:most]
    return {(int(pairs[i] // base), int(pairs[i] % base)): float(weights[i]) for i in heaviest}


def families(
    classes: Iterable[int] | np.ndarray, weights: Mapping[Pair, float], most: int = 4
) -> list[list[int]]:
    """Classes of one group joined to families of look-alikes, the most confused family first.

    Pairs are joined from the heaviest down, as in Kruskal's spanning tree, as long as a family
    keeps to `most` classes. Classes that are confused with nothing in the group are in no family.
    """
    inside = {int(c) for c in classes}
    family_of = {c: [c] for c in inside}
    total: dict[int, float] = defaultdict(float)  # by the id() of the family's list
    pairs = [item for item in weights.items() if inside.issuperset(item[0])]
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


def spread(rows: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows, evenly spaced: a sample that nobody picked."""
    rows = np.asarray(rows)
    if len(rows) <= count:
        return rows
    return rows[(np.arange(count) * len(rows)) // count]


def typical_examples(labels: np.ndarray, label_probability: np.ndarray) -> dict[int, int]:
    """Per class the test example that the generalist is surest of: class -> row."""
    order = np.lexsort((-np.asarray(label_probability), labels))
    classes, first = np.unique(np.asarray(labels)[order], return_index=True)
    return dict(zip(classes.tolist(), order[first].tolist(), strict=True))


def curve(points: Iterable[tuple[float, float]], most: int = 160) -> list[tuple[float, float]]:
    """At most `most` points: neighbours are averaged, the last one stays."""
    points = [(x, y) for x, y in points if np.isfinite(x) and np.isfinite(y)]
    if len(points) <= most:
        return points
    pieces = np.array_split(np.asarray(points), most)
    means = [piece.mean(axis=0) for piece in pieces[:-1]]
    return [(float(x), float(y)) for x, y in means] + [points[-1]]
