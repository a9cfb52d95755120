"""The job graph, a pure function of the run's stages. Either runner executes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Schedule
from pipeline.controls import COMPUTE
from pipeline.files import holds, json_text
from pipeline.graph import RunDirectory
from pipeline.stages import KINDS, SIDE_BY_SIDE
from pipeline.store import Stage, write_text

OVERHEAD = 100  # what starting a job costs, in optimizer steps: it orders jobs and nothing else
EPOCH = 1000  # steps per epoch where no manifest says how many examples there are


@dataclass(frozen=True)
class Job:
    """One command of the trainer's, for one stage or several in a row.

    name: the place of its stage, or what its stages share.  processes: ranks.  waits_for: names
    of jobs. chain: estimated steps from this job's start to the end of the run.
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

    @property
    def log(self) -> str:
        """The job's log on this machine, below RUN."""
        return f"logs/{file_name(self.name)}.txt"

    def command(self, stages: Sequence[Stage] = ()) -> list[str]:
        """The trainer's arguments, without --run, for `stages` or for all of this job's."""
        stages = stages or self.stages
        words = list(dict.fromkeys(stage.name for stage in stages))
        for option, addressed_by in (("--index", "index"), ("--name", "name")):
            family = [stage for stage in stages if stage.kind.addressed_by == addressed_by]
            if family:
                words += [option, *(str(stage.address) for stage in family)]
        return words


def plan(
    run: RunDirectory,
    processes: int = 1,
    stages: Sequence[Stage] | None = None,
    reserved: Mapping[str, int] | None = None,
) -> list[Job]:
    """Every job of the run, finished or not, each behind those it waits for.

    processes: ranks of the jobs that scale, where launch.processes does not say.
    stages: of the jobs, instead of the run's: those of an advice.
    reserved: ranks by section of [slurm], of those that say themselves how many their jobs have.
    """
    groups = _grouped(run, run.stages if stages is None else stages)
    job_of = {stage.place: name for name, stages in groups.items() for stage in stages}
    ranks = _ranks(run, groups, run.config.launch.processes or processes, reserved or {})
    waits_for, costs = {}, {}
    for name, stages in groups.items():
        needed = dict.fromkeys(job_of[each.place] for stage in stages for each in stage.inputs)
        needed.pop(name, None)
        waits_for[name] = tuple(needed)
        costs[name] = OVERHEAD + sum(planned_steps(stage, run) for stage in stages) / ranks[name]
    chains = _chains(waits_for, costs)
    return [
        Job(name, tuple(stages), ranks[name], waits_for[name], chains[name])
        for name, stages in groups.items()
    ]


def save_graph(jobs: list[Job], path: Path) -> None:
    """RUN/graph.json. Not touched if it says the same already."""
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
    text = json_text({"schema": 1, "jobs": rows}, "jobs.json", indent=2) + "\n"
    if not holds(path, text):
        write_text(path, text)


def file_name(job: str) -> str:
    """A job's name as a part of a file's name."""
    return job.replace("/", "-")


def is_of_specialists(job: str) -> bool:
    """Whether a job, by its name, trains specialists: ensemble.allow_missing lets these fail."""
    return job.startswith(KINDS["specialist"].place.partition("{")[0])


def packs(run: RunDirectory) -> list[range]:
    """The specialists that are trained here, specialists.per_job to a job, by their numbers."""
    count = len(run.specialists)
    trained = sum(stage.kind.trains for stage in run.specialists)
    first = count - trained
    per_job = run.config.specialists.in_one_job(trained)
    return [range(start, min(start + per_job, count)) for start in range(first, count, per_job)]


def _grouped(run: RunDirectory, stages: Sequence[Stage]) -> dict[str, list[Stage]]:
    """The stages of each job by the job's name, in the order of the stages."""
    groups: dict[str, list[Stage]] = {}
    pack_of = {index: pack for pack in packs(run) for index in pack}
    for stage in stages:
        groups.setdefault(_job_name(stage, pack_of), []).append(stage)
    return groups


def _ranks(
    run: RunDirectory,
    groups: Mapping[str, Sequence[Stage]],
    processes: int,
    reserved: Mapping[str, int],
) -> dict[str, int]:
    """Per job its ranks.  A job in which no stage scales has one.

    Independent trainings of one kind have one rank each and run beside each other, as
    launch.side_by_side says. By default where they are at least as many as `processes`.
    """
    families = {name: _family(stages) for name, stages in groups.items()}
    count = Counter(families.values())
    chosen = run.config.launch.side_by_side
    ranks = {}
    for name, stages in groups.items():
        section = stages[0].kind.slurm
        if chosen is None:
            is_beside_others = section in SIDE_BY_SIDE and count[families[name]] >= processes
        else:
            is_beside_others = section in chosen
        ranks[name] = 1
        if any(stage.kind.scales for stage in stages):
            ranks[name] = reserved.get(section, 1 if is_beside_others else processes)
    return ranks


def _family(stages: Sequence[Stage]) -> tuple[str, bool]:
    """What the jobs that are about as long as this one share: control_compute is a family of one.

    It trains as long as all specialists together.
    """
    return stages[0].kind.slurm, stages[0].address == COMPUTE


def _job_name(stage: Stage, pack_of: dict[int, range]) -> str:
    """A stage's own place, or what it shares with those that run in the same process."""
    if stage.kind.job:
        return stage.kind.job
    if stage.name == "specialist":
        pack = pack_of[int(stage.address or 0)]
        first = stage.kind.place_of(pack[0])
        return first if len(pack) == 1 else f"{first}-{pack[-1]:03d}"
    # The ensemble's own targets, if nothing else is waited for, go in the job that makes it.
    if stage.name == "targets" and stage.inputs:
        shared = {needed.kind.job for needed in stage.inputs}
        if shared == {"ensemble"}:
            return "ensemble"
    return stage.place


def planned_steps(stage: Stage, run: RunDirectory) -> float:
    """About how many optimizer steps a stage takes. 0 for one that trains nothing."""
    if not stage.kind.trains:
        return 0
    if stage.name == "pilot":
        return _length(run.config.train) * run.advice.planned_share(stage)
    length = _length(run.schedule(stage))
    if stage.name == "control" and stage.address == COMPUTE:
        others = sum(each.kind.trains for each in run.members) * _length(run.config.train)
        steps = length * sum(each.kind.trains for each in run.specialists) + others
        return run.config.controls.max_share * steps
    return length


def _length(schedule: Schedule) -> float:
    return schedule.steps or (schedule.epochs or 1) * EPOCH


def _chains(waits_for: dict[str, tuple[str, ...]], costs: dict[str, float]) -> dict[str, float]:
    """Per job, the cost of the dearest chain of jobs that starts with it.

    It is the upward rank of list scheduling.
    """
    chains: dict[str, float] = {}
    for name in reversed(waits_for):  # dependents stand behind what they wait for
        behind = [chains[other] for other, needed in waits_for.items() if name in needed]
        chains[name] = costs[name] + max(behind, default=0)
    return chains
