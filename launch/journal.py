"""RUN/jobs.json: what the launcher noted of its jobs.

A reader joins it with the stages' markers and live processes.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from pipeline.files import checked
from pipeline.store import read_json, write_json

from .processes import is_born

AimName = Literal["run", "advise"]

SlurmId = Annotated[str, Field(pattern=r"^(\d+(_\d+)?)?$")]  # scancel gets it
Process = Annotated[int, Field(gt=1)]
FINITE = ConfigDict(allow_inf_nan=False)
OF_JOB = ConfigDict(allow_inf_nan=False, extra="forbid")


@dataclass
class JobRecord:
    """What is known of one job.

    log_start: the byte of the log at which this attempt begins.
    reached: of each stage what was done when this attempt began.
    pid, born: of a process on this machine.  id, node, restarts: of a job of Slurm's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = OF_JOB

    state: Literal["waiting", "running", "done", "failed", "blocked", "interrupted"] = "waiting"
    pid: Process | None = None
    born: str | None = None
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    log: str = ""
    log_start: int = 0
    attempts: int = 0
    reason: str = ""
    reached: list[str] = field(default_factory=list)
    id: SlurmId = ""
    node: str = ""
    restarts: int = 0

    @property
    def is_running(self) -> bool:
        if self.state != "running" or self.pid is None or self.born is None:
            return False
        return is_born(self.pid, self.born)

    @property
    def elapsed_s(self) -> float:
        """Since this attempt began. 0 where the clock was set back to before.

        Whoever asks may be another process than the one that started it: the clock is the wall's.
        """
        assert self.started is not None, "the job was never started"
        return max(0.0, time.time() - self.started)


@dataclass
class Journal:
    """All jobs of one launch: on one host, or (runner = "slurm") handed over to Slurm.

    aim: what the launch was for, one of launch.aims.AIMS.
    """

    __pydantic_config__: ClassVar[ConfigDict] = FINITE

    jobs: dict[str, JobRecord] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=time.time)
    runner: Literal["local", "slurm"] = "local"
    aim: AimName = "run"

    def save(self, run: Path) -> None:
        write_json(run / "jobs.json", {"schema": 1, **asdict(self)})


FORM = TypeAdapter(Journal)


def read_journal(run: Path) -> Journal:
    """The last launch's journal, or an empty one."""
    path = run / "jobs.json"
    try:
        return checked(path, read_json(path), FORM)
    except FileNotFoundError:
        return Journal()


def end_of_log(path: Path, start: int = 0, lines: int = 12) -> list[str]:
    """The last lines of what stands in a log from byte `start` on."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, path.stat().st_size - 64 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
