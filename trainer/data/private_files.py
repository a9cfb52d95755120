"""Files of a directory that several users share: none of them can make us write elsewhere.

Whoever may write to a directory can put a link where a file of a known name will be written.  So
what is written has a name that nobody can know and is made anew, and what has a known name is
locked and never written.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
import uuid
from pathlib import Path
from typing import BinaryIO

from pipeline.config import UserError

LOCK_S = 600.0  # a short piece of work, who holds its lock longer has stopped
LOOK_S = 0.05  # between attempts at a lock


def new_file(path: Path) -> BinaryIO:
    """A file made anew, open for reading and writing. Its name must not be one that is guessed."""
    return open(path, "x+b", opener=_not_followed)


def private_name(path: Path, ending: str) -> Path:
    """A name beside `path` that nobody can know beforehand."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{ending}")


def lock_file(path: Path) -> BinaryIO:
    """The file of a known name, made if need be, to be locked and nothing else.

    A link of that name is none of ours, and removed.  Raises OSError, and UserError for what is no
    regular file.
    """
    if path.is_symlink():
        path.unlink()
    file = open(path, "r+b", opener=_made_if_absent)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is no regular file, and none of ours; remove it")
    return file


def _not_followed(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _made_if_absent(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def is_ours(path: Path) -> bool:
    """Whether a file of that name is there: a link is none."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def lock(file: BinaryIO, path: Path) -> None:
    """Lock a file for a short piece of work.  UserError where another one does not let go."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path}: another process holds this lock for {LOCK_S:.0f} s; "
                    "end it (`fuser` names it), or choose another data.fetch_dir"
                ) from None
        time.sleep(LOOK_S)
