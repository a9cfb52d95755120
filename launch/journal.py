"""RUN/jobs.json: what the launcher noted of its jobs; a reader joins it with the stages' markers and live processes."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.store import read_json, write_json


@dataclass
class JobRecord:
    """state: waiting | running | done | failed | blocked | interrupted.  log_start: where this attempt's log begins.

    Of a process on this machine: pid, born.  Of a job of Slurm's: id, node, restarts.
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
    reached: list[str] = field(default_factory=list)  # by each stage, when this attempt began
    id: str = ""
    node: str = ""
    restarts: int = 0

    @property
    def is_running(self) -> bool:
        return self.state == "running" and self.pid is not None and self.born == birth(self.pid)


@dataclass
class Journal:
    """All jobs of one launch: on one host, or (runner = "slurm") handed over to Slurm."""

    jobs: dict[str, JobRecord] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=time.time)
    runner: str = "local"

    def save(self, run: Path) -> None:
        write_json(run / "jobs.json", {"schema": 1, **asdict(self)})


def read_journal(run: Path) -> Journal:
    """The last launch's journal, or an empty one."""
    try:
        content = read_json(run / "jobs.json")
    except FileNotFoundError:
        return Journal()
    jobs = {name: JobRecord(**record) for name, record in content["jobs"].items()}
    return Journal(
        jobs, content["host"], content["pid"], content["started"], content.get("runner", "local")
    )


def birth(pid: int) -> str | None:
    """A mark of the process now called `pid`, None if there is none: a pid alone may have been given away again."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (
            None if after_name[0] in "ZX" else after_name[19]
        )  # start time in clock ticks since boot
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc
        os.kill(pid, 0)
        return "alive"
    except ProcessLookupError:
        return None


def end_of_log(path: Path, start: int = 0, lines: int = 12) -> list[str]:
    """The last lines of what stands in a log from byte `start` on."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, path.stat().st_size - 64 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
