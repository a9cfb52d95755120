"""The job graph on Slurm: submit what is not done, tell what became of it, cancel it.

Slurm is asked only through its clients, each with a time limit.  Nothing of ours stays behind on the login node:
slurm/stage.sbatch itself tries again after a failure and queues again after a signal.  A stage is done when its own
marker says so, whatever Slurm says.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import UserError
from pipeline.graph import RunDirectory

from .journal import JobRecord, Journal
from .plan import Job
from .sbatch import MAX_ARRAY_SIZE, Batch, batches, dependency

CLIENT_S, SUBMIT_S = 20, 60  # how long a client may take to answer
ENDING_S = 60  # how long a job that is being ended may take (Slurm's KillWait is 30)
ENDING = "ending"  # the reason of a job that Slurm is ending, or taking back into its queue

# States of squeue; all others are ends.
WAITING = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
COLUMNS = {
    "JobArrayID": 40,
    "State": 24,
    "Reason": 80,
    "RestartCnt": 10,
    "NodeList": 120,
    "TimeUsed": 24,
}


# Talking to Slurm


def ask(
    command: Sequence[str], timeout: float = CLIENT_S, environment: dict[str, str] | None = None
) -> str:
    """What a client of Slurm answers.  Raises UserError, with Slurm's own words, where there is no answer."""
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    try:
        ended = subprocess.run(command, timeout=timeout, env=environment, **options)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on the PATH: Slurm is spoken to from a login node of its cluster; to run on this "
            f"machine leave out --on slurm"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {timeout:g} s") from None
    if ended.returncode:
        said = [
            re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in ended.stderr.splitlines()
        ]
        raise UserError(
            f"{command[0]}: {'; '.join(filter(None, said)) or f'exit code {ended.returncode}'}"
        )
    return ended.stdout


def max_array_size() -> int:
    found = re.search(
        r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.MULTILINE
    )
    return int(found[1]) if found else MAX_ARRAY_SIZE


def site_file(run: Path) -> Path | None:
    """RUN/site.sh, or the user's own, or none: the same choice as in stage.sbatch."""
    places = [run / "site.sh", Path("~/.config/referral/site.sh").expanduser()]
    return next((place for place in places if os.access(place, os.R_OK)), None)


def environment(run: Path) -> dict[str, str]:
    """For sbatch: ours, without what a Slurm job around us has set, and the site's SBATCH_ variables."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    site = site_file(run)
    if site is None:
        return own
    command = [
        "bash",
        "-c",
        '. "$1" >&2; env -0',
        "site",
        str(site.resolve()),
    ]  # what it prints is for the user
    options = {"env": own, "stdout": subprocess.PIPE, "text": True, "stdin": subprocess.DEVNULL}
    try:
        shell = subprocess.run(command, timeout=SUBMIT_S, **options)
    except subprocess.TimeoutExpired:
        raise UserError(f"{site} did not end within {SUBMIT_S} s") from None
    if shell.returncode:
        raise UserError(f"{site} ended the shell that read it, with exit code {shell.returncode}")
    pairs = (entry.split("=", 1) for entry in shell.stdout.split("\0") if "=" in entry)
    return own | {name: value for name, value in pairs if name.startswith("SBATCH_")}


@dataclass(frozen=True)
class Row:
    """What squeue says of one job."""

    state: str
    reason: str
    restarts: int
    node: str
    elapsed_s: float


def queue(ids: Sequence[str]) -> dict[str, Row]:
    """What Slurm knows of jobs, by their ids, array elements one by one; it forgets a job minutes after its end."""
    numbers = sorted({number.partition("_")[0] for number in ids})
    if not numbers:
        return {}
    columns = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    options = [
        "--noheader",
        "--array",
        "--states=all",
        f"--jobs={','.join(numbers)}",
        f"--Format={columns}",
    ]
    try:
        answer = ask(["squeue", *options])
    except UserError as mistake:
        if "Invalid job id" in str(mistake):  # a single one, and it is forgotten
            return {}
        raise
    return dict(parse(line) for line in answer.splitlines() if line.strip())


def parse(line: str) -> tuple[str, Row]:
    """One line of squeue, in COLUMNS."""
    values, start = {}, 0
    for name, width in COLUMNS.items():
        values[name] = line[start : start + width].strip()
        start += width
    elapsed, restarts = seconds(values["TimeUsed"]), int(values["RestartCnt"] or 0)
    return values["JobArrayID"], Row(
        values["State"], values["Reason"], restarts, values["NodeList"], elapsed
    )


def seconds(text: str) -> float:
    """Of squeue's DAYS-HH:MM:SS; 0 where it says INVALID or nothing."""
    days, _, clock = text.rpartition("-")
    if not re.fullmatch(r"[\d:]+", clock):
        return 0.0
    return int(days or 0) * 86400.0 + sum(
        int(part) * 60**k for k, part in enumerate(reversed(clock.split(":")))
    )


