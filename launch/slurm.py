"""The job graph on Slurm: submit what is not done, tell what became of it, cancel it.

Slurm is asked only through its clients, each with a time limit.  Nothing of ours stays behind on
the login node: slurm/stage.sbatch itself tries again after a failure and queues again after a
signal.  A stage is done when its own marker says so, whatever Slurm says.
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
from pipeline.files import home
from pipeline.graph import RunDirectory
from pipeline.trust import SITE

from .endings import memory_remedy
from .journal import JobRecord, Journal, end_of_log
from .plan import Job
from .sbatch import MAX_ARRAY_SIZE, Batch, batches, dependency

# Seconds that a client may take to answer.
CLIENT_S = 20
SUBMIT_S = 60
ENDING_S = 60  # that a job which is being ended may take (Slurm's KillWait is 30)
ENDING = "ending"  # the reason of a job that Slurm is ending, or taking back into its queue
CANCELLED = {"state": "interrupted", "reason": "cancelled"}

# States of squeue. All others are ends.
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
    """The output of a client of Slurm.

    Raises UserError, with Slurm's own words, where there is no answer.
    """
    client = command[0]
    try:
        ended = subprocess.run(
            command,
            timeout=timeout,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise UserError(
            f"{client} is not on the PATH: Slurm is reached from a login node of its cluster; "
            "to run on this machine leave out --on slurm"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{client} did not answer within {timeout:g} s") from None
    if ended.returncode:
        lines = [
            re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in ended.stderr.splitlines()
        ]
        message = "; ".join(filter(None, lines)) or f"exit code {ended.returncode}"
        raise UserError(f"{client}: {message}")
    return ended.stdout


def max_array_size() -> int:
    config = ask(["scontrol", "show", "config"])
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return int(size[1]) if size else MAX_ARRAY_SIZE


def site_file(run: Path) -> Path | None:
    """RUN/site.sh, or the user's own, or none: the same choice as in stage.sbatch."""
    paths = [run / SITE]
    if (own := home()) is not None:
        paths.append(own / ".config/referral" / SITE)
    return next((path for path in paths if os.access(path, os.R_OK)), None)


def environment(run: Path) -> dict[str, str]:
    """The environment for sbatch: ours without an enclosing job's, and the site's SBATCH_
    variables.

    Raises UserError if the site's file ends its shell, or does not end.
    """
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    site = site_file(run)
    if site is None:
        return own
    script = '. "$1" >&2; env -0'  # what the site's file prints is for the user
    command = ["bash", "-c", script, "site", str(site.resolve())]
    try:
        shell = subprocess.run(
            command,
            timeout=SUBMIT_S,
            env=own,
            stdout=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
        )
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
    """What Slurm knows of jobs, by their ids, array elements one by one.

    Slurm forgets a job minutes after its end: then it is not in the answer.
    """
    numbers = sorted({id_.partition("_")[0] for id_ in ids})
    if not numbers:
        return {}
    columns = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    options = ["--noheader", "--array", "--states=all"]
    options += [f"--jobs={','.join(numbers)}", f"--Format={columns}"]
    try:
        output = ask(["squeue", *options])
    except UserError as error:
        if "Invalid job id" in str(error):  # a single one, and it is forgotten
            return {}
        raise
    return dict(parse(line) for line in output.splitlines() if line.strip())


def parse(line: str) -> tuple[str, Row]:
    """One line of squeue, in COLUMNS: a job's id, and what is said of it."""
    values, start = {}, 0
    for name, width in COLUMNS.items():
        values[name] = line[start : start + width].strip()
        start += width
    row = Row(
        state=values["State"],
        reason=values["Reason"],
        restarts=int(values["RestartCnt"] or 0),
        node=values["NodeList"],
        elapsed_s=seconds(values["TimeUsed"]),
    )
    return values["JobArrayID"], row


def seconds(text: str) -> float:
    """Seconds of squeue's DAYS-HH:MM:SS. 0 where it says INVALID or nothing."""
    days, _, clock = text.rpartition("-")
    if not re.fullmatch(r"[\d:]+", clock):
        return 0.0
    parts = reversed(clock.split(":"))
    return int(days or 0) * 86400.0 + sum(int(part) * 60**k for k, part in enumerate(parts))


# What became of the jobs


