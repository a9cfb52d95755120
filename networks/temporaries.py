"""Hidden names for files that are still being written, and the removal of stale ones.

A name says which process on which machine writes: `.NAME.HOST.PID-BORN.TOKEN`, where BORN tells it
from other processes of that number.  What a killed process left behind is removed at the next
start, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from .births import birth, is_hidden

# Earlier versions wrote no birth.
NAME = re.compile(
    r"\..+\.(?P<host>[\w-]+)\.(?P<pid>\d+)(-(?P<born>[0-9a-f]{8}))?\.[0-9a-f]{8}(\.pt2|\.onnx)?"
)
# Names that do not say who writes: of earlier versions, and of `clustering`.
FORMER = re.compile(r"\..+\.([0-9a-f]{8}|[0-9a-f]{32})(\.npz)?|\.\w+\.(safetensors|json)\.\d+")
LONGEST_WRITE_S = 24 * 3600.0  # a file that was not written to for so long has no writer


def temporary_beside(path: Path) -> Path:
    """A new hidden name in the directory of `path`, which says whose it is."""
    token = uuid.uuid4().hex[:8]
    return path.with_name(f".{path.name}.{_host()}.{_process(os.getpid())}.{token}")


@contextmanager
def appearing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A hidden name to write to. It becomes `path` if the block ends without an error.

    suffix: of that name, for a writer that goes by it.
    """
    temporary = temporary_beside(path)
    written = temporary.with_name(temporary.name + suffix)
    try:
        yield written
        os.replace(written, path)
    finally:
        discard(written)


@lru_cache(maxsize=1)
def _process(pid: int) -> str:
    """PID-BORN of this process. PID where nothing tells its birth."""
    mark = birth(pid)
    return f"{pid}-{_short(mark)}" if mark else str(pid)


def _short(mark: str) -> str:
    return hashlib.sha256(mark.encode()).hexdigest()[:8]


def sweep(directory: Path, recursive: bool = True) -> list[Path]:
    """Remove the temporaries in `directory` whose writer is dead, and return their names.

    On another machine, and where a name has no birth, a writer is dead after LONGEST_WRITE_S.
    What cannot be removed stays.
    """
    swept = []
    for path in _hidden(directory, recursive):
        if _is_abandoned(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                discard(path)
            swept.append(path)
    return swept


def _hidden(directory: Path, recursive: bool) -> Iterator[Path]:
    for place, folders, files in os.walk(directory):
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        for name in hidden:
            yield Path(place, name)


def _is_abandoned(path: Path) -> bool:
    match = NAME.fullmatch(path.name)
    if match is None and FORMER.fullmatch(path.name) is None:
        return False
    try:
        age = time.time() - path.lstat().st_mtime
    except OSError:
        return False
    if match is None or match["host"] != _host():
        return age > LONGEST_WRITE_S
    pid, born = int(match["pid"]), match["born"]
    mark = birth(pid)
    if mark is not None and born:
        # Known for certain, whatever the clock says, which somebody may have set forward.
        return _short(mark) != born
    is_there = mark is not None or is_hidden(pid)
    return not is_there or age > LONGEST_WRITE_S


def discard(path: Path) -> None:
    """Remove a temporary, if that can be done. What went wrong before is what is to be said.

    On a read-only file system even a name that is not there cannot be removed.
    """
    try:
        path.unlink()
    except OSError:
        pass


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:32]
