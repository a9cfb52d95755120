"""Check network files from elsewhere, and report damage in one line with the file's name.

A bundle has checksums beside it, `sha256sum -c` reads them too: a file that they list is compared
whenever it is read.  Without them, and for what they do not list, a file is held against its form
and against the network's.  No torch here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import checksums, regular
from .temporaries import appearing

CHECKSUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
LEVELS = 3  # from a file up to its bundle: students/NAME/model.json
LARGEST = 2**31 - 1  # a whole number in a file of a network's
# What code raises that meets values of another form than it expects. Torch says RuntimeError.
OTHER_FORM = (
    AttributeError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    NotImplementedError,
)
OUT_OF_MEMORY = ("allocate memory", "out of memory")


@contextmanager
def blamed_on(path: str | Path) -> Iterator[None]:
    """Turn whatever fails in here, over a file's values, into a ValueError that names it.

    A ValueError keeps its message.
    """
    try:
        yield
    except OTHER_FORM as error:
        text = " ".join(str(error).split())
        if any(words in text for words in OUT_OF_MEMORY):
            raise
        reason = f"{type(error).__name__}: {text[:200]}"
        raise ValueError(f"{path} is damaged, or not of this version ({reason})") from None


def read_values(path: str | Path) -> Any:
    """The content of a JSON file, compared with its checksum.

    Raises ValueError, naming the file, for one that cannot be read, is not JSON, or holds a whole
    number that is beyond any network's.
    """
    path = Path(path)
    content = read_content(path)
    try:
        values = regular.parse(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    with blamed_on(path):
        check_numbers(values, path)
    return values


def check_numbers(values: Any, path: Path) -> None:
    """Raise ValueError for a whole number so large that it would take all memory."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        # Most of what is looked at are classes of specialists, and names of a million classes.
        kinds = {*map(type, values)}
        if kinds == {int} and -LARGEST <= min(values) <= max(values) <= LARGEST:
            return
        if kinds == {str}:
            return
        for value in values:
            check_numbers(value, path)
    elif isinstance(values, int) and not -LARGEST <= values <= LARGEST:
        raise ValueError(f"{path}: {str(values)[:30]} is larger than a network's file may say")


# Checksums


def write_checksums(root: Path) -> None:
    """ROOT/SHA256SUMS, of every file below ROOT."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    lines = [f"{_sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in files]
    with appearing(root / CHECKSUMS) as unfinished:
        unfinished.write_text("".join(lines), encoding="utf-8")


def read_content(path: Path) -> bytes:
    """What a file holds, compared with its checksum. It is read once for both.

    Raises ValueError, naming the file, as check_file does, and for one that cannot be read.
    """
    try:
        content = regular.read_bytes(path)
    except OSError as error:
        # What a manifest says of a file that is missing tells more.
        check_file(path)
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except regular.NotRegular:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_file(path, content)
    return content


def check_file(path: Path, content: bytes | None = None) -> None:
    """Raise ValueError if a stage's DONE or a SHA256SUMS lists another checksum for a file.

    content: what was read of it. None reads the file.
    """
    checksums.check_content(path, content)
    absolute = os.path.abspath(path)
    root = absolute
    for _ in range(LEVELS):
        root = os.path.dirname(root)
        sums = os.path.join(root, CHECKSUMS)
        try:
            status = os.stat(sums)
        except OSError:
            continue
        listed = _listed(Path(sums), status.st_mtime_ns, status.st_size)
        said = listed.get(Path(absolute).relative_to(root).as_posix())
        if said is not None and said != _sha256(path, content):
            raise ValueError(
                f"{path} is damaged: it is not what {sums} says; restore it, or export it again"
            )
        return


@lru_cache(maxsize=64)
def _listed(path: Path, mtime_ns: int, size: int) -> dict[str, str]:
    """{file: sha256}. mtime_ns, size: of the list, so that another one is read again."""
    try:
        lines = regular.read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    matches = [LINE.fullmatch(line) for line in lines]
    if not all(matches):
        raise ValueError(f"{path} is damaged: its lines are not of sha256sum; restore it")
    return {match[2]: match[1] for match in matches if match is not None}


def _sha256(path: Path, content: bytes | None = None) -> str:
    if content is not None:
        return hashlib.sha256(content).hexdigest()
    try:
        with regular.open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
