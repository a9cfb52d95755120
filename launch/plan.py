"""The job graph, a pure function of the run's config; either runner executes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Schedule
from pipeline.store import RunDirectory, Stage, write_text

OVERHEAD = 100  # what starting a job costs, in optimizer steps: it orders jobs and nothing else
# Short stages that follow on each other and that nothing runs beside share a process: starting one takes seconds.
TOGETHER = {"measure": "clusters", "cluster": "clusters", "route": "clusters", "evaluate": "report"}
EPOCH = 1000  # steps per epoch where no manifest says how many examples there are


@dataclass(frozen=True)
class Job:
    """One command of the trainer's, for one stage or several in a row.

    processes: ranks.  waits_for: names of jobs.  chain: estimated steps from this job's start to the end of the run.
    """

    name: str
    stages: tuple[Stage, ...]
    processes: int
    waits_for: tuple[str, ...]
    chain: float = 0.0

    @property
    def pending(self) -> list[Stage]:
        """The stages that are not done."""
        return [stage for stage in self.stages if not stage.is_done]

    @property
    def is_done(self) -> bool:
        return not self.pending

    def command(self, stages: Sequence[Stage] = ()) -> list[str]:
        """The trainer's arguments, without --run, for `stages` or for all of this job's."""
        stages = stages or self.stages
        indices = [
            str(int(stage.directory.name))
            for stage in stages
            if stage.name in ("specialist", "member")
        ]
        names = [
            stage.directory.name
            for stage in stages
            if stage.name in ("control", "student", "answers")
        ]
        words = list(dict.fromkeys(stage.name for stage in stages))
        return (
            words
            + (["--index", *indices] if indices else [])
            + (["--name", *names] if names else [])
        )


def plan(run: RunDirectory, processes: int = 1) -> list[Job]:
    """Every job of the run, finished or not, each behind those it waits for.

    processes: ranks of the generalist where launch.processes does not say.
    """
    groups = _grouped(run)
    job_of = {stage.place: name for name, stages in groups for stage in stages}
    waits_for = {}
    for name, stages in groups:
        wanted = dict.fromkeys(job_of[input.place] for stage in stages for input in stage.inputs)
        waits_for[name] = tuple(other for other in wanted if other != name)
    ranks = {"generalist": run.config.launch.processes or processes}
    costs = {
        name: OVERHEAD + sum(_steps(stage, run) for stage in stages) / ranks.get(name, 1)
        for name, stages in groups
    }
    chains = _chains(waits_for, costs)
    return [
        Job(name, tuple(stages), ranks.get(name, 1), waits_for[name], chains[name])
        for name, stages in groups
    ]


def save_graph(jobs: list[Job], path: Path) -> None:
    """RUN/graph.json; not touched if it says the same already."""
    rows = [
        {
            "name": job.name,
            "stages": [stage.place for stage in job.stages],
            "command": job.command(),
            "processes": job.processes,
            "waits_for": list(job.waits_for),
        }
        for job in jobs
    ]
    text = json.dumps({"schema": 1, "jobs": rows}, indent=2) + "\n"
    if not path.exists() or path.read_text() != text:
        write_text(path, text)


def packs(run: RunDirectory) -> list[range]:
    """The specialists that are trained here, specialists.per_job to a job, by their numbers."""
    per_job, count = run.config.specialists.per_job, run.num_specialists
    return [
        range(first, min(first + per_job, count))
        for first in range(run.num_inherited, count, per_job)
    ]


def _grouped(run: RunDirectory) -> list[tuple[str, list[Stage]]]:
    """(job name, its stages) in the order of the stages; specialists are packed specialists.per_job to a job, those
    that are only taken over go with the clusters."""
    groups: dict[str, list[Stage]] = {}
    together = [[run.specialists[index] for index in pack] for pack in packs(run)]
    pack_of = {stage.place: pack for pack in together for stage in pack}
    for stage in run.stages:
        name = TOGETHER.get(stage.name, stage.name)
        if stage.name == "specialist" and stage.place not in pack_of:
            name = TOGETHER["cluster"]
        elif stage.name == "specialist":
            numbers = [other.directory.name for other in pack_of[stage.place]]
            name = f"specialist-{numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")
        elif stage.name == "control":
            name = stage.directory.name
        elif stage.name in ("student", "member"):
            name = f"{stage.name}-{stage.directory.name}"
        elif (
            stage.name == "answers"
        ):  # the ensemble's, where nothing else is waited for, in the job that combines
            only = stage.inputs and all(wanted.name == "combine" for wanted in stage.inputs)
            name = "combine" if only else f"answers-{stage.directory.name}"
        groups.setdefault(name, []).append(stage)
    return list(groups.items())


def _steps(stage: Stage, run: RunDirectory) -> float:
    """About how many optimizer steps a stage takes; 0 for one that trains nothing."""
    config, name = run.config, stage.directory.name
    if stage.name in ("generalist", "member"):
        return _length(config.train)
    if stage.name == "specialist":
        return 0 if int(name) < run.num_inherited else _length(config.specialists)
    if stage.name == "student":
        return _length(config.students[name])
    if stage.name == "control":
        if name == "student_hard":
            return _length(config.students["main"])
        trained = len(run.specialists) - run.num_inherited
        return _length(config.specialists) * (trained if name == "control_compute" else 1)
    return 0


def _length(schedule: Schedule) -> float:
    return schedule.steps or (schedule.epochs or 1) * EPOCH


def _chains(waits_for: dict[str, tuple[str, ...]], costs: dict[str, float]) -> dict[str, float]:
    """Per job, the cost of the dearest chain of jobs that starts with it (the upward rank of list scheduling)."""
    chains: dict[str, float] = {}
    for name in reversed(waits_for):  # dependents stand behind what they wait for
        behind = [chains[other] for other, wanted in waits_for.items() if name in wanted]
        chains[name] = costs[name] + max(behind, default=0)
    return chains