# What became of the jobs


def look(run: RunDirectory, jobs: Sequence[Job], journal: Journal) -> Journal:
    """The journal with each job's state as Slurm and the run directory tell it together; nothing is written."""
    rows, records = queue([record.id for record in journal.jobs.values() if record.id]), {}
    for job in jobs:  # each stands behind those it waits for
        noted = journal.jobs.get(job.name, JobRecord())
        lost = [
            name
            for name in job.waits_for
            if records[name].state in ("failed", "blocked", "interrupted")
        ]
        records[job.name] = _judge(run, job, noted, rows.get(noted.id), lost)
    return replace(journal, jobs=records)


def _judge(
    run: RunDirectory, job: Job, noted: JobRecord, row: Row | None, lost: list[str]
) -> JobRecord:
    """One job's record.  lost: what it waits for and will not get."""
    ending = row is not None and row.state == "COMPLETING"
    if job.is_done:
        return replace(noted, state="done", reason="", node=row.node if row else noted.node)
    if not noted.id or noted.state == "interrupted":  # never submitted, or cancelled by us
        return replace(noted, pid=None, reason=ENDING if ending else noted.reason)
    if row is None:
        if lost and not (run.root / noted.log).exists():
            return replace(noted, state="blocked", reason=f"waits for {', '.join(lost)}")
        return replace(
            noted,
            state="failed",
            reason=f"it ended unfinished, and Slurm has forgotten job {noted.id}",
        )
    found = replace(noted, restarts=row.restarts, attempts=row.restarts + 1, node=row.node)
    if row.state in WAITING:
        return replace(found, state="waiting", attempts=row.restarts, reason=row.reason)
    if row.state in RUNNING:
        reason = ENDING if ending else "" if row.state == "RUNNING" else row.state
        return replace(found, state="running", reason=reason, started=time.time() - row.elapsed_s)
    if row.state == "CANCELLED":
        if lost and not row.node:
            return replace(found, state="blocked", reason=f"waits for {', '.join(lost)}")
        return replace(found, state="interrupted", reason="cancelled")
    reason = f"Slurm says {row.state}" + (
        f", {row.reason}" if row.reason not in ("None", "NonZeroExitCode") else ""
    )
    if "LaunchFailure" in reason or ":53" in reason:  # how slurmd says that it cannot open the log
        reason += f": {row.node} cannot write {run.root / noted.log}; the run must lie where compute nodes see it"
    return replace(found, state="failed", reason=reason)


def live(journal: Journal) -> dict[str, str]:
    """Per job that waits or runs its id, in a journal as `look` returns it."""
    queued = {
        name: record
        for name, record in journal.jobs.items()
        if record.state in ("waiting", "running")
    }
    return {name: record.id for name, record in queued.items() if record.id}


def settle(
    run: RunDirectory, jobs: Sequence[Job], journal: Journal, say: Callable[[str], None]
) -> Journal:
    """`look`, once the jobs that Slurm is just ending or taking back into its queue have ended or are queued."""
    deadline, told = time.monotonic() + ENDING_S, False
    while True:
        found = look(run, jobs, journal)
        ending = [record.id for record in found.jobs.values() if record.reason == ENDING]
        if not ending or time.monotonic() > deadline:
            return found
        if not told:
            say(f"{', '.join(ending)}: Slurm is still ending them")
        told = True
        time.sleep(1)


# Submitting and cancelling


