"""Processes by more than their number, which another one may have by now.

Whatever is signalled from what a file says is signalled here: `ask_to_end`.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def birth(pid: int) -> str | None:
    """A mark of the process now called `pid`, None if there is none: BOOT:TICKS of its start.

    A number alone may have been given away again, by this boot of the machine or a later one.
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
    """Whether the process `pid` is the one with that mark. Older versions wrote TICKS alone."""
    mark = birth(pid)
    if mark is None:
        return False
    return mark == born or (":" not in born and mark.rpartition(":")[2] == born)


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


def ask_to_end(pid: int, born: str, holds: Path) -> bool:
    """SIGTERM to a process, if it is the one that is meant.  Returns whether it is.

    born: its mark.  holds: a file. Where an older version noted no mark, the process must have
    it open.
    """
    if pid <= 1 or pid == os.getpid():
        return False
    with _handle(pid) as handle:
        # The handle is of one process for good: what is checked now is what gets the signal.
        if not (is_born(pid, born) if born else _has_open(pid, holds)):
            return False
        try:
            if handle is None:
                os.kill(pid, signal.SIGTERM)
            else:
                signal.pidfd_send_signal(handle, signal.SIGTERM)
        except ProcessLookupError:  # it has just ended
            pass
    return True


@contextmanager
def _handle(pid: int) -> Iterator[int | None]:
    """A file descriptor that stands for a process. None where the system has none, or it ended."""
    try:
        handle = os.pidfd_open(pid)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open, as far as we may know."""
    try:
        return any(_is_same(link, path) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def _is_same(link: Path, path: Path) -> bool:
    try:
        return link.samefile(path)
    except OSError:
        return False


# Children, each of which leads a group of its own


def has_ended(child: subprocess.Popen) -> bool:
    """Whether a child has ended. Until `child.wait()` its number stays its own."""
    if child.returncode is not None:
        return True
    if not hasattr(os, "waitid"):
        return child.poll() is not None
    try:
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return ended is not None


def signal_group(child: subprocess.Popen, number: int) -> None:
    """A signal to a child's group, unless the child's number may be another's by now."""
    if child.returncode is not None or child.pid <= 1 or child.pid == os.getpgrp():
        return
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass
