"""RUN/.lock: one launcher for each run, and who it is."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pipeline.config import UserError
from pipeline.failures import cannot_write

from .processes import ask_to_end, birth

FILE = ".lock"
# Older versions wrote no birth.
LINE = re.compile(r"process (\d+) on (\S+?)(?:, born (\S+))?")
UNNAMED_S = 3.0  # that a launcher may take between its lock and its name in it


class Held(UserError):
    """Another launcher runs this run."""


@dataclass(frozen=True)
class Holder:
    """The launcher that a lock names.  born: as in `processes.birth`. "" of older versions."""

    pid: int
    host: str
    born: str = ""

    @classmethod
    def this(cls) -> Holder:
        return cls(os.getpid(), os.uname().nodename, birth(os.getpid()) or "")

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """None where the text names none."""
        match = LINE.fullmatch(text.strip())
        return cls(int(match[1]), match[2], match[3] or "") if match else None

    @property
    def line(self) -> str:
        born = f", born {self.born}" if self.born else ""
        return f"process {self.pid} on {self.host}{born}\n"

    @property
    def is_elsewhere(self) -> bool:
        return self.host != os.uname().nodename


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make RUN and hold RUN/.lock.

    Raises Held if another launcher holds it, UserError if RUN cannot be written or locked.
    """
    path = run / FILE
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = _opened(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise cannot_write(run, error) from None
    with file:
        if not _take(file, path, fcntl.LOCK_EX):
            raise _held(run, file.read())
        file.truncate(0)
        file.write(Holder.this().line)
        file.flush()
        yield


def is_held(run: Path) -> bool:
    """Whether a living launcher holds the lock. Asked without writing.

    Raises UserError where it cannot be known.
    """
    path = run / FILE
    try:
        file = _opened(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        return not _take(file, path, fcntl.LOCK_SH)


def stop_launcher(run: Path, patience_s: float) -> bool:
    """Ask the launcher that runs `run` to stop, as Ctrl-C does, and wait for it.

    Returns False if there is none.
    Raises UserError if it runs on another machine, is not the process that the lock names, or does
    not stop within `patience_s`.
    """
    began, asked = time.monotonic(), None
    while time.monotonic() - began < patience_s:
        if not is_held(run):
            return asked is not None
        if asked is None:
            asked = _asked(run)
            if asked is None and time.monotonic() - began > UNNAMED_S:
                raise UserError(
                    f"{run / FILE}: a process holds it, but not the one that it names "
                    f"({_text(run)}), so nothing was signalled; `fuser {run / FILE}` tells which"
                )
        time.sleep(0.1)
    if asked is None:
        return False
    raise UserError(f"process {asked.pid}, which runs {run}, did not stop within {patience_s:g} s")


def _asked(run: Path) -> Holder | None:
    """The holder, which was asked to end. None where the lock names no such process."""
    holder = Holder.parse(_text(run))
    if holder is None:
        return None
    if holder.is_elsewhere:
        raise _held(run, holder.line)
    return holder if ask_to_end(holder.pid, holder.born, run / FILE) else None


def _text(run: Path) -> str:
    try:
        with _opened(run / FILE, os.O_RDONLY) as file:
            return file.read(1000).strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _held(run: Path, text: str) -> Held:
    return Held(f"{run / FILE}: another launcher is running {run} ({text.strip()[:200]})")


def _opened(path: Path, flags: int) -> TextIO:
    """The lock's file. OSError for a link and for what is no file, which may be anybody's."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    mode = "r" if flags == os.O_RDONLY else "r+"
    return open(descriptor, mode, encoding="utf-8", errors="replace")


def _take(file: TextIO, path: Path, kind: int) -> bool:
    """Whether the lock was free.  Raises UserError where the file system has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as mistake:
        raise UserError(
            f"{path}: its file system cannot lock files (flock: {mistake.strerror}), which "
            "keeps two launchers apart; choose --run on another one"
        ) from None
    return True
