"""Each specialist: conditional accuracy, what it fixed and broke, its forecast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import plots
from .evidence import Changes, Evidence
from .formatting import points

MOST_SPECIALISTS = 100


@dataclass(frozen=True)
class SpecialistRow:
    """before, after: conditional accuracy of the generalist and of the specialist.

    forecast: the most that it could gain, a fraction of the val examples. routed: test examples.
    """

    index: int
    before: float
    after: float
    difference: float
    svg: str
    changes: Changes | None
    forecast: float | None
    classes: int
    routed: int
    cost: dict


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
    specialists = evidence.results["specialists"]
    measured = [row for row in specialists if _is_measured(row)]
    if not measured:
        return SpecialistRows([], unmeasured=len(specialists))
    before = [row["conditional_before"] for row in measured]
    after = [row["conditional_after"] for row in measured]
    low, high = min(before + after), max(before + after)
    rows = [_specialist_row(evidence, row, low, high) for row in measured]
    rows.sort(key=lambda row: (-row.difference, row.index))
    examples = np.array([row["n"] for row in measured], dtype=float)
    return SpecialistRows(
        rows=rows[:MOST_SPECIALISTS],
        unmeasured=len(specialists) - len(measured),
        rest=max(len(rows) - MOST_SPECIALISTS, 0),
        before=_weighted_mean(before, examples),
        after=_weighted_mean(after, examples),
        low=low,
        high=high,
    )


def _is_measured(row: dict) -> bool:
    return row.get("conditional_before") is not None and row.get("conditional_after") is not None


def _specialist_row(evidence: Evidence, row: dict, low: float, high: float) -> SpecialistRow:
    before, after = row["conditional_before"], row["conditional_after"]
    return SpecialistRow(
        index=row["index"],
        before=before,
        after=after,
        difference=after - before,
        svg=plots.dumbbell(before, after, low, high),
        changes=evidence.changes(row["index"]),
        forecast=evidence.forecast(row["index"]),
        classes=row["classes"],
        routed=row["routed"],
        cost=row.get("cost") or {},
    )


def _weighted_mean(values: list[float], weights: np.ndarray) -> float | None:
    if not weights.sum():
        return None
    return float(np.average(values, weights=weights))


def forecast_plot(evidence: Evidence) -> str | None:
    """What the ensemble gained on test against the forecast from val, a point for each group.

    None without a forecast.
    """
    dots = []
    for index in range(len(evidence.groups)):
        forecast, changes = evidence.forecast(index), evidence.changes(index)
        if forecast is None or changes is None:
            continue
        net = (changes.fixed - changes.broken) / len(evidence.labels)
        name = f"group {index}: forecast at most {points(forecast)} points, net {points(net)}"
        dots.append(plots.Dot(name, "ensemble", 100 * forecast, 100 * net))
    if not dots:
        return None
    return plots.scatter(
        dots,
        "forecast from val: points that a perfect specialist would add",
        "points gained on test",
        diagonal=True,
    )
