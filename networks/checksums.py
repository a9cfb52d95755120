"""Record what a file holds when it is written, and detect later changes.

A manifest is a JSON object with the key "files": {name: {"bytes": n, "xxh3_128": "..."}}, names
relative to the directory in which it lies: DONE of a stage's attempt.  Whoever reads a file of such
a directory has it compared first, once per process.  A bundle has SHA256SUMS instead, since people
compare these too: networks.integrity reads both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypedDict

from xxhash import xxh3_128

from . import regular

DONE = "DONE"
DEPTH = 3  # directories between a file and its manifest, at most
CHUNK = 1 << 20


class Entry(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    xxh3_128: str


class ChangedFile(ValueError):
    """A file differs from its manifest: says which file, what is wrong and what to do."""


class Hashing:
    """A file to write to, whose content is hashed on the way."""

    def __init__(self, file):
        self.file = file
        self.bytes = 0
        self._state = xxh3_128()

    def write(self, content) -> int:
        self._state.update(content)
        self.bytes += memoryview(content).nbytes
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()

    @property
    def entry(self) -> Entry:
        return {"bytes": self.bytes, "xxh3_128": self._state.hexdigest()}


def entry_of(path: str | Path) -> Entry:
    """Size and checksum of a file as it is now."""
    state, buffer, size = xxh3_128(), bytearray(CHUNK), 0
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(view[:count])
            size += count
    return {"bytes": size, "xxh3_128": state.hexdigest()}


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """Checksum of bytes in memory, given in parts."""
    state = xxh3_128()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def entries_of(directory: Path, is_listed: Callable[[str], bool]) -> dict[str, Entry]:
    """{name: entry} of the files below `directory` whose relative name `is_listed`."""
    entries = {}
    for place, folders, files in os.walk(directory):
        folders.sort()
        for file in sorted(files):
            name = os.path.relpath(os.path.join(place, file), directory)
            if is_listed(name):
                entries[name] = entry_of(Path(place, file))
    return entries


def lacks(path: Path, entry: Entry) -> str:
    """What is wrong with a file, judged by its size alone. Empty if nothing is."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if size != entry["bytes"]:
        return f"it has {size:,} bytes instead of {entry['bytes']:,}"
    return ""


def differs(path: Path, entry: Entry, content: bytes | None = None) -> str:
    """What is wrong with a file's content. Empty if nothing is. Compared once per process.

    content: what was read of it. None reads the file.
    """
    reason = lacks(path, entry)
    if reason:
        return reason
    mark = (*_mark(path), entry["xxh3_128"])
    if mark in _compared:
        return ""
    digest = entry_of(path)["xxh3_128"] if content is None else digest_of([content])
    if digest != entry["xxh3_128"]:
        return "its checksum is another"
    _compared.add(mark)
    return ""


def _mark(path: str | Path) -> tuple[int, int, int, int]:
    """What changes when a file is replaced or written to."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


_compared: set[tuple] = set()  # files of this process that are what their manifest says
# A path that was compared -> the marks of file and manifest, and the manifest.
_checked: dict[str, tuple[tuple, tuple, Path]] = {}


class Recorded(NamedTuple):
    """A file's entry and the manifest that has it."""

    entry: Entry
    manifest: Path


def recorded(path: str | Path) -> Recorded | None:
    """A file's entry and its manifest. None if no manifest lists it, as in older runs.

    It lies in the directory of the file (of the linked one), or above.  A file that a stage
    published in RUN is in that stage's: RUN/*/DONE.
    """
    real = Path(os.path.realpath(path))
    for directory in real.parents[:DEPTH]:
        manifest = directory / DONE
        content = _content(manifest)
        if content is None:
            continue
        entry = _files(content, manifest).get(str(real.relative_to(directory)))
        if entry:
            return Recorded(entry, manifest)
    for manifest in sorted(real.parent.glob(f"*/{DONE}")):
        content = _content(manifest) or {}
        entry = _files(content, manifest).get(real.name)
        if entry and real.name in (content.get("published") or ()):
            return Recorded(entry, manifest)
    return None


def _files(content: dict, manifest: Path) -> dict[str, Entry]:
    try:
        return files_of(content)
    except ValueError as error:
        raise ChangedFile(f"{manifest} is damaged: {error}; {remedy(manifest)}") from None


def _content(manifest: Path) -> dict | None:
    try:
        return _parsed(str(manifest), _mark(manifest))
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=64)
def _parsed(manifest: str, mark: tuple) -> dict | None:
    """mark: of the manifest, so that another one is read again."""
    content = regular.read_json(manifest)
    return content if isinstance(content, dict) else None


def check(*paths: str | Path) -> None:
    """Compare files with their manifests, if they have any.  Raises ChangedFile."""
    for path in paths:
        check_content(path, None)


def check_content(path: str | Path, content: bytes | None) -> None:
    """Compare a file with its manifest, if it has one.  Raises ChangedFile.

    content: what was read of it. None reads the file.  A file that was compared is looked up in its
    manifest again when one of the two has changed.
    """
    if _is_unchanged(str(path)):
        return
    known = recorded(path)
    if known is None:
        return
    reason = differs(Path(path), known.entry, content)
    if reason:
        raise ChangedFile(f"{path} is damaged: {reason}; {remedy(known.manifest)}")
    _checked[str(path)] = _mark(path), _mark(known.manifest), known.manifest


def _is_unchanged(path: str) -> bool:
    """Whether file and manifest are those that were compared."""
    if path not in _checked:
        return False
    of_file, of_manifest, manifest = _checked[path]
    try:
        return _mark(path) == of_file and _mark(manifest) == of_manifest
    except OSError:
        return False


def remedy(manifest: Path) -> str:
    """How to repair a damaged file of this manifest."""
    stage = manifest.parent
    if stage.parent.name == "attempts":
        stage = stage.parent.parent
    markers = [str(stage / name) for name in (DONE, "WINNER") if (stage / name).exists()]
    return f"remove {' and '.join(markers) or stage / DONE}, then `referral run` makes it again"


def files_of(content: Mapping) -> dict[str, Entry]:
    """The files that a manifest lists. None in DONE of earlier versions.

    Raises ValueError for a list that is none.
    """
    files = content.get("files") or {}
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise ValueError('"files" is no list of checksums')
    return files


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    return isinstance(entry.get("bytes"), int) and isinstance(entry.get("xxh3_128"), str)
