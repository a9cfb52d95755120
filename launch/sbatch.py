"""The sbatch commands of a run: a pure function of the run, its jobs and what is queued already."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, UserError
from pipeline.graph import RunDirectory

from .plan import Job, file_name, is_of_specialists, packs

SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "stage.sbatch"
OPTIONS = {
    "gpus": "gpus-per-node",
    "cpus": "cpus-per-task",
    "memory": "mem",
    "time": "time",
    "partition": "partition",
    "constraint": "constraint",
    "qos": "qos",
    "account": "account",
}
MAX_ARRAY_SIZE = 1001  # Slurm's own default


@dataclass(frozen=True)
class Batch:
    """One sbatch command: a job of the plan, or some elements of an array of specialists' jobs.

    places: of each job its number in the array, None for a job of its own.  limit: elements at work at the same time.
    """

    name: str
    jobs: tuple[Job, ...]
    options: tuple[str, ...]
    arguments: tuple[str, ...]
    places: tuple[int, ...] | None = None
    limit: int | None = None

    @property
    def waits_for(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for job in self.jobs for name in job.waits_for))

    def ids(self, number: str) -> dict[str, str]:
        """Per job its id, where sbatch answered with `number`."""
        if self.places is None:
            return {self.jobs[0].name: number}
        return {
            job.name: f"{number}_{place}" for job, place in zip(self.jobs, self.places, strict=True)
        }

    def logs(self) -> dict[str, str]:
        """Per job its log, below RUN."""
        if self.places is None:
            return {self.jobs[0].name: f"logs/{file_name(self.name)}.txt"}
        pairs = zip(self.jobs, self.places, strict=True)
        return {job.name: f"logs/{file_name(self.name)}-{place:03d}.txt" for job, place in pairs}

    def command(self, run: Path, waits: str = "") -> list[str]:
        """argv of sbatch.  waits: its word for what this waits for."""
        title = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{run.name}-{self.name}").lstrip("-")
        # In the path of a log Slurm replaces %% by %, %3a by an element's number, and more.
        log = f"{run}/logs/{file_name(self.name)}".replace("%", "%%") + (
            ".txt" if self.places is None else "-%3a.txt"
        )
        own = [f"--job-name={title}", f"--output={log}"]
        if self.places is not None:
            own.append(f"--array={ranges(self.places)}" + (f"%{self.limit}" if self.limit else ""))
        own += [f"--dependency={waits}"] if waits else []
        return ["sbatch", "--parsable", *own, *self.options, str(SCRIPT), *self.arguments]


def ranks(config: Config) -> int:
    """Ranks of the generalist: launch.processes, or one for each GPU (each node) of its job."""
    wanted = config.slurm.resources("generalist")
    nodes = wanted.nodes or 1
    processes = config.launch.processes or nodes * (wanted.gpus or 1)
    if processes % nodes:
        raise UserError(
            f"launch.processes = {processes} ranks cannot be shared evenly by slurm.generalist.nodes = {nodes}; try "
            f"{processes // nodes * nodes or nodes} or {(processes // nodes + 1) * nodes}"
        )
    return processes


def batches(
    run: RunDirectory, jobs: Sequence[Job], max_array_size: int = MAX_ARRAY_SIZE
) -> list[Batch]:
    """The commands that submit `jobs`, each behind those it waits for, as the jobs are."""
    specialists = [job for job in jobs if is_of_specialists(job.name)]
    found = []
    for job in jobs:
        if not is_of_specialists(job.name):
            found.append(_single(run, job))
        elif job is specialists[0]:
            found += _arrays(run, specialists, max_array_size)
    return found


def _single(run: RunDirectory, job: Job) -> Batch:
    kind = job.stages[0].kind.slurm
    return Batch(
        job.name, (job,), _options(run, kind), _arguments(run, kind, job.processes, job.command())
    )


def _arrays(run: RunDirectory, wanted: list[Job], max_array_size: int) -> list[Batch]:
    """Arrays of the specialists' jobs.  Element K of the first is the K-th, whichever of them are wanted."""
    per_job, config, every = run.config.specialists.per_job, run.config.slurm, packs(run)
    job_of = {job.stages[0].address: job for job in wanted}  # by its first specialist
    starts, name, found = (
        range(0, len(every), max_array_size),
        "specialists" if per_job == 1 else "specialists-pack",
        [],
    )
    limit = max(1, config.throttle // len(starts)) if config.throttle else None
    for start in starts:
        chunk = every[start : start + max_array_size]
        places = [place for place, pack in enumerate(chunk) if pack[0] in job_of]
        words = ["specialist", *(",".join(map(str, pack)) for pack in chunk)]
        if places:
            found.append(
                Batch(
                    f"{name}-{start}+" if start else name,
                    tuple(job_of[chunk[place][0]] for place in places),
                    _options(run, "specialists"),
                    _arguments(run, "specialists", 1, words),
                    tuple(places),
                    limit,
                )
            )
    return found


def _options(run: RunDirectory, kind: str) -> tuple[str, ...]:
    wanted = run.config.slurm.resources(kind)
    asked = {option: getattr(wanted, key) for key, option in OPTIONS.items()}
    words = [f"--{option}={value}" for option, value in asked.items() if value]
    return (
        f"--nodes={wanted.nodes or 1}",
        f"--signal=USR2@{run.config.slurm.signal_s}",
        *words,
        *wanted.extra,
    )


def _arguments(run: RunDirectory, kind: str, processes: int, words: list[str]) -> tuple[str, ...]:
    on_each = processes // (run.config.slurm.resources(kind).nodes or 1)
    tries = str(run.config.launch.retries)
    return (
        "-r",
        str(on_each),
        "-t",
        tries,
        "-p",
        sys.executable,
        os.path.abspath(run.root),
        *words,
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as Slurm writes them: 0-3,7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def dependency(
    run: RunDirectory,
    batch: Batch,
    ids: dict[str, str],
    whole: Collection[str],
    done: Callable[[str], bool],
) -> str:
    """sbatch's word for what a batch waits for.

    ids: of the jobs that are queued.  whole: arrays of which every element is meant.  A specialist that may be missing
    is only waited for.  Slurm takes an id that it does not know for fulfilled: so done jobs are left out, and each
    other one must be queued.
    """
    words: dict[str, list[str]] = {"afterok": [], "afterany": []}
    for name in batch.waits_for:
        if not done(name):
            number = ids[name].partition("_")[0]
            may_fail = run.config.ensemble.allow_missing and is_of_specialists(name)
            how = "afterany" if may_fail else "afterok"
            words[how].append(number if number in whole else ids[name])
    return ",".join(
        ":".join([how, *dict.fromkeys(listed)]) for how, listed in words.items() if listed
    )


def shell_script(
    run: RunDirectory,
    jobs: Sequence[Job],
    chosen: Sequence[Job],
    queued: dict[str, str],
    max_array_size: int,
) -> str:
    """What would be submitted, as a shell script of its own.  queued: ids of the jobs that are queued already."""
    done, ids, whole, lines = {job.name for job in jobs if job.is_done}, dict(queued), set(), []
    for batch in batches(run, chosen, max_array_size):
        variable = re.sub(r"\W", "_", batch.name)
        number = f"${{{variable}}}"
        waits = dependency(run, batch, ids, whole, done.__contains__)
        words = batch.command(Path(os.path.abspath(run.root)), waits)
        # The dependency is made of ids and of this script's own variables: the one word that the shell is to read.
        quoted = [word if word == f"--dependency={waits}" else shlex.quote(word) for word in words]
        lines.append(f"{variable}=$({' '.join(quoted)})")
        whole.add(number)
        ids |= {name: f"{number}{end}" for name, end in batch.ids("").items()}
    return "\n".join(lines)
