"""Files that somebody else made: only regular ones are opened, and JSON of one meaning is read.

A named pipe that nobody writes to is never read to its end, nor is a device.  No torch here.
"""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MOST_JSON = 1 << 30  # bytes. Groups of 16,777,216 classes take a seventh
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class NotRegular(ValueError):
    """A pipe, a device or a socket where a file is read."""


def not_regular(path: str | Path, mode: int) -> str:
    """Why a file of this mode is not read. Empty if it is regular."""
    if stat.S_ISREG(mode):
        return ""
    kind = KINDS.get(stat.S_IFMT(mode), "no file")
    return f"{path} is {kind}; only regular files are read"


def check_regular(path: str | Path) -> None:
    """Raises NotRegular, before a library opens the file, and OSError."""
    if reason := not_regular(path, os.stat(path).st_mode):
        raise NotRegular(reason)


def open_regular(path: str | Path) -> BufferedReader:
    """A file open for reading.  Raises NotRegular, and OSError (of a directory, too)."""
    # Without O_NONBLOCK opening a pipe that nobody writes already waits.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if reason := not_regular(path, os.fstat(descriptor).st_mode):
            raise NotRegular(reason)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, most: int = MOST_JSON) -> bytes:
    """What a file holds.  Raises ValueError for more than `most` bytes, NotRegular and OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= most else b""  # most would be allocated first
    if max(size, len(content)) > most:
        raise ValueError(f"it has more than {most} bytes, and is no such file")
    return content


def read_text(path: str | Path, encoding: str = "utf-8", most: int = MOST_JSON) -> str:
    """A file's text.  Raises as read_bytes does, and ValueError for other encodings."""
    return read_bytes(path, most).decode(encoding)


def read_json(path: str | Path) -> Any:
    """A JSON file's content.  Raises ValueError (see `parse`) and OSError."""
    return parse(read_text(path))


def parse(text: str | bytes) -> Any:
    """The value that JSON says.

    Raises ValueError for what is none, nests too deep, or says a key twice: of the two values
    every program takes another.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:100]!r} stands there twice")
    return values
