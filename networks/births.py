"""Tell processes that had the same pid apart, by when they started."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def birth(pid: int) -> str | None:
    """BOOT:TICKS at which the process `pid` started. None if there is no such process.

    A pid alone is not enough: this boot of the machine, or a later one, may reuse it.
    """
    if not Path("/proc/self/stat").exists():
        return _birth_by_ps(pid)
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, ticks_since_boot = after_name[0], after_name[19]
    if state in "ZX":  # a zombie, or dead
        return None
    return f"{_boot()}:{ticks_since_boot}"


def is_born(pid: int, born: str) -> bool:
    """Whether the process `pid` started at that mark. Older versions wrote TICKS alone."""
    mark = birth(pid)
    if mark is None:
        return False
    return mark == born or (":" not in born and mark.rpartition(":")[2] == born)


def is_hidden(pid: int) -> bool:
    """Whether the process exists but belongs to another user, so that nothing else is known."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _boot() -> str:
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""


def _birth_by_ps(pid: int) -> str | None:
    """Where there is no /proc."""
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "_".join(ended.stdout.split()) or None
