"""Run the job graph on this machine: a bounded pool of torchrun processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import UserError
from pipeline.failures import INTERRUPTED, USER_ERROR, moved_text
from pipeline.graph import RunDirectory
from pipeline.store import Stage, complete_checkpoints
from pipeline.trust import code_in

from .calling import TRAINER, python, tethered
from .display import Display
from .endings import AGAIN, is_repeatable, reason
from .journal import AimName, JobRecord, Journal, end_of_log
from .machine import Machine
from .plan import Job, is_of_specialists
from .processes import birth, has_ended, signal_group
from .results import diagnosis_lines, groups_line, metrics_of
from .status import duration

GRACE_S = 15  # for a child to write a checkpoint after SIGTERM


def torchrun(processes: int) -> list[str]:
    """The command that starts `processes` ranks of the trainer. Its arguments follow.

    One rank needs no agent beside it, which would import torch a second time and hold 200 MB.
    """
    if processes == 1:
        return TRAINER
    return [
        *python("trainer.distributed.torchrun"),
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "--shutdown-timeout",
        str(GRACE_S - 3),
        "--",
    ]


def trainer_command(
    job: Job, run: RunDirectory, stages: Sequence[Stage], trainer: list[str] | None = None
) -> list[str]:
    """argv that runs these stages of a job.  trainer: what stands for torchrun and the trainer."""
    words = [*(trainer or torchrun(job.processes)), *job.command(stages), "--run", str(run.root)]
    # Whoever starts a job has asked. Its machine may have no record of it.
    return [*words, "--trust"] if code_in(run.config) else words


@dataclass
class Pool:
    """The jobs of one launch: which run, which wait, which slots are free."""

    run: RunDirectory
    jobs: list[Job]
    machine: Machine
    display: Display
    trainer: list[str] | None = None
    aim: AimName = "run"
    children: dict[str, subprocess.Popen] = field(default_factory=dict)
    slots: dict[str, list[int]] = field(default_factory=dict)  # those that a running job holds
    requested: int = 0  # the signal that asked to stop

    def __post_init__(self):
        self.size = self.machine.pool(self.run.config)
        self.free = list(range(self.size))
        records = {job.name: _first_record(job) for job in self.jobs}
        self.journal = Journal(records, aim=self.aim)
        (self.run.root / "logs").mkdir(exist_ok=True)
        self._root = _identity(self.run.root)

    def execute(self) -> int:
        """Run all that can run.  Returns the launcher's exit code."""
        with _signals(self), self._no_orphans():
            while not self.requested:
                self._check_there()
                self._reap()
                self._start_ready()
                self.display.tick(self.run, self.jobs, self.journal, self.size)
                if not self.children:
                    break
                time.sleep(0.05)
            if self.requested:
                self._stop()
                return INTERRUPTED
        return self._verdict()

    def _check_there(self) -> None:
        """UserError where RUN was moved, removed or replaced: what is noted would go elsewhere."""
        if _identity(self.run.root) != self._root:
            raise UserError(f"{moved_text(self.run.root)}; its jobs were ended")

    @contextmanager
    def _no_orphans(self) -> Iterator[None]:
        """End the children before an error of the launcher's own, as of a full disk, is said."""
        try:
            yield
        except BaseException:
            running = [child for child in self.children.values() if not has_ended(child)]
            for child in running:
                signal_group(child, signal.SIGKILL)
                child.wait()
            raise

    # Which job next

    def _start_ready(self) -> None:
        """Start what can be started, the longest chain first.

        Where that needs more slots than are free, they are kept for it: shorter chains of one rank
        would take each slot that becomes free, and it would come last.
        """
        self._block()
        for job in sorted(self.jobs, key=lambda job: -job.chain):  # sorted() is stable
            if self._state(job.name) == "waiting" and self._inputs_ended(job):
                if len(self.free) < min(job.processes, self.size):
                    break
                self._start(job)

    def _state(self, name: str) -> str:
        return self.journal.jobs[name].state

    def _is_left_out(self, name: str) -> bool:
        """Whether it is a specialist that failed, and the config lets the ensemble do without."""
        tolerated = self.run.config.ensemble.allow_missing and is_of_specialists(name)
        return tolerated and self._state(name) == "failed"

    def _inputs_ended(self, job: Job) -> bool:
        return all(self._state(name) == "done" or self._is_left_out(name) for name in job.waits_for)

    def _block(self) -> None:
        """Mark the jobs that wait, through others or directly, for one that failed."""
        for job in self.jobs:  # each stands behind those it waits for
            lost = [
                name
                for name in job.waits_for
                if self._state(name) in ("failed", "blocked") and not self._is_left_out(name)
            ]
            if lost and self._state(job.name) == "waiting":
                self._record(job, state="blocked", reason=f"waits for {', '.join(lost)}")

    def _redo_what_went_without(self, job: Job) -> None:
        """Redo what was begun without `job` (ensemble.allow_missing), now that it is done."""
        for other in self.jobs:
            if job.name in other.waits_for and any(stage.is_begun for stage in other.stages):
                for stage in other.stages:
                    stage.clear()
                self._record(other, state="waiting")

    # One job's life

    def _start(self, job: Job) -> None:
        size = min(job.processes, self.size)
        slots, self.free = self.free[:size], self.free[size:]
        log = self.run.root / job.log
        child, log_start = self._spawn(job, log, slots)
        self.slots[job.name] = slots
        self.children[job.name] = child
        attempts = self.journal.jobs[job.name].attempts + 1
        self._record(
            job,
            state="running",
            pid=child.pid,
            born=birth(child.pid),
            started=time.time(),
            ended=None,
            exit_code=None,
            log=str(log.relative_to(self.run.root)),
            log_start=log_start,
            attempts=attempts,
            reason="",
            reached=reached(job),
        )
        event = f"{job.name} started"
        if attempts > 1:
            event += f" (attempt {attempts})"
        self.display.event(event)

    def _spawn(self, job: Job, log: Path, slots: list[int]) -> tuple[subprocess.Popen, int]:
        """The process of a job, and where in the log its output begins."""
        command = trainer_command(job, self.run, job.pending, self.trainer)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with open(log, "ab", opener=_own) as output:
            start = output.tell()
            output.write(f"--- {now} {shlex.join(command)}\n".encode())
            output.flush()
            child = subprocess.Popen(
                tethered(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment(slots),
                start_new_session=True,
            )
        return child, start

    def _environment(self, slots: list[int]) -> dict[str, str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        devices = self.machine.devices
        if devices:
            own = dict.fromkeys(devices[slot % len(devices)] for slot in slots)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return environment

    def _reap(self) -> None:
        for job in self.jobs:
            child = self.children.get(job.name)
            if child is not None and has_ended(child):
                signal_group(child, signal.SIGKILL)  # whatever it left behind
                code = child.wait()
                del self.children[job.name]
                self.free = sorted(self.free + self.slots.pop(job.name))
                self._ended(job, code)

    def _ended(self, job: Job, code: int) -> None:
        """The stages' markers decide whether a job is done. Its exit code says why it is not."""
        missing = job.pending
        if not missing:
            self._done(job, code)
        elif code == AGAIN and reached(job) != self.journal.jobs[job.name].reached:
            self._record_end(job, code, state="waiting")
            self.display.event(f"{job.name} asked to be started again")
        else:
            own = self._own_words(self.journal.jobs[job.name])
            why = reason(code, missing)
            if code == USER_ERROR and own:
                why = own[0].removeprefix("error: ")
            self._failed(job, code, why)

    def _done(self, job: Job, code: int) -> None:
        self._redo_what_went_without(job)
        self._record_end(job, code, state="done")
        taken = duration(self.journal.jobs[job.name].elapsed_s)
        self.display.event(", ".join([f"{job.name} done in {taken}", *metrics_of(job.stages)]))
        has_found_groups = any(stage.name == "cluster" for stage in job.stages)
        if has_found_groups and (line := groups_line(self.run)):
            self.display.event(line)
        for line in diagnosis_lines(job.stages):
            self.display.event(line)

    def _failed(self, job: Job, code: int, reason: str) -> None:
        """Try again as often as launch.retries says, but not after an error of the user's."""
        record = self.journal.jobs[job.name]
        event = f"{job.name} failed after {duration(record.elapsed_s)}"
        if code != USER_ERROR:  # `_verdict` has the user's
            event += f": {reason}"
        if is_repeatable(code) and record.attempts <= self.run.config.launch.retries:
            self._record_end(job, code, state="waiting", reason=reason)
            event += "; trying again"
        else:
            self._record_end(job, code, state="failed", reason=reason)
        self.display.event(event)

    def _record_end(self, job: Job, code: int, **changes) -> None:
        self._record(job, exit_code=code, ended=time.time(), pid=None, **changes)

    def _record(self, job: Job, **changes) -> None:
        record = self.journal.jobs[job.name]
        for key, value in changes.items():
            setattr(record, key, value)
        self.journal.save(self.run.root)

    # The end

    def _stop(self) -> None:
        """Ask every child to write a checkpoint and end.

        After GRACE_S, or at a second signal, kill the rest.
        """
        self.display.event(f"stopping {len(self.children)} jobs; they write a checkpoint first")
        self.requested = 0
        for child in self.children.values():
            signal_group(child, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while not all(map(has_ended, self.children.values())):
            if time.monotonic() > deadline or self.requested:
                break
            time.sleep(0.05)
        for job in self.jobs:
            if job.name in self.children:
                child = self.children[job.name]
                signal_group(child, signal.SIGKILL)
                code = child.wait()
                state = "done" if job.is_done else "interrupted"
                self._record_end(job, code, state=state)
        self.display.event(f"stopped; the same command resumes it: {self.run.root}")

    def _verdict(self) -> int:
        """Say what failed, with the end of its log.

        Returns 0 if nothing did, 2 if each failure was the user's error, else 1.
        """
        records = self.journal.jobs
        failed = {name: record for name, record in records.items() if record.state == "failed"}
        blocked = [name for name, record in records.items() if record.state == "blocked"]
        for name, record in failed.items():
            self.display.error(*self._failure(name, record))
        if blocked:
            self.display.error(f"not started, for they wait for these: {', '.join(blocked)}")
        if blocked and all(is_of_specialists(name) for name in failed):
            self.display.error(
                "to continue without these specialists: --set ensemble.allow_missing=true"
            )
        if not failed:
            return 0
        if all(record.exit_code == USER_ERROR for record in failed.values()):
            return USER_ERROR
        return 1

    def _failure(self, name: str, record: JobRecord) -> list[str]:
        """The user's error in the trainer's words, or why a job failed and the end of its log."""
        errors = self._own_words(record)
        if record.exit_code == USER_ERROR and errors:
            return errors
        log = self.run.root / record.log
        title = f"error: {name}: {record.reason}; {log} ends:"
        return [title, *(f"    {line}" for line in end_of_log(log, record.log_start))]

    def _own_words(self, record: JobRecord) -> list[str]:
        """The lines by which the trainer named the user's error in this attempt's log."""
        lines = end_of_log(self.run.root / record.log, record.log_start, lines=200)
        return [line for line in lines if line.startswith("error: ")]


def _own(path: str, flags: int) -> int:
    """The opener of a log: not of what a link in a RUN that somebody else made leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _identity(directory: Path) -> tuple[int, int] | None:
    """Which directory it is, whatever it is called. None where there is none."""
    try:
        stat = directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_dev, stat.st_ino


def _first_record(job: Job) -> JobRecord:
    return JobRecord("done" if job.is_done else "waiting")


def reached(job: Job) -> list[str]:
    """How far each stage of a job is: "done", or its newest checkpoint, or ""."""
    return [_reached(stage) for stage in job.stages]


def _reached(stage: Stage) -> str:
    if stage.is_done:
        return "done"
    checkpoints = complete_checkpoints(stage.checkpoints)
    return checkpoints[-1].name if checkpoints else ""


@contextmanager
def _signals(pool: Pool) -> Iterator[None]:
    """While this holds, Ctrl-C and its like only note that the pool is to stop."""

    def note(number, _frame):
        pool.requested = number

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # What is ignored stays ignored: nohup and a shell's `&` rely on it.
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
