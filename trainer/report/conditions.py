"""The conditions of a run: seed, sizes, machine, commit, and the time of each stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.graph import RunDirectory
from pipeline.store import read_json

from .evidence import Evidence


@dataclass(frozen=True)
class StageTime:
    place: str
    jobs: int
    seconds: float


def run_conditions(evidence: Evidence) -> list[tuple[str, str]]:
    """(name, value) of what every metric of the page depends on."""
    run, config = evidence.run, evidence.run.config
    if not evidence.has_specialists:
        networks = ("members", f"{1 + len(run.members)}")
    else:
        networks = ("groups", f"{len(evidence.groups)}")
    try:
        environment = read_json(run.root / "environment.json")
    except (OSError, ValueError):
        environment = {"environment": "environment.json is missing"}
    return [
        ("run", str(run.root.resolve())),
        ("seed", str(config.seed)),
        ("evaluated", _time_of_evaluation(run)),
        ("classes", f"{evidence.num_classes:,}"),
        ("test examples", f"{evidence.results['ensemble']['n']:,}"),
        networks,
        *_start_of_specialists(evidence),
        ("network", config.model.name),
        *_flat(environment),
    ]


def about_the_run(evidence: Evidence) -> list[str]:
    """What the page is about: run, date, data, network and seed."""
    run, config = evidence.run, evidence.run.config
    return [
        run.root.resolve().name,
        _time_of_evaluation(run),
        f"{evidence.num_classes:,} classes",
        f"{evidence.results['ensemble']['n']:,} test examples of {config.data.test}",
        f"network {config.model.name}",
        f"seed {config.seed}",
    ]


def _start_of_specialists(evidence: Evidence) -> list[tuple[str, str]]:
    """What they start as, where that is another network than the generalist."""
    section = evidence.run.config.specialists
    if not (evidence.has_specialists and section.starts_elsewhere):
        return []
    return [("specialists from", section.start)]


def _time_of_evaluation(run: RunDirectory) -> str:
    done = run.evaluate.done() or {}
    if "finished" not in done:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(done["finished"]))


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values of a JSON file as (keys, text)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix} {key}".strip())
    elif isinstance(value, list):
        yield prefix, ", ".join(str(item) for item in value)
    else:
        yield prefix, "–" if value is None else str(value)


def stage_times(run: RunDirectory) -> list[StageTime]:
    """Seconds of each finished stage. Those with an index, the specialists say, together."""
    times: dict[str, list[float]] = {}
    for stage in run.stages:
        done = stage.done()
        if done is not None and "seconds" in done:
            place = stage.place
            if stage.kind.addressed_by == "index":
                place = place.rpartition("/")[0]
            times.setdefault(place, []).append(done["seconds"])
    return [StageTime(place, len(seconds), sum(seconds)) for place, seconds in times.items()]
