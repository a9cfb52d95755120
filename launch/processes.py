"""Identify processes by more than their pid, which may have been reused.

Whatever is signalled from what a file says is signalled here: `ask_to_end`.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.files import birth as birth
from pipeline.files import is_born


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