def choose(run: RunDirectory, jobs: Sequence[Job], journal: Journal) -> list[Job]:
    """The jobs to submit: those that are neither done nor queued, and whatever stands behind one of these.

    Raises UserError if one of the latter is running (ensemble.allow_missing let it): it goes without what is to come.
    """
    queued, chosen = live(journal), {}
    for job in jobs:
        behind = [name for name in job.waits_for if name in chosen]
        if behind and job.name in queued and journal.jobs[job.name].state == "running":
            raise UserError(
                f"{job.name} (job {queued[job.name]}) is running without {', '.join(behind)}; wait for its end, or "
                f"first: referral cancel {shlex.quote(str(run.root))}"
            )
        if behind or not (job.is_done or job.name in queued):
            chosen[job.name] = job
    return list(chosen.values())


def submit(run: RunDirectory, jobs: Sequence[Job], journal: Journal) -> list[tuple[Batch, str]]:
    """Submit what `choose` says, and note it in RUN/jobs.json.  Returns each batch with the number that Slurm gave it.

    journal: as `settle` returns it.  Raises UserError, with Slurm's words, if a batch is refused: those before it are
    cancelled.
    """
    if "\\" in str(run.root.absolute()):
        raise UserError(
            f"{run.root}: Slurm doubles the backslashes in a job's arguments; choose another --run"
        )
    variables, size, chosen = environment(run.root), max_array_size(), choose(run, jobs, journal)
    queued, names = live(journal), {job.name for job in chosen}
    if superseded := [number for name, number in queued.items() if name in names]:
        ask(["scancel", *superseded], SUBMIT_S)
    for job in chosen:  # what was begun without what is now to come is begun anew
        if names & set(job.waits_for):
            for stage in job.stages:
                stage.clear()
    (run.root / "logs").mkdir(exist_ok=True)
    noted, ids = Journal(dict(journal.jobs), runner="slurm"), dict(queued)
    done, submitted = {job.name for job in jobs if job.is_done}, {}
    for batch in batches(run, chosen, size):
        waits = dependency(run, batch, ids, submitted.values(), done.__contains__)
        try:
            answer = ask(batch.command(run.root.absolute(), waits), SUBMIT_S, variables)
        except (UserError, KeyboardInterrupt) as mistake:
            raise UserError(_withdrawn(run, batch, submitted, noted, mistake)) from None
        submitted[batch] = answer.strip().partition(";")[0]  # NUMBER, or NUMBER;CLUSTER
        ids |= batch.ids(submitted[batch])
        for name, log in batch.logs().items():
            size_now = (run.root / log).stat().st_size if (run.root / log).exists() else 0
            noted.jobs[name] = JobRecord("waiting", log=log, log_start=size_now, id=ids[name])
        noted.save(run.root)
    return list(submitted.items())


def _withdrawn(
    run: RunDirectory,
    refused: Batch,
    submitted: dict[Batch, str],
    noted: Journal,
    mistake: BaseException,
) -> str:
    """Cancel what was submitted before the refused batch; the words for it."""
    why = f"{refused.name} was not submitted: {str(mistake) or 'interrupted'}"
    if not submitted:
        return why
    named = ", ".join(f"{number} ({batch.name})" for batch, number in submitted.items())
    try:
        ask(["scancel", *submitted.values()], SUBMIT_S)
    except UserError as trouble:
        return f"{why}\nstill queued, for they could not be cancelled ({trouble}): {named}"
    for batch in submitted:
        for job in batch.jobs:
            noted.jobs[job.name] = replace(
                noted.jobs[job.name], state="interrupted", reason="cancelled"
            )
    noted.save(run.root)
    return f"{why}\nwhat was submitted before it is cancelled: {named}"


def cancel(run: RunDirectory, journal: Journal) -> list[str]:
    """Cancel every job that waits or runs, and note it; returns their ids.  journal: as `look` returns it."""
    queued = live(journal)
    if queued:
        ask(["scancel", *queued.values()], SUBMIT_S)
        for name in queued:
            journal.jobs[name] = replace(
                journal.jobs[name], state="interrupted", reason="cancelled"
            )
        journal.save(run.root)
    return list(queued.values())
