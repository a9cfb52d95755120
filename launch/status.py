"""The state of every stage.

Its own markers count first, then what the launcher noted and which processes live.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pipeline.files import parse
from pipeline.graph import RunDirectory
from pipeline.results import percent
from pipeline.store import Stage

from .journal import JobRecord, Journal, end_of_log
from .plan import Job

FRESH_S = 60  # a job on another host counts as running if it wrote something this lately
SILENT_S = 600  # a job of Slurm's that wrote nothing for so long is doubted
PACE_ROWS = 10  # the last rows of metrics.jsonl, from which the pace is taken
WIDE = 110  # columns of a terminal that has room for all of a stage's progress
TIME_LEGEND = "time: on the clock, since a running stage began, or what a done one took"
LARGEST = 1e15  # a number of a metric. Neither NaN nor infinity is below
STATES = ("done", "running", "interrupted", "failed", "blocked", "stale", "waiting")
COLOURS = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "stale": "yellow",
    "interrupted": "yellow",
}


@dataclass
class StageStatus:
    """state: one of STATES.  seconds: since its start, or what it took.  detail: why it is so."""

    stage: str
    job: str
    state: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    val_top1: float | None = None
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
        stage=stage.place,
        job=job.name,
        state="waiting",
        attempts=record.attempts,
        log=record.log,
        id=record.id,
        node=record.node,
        restarts=record.restarts,
    )
    done = stage.done()
    if done is not None and (stage.is_done or stage.is_older):
        status.state, status.seconds = "done", done.get("seconds")
        if stage.is_older:
            status.detail = "made by an older version"
    elif stage.is_stale or done is not None:
        status.state, status.detail = "stale", "made with another config or other data"
    elif _runs(run, record, journal):
        # Of a job's stages one runs, and the rest waits.
        if stage.is_begun or stage.place == job.pending[0].place:
            _add_running(status, run, record, stage)
    elif record.state in ("failed", "blocked"):
        status.state, status.detail = record.state, record.reason
    elif journal.runner == "slurm" and record.state == "waiting":
        status.detail = record.reason
        _add_progress(status, stage)
    elif record.state == "interrupted" or stage.is_begun:
        status.state, status.detail = "interrupted", record.reason
        _add_progress(status, stage)
    return status


def _add_running(status: StageStatus, run: RunDirectory, record: JobRecord, stage: Stage) -> None:
    status.state = "running"
    status.seconds = record.elapsed_s
    status.detail = record.reason or _silence(run, record, stage)
    _add_progress(status, stage, since=record.started or 0.0)


def _runs(run: RunDirectory, record: JobRecord, journal: Journal) -> bool:
    """Whether a job runs, by what there is to see.

    On this host its process says so, on another one a log that grows.  Of Slurm's jobs the record
    says it, which launch.slurm.look made.
    """
    if journal.runner == "slurm":
        return record.state == "running"
    if journal.host == socket.gethostname():
        return record.is_running
    age_s = time.time() - _modified(run.root / record.log)
    # Clocks of two hosts differ by seconds.  What is written tomorrow says nothing: one was set.
    return record.state == "running" and -SILENT_S < age_s < FRESH_S


def _silence(run: RunDirectory, record: JobRecord, stage: Stage) -> str:
    """A doubt whether a job of Slurm's runs: nothing that it writes has changed for long."""
    last_sign = max(
        _modified(run.root / record.log),
        _modified(stage.shown("metrics.jsonl")),
        record.started or 0.0,
    )
    silent_s = time.time() - last_sign
    if not record.id or silent_s <= SILENT_S:
        return ""
    return f"nothing written for {duration(silent_s)}"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _add_progress(status: StageStatus, stage: Stage, since: float = 0.0) -> None:
    """Step, pace and time to go, from the stage's metrics.

    Metrics that are older than `since` are an earlier attempt's: of these only the step counts.
    """
    path = stage.shown("metrics.jsonl")
    every = _last_rows(path)
    rows = [row for row in every if "loss" in row and row.get("steps")][-PACE_ROWS:]
    if not rows:
        return
    first, last = rows[0], rows[-1]
    status.step, status.steps = last["step"], last["steps"]
    status.loss, status.learning_rate = last["loss"], last.get("lr")
    measured = [row["val/top1"] for row in every if "val/top1" in row]
    status.val_top1 = measured[-1] if measured else None
    if _modified(path) < since:
        return
    status.samples_per_s = last.get("samples_per_s")
    left = last["steps"] - last["step"]
    steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    if steps > 0 and seconds > 0:
        status.eta_s = left * seconds / steps
    elif last["step"] > 0 and last["seconds"] > 0 and status.samples_per_s:
        status.eta_s = left * last["seconds"] / last["step"]


