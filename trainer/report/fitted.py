"""What was fitted on val to join the ensemble's networks, and a warning where it is at a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ensemble.fitting import WEIGHTS, WIDEST
from pipeline.results import read_file

from .evidence import Evidence

NEAR = 0.01  # of a bound's logarithm: closer than so, and a value is at the bound


@dataclass(frozen=True)
class FittedRow:
    what: str
    value: str
    note: str


@dataclass(frozen=True)
class Fitted:
    """warnings: a sentence for each value that lies at the end of what was tried."""

    rows: list[FittedRow]
    warnings: list[str]


def fitted(evidence: Evidence) -> Fitted | None:
    """What ensemble.json says. None where there is nothing fitted to show."""
    settings = read_file(evidence.run.ensemble, "ensemble.json") or {}
    rows, warnings = [], []
    for part in PARTS.get(settings.get("kind", "specialists"), ()):
        part(evidence, settings, rows, warnings)
    warnings += _calibration_warnings(evidence)
    if not rows and not warnings:
        return None
    return Fitted(rows, warnings)


Part = Callable[[Evidence, dict, list[FittedRow], list[str]], None]


def _weights(
    evidence: Evidence, settings: dict, rows: list[FittedRow], warnings: list[str]
) -> None:
    """The specialists' weight in eq. 5, against the generalist's 1."""
    weights = (settings.get("weights") or [])[1:]
    if not weights:
        return
    what = "weight of the specialists in eq. 5"
    if not evidence.run.config.ensemble.fit_weight:
        rows.append(FittedRow(what, _span(weights), "not fitted: ensemble.fit_weight is false"))
        return
    least, most = WEIGHTS[0], WEIGHTS[-1]
    note = f"the generalist’s is 1; tried on val from {least:.3g} to {most:g}"
    rows.append(FittedRow(what, _span(weights), note))
    if any(_is_at(weight, least) for weight in weights):
        warnings.append(
            f"The specialists’ weight, {_span(weights)}, is the least that was tried on val: on "
            "val they hardly help, and the ensemble is the generalist."
        )
    if any(_is_at(weight, most) for weight in weights):
        warnings.append(
            f"The specialists’ weight, {_span(weights)}, is the most that was tried on val: on val "
            "the generalist has no say beside them."
        )


def _temperatures(
    evidence: Evidence, settings: dict, rows: list[FittedRow], warnings: list[str]
) -> None:
    temperatures = settings.get("temperatures") or []
    if not temperatures:
        return
    first, *others = temperatures
    rows.append(FittedRow("temperature of the generalist’s answer", f"{first:.3g}", ""))
    if not others:
        return
    whose = "specialists" if evidence.has_specialists else "further networks"
    note = f"fitted on val, each between 1/{WIDEST:g} and {WIDEST:g}"
    rows.append(FittedRow(f"temperatures of the {whose}", _span(others), note))
    at_bound = [str(m) for m, t in enumerate(others) if _is_at(t, WIDEST) or _is_at(t, 1 / WIDEST)]
    if at_bound:
        shown = ", ".join(at_bound[:10]) + (", …" if len(at_bound) > 10 else "")
        warnings.append(
            f"The temperature of {len(at_bound)} of {len(others)} {whose} ({shown}) is at a bound "
            "of what was tried on val: its answers there are never, or always, right."
        )


def _shortlist(
    evidence: Evidence, settings: dict, rows: list[FittedRow], warnings: list[str]
) -> None:
    length, order = settings.get("shortlist"), settings.get("order")
    if length is not None:
        note = "the generalist’s likeliest classes that others are asked about"
        rows.append(FittedRow("length of the shortlist", f"{length:,}", note))
    if order is not None:
        note = "of the generalised mean: 0 geometric, 1 arithmetic"
        rows.append(FittedRow("order", f"{order:.3g}", note))


PARTS: dict[str, tuple[Part, ...]] = {
    "specialists": (_weights, _temperatures, _shortlist),
    "shortlist": (_shortlist, _temperatures),
    "deep": (_shortlist,),
}


def _calibration_warnings(evidence: Evidence) -> list[str]:
    """Warnings about temperatures of calibrated metrics that lie at a bound."""
    return [
        f"The calibration of {name}, T = {temperature:.3g}, is at a bound of what was tried on "
        "val: its calibrated metrics are no better than that bound allows."
        for name, row in evidence.rows.items()
        if (temperature := row.get("temperature")) is not None
        and (_is_at(temperature, WIDEST) or _is_at(temperature, 1 / WIDEST))
    ]


def _is_at(value: float, bound: float) -> bool:
    return value > 0 and abs(math.log(value / bound)) < NEAR


def _span(values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    if most - least < 1e-9:
        return f"{least:.3g}"
    return f"{least:.3g} to {most:.3g}"
