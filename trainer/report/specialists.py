"""Each specialist: conditional accuracy, what it fixed and broke, its forecast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.results import Difference

from . import plots, tables
from .evidence import Changes, Conditional, Evidence
from .formatting import points

MOST_SPECIALISTS = 100


@dataclass(frozen=True)
class SpecialistRow:
    """before, after: conditional accuracy of the generalist and of the specialist on n examples.

    gained: what it fixed less what it broke, a fraction of all test examples, with half its 95 %
    interval. forecast: the ceiling, the fraction of the examples of `Evidence.judged_on` that a
    perfect one would fix. routed: test examples.
    """

    index: int
    before: float
    after: float
    n: int
    svg: str
    gained: Difference | None
    changes: Changes | None
    forecast: float | None
    classes: int
    routed: int
    cost: Mapping[str, object]


@dataclass(frozen=True)
class SpecialistRows:
    """before, after: mean conditional accuracy, weighted by examples. low, high: of the axis."""

    rows: list[SpecialistRow]
    unmeasured: int
    rest: int = 0
    before: float | None = None
    after: float | None = None
    low: float | None = None
    high: float | None = None


def specialist_rows(evidence: Evidence) -> SpecialistRows:
    """Each specialist's conditional accuracy before and after, the largest gain first."""
    conditionals = {index: evidence.conditional(index) for index in evidence.specialists}
    measured = {index: one for index, one in conditionals.items() if one is not None}
    unmeasured = len(conditionals) - len(measured)
    if not measured:
        return SpecialistRows([], unmeasured)
    low = min(min(one) for one in measured.values())
    high = max(max(one) for one in measured.values())
    rows = [_specialist_row(evidence, index, one, low, high) for index, one in measured.items()]
    rows.sort(key=lambda row: (-_net(row), row.before - row.after, row.index))
    examples = np.array([evidence.specialists[index]["n"] for index in measured], dtype=float)
    return SpecialistRows(
        rows=rows[:MOST_SPECIALISTS],
        unmeasured=unmeasured,
        rest=max(len(rows) - MOST_SPECIALISTS, 0),
        before=_weighted_mean([one.before for one in measured.values()], examples),
        after=_weighted_mean([one.after for one in measured.values()], examples),
        low=low,
        high=high,
    )


def _specialist_row(
    evidence: Evidence, index: int, conditional: Conditional, low: float, high: float
) -> SpecialistRow:
    before, after = conditional
    row = evidence.specialists[index]
    changes = evidence.changes(index)
    differs = unpaired_half(before, after, row["n"]) < abs(after - before)
    return SpecialistRow(
        index=index,
        before=before,
        after=after,
        n=row["n"],
        svg=plots.dumbbell(before, after, low, high, is_measurable=differs),
        gained=_gained(changes, len(evidence.labels)),
        changes=changes,
        forecast=evidence.forecast(index),
        classes=row["classes"],
        routed=row["routed"],
        cost=row.get("cost") or {},
    )


def _net(row: SpecialistRow) -> float:
    return row.gained.value if row.gained is not None else 0.0


def _gained(changes: Changes | None, n: int) -> Difference | None:
    """How many of n test examples became right, less those that became wrong."""
    if changes is None:
        return None
    net = (changes.fixed - changes.broken) / n
    variance = (changes.fixed + changes.broken) / n - net**2
    return Difference(net, 1.96 * math.sqrt(max(variance, 0.0) / n))


def unpaired_half(before: float, after: float, n: int) -> float:
    """Half the 95 % interval of a difference of accuracies, each of n examples. Infinite of few.

    Which examples changed is not known here. Accuracies on the same examples vary together, so
    that this is rather too wide.
    """
    if n < tables.FEWEST:
        return math.inf
    return 1.96 * math.sqrt((before * (1 - before) + after * (1 - after)) / n)


def _weighted_mean(values: list[float], weights: np.ndarray) -> float | None:
    if not weights.sum():
        return None
    return float(np.average(values, weights=weights))


def forecast_plot(evidence: Evidence) -> str | None:
    """What the ensemble gained on test against the groups' ceilings, a point for each group.

    None without a forecast.
    """
    dots = []
    for index in range(len(evidence.groups)):
        forecast, changes = evidence.forecast(index), evidence.changes(index)
        if forecast is None or changes is None:
            continue
        net = (changes.fixed - changes.broken) / len(evidence.labels)
        name = f"group {index}: forecast, a ceiling, {points(forecast)} points, net {points(net)}"
        dots.append(plots.Dot(name, "ensemble", 100 * forecast, 100 * net))
    if not dots:
        return None
    return plots.scatter(
        dots,
        f"ceiling from {evidence.judged_on}: points that a perfect specialist would add",
        "points gained on test",
        diagonal=True,
    )