def _last_rows(path: Path) -> list[dict]:
    """The last logged rows. A line that is being written is left out."""
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
            row = parse(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(_numbers(row))
    return [row for row in rows if {"step", "seconds"} <= row.keys() or "val/top1" in row]


def _numbers(row: dict) -> dict[str, float]:
    """What of a row is a number. Others are no metrics, whoever wrote them."""
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, (int, float)) and -LARGEST < value < LARGEST
    }


# How it looks


def duration(seconds: float | None) -> str:
    """12 s, 3 min 05 s or 2 h 07 min"""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def progress(status: StageStatus, is_brief: bool = False) -> str:
    """`step 120/600 · loss 1.23 · 1,930 samples/s · 12 s to go`, as far as it is known.

    is_brief: without rate and pace, for a narrow terminal.  Of a stage that has no steps how long
    it has run stands in their place.
    """
    parts = []
    if status.state == "running" and not status.steps and status.seconds is not None:
        parts.append(f"for {duration(status.seconds)}")
    if status.steps:
        parts.append(f"step {status.step:,}/{status.steps:,}")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3g}")
    if status.state == "running" and status.learning_rate is not None and not is_brief:
        parts.append(f"lr {status.learning_rate:.2g}")
    if status.val_top1 is not None:
        parts.append(f"val top-1 {percent(status.val_top1, 1)}")
    if status.state == "running" and status.samples_per_s and not is_brief:
        parts.append(f"{status.samples_per_s:,.0f} samples/s")
    if status.state == "running" and status.eta_s is not None:
        parts.append(f"{duration(status.eta_s)} to go")
    if status.detail:
        parts.append(status.detail)
    return " · ".join(parts)


def summary(stages: list[StageStatus], to_go_s: float | None = None) -> str:
    """`17 stages: 5 done, 2 running, 10 waiting; about 12 min 05 s to go`."""
    counts = Counter(stage.state for stage in stages)
    listed = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    text = f"{len(stages)} stages: {listed}"
    if to_go_s and round(to_go_s):
        text += f"; about {duration(to_go_s)} to go"
    return text


def next_command(stages: list[StageStatus], journal: Journal, run: str) -> str:
    """What is typed next, by how the stages stand.  run: the run's directory, quoted."""
    states = {stage.state for stage in stages}
    if states == {"done"}:
        if journal.aim == "advise":
            return f"referral run --advised --run {run}"
        return f"referral report {run}"
    if "running" in states:
        return f"referral status {run} --watch"
    if "stale" in states:
        return f"referral run --run {run} --force"
    if states & {"failed", "interrupted", "blocked"} or journal.jobs:
        return f"referral retry {run}"
    return f"referral run --run {run}"


def table(stages: list[StageStatus], title: str | None = None, width: int | None = None) -> Table:
    """One row for each stage. Where Slurm ran any, its job, node and restarts beside it.

    width: of the terminal. Progress is brief on a narrow one.
    """
    rows = Table(
        title=title,
        box=None,
        pad_edge=False,
        header_style="bold",
        title_justify="left",
        title_style="",
    )
    columns = ["stage", "state", "time", "progress"]
    on_slurm = any(stage.id for stage in stages)
    if on_slurm:
        columns[2:2] = ["job", "node", "restarts"]
    for column in columns:
        justify = "right" if column in ("time", "restarts") else "left"
        rows.add_column(column, justify=justify, no_wrap=column != "progress", overflow="fold")
    is_brief = width is not None and width < WIDE
    for stage in stages:
        cells = [Text(stage.stage), Text(stage.state, style=COLOURS.get(stage.state, "dim"))]
        if on_slurm:
            cells += [Text(stage.id), Text(stage.node), Text(str(stage.restarts or ""))]
        rows.add_row(*cells, duration(stage.seconds), Text(progress(stage, is_brief)))
    return rows


def failures(run: RunDirectory, stages: list[StageStatus], journal: Journal) -> list[str]:
    """For each failed job, its log's path and last lines."""
    lines = []
    for job in dict.fromkeys(stage.job for stage in stages if stage.state == "failed"):
        record = journal.jobs[job]
        log = run.root / record.log
        lines.append(f"{job}: {record.reason}; {log} ends:")
        lines += [f"    {line}" for line in end_of_log(log, record.log_start)]
    return lines