def look(run: RunDirectory, jobs: Sequence[Job], journal: Journal) -> Journal:
    """The journal with each job's state, as Slurm and the run directory tell it together.

    Nothing is written.
    """
    rows = queue([record.id for record in journal.jobs.values() if record.id])
    records: dict[str, JobRecord] = {}
    for job in jobs:  # each stands behind those it waits for
        noted = journal.jobs.get(job.name, JobRecord())
        lost = [
            name
            for name in job.waits_for
            if records[name].state in ("failed", "blocked", "interrupted")
        ]
        records[job.name] = _record(run, job, noted, rows.get(noted.id), lost)
    return replace(journal, jobs=records)


def _record(
    run: RunDirectory, job: Job, noted: JobRecord, row: Row | None, lost: list[str]
) -> JobRecord:
    """One job's record, from what was noted and what Slurm says.

    lost: what it waits for and will not get.
    """
    if job.is_done:
        node = row.node if row else noted.node
        return replace(noted, state="done", reason="", node=node)
    if not noted.id or noted.state == "interrupted":  # never submitted, or cancelled by us
        is_ending = row is not None and row.state == "COMPLETING"
        return replace(noted, pid=None, reason=ENDING if is_ending else noted.reason)
    if row is None:
        return _forgotten(run, noted, lost)
    record = replace(noted, restarts=row.restarts, attempts=row.restarts + 1, node=row.node)
    if row.state in WAITING:
        return replace(record, state="waiting", attempts=row.restarts, reason=row.reason)
    if row.state in RUNNING:
        reason = {"RUNNING": "", "COMPLETING": ENDING}.get(row.state, row.state)
        started = time.time() - row.elapsed_s
        return replace(record, state="running", reason=reason, started=started)
    if row.state == "CANCELLED":
        if lost and not row.node:
            return _blocked(record, lost)
        return replace(record, **CANCELLED)
    return replace(record, state="failed", reason=_failure(run, job, noted, row))


def _forgotten(run: RunDirectory, noted: JobRecord, lost: list[str]) -> JobRecord:
    """The record of a job that Slurm no longer knows."""
    if lost and not (run.root / noted.log).exists():
        return _blocked(noted, lost)
    reason = f"it ended unfinished, and Slurm has forgotten job {noted.id}"
    return replace(noted, state="failed", reason=reason)


def _blocked(record: JobRecord, lost: list[str]) -> JobRecord:
    return replace(record, state="blocked", reason=f"waits for {', '.join(lost)}")


def _was_killed(run: RunDirectory, noted: JobRecord) -> bool:
    """Whether slurm/stage.sbatch says so at the end of the log."""
    end = end_of_log(run.root / noted.log, noted.log_start)
    return any(line.startswith("killed by signal 9") for line in end)


def _failure(run: RunDirectory, job: Job, noted: JobRecord, row: Row) -> str:
    """Why a job ended without its stage done."""
    if row.state == "OUT_OF_MEMORY" or _was_killed(run, noted):
        section = f"slurm.{job.stages[0].kind.slurm}"
        remedy = memory_remedy(job.pending, f"ask for more by {section}.memory")
        return f"Slurm says {row.state}: probably out of memory; {remedy}"
    reason = f"Slurm says {row.state}"
    if row.reason not in ("None", "NonZeroExitCode"):
        reason += f", {row.reason}"
    if "LaunchFailure" in reason or ":53" in reason:  # how slurmd says that it cannot open the log
        log = run.root / noted.log
        reason += f": {row.node} cannot write {log}; the run must lie where compute nodes see it"
    return reason


def live(journal: Journal) -> dict[str, str]:
    """Per job that waits or runs its id, in a journal as `look` returns it."""
    return {
        name: record.id
        for name, record in journal.jobs.items()
        if record.id and record.state in ("waiting", "running")
    }


def settle(
    run: RunDirectory, jobs: Sequence[Job], journal: Journal, say: Callable[[str], None]
) -> Journal:
    """`look`, once the jobs that Slurm is just ending have ended or are queued again."""
    deadline = time.monotonic() + ENDING_S
    has_said = False
    while True:
        current = look(run, jobs, journal)
        ending = [record.id for record in current.jobs.values() if record.reason == ENDING]
        if not ending or time.monotonic() > deadline:
            return current
        if not has_said:
            say(f"{', '.join(ending)}: Slurm is still ending them")
            has_said = True
        time.sleep(1)


# Submitting and cancelling


