"""The state of every stage: its own markers first, joined with what the launcher noted and which processes live."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pipeline.graph import RunDirectory
from pipeline.store import Stage

from .journal import JobRecord, Journal, end_of_log
from .plan import Job

FRESH_S = 60  # a job on another host counts as running if it wrote something this lately
SILENT_S = 600  # a job of Slurm's that wrote nothing for so long is doubted
COLOURS = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "stale": "yellow",
    "interrupted": "yellow",
}


@dataclass
class StageStatus:
    """state: waiting | running | done | failed | blocked | interrupted | stale."""

    stage: str
    job: str
    state: str
    step: int | None = None
    steps: int | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None
    seconds: float | None = None
    attempts: int = 0
    log: str = ""
    detail: str = ""
    id: str = ""
    node: str = ""
    restarts: int = 0


def statuses(run: RunDirectory, jobs: list[Job], journal: Journal) -> list[StageStatus]:
    """One for each stage, in the order of the jobs."""
    return [_status(run, job, stage, journal) for job in jobs for stage in job.stages]


def _status(run: RunDirectory, job: Job, stage: Stage, journal: Journal) -> StageStatus:
    record = journal.jobs.get(job.name, JobRecord())
    status = StageStatus(
        stage.place,
        job.name,
        "waiting",
        attempts=record.attempts,
        log=record.log,
        id=record.id,
        node=record.node,
        restarts=record.restarts,
    )
    done = stage.done()
    if done is not None and (stage.is_done or stage.is_older):
        status.state, status.seconds = "done", done["seconds"]
        if stage.is_older:
            status.detail = "made by an older version"
    elif stage.is_stale or done is not None:
        status.state, status.detail = "stale", "made with another config or other data"
    elif _runs(run, record, journal):
        begun = stage.is_begun or stage.place == job.pending[0].place  # the rest of its job waits
        status.state = "running" if begun else "waiting"
        if begun:
            status.seconds = time.time() - record.started
            _add_progress(status, stage, since=record.started)
            status.detail = record.reason or _silence(run, record, stage)
    elif record.state in ("failed", "blocked"):
        status.state, status.detail = record.state, record.reason
    elif journal.runner == "slurm" and record.state == "waiting":
        status.detail = record.reason
        _add_progress(status, stage)
    elif record.state == "interrupted" or stage.is_begun:
        status.state, status.detail = "interrupted", record.reason
        _add_progress(status, stage)
    return status


def _runs(run: RunDirectory, record: JobRecord, journal: Journal) -> bool:
    """A job runs if its process does; on a host that cannot be asked, if it wrote to its log lately.

    Of Slurm's jobs the record says it: launch.slurm.look made it.
    """
    if journal.runner == "slurm":
        return record.state == "running"
    if journal.host == socket.gethostname():
        return record.is_running
    return record.state == "running" and time.time() - _modified(run.root / record.log) < FRESH_S


def _silence(run: RunDirectory, record: JobRecord, stage: Stage) -> str:
    """What makes one doubt that a job of Slurm's runs: nothing that it writes has changed for long."""
    written = max(
        _modified(run.root / record.log),
        _modified(stage.shown("metrics.jsonl")),
        record.started,
    )
    silent = time.time() - written
    return f"nothing written for {duration(silent)}" if record.id and silent > SILENT_S else ""


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _add_progress(status: StageStatus, stage: Stage, since: float = 0.0) -> None:
    """Step, pace and time to go from the stage's metrics, unless they are older than `since` (an earlier attempt's)."""
    path = stage.shown("metrics.jsonl")
    rows = [row for row in _last_rows(path) if "loss" in row and row.get("steps")]
    if not rows:
        return
    first, last = rows[0], rows[-1]
    status.step, status.steps = last["step"], last["steps"]
    if _modified(path) < since:
        return
    status.samples_per_s = last.get("samples_per_s")
    steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    if steps > 0 and seconds > 0:
        status.eta_s = (last["steps"] - last["step"]) * seconds / steps
    elif last["step"] > 0 and last["seconds"] > 0 and status.samples_per_s:
        status.eta_s = (last["steps"] - last["step"]) * last["seconds"] / last["step"]


def _last_rows(path: Path, count: int = 10) -> list[dict]:
    """The last logged training rows; a line that is being written is left out."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 16 * 1024))
            lines = file.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "loss" in row:
            rows.append(row)
    return rows[-count:]


# How it looks


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them: 12 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def progress(status: StageStatus) -> str:
    """`120/600 · 1,930 samples/s · 12 s to go`, as far as it is known."""
    parts = []
    if status.steps:
        parts.append(f"step {status.step:,}/{status.steps:,}")
    if status.state == "running" and status.samples_per_s:
        parts.append(f"{status.samples_per_s:,.0f} samples/s")
    if status.state == "running" and status.eta_s is not None:
        parts.append(f"{duration(status.eta_s)} to go")
    return " · ".join([*parts, *([status.detail] if status.detail else [])])


def summary(found: list[StageStatus]) -> str:
    """`17 stages: 5 done, 2 running, 10 waiting`."""
    states = ["done", "running", "interrupted", "failed", "blocked", "stale", "waiting"]
    counts = [(sum(status.state == state for status in found), state) for state in states]
    return f"{len(found)} stages: " + ", ".join(
        f"{count} {state}" for count, state in counts if count
    )


def table(found: list[StageStatus], title: str | None = None) -> Table:
    """One row for each stage; where Slurm ran any, its job, node and restarts beside it."""
    rows = Table(
        title=title,
        box=None,
        pad_edge=False,
        header_style="bold",
        title_justify="left",
        title_style="",
    )
    slurm = any(status.id for status in found)
    for column in (
        "stage",
        "state",
        *(("job", "node", "restarts") if slurm else ()),
        "time",
        "progress",
    ):
        justify = "right" if column in ("time", "restarts") else "left"
        rows.add_column(column, justify=justify, no_wrap=column != "progress")
    for status in found:
        state = Text(status.state, style=COLOURS.get(status.state, "dim"))
        place = (Text(status.id), Text(status.node), str(status.restarts or "")) if slurm else ()
        rows.add_row(
            Text(status.stage), state, *place, duration(status.seconds), Text(progress(status))
        )
    return rows


def failures(run: RunDirectory, found: list[StageStatus], journal: Journal) -> list[str]:
    """For each failed job, its log's path and last lines."""
    lines = []
    for job in dict.fromkeys(status.job for status in found if status.state == "failed"):
        record = journal.jobs[job]
        lines.append(f"{job}: {record.reason}; {run.root / record.log} ends:")
        lines += [f"    {line}" for line in end_of_log(run.root / record.log, record.log_start)]
    return lines
