"""Run the job graph on this machine: a bounded pool of torchrun processes."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pipeline
from pipeline.config import UserError
from pipeline.graph import RunDirectory
from pipeline.store import Stage, complete_checkpoints

from .display import Display
from .journal import JobRecord, Journal, birth, end_of_log
from .machine import Machine
from .plan import Job, is_of_specialists
from .results import groups_line

USERS_MISTAKE, AGAIN, INTERRUPTED = 2, 75, 130  # exit codes
GRACE_S = 15  # for a child to write a checkpoint after SIGTERM
TETHER = Path(pipeline.__file__).parents[1] / "trainer" / "distributed" / "die_with_parent.py"
TRAINER = [sys.executable, "-m", "trainer"]


def torchrun(processes: int) -> list[str]:
    """The command that starts `processes` ranks of the trainer; its arguments follow.

    One rank needs no agent beside it, which would import torch a second time and hold 200 MB.
    """
    if processes == 1:
        return TRAINER
    return [
        sys.executable,
        "-m",
        "trainer.distributed.torchrun",
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
    return [*(trainer or torchrun(job.processes)), *job.command(stages), "--run", str(run.root)]


def tethered(command: list[str]) -> list[str]:
    """The command, made to die with this process."""
    return [sys.executable, "-I", str(TETHER), str(os.getpid()), *command]


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make RUN and hold RUN/.lock: one launcher per run."""
    path = run / ".lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as mistake:
        raise UserError(f"{run}: cannot be written: {mistake.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{path}: another launcher is running {run} ({file.read().strip()})"
            ) from None
        except OSError as mistake:
            raise UserError(
                f"{path}: its file system cannot lock files (flock: {mistake.strerror}), which keeps "
                "two launchers apart; choose --run on another one"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def stop_launcher(run: Path) -> bool:
    """Ask the launcher that runs `run` to stop, as Ctrl-C does, and wait for it; False if there is none."""
    number = None
    deadline = time.monotonic() + GRACE_S + 15
    while time.monotonic() < deadline:
        try:
            with locked(run):
                return number is not None
        except UserError as mistake:
            if number is None:
                number = _signal_holder(run, mistake)
        time.sleep(0.1)
    raise UserError(f"process {number}, which runs {run}, did not stop within {GRACE_S + 15} s")


def _signal_holder(run: Path, mistake: UserError) -> int:
    words = (run / ".lock").read_text().split()  # process NUMBER on HOST
    if len(words) != 4 or words[3] != os.uname().nodename:
        raise mistake
    os.kill(int(words[1]), signal.SIGTERM)
    return int(words[1])


@dataclass
class Pool:
    """The jobs of one launch: which run, which wait, which slots are free."""

    run: RunDirectory
    jobs: list[Job]
    machine: Machine
    display: Display
    trainer: list[str] | None = None
    children: dict[str, subprocess.Popen] = field(default_factory=dict)
    slots: dict[str, list[int]] = field(default_factory=dict)  # those that a running job holds
    requested: int = 0  # the signal that asked to stop

    def __post_init__(self):
        self.size = self.machine.pool(self.run.config)
        self.free = list(range(self.size))
        records = {job.name: JobRecord("done" if job.is_done else "waiting") for job in self.jobs}
        self.journal = Journal(records)
        self.logs = self.run.root / "logs"
        self.logs.mkdir(exist_ok=True)

    def execute(self) -> int:
        """Run all that can run.  Returns the launcher's exit code."""
        with _signals(self):
            while not self.requested:
                self._reap()
                self._start_ready()
                self.display.tick(self.run, self.jobs, self.journal)
                if not self.children:
                    break
                time.sleep(0.05)
            if self.requested:
                self._stop()
                return INTERRUPTED
        return self._verdict()

    # Which job next

    def _start_ready(self) -> None:
        self._block()
        for job in sorted(
            self.jobs, key=lambda job: -job.chain
        ):  # the longest chain first; sorted() is stable
            fits = len(self.free) >= min(job.processes, self.size)
            if fits and self._state(job.name) == "waiting" and self._inputs_ended(job):
                self._start(job)

    def _state(self, name: str) -> str:
        return self.journal.jobs[name].state

    def _tolerates(self, job: Job, name: str) -> bool:
        """A specialist that failed may be left out, if the config says so."""
        return self.run.config.ensemble.allow_missing and is_of_specialists(name)

    def _inputs_ended(self, job: Job) -> bool:
        return all(
            self._state(name) == "done"
            or (self._state(name) == "failed" and self._tolerates(job, name))
            for name in job.waits_for
        )

    def _block(self) -> None:
        """Mark the jobs that wait, through others or directly, for one that failed."""
        for job in self.jobs:  # each stands behind those it waits for
            lost = [name for name in job.waits_for if self._state(name) in ("failed", "blocked")]
            lost = [
                name
                for name in lost
                if not (self._state(name) == "failed" and self._tolerates(job, name))
            ]
            if lost and self._state(job.name) == "waiting":
                self._record(job, state="blocked", reason=f"waits for {', '.join(lost)}")

    def _redo_what_went_without(self, job: Job) -> None:
        """What was begun before `job` was done (ensemble.allow_missing) is begun anew, now that it is."""
        for other in self.jobs:
            if job.name in other.waits_for and any(stage.is_begun for stage in other.stages):
                for stage in other.stages:
                    stage.clear()
                self._record(other, state="waiting")

    # One job's life

    def _start(self, job: Job) -> None:
        slots = self.slots[job.name] = [
            self.free.pop(0) for _ in range(min(job.processes, self.size))
        ]
        command = trainer_command(job, self.run, job.pending, self.trainer)
        log = self.run.root / job.log
        with open(log, "ab") as output:
            start = output.tell()
            output.write(
                f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n".encode()
            )
            output.flush()
            child = subprocess.Popen(
                tethered(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment(slots),
                start_new_session=True,
            )
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
            log_start=start,
            attempts=attempts,
            reason="",
            reached=reached(job),
        )
        self.display.event(
            f"{job.name} started" + (f" (attempt {attempts})" if attempts > 1 else "")
        )

    def _environment(self, slots: list[int]) -> dict[str, str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        environment["PYTHONUNBUFFERED"] = "1"
        if self.machine.devices:
            mine = dict.fromkeys(
                self.machine.devices[slot % len(self.machine.devices)] for slot in slots
            )
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return environment

    def _reap(self) -> None:
        for job in self.jobs:
            child = self.children.get(job.name)
            if child is not None and child.poll() is not None:
                _kill_group(child, signal.SIGKILL)  # whatever it left behind
                del self.children[job.name]
                self.free = sorted(self.free + self.slots.pop(job.name))
                self._ended(job, child.returncode)

    def _ended(self, job: Job, code: int) -> None:
        """The stages' markers decide whether a job is done; its exit code says why it is not."""
        record = self.journal.jobs[job.name]
        seconds = time.time() - record.started
        facts = {"exit_code": code, "ended": time.time(), "pid": None}
        missing = [stage.place for stage in job.pending]
        if not missing:
            self._redo_what_went_without(job)
            self._record(job, state="done", **facts)
            self.display.event(f"{job.name} done in {seconds:.0f} s")
            if self.run.method.has_groups and self.run.cluster in job.stages:
                line = groups_line(self.run)
            else:
                line = None
            if line:
                self.display.event(line)
        elif code == AGAIN and reached(job) != record.reached:
            self._record(job, state="waiting", **facts)
            self.display.event(f"{job.name} asked to be started again")
        else:
            reason = _reason(code, missing)
            again = (
                code not in (USERS_MISTAKE, AGAIN)
                and record.attempts <= self.run.config.launch.retries
            )
            self._record(job, state="waiting" if again else "failed", reason=reason, **facts)
            self.display.event(
                f"{job.name} failed after {seconds:.0f} s: {reason}"
                + ("; trying again" if again else "")
            )

    def _record(self, job: Job, **changes) -> None:
        record = self.journal.jobs[job.name]
        for key, value in changes.items():
            setattr(record, key, value)
        self.journal.save(self.run.root)

    # The end

    def _stop(self) -> None:
        """Ask every child to write a checkpoint and go; after GRACE_S, or at a second signal, kill the rest."""
        self.display.event(f"stopping {len(self.children)} jobs; they write a checkpoint first")
        self.requested = 0
        for child in self.children.values():
            _kill_group(child, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while any(child.poll() is None for child in self.children.values()):
            if time.monotonic() > deadline or self.requested:
                break
            time.sleep(0.05)
        for job in self.jobs:
            if job.name in self.children:
                child = self.children[job.name]
                _kill_group(child, signal.SIGKILL)
                code = child.wait()
                state = "interrupted" if job.pending else "done"
                self._record(job, state=state, pid=None, exit_code=code, ended=time.time())
        self.display.event(f"stopped; the same command goes on from here: {self.run.root}")

    def _verdict(self) -> int:
        """Say what failed, with the end of its log; 0 if nothing did, 2 if all of it was the user's mistake, else 1."""
        failed = {
            name: record for name, record in self.journal.jobs.items() if record.state == "failed"
        }
        for name, record in failed.items():
            log = self.run.root / record.log
            end = end_of_log(log, record.log_start, lines=200)
            mistakes = [line for line in end if line.startswith("error: ")]
            if record.exit_code == USERS_MISTAKE and mistakes:
                self.display.error(*mistakes)
            else:
                self.display.error(
                    f"error: {name}: {record.reason}; {log} ends:",
                    *(f"    {line}" for line in end[-12:]),
                )
        blocked = [name for name, record in self.journal.jobs.items() if record.state == "blocked"]
        if blocked:
            self.display.error(f"not started for want of these: {', '.join(blocked)}")
        if blocked and all(is_of_specialists(name) for name in failed):
            self.display.error(
                "to go on without these specialists: --set ensemble.allow_missing=true"
            )
        if not failed:
            return 0
        return (
            USERS_MISTAKE
            if all(record.exit_code == USERS_MISTAKE for record in failed.values())
            else 1
        )


def reached(job: Job) -> list[str]:
    """How far each stage of a job is: done, or its newest checkpoint."""
    steps = [
        [path.name for path in complete_checkpoints(stage.checkpoints)] for stage in job.stages
    ]
    return [
        "done" if stage.is_done else (found or [""])[-1]
        for stage, found in zip(job.stages, steps, strict=True)
    ]


def _reason(code: int, missing: list[str]) -> str:
    if code == 0:
        return f"it ended without finishing {', '.join(missing)}"
    if code == AGAIN:
        return "it asked to be started again and had come no further"
    if code < 0:
        return (
            f"killed by {signal.Signals(-code).name}"
            if -code in list(signal.Signals)
            else f"killed by {-code}"
        )
    return f"exit code {code}"


def _kill_group(child: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


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
