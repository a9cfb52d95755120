"""How long a run will still take, from what its stages have taken so far."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.graph import RunDirectory

from .plan import Job, planned_steps
from .status import StageStatus

START_S = 3.0  # the imports of a job's process


def seconds_to_go(
    run: RunDirectory,
    jobs: Sequence[Job],
    stages: Sequence[StageStatus],
    slots: int,
    start_s: float = START_S,
) -> float | None:
    """Seconds until the last job ends, if nothing fails. None while no stage has shown its pace.

    stages: what `status.statuses` says of the jobs.  slots: processes side by side.  start_s: what
    the start of a job takes.
    """
    status_of = {stage.stage: stage for stage in stages}
    left = _left_by_stage(run, jobs, status_of)
    if left is None:
        return None
    costs = {}
    for job in jobs:
        costs[job.name] = sum(left[stage.place] for stage in job.stages)
        if all(status_of[stage.place].state not in ("running", "done") for stage in job.stages):
            costs[job.name] += start_s
    return makespan(jobs, costs, slots)


def _left_by_stage(
    run: RunDirectory, jobs: Sequence[Job], status_of: dict[str, StageStatus]
) -> dict[str, float] | None:
    """Seconds that each stage still takes.

    A stage that has not begun takes as long as others of its kind on average, or, where there is
    none yet, as long as its steps do at the pace of those that train.
    """
    every = [stage for job in jobs for stage in job.stages]
    whole: dict[str, float] = {}
    for stage in every:
        seconds = whole_seconds(status_of[stage.place])
        if seconds is not None:
            whole[stage.place] = seconds
    measured = [stage for stage in every if stage.place in whole and stage.kind.trains]
    steps = sum(planned_steps(stage, run) for stage in measured)
    if not steps:
        return None
    pace = sum(whole[stage.place] for stage in measured) / steps
    left = {}
    for stage in every:
        status = status_of[stage.place]
        alike = [whole[other.place] for other in every if _alike(stage, other, whole)]
        expected = pace * planned_steps(stage, run)
        if alike:
            expected = sum(alike) / len(alike)
        left[stage.place] = _left(status, expected)
    return left


def _alike(stage, other, whole: dict[str, float]) -> bool:
    return other.name == stage.name and other.kind.trains and other.place in whole


def whole_seconds(status: StageStatus) -> float | None:
    """What a stage takes from start to end, of one that is done or shows its progress."""
    if status.state == "done":
        return status.seconds
    if status.state == "running" and status.eta_s is not None:
        return (status.seconds or 0.0) + status.eta_s
    return None


def _left(status: StageStatus, expected: float) -> float:
    if status.state == "done":
        return 0.0
    if status.state == "running":
        if status.eta_s is not None:
            return status.eta_s
        return max(0.0, expected - (status.seconds or 0.0))
    return expected


def makespan(jobs: Sequence[Job], costs: dict[str, float], slots: int) -> float:
    """When the last job ends, if each starts as soon as its inputs and its slots are there.

    The longest chain goes first, as in the pool.
    """
    free = [0.0] * max(1, slots)  # when each slot is free
    ends: dict[str, float] = {}
    waiting = sorted(jobs, key=lambda job: -job.chain)
    while waiting:
        job = next(job for job in waiting if all(name in ends for name in job.waits_for))
        waiting.remove(job)
        ready = max((ends[name] for name in job.waits_for), default=0.0)
        ends[job.name] = ready
        if costs[job.name]:
            free.sort()
            size = min(job.processes, len(free))
            start = max(ready, free[size - 1])
            ends[job.name] = start + costs[job.name]
            free[:size] = [ends[job.name]] * size
    return max(ends.values(), default=0.0)
