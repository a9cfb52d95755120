"""RUN/jobs.json: what the launcher noted of its jobs.

A reader joins it with the stages' markers and live processes.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.files import damaged
from pipeline.store import read_json, write_json


@dataclass
class JobRecord:
    """What is known of one job.

    state: waiting | running | done | failed | blocked | interrupted.
    log_start: the byte of the log at which this attempt begins.
    reached: of each stage what was done when this attempt began.
    pid, born: of a process on this machine.  id, node, restarts: of a job of Slurm's.
    """

    state: str = "waiting"
    pid: int | None = None
    born: str | None = None
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    log: str = ""
    log_start: int = 0
    attempts: int = 0
    reason: str = ""
    reached: list[str] = field(default_factory=list)
    id: str = ""
    node: str = ""
    restarts: int = 0

    @property
    def is_running(self) -> bool:
        return self.state == "running" and self.pid is not None and self.born == birth(self.pid)

    @property
    def elapsed_s(self) -> float:
        """Since this attempt began; 0 where the clock was set back to before.

        Whoever asks may be another process than the one that started it: the clock is the wall's.
        """
        assert self.started is not None, "the job was never started"
        return max(0.0, time.time() - self.started)


@dataclass
class Journal:
    """All jobs of one launch: on one host, or (runner = "slurm") handed over to Slurm.

    aim: what the launch was for, one of launch.aims.AIMS.
    """

    jobs: dict[str, JobRecord] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=time.time)
    runner: str = "local"
    aim: str = "run"

    def save(self, run: Path) -> None:
        write_json(run / "jobs.json", {"schema": 1, **asdict(self)})


def read_journal(run: Path) -> Journal:
    """The last launch's journal, or an empty one."""
    path = run / "jobs.json"
    try:
        content = read_json(path)
        return Journal(
            jobs={name: JobRecord(**record) for name, record in content["jobs"].items()},
            host=content["host"],
            pid=content["pid"],
            started=content["started"],
            runner=content.get("runner", "local"),
            aim=content.get("aim", "run"),
        )
    except FileNotFoundError:
        return Journal()
    except (AttributeError, KeyError, TypeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None


def birth(pid: int) -> str | None:
    """A mark of the process now called `pid`, None if there is none.

    A pid alone may have been given away again.
    """
    if not Path("/proc/self/stat").exists():
        return _alive(pid)
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (ProcessLookupError, FileNotFoundError):
        return None
    state, start_in_ticks_since_boot = after_name[0], after_name[19]
    if state in "ZX":  # a zombie, or dead
        return None
    return start_in_ticks_since_boot


def _alive(pid: int) -> str | None:
    """The best that there is without /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    return "alive"


def end_of_log(path: Path, start: int = 0, lines: int = 12) -> list[str]:
    """The last lines of what stands in a log from byte `start` on."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, path.stat().st_size - 64 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