def choose(run: RunDirectory, jobs: Sequence[Job], journal: Journal) -> list[Job]:
    """The jobs to submit: neither done nor queued, or behind one of these.

    Raises UserError if one of the latter is running (ensemble.allow_missing let it): it would go
    without what is to come.
    """
    queued = live(journal)
    chosen: dict[str, Job] = {}
    for job in jobs:
        behind = [name for name in job.waits_for if name in chosen]
        if behind and job.name in queued and journal.jobs[job.name].state == "running":
            raise UserError(
                f"{job.name} (job {queued[job.name]}) is running without {', '.join(behind)}; "
                f"wait for its end, or first: referral cancel {shlex.quote(str(run.root))}"
            )
        if behind or not (job.is_done or job.name in queued):
            chosen[job.name] = job
    return list(chosen.values())


def submit(run: RunDirectory, jobs: Sequence[Job], journal: Journal) -> list[tuple[Batch, str]]:
    """Submit what `choose` says, and note it in RUN/jobs.json.

    Parameters
    ----------
    run : RunDirectory
    jobs : sequence of Job
        All jobs of the run.
    journal : Journal
        As `settle` returns it.

    Returns
    -------
    list of (Batch, str)
        Each batch with the number that Slurm gave it.

    Raises
    ------
    UserError
        With Slurm's words, if a batch is refused. Those before it are cancelled.
    """
    if "\\" in str(run.root.absolute()):
        raise UserError(
            f"{run.root}: Slurm doubles the backslashes in a job's arguments; choose another --run"
        )
    variables, size = environment(run.root), max_array_size()
    chosen = choose(run, jobs, journal)
    _withdraw_superseded(chosen, live(journal))
    (run.root / "logs").mkdir(exist_ok=True)
    done = {job.name for job in jobs if job.is_done}
    ids = live(journal)
    noted = Journal(dict(journal.jobs), runner="slurm", aim=journal.aim)
    submitted: dict[Batch, str] = {}
    for batch in batches(run, chosen, size):
        waits = dependency(run, batch, ids, submitted.values(), done.__contains__)
        command = batch.command(run.root.absolute(), waits)
        try:
            output = ask(command, SUBMIT_S, variables)
        except (UserError, KeyboardInterrupt) as error:
            raise UserError(_withdraw(run, batch, submitted, noted, error)) from None
        submitted[batch] = output.strip().partition(";")[0]  # NUMBER, or NUMBER;CLUSTER
        ids |= batch.ids(submitted[batch])
        for name, log in batch.logs().items():
            noted.jobs[name] = JobRecord(
                "waiting", log=log, log_start=_size(run.root / log), id=ids[name]
            )
        noted.save(run.root)
    return list(submitted.items())


def _withdraw_superseded(chosen: Sequence[Job], queued: dict[str, str]) -> None:
    """Cancel and clear what would go, or has gone, without what is now submitted."""
    names = {job.name for job in chosen}
    superseded = [id_ for name, id_ in queued.items() if name in names]
    if superseded:
        ask(["scancel", *superseded], SUBMIT_S)
    for job in chosen:
        if names & set(job.waits_for):
            for stage in job.stages:
                stage.clear()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _withdraw(
    run: RunDirectory,
    refused: Batch,
    submitted: dict[Batch, str],
    noted: Journal,
    error: BaseException,
) -> str:
    """Cancel what was submitted before the refused batch. The message about both."""
    message = f"{refused.name} was not submitted: {str(error) or 'interrupted'}"
    if not submitted:
        return message
    listed = ", ".join(f"{number} ({batch.name})" for batch, number in submitted.items())
    try:
        ask(["scancel", *submitted.values()], SUBMIT_S)
    except UserError as cause:
        return f"{message}\nstill queued, for they could not be cancelled ({cause}): {listed}"
    for batch in submitted:
        for job in batch.jobs:
            noted.jobs[job.name] = replace(noted.jobs[job.name], **CANCELLED)
    noted.save(run.root)
    return f"{message}\nwhat was submitted before it is cancelled: {listed}"


def cancel(run: RunDirectory, journal: Journal) -> list[str]:
    """Cancel every job that waits or runs, and note it. Returns their ids.

    journal: as `look` returns it.
    """
    queued = live(journal)
    if queued:
        ask(["scancel", *queued.values()], SUBMIT_S)
        for name in queued:
            journal.jobs[name] = replace(journal.jobs[name], **CANCELLED)
        journal.save(run.root)
    return list(queued.values())
