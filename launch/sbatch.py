"""The sbatch commands of a run: a pure function of the run, its jobs and what is queued already."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, Resources, UserError
from pipeline.graph import RunDirectory
from pipeline.stages import KINDS
from pipeline.store import Stage
from pipeline.trust import code_in

from .plan import Job, file_name, is_of_specialists, packs, plan

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

    elements: of each job its number in the array, None for a job of its own.
    limit: elements at work at the same time.
    """

    name: str
    jobs: tuple[Job, ...]
    options: tuple[str, ...]
    arguments: tuple[str, ...]
    elements: tuple[int, ...] | None = None
    limit: int | None = None

    @property
    def waits_for(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for job in self.jobs for name in job.waits_for))

    def ids(self, number: str) -> dict[str, str]:
        """Per job its id, where sbatch answered with `number`."""
        if self.elements is None:
            return {self.jobs[0].name: number}
        pairs = zip(self.jobs, self.elements, strict=True)
        return {job.name: f"{number}_{element}" for job, element in pairs}

    def logs(self) -> dict[str, str]:
        """Per job its log, below RUN."""
        log = f"logs/{file_name(self.name)}"
        if self.elements is None:
            return {self.jobs[0].name: f"{log}.txt"}
        pairs = zip(self.jobs, self.elements, strict=True)
        return {job.name: f"{log}-{element:03d}.txt" for job, element in pairs}

    def command(self, run: Path, dependency: str = "") -> list[str]:
        """argv of sbatch.  dependency: its word for what this waits for."""
        title = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{run.name}-{self.name}").lstrip("-")
        # In the path of a log Slurm replaces %% by %, %3a by an element's number, and more.
        log = f"{run}/logs/{file_name(self.name)}".replace("%", "%%")
        options = [f"--job-name={title}"]
        if self.elements is None:
            options.append(f"--output={log}.txt")
        else:
            throttle = f"%{self.limit}" if self.limit else ""
            options.append(f"--output={log}-%3a.txt")
            options.append(f"--array={ranges(self.elements)}{throttle}")
        if dependency:
            options.append(f"--dependency={dependency}")
        return ["sbatch", "--parsable", *options, *self.options, str(SCRIPT), *self.arguments]


def reserved_ranks(config: Config) -> dict[str, int]:
    """Ranks by section of [slurm]: one for each GPU, or without GPUs one on each node.

    A section without GPUs is not in it where launch.processes is set, which then counts.
    """
    sections = {kind.slurm for kind in KINDS.values()}
    ranks = {}
    for section in sections:
        resources = config.slurm.resources(section)
        if resources.gpus or config.launch.processes is None:
            ranks[section] = slots(resources)
    return ranks


def slots(resources: Resources) -> int:
    """What a job of these resources can have a rank on: its GPUs, or without GPUs its nodes."""
    return (resources.nodes or 1) * (resources.gpus or 1)


def plan_on_slurm(run: RunDirectory, stages: Sequence[Stage] | None = None) -> list[Job]:
    """`plan`, by what [slurm] reserves for each job.

    Raises UserError for a reservation of which a part would idle, and for ranks that nodes or GPUs
    cannot share evenly.
    """
    jobs = plan(run, 1, stages, reserved_ranks(run.config))
    every = [stage for stage in run.stages if stage.kind.scales]
    scaling = {stage.kind.slurm for stage in every}
    for job in jobs:
        check_reservation(run.config, job, job.stages[0].kind.slurm in scaling)
    return jobs


def check_reservation(config: Config, job: Job, shares_section: bool) -> None:
    """Raises UserError unless the job keeps all busy that its section of [slurm] reserves.

    shares_section: whether another stage of the section scales: then a job that does not asks for
    one node and one GPU (`resources_of`).
    """
    section, processes = job.stages[0].kind.slurm, config.launch.processes
    resources = config.slurm.resources(section)
    nodes, available = resources.nodes or 1, slots(resources)
    if not any(stage.kind.scales for stage in job.stages):
        if available > 1 and not shares_section:
            raise UserError(
                f"slurm.{section} reserves {_in_words(resources)}, and {job.name} has one rank "
                f"({job.stages[0].kind.alone}): the rest would idle; {_one_of(section, resources)}"
            )
        return
    if resources.gpus and section == "generalist" and processes not in (None, available):
        raise UserError(
            f"launch.processes = {processes}, and slurm.{section} reserves "
            f"{_in_words(resources)}: each rank has a GPU of its own; leave launch.processes out"
        )
    if job.processes < nodes:
        raise UserError(
            f"slurm.{section} reserves {_in_words(resources)}, and {job.name} has "
            f"{job.processes} ranks: the rest would idle; {_one_of(section, resources)}, or "
            f"leave {section} out of launch.side_by_side"
        )
    if job.processes % nodes:
        fewer = job.processes // nodes * nodes or nodes
        more = (job.processes // nodes + 1) * nodes
        raise UserError(
            f"launch.processes = {job.processes} ranks cannot be shared evenly by "
            f"slurm.{section}.nodes = {nodes}; try {fewer} or {more}"
        )


def _in_words(resources: Resources) -> str:
    nodes, gpus = resources.nodes or 1, resources.gpus or 0
    of_node = f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"
    if nodes == 1:
        return of_node if gpus else "1 node"
    return f"{nodes} nodes of {of_node} each" if gpus else f"{nodes} nodes"


def _one_of(section: str, resources: Resources) -> str:
    """What sets a section's reservation to one rank's."""
    keys = [key for key in ("nodes", "gpus") if (getattr(resources, key) or 0) > 1]
    return "set " + " and ".join(f"slurm.{section}.{key} = 1" for key in keys)


def resources_of(run: RunDirectory, job: Job) -> Resources:
    """What a job asks for: its section's, but one node and at most one GPU where nothing scales."""
    resources = run.config.slurm.resources(job.stages[0].kind.slurm)
    if any(stage.kind.scales for stage in job.stages):
        return resources
    gpus = None if resources.gpus is None else min(resources.gpus, 1)
    return resources.model_copy(update={"nodes": 1, "gpus": gpus})


def batches(
    run: RunDirectory, jobs: Sequence[Job], max_array_size: int = MAX_ARRAY_SIZE
) -> list[Batch]:
    """The commands that submit `jobs`, each behind those it waits for, as the jobs are."""
    specialists = [job for job in jobs if is_of_specialists(job.name)]
    commands = []
    for job in jobs:
        if not is_of_specialists(job.name):
            commands.append(_single(run, job))
        elif job is specialists[0]:
            commands += _arrays(run, specialists, max_array_size)
    return commands


def _single(run: RunDirectory, job: Job) -> Batch:
    resources = resources_of(run, job)
    arguments = _arguments(run, resources, job.processes, job.command())
    return Batch(job.name, (job,), _options(run, resources), arguments)


def _arrays(run: RunDirectory, jobs: list[Job], max_array_size: int) -> list[Batch]:
    """Arrays of the specialists' jobs.

    Element K of the first is the K-th pack of specialists, whichever of them are among `jobs`.
    """
    all_packs = packs(run)
    job_of = {job.stages[0].address: job for job in jobs}  # by its first specialist
    name = "specialists"
    if run.config.specialists.in_one_job(len(run.specialists)) > 1:
        name = "specialists-pack"
    resources = resources_of(run, jobs[0])
    starts = range(0, len(all_packs), max_array_size)
    limit = None
    if run.config.slurm.throttle:
        limit = max(1, run.config.slurm.throttle // len(starts))
    arrays = []
    for start in starts:
        chunk = all_packs[start : start + max_array_size]
        elements = [element for element, pack in enumerate(chunk) if pack[0] in job_of]
        words = ["specialist", *(",".join(map(str, pack)) for pack in chunk)]
        if elements:
            arrays.append(
                Batch(
                    name=f"{name}-{start}+" if start else name,
                    jobs=tuple(job_of[chunk[element][0]] for element in elements),
                    options=_options(run, resources),
                    arguments=_arguments(run, resources, jobs[0].processes, words),
                    elements=tuple(elements),
                    limit=limit,
                )
            )
    return arrays


def _options(run: RunDirectory, resources: Resources) -> tuple[str, ...]:
    """What a job asks for."""
    values = {option: getattr(resources, key) for key, option in OPTIONS.items()}
    return (
        f"--nodes={resources.nodes or 1}",
        f"--signal=USR2@{run.config.slurm.signal_s}",
        *(f"--{option}={value}" for option, value in values.items() if value),
        *resources.extra,
    )


def _arguments(
    run: RunDirectory, resources: Resources, processes: int, words: list[str]
) -> tuple[str, ...]:
    """Arguments of stage.sbatch: ranks on a node, tries after a failure, python, RUN, stage."""
    ranks_on_node = processes // (resources.nodes or 1)
    options = ("-r", str(ranks_on_node), "-t", str(run.config.launch.retries), "-p", sys.executable)
    if code_in(run.config):
        options = (*options, "-c")
    return (*options, os.path.abspath(run.root), *words)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as Slurm writes them: 0-3,7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = ["-".join(dict.fromkeys(map(str, span))) for span in spans]  # 7-7 is 7
    return ",".join(words)


def dependency(
    run: RunDirectory,
    batch: Batch,
    ids: dict[str, str],
    whole: Collection[str],
    is_done: Callable[[str], bool],
) -> str:
    """sbatch's word for what a batch waits for.

    ids: of the jobs that are queued.  whole: arrays of which every element is meant.

    Slurm takes an id that it does not know for fulfilled.  So done jobs are left out, and each
    other one must be queued.  A specialist that may be missing is waited for, however it ends.
    """
    words: dict[str, list[str]] = {"afterok": [], "afterany": []}
    for name in batch.waits_for:
        if is_done(name):
            continue
        array = ids[name].partition("_")[0]
        may_fail = run.config.ensemble.allow_missing and is_of_specialists(name)
        condition = "afterany" if may_fail else "afterok"
        words[condition].append(array if array in whole else ids[name])
    return ",".join(
        ":".join([condition, *dict.fromkeys(listed)])
        for condition, listed in words.items()
        if listed
    )


def shell_script(
    run: RunDirectory,
    jobs: Sequence[Job],
    chosen: Sequence[Job],
    queued: dict[str, str],
    max_array_size: int,
) -> str:
    """What would be submitted, as a shell script of its own.

    queued: ids of the jobs that are queued already.
    """
    done = {job.name for job in jobs if job.is_done}
    ids, whole, lines = dict(queued), set(), []
    for batch in batches(run, chosen, max_array_size):
        variable = re.sub(r"\W", "_", batch.name)
        number = f"${{{variable}}}"
        word = dependency(run, batch, ids, whole, done.__contains__)
        command = batch.command(Path(os.path.abspath(run.root)), word)
        lines.append(f"{variable}=$({_quoted(command, f'--dependency={word}')})")
        whole.add(number)
        ids |= batch.ids(number)
    return "\n".join(lines)


def _quoted(command: list[str], dependency: str) -> str:
    """A command for a shell.

    The dependency is made of ids and of the script's own variables: it is the one word that the
    shell is to read.
    """
    return " ".join(word if word == dependency else shlex.quote(word) for word in command)
