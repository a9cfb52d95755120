"""results.json, put together from what the stage `evaluate` wrote."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NotRequired, TypedDict, cast

from ..advice.document import FILE as ADVICE
from ..advice.document import read_advice
from ..advice.outcomes import outcomes
from ..config import UserError
from ..controls import command_for, control_names, missing_controls, twin_name
from ..corruption import merged, summary
from ..graph import RunDirectory
from ..store import Stage, read_json
from .rows import (
    AddedClasses,
    Clusters,
    Cost,
    FurtherMetrics,
    Metrics,
    MissingControls,
    Results,
    Row,
    SizeRow,
    SpecialistMetrics,
    named_rows,
)


class Evaluation(TypedDict):
    """evaluation/NAME.json.

    reliability: a dict {lo, hi, count, confidence, accuracy} for each bin of confidence.
    added: in the generalist's file, of a run that adds classes.
    sizes, or clusters, specialists, missing and dropped (their indices): in the ensemble's file.
    """

    name: str
    row: Row
    reliability: NotRequired[list[dict]]
    reliability_calibrated: NotRequired[list[dict]]
    added: NotRequired[AddedClasses]
    sizes: NotRequired[list[SizeRow]]
    clusters: NotRequired[Clusters]
    specialists: NotRequired[list[SpecialistMetrics]]
    missing: NotRequired[list[int]]
    dropped: NotRequired[list[int]]


def collect(run: RunDirectory) -> Results:
    """The content of results.json.

    Raises UserError if the run is not evaluated yet.
    """
    generalist = read_evaluation(run.evaluate, "generalist")
    ensemble = read_evaluation(run.evaluate, "ensemble")
    if generalist is None or ensemble is None:
        raise UserError(
            f"{run.root}: nothing to report before the stage `evaluate` is done; "
            "finish the run first"
        )
    students = _rows(run, run.students)
    controls = _rows(run, control_names(run))
    rows = {"generalist": _row(generalist["row"]), "ensemble": _row(ensemble["row"])}
    _add_differences(run, {**rows, **controls, **students})
    results: dict[str, Any] = {
        **rows,
        "controls": controls,
        "missing_controls": _missing_controls(run, controls),
        "students": students,
        "student": students.get("main"),
    }
    if "added" in generalist:
        results["added"] = generalist["added"]
    results |= _parts(run, ensemble)
    advice = read_advice(run.root / ADVICE)
    if advice is not None:
        results["advice"] = outcomes(advice, run.config, named_rows(cast(Results, results)))
    results["damage"] = summary(
        merged([read_file(stage, "damage.json") or {} for stage in run.stages])
    )
    return cast(Results, _finite(results))


def read_evaluation(evaluate: Stage, name: str) -> Evaluation | None:
    """evaluation/NAME.json, or None where there is none."""
    return read_file(evaluate, f"{name}.json")


def read_file(stage: Stage, file: str):
    """A finished stage's JSON file, or None where the stage is not done or wrote no such file."""
    if stage.done() is None:
        return None
    try:
        return read_json(stage.path(file))
    except FileNotFoundError:
        return None


def _rows(run: RunDirectory, names: Iterable[str]) -> dict[str, Row]:
    """The rows of those that were evaluated."""
    evaluations = {name: read_evaluation(run.evaluate, name) for name in names}
    return {name: _row(content["row"]) for name, content in evaluations.items() if content}


def _add_differences(run: RunDirectory, rows: dict[str, Row]) -> None:
    """Add to each row its paired differences to generalist, ensemble and, of a student, its twin.

    Runs whose evaluation kept no predictions have none.
    """
    from .paired import paired, read_answers

    answers = {name: read_answers(run.evaluate.path(f"{name}.npz")) for name in rows}
    for name, row in rows.items():
        twin = twin_name(name) if name in run.students else ""
        versus = {}
        for other in ("generalist", "ensemble", twin):
            one, two = answers[name], answers.get(other)
            if other != name and one is not None and two is not None:
                versus[other] = paired(one, two)
        differences = {other: each for other, each in versus.items() if each is not None}
        if differences:
            row["versus"] = differences


def _missing_controls(run: RunDirectory, controls: dict[str, Row]) -> MissingControls | None:
    missing = missing_controls(run, controls)
    if not missing:
        return None
    return MissingControls(names=missing, command=command_for(run, missing, "RUN"))


def _row(row: Row) -> Row:
    """A row in the order of results.json. Metrics that an older version did not write are None."""
    metrics = {key: row.get(key) for key in Metrics.__annotations__}
    further = {key: row.get(key) for key in FurtherMetrics.__annotations__ if key in row}
    cost = row.get("cost") or {}
    costs = {key: cost.get(key) for key in Cost.__annotations__}
    for key in ("latency_ms", "softmax_ms", "cpu_seconds"):  # what not every version measured
        if costs[key] is None:
            del costs[key]
    return cast(Row, {**metrics, **further, "cost": costs})


def _parts(run: RunDirectory, ensemble: Evaluation) -> dict:
    """What the ensemble is made of: groups and specialists, or members."""
    if not run.method.has_groups:
        return {"sizes": ensemble.get("sizes")}
    clusters = ensemble.get("clusters") or {}
    return {
        "clusters": {key: clusters.get(key) for key in Clusters.__annotations__},
        "specialists": ensemble.get("specialists"),
        "dropped": ensemble.get("dropped") or [],
    }


def _finite(value):
    """The same without NaN and infinity, which JSON does not have: such a metric is None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
