"""One pass over a webdataset tar: where each sample's files lie, their checksums, what is corrupt.

The result is kept beside the shard as NAME.tar.index.npz: later readers map it and go straight to
a sample with one `pread`.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
import tarfile
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .mapped import map_npz
from .texts import Texts

SCHEMA = 2
READABLE = (1, SCHEMA)  # 1 held keys, labels and reasons as arrays of fixed width
BLOCK = tarfile.BLOCKSIZE
# webdataset's rule: the key ends at the first dot of the base name.
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
BESIDE_A_GAP = "next to a corrupt part of the file"


@dataclass
class TarIndex:
    """The intact samples of one tar.  Sample i has rows member_start[i] : member_start[i + 1].

    sha256, bytes:     of the whole file.
    label:             the member (or "json:FIELD") that label_texts was read from.
    keys:              of each sample [n].
    label_texts:       the distinct raw labels [l], in the order in which they come.
    label_number:      int32 [n], the index of each sample's label in label_texts.
    extensions:        str [k].
    member_extension:  int16 [m], indices into `extensions`.
    offset, size:      int64 [m].
    crc:               uint32 [m], zlib's.
    damaged, reasons:  [d], of each sample (or place) that is not among the intact ones.
    countable:         False where something is unreadable, so that the tar alone cannot say how
                       many samples are lost.
    """

    sha256: str
    bytes: int
    label: str
    keys: Texts
    label_texts: Texts
    label_number: np.ndarray
    member_start: np.ndarray
    extensions: np.ndarray
    member_extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    damaged: Texts
    reasons: Texts
    countable: bool

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, kept: np.ndarray) -> TarIndex:
        """The same index with only the samples where `kept` (bool [n]) holds."""
        lengths = np.diff(self.member_start)
        rows = np.repeat(kept, lengths)
        start = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
        return replace(
            self,
            keys=self.keys.take(kept),
            label_number=self.label_number[kept],
            member_start=start,
            member_extension=self.member_extension[rows],
            offset=self.offset[rows],
            size=self.size[rows],
            crc=self.crc[rows],
        )


def split_name(name: str) -> tuple[str, str] | None:
    """("a/b", "png") of "a/b.png", as webdataset splits it; None for files that it passes over."""
    match = NAME.fullmatch(name)
    if not match or re.match(r"__[^/]*__($|/)", name):
        return None
    return match.group(1), match.group(2).lower()


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_label(content: bytes, label: str) -> str:
    """The raw label; trainer.data.labels says what it means.  Raises ValueError with the reason.

    content: the member `cls`, or the json of "json:FIELD".  Bytes that are not UTF-8 stay, as
    surrogates.
    """
    kind, colon, field = label.partition(":")
    if not colon:
        return content.decode("utf-8", "surrogateescape").strip()
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{kind} member is not valid JSON") from None
    value = parsed.get(field) if isinstance(parsed, dict) else None
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"{kind} member has no field {field!r} that is a number or a name")
    return json.dumps(value)  # a name keeps its quotes, which tell it from a number


def scan_tar(path: str | Path, label: str = "cls") -> TarIndex:
    """Read a tar once: headers, checksums, labels.

    Corruption is listed, not raised.

    Parameters
    ----------
    path : path
    label : str
        The member with the label, or "json:FIELD"; "" reads none: unlabelled samples.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    if os.path.getsize(path) == 0:
        return _as_index(path, label, [], [("", "is an empty file")], countable=False)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        grouping = _Grouping(label)
        for name, offset, size in _files(content):
            if offset < 0:
                grouping.gap(reason=name)
            else:
                grouping.add(name, offset, size)
        grouping.close()
        corruption = grouping.corruption
        samples: list[_Sample] = []
        for key, extents in grouping.samples:
            try:
                text = _label_text(content, extents, label)
            except ValueError as reason:
                corruption.append((key, str(reason)))
                continue
            rows = {
                extension: _Row(offset, size, zlib.crc32(content[offset : offset + size]))
                for extension, (offset, size) in extents.items()
            }
            samples.append(_Sample(key, rows, text))
        return _as_index(path, label, samples, corruption, grouping.countable)


class _Row(NamedTuple):
    offset: int
    size: int
    crc: int


class _Sample(NamedTuple):
    key: str
    rows: dict[str, _Row]  # by extension
    label_text: str


class _Grouping:
    """Puts neighbouring files of one key together, as webdataset does.

    samples:    (key, {extension: (offset, size)}).
    corruption: (key or "", reason).
    countable:  as in TarIndex.
    """

    def __init__(self, label: str):
        self.label = label
        self.samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        self.corruption: list[tuple[str, str]] = []
        self.countable = True
        self._seen: set[str] = set()
        self._begin(None, "")

    def _begin(self, key: str | None, doubt: str) -> None:
        """doubt: why the sample cannot be trusted, "" if nothing speaks against it."""
        self._key = key
        self._extents: dict[str, tuple[int, int]] = {}
        self._doubt = doubt

    def add(self, name: str, offset: int, size: int) -> None:
        """The next file of the tar."""
        parts = split_name(name)
        if parts is None:
            return
        key, extension = parts
        if key != self._key:
            behind_a_gap = self._doubt if self._key is None else ""
            self.close()
            self._begin(key, behind_a_gap)
        if extension in self._extents:
            self._doubt = self._doubt or f"two members are called {name}"
        self._extents[extension] = (offset, size)

    def gap(self, reason: str) -> None:
        """An unreadable part of the tar: what stood next to it may have lost files."""
        self._doubt = self._doubt or BESIDE_A_GAP
        self.close()
        self._begin(None, BESIDE_A_GAP)
        self.corruption.append(("", reason))
        self.countable = False

    def close(self) -> None:
        """End the current sample."""
        if self._key is None:
            return
        reason = self._doubt or _what_is_wrong(self._extents, self.label)
        if self._key in self._seen:
            reason = reason or "its key occurs twice, apart from each other"
        self._seen.add(self._key)
        if reason:
            self.corruption.append((self._key, reason))
        else:
            self.samples.append((self._key, self._extents))


def _what_is_wrong(extents: dict[str, tuple[int, int]], label: str) -> str:
    """Why the files of a key are no labelled sample, or ""."""
    if not label:
        return ""
    label_extension = label.partition(":")[0]
    if label_extension not in extents:
        reason = f"has no member .{label_extension}"
        dotted = [extension for extension in extents if "." in extension]
        if dotted:
            reason += (
                f": a key ends at its first dot, so .{dotted[0]} is taken for its extension; "
                "rename the files without dots in their keys"
            )
        return reason
    if len(extents) == 1 and ":" not in label:
        return f"has only the member .{label_extension}"
    for extension in extents:
        if extension.endswith(f".{label_extension}"):
            return f"dots in its key merge samples: it has both .{label_extension} and .{extension}"
    return ""


def _label_text(content: mmap.mmap, extents: dict[str, tuple[int, int]], label: str) -> str:
    if not label:
        return ""
    offset, size = extents[label.partition(":")[0]]
    return read_label(content[offset : offset + size], label)


def _files(content: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each plain file in the tar.

    Where it is corrupt, (what is wrong, -1, 0); then it goes on behind that.
    """
    # tarfile's own loop takes a broken header for the end of the archive, so only its header parser
    # is used here: the archive is opened on an empty one, and headers are then read from `content`,
    # one by one.
    archive = tarfile.open(fileobj=io.BytesIO(bytes(tarfile.RECORDSIZE)), mode="r:")
    archive.fileobj = content  # pyright: ignore[reportAttributeAccessIssue] - reads, seeks and tells
    end = len(content)
    offset = 0
    while True:
        content.seek(min(offset, end))
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue] - not in stubs
            following = _next_header(content, offset + BLOCK)
            if following == end:
                return
            yield f"zeros at byte {offset}, with more samples behind them", -1, 0
            offset = following
            continue
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, OSError):
            following = _next_header(content, offset + BLOCK)
            yield _unreadable(offset, following, end), -1, 0
            if following == end:
                return
            offset = following
            continue
        if member.size < 0 or member.offset_data + member.size > end:
            yield f"is cut off within {member.name}", -1, 0
            return
        if member.isreg():
            if member.issparse():
                yield f"{member.name} is a sparse file", -1, 0
            else:
                yield member.name, member.offset_data, member.size
        offset = max(archive.offset, offset + BLOCK)


def _unreadable(offset: int, following: int, end: int) -> str:
    if offset >= end:
        return "is cut off: it has no end mark"
    return f"bytes {offset} to {following} are unreadable"


def _next_header(content: mmap.mmap, offset: int) -> int:
    """Start of the first valid header at or behind `offset`; the file's length if there is none."""
    magic = content.find(b"ustar", offset)
    while magic >= 0:
        start = magic - 257
        if start >= offset and start % BLOCK == 0:
            try:
                tarfile.TarInfo.frombuf(content[start : start + BLOCK], "utf-8", "surrogateescape")
                return start
            except tarfile.HeaderError:
                pass
        magic = content.find(b"ustar", magic + 1)
    return len(content)


def _as_index(
    path: str | Path,
    label: str,
    samples: Sequence[_Sample],
    corruption: Sequence[tuple[str, str]],
    countable: bool,
) -> TarIndex:
    extensions = sorted(set().union(*(sample.rows for sample in samples)))
    number_of = {extension: number for number, extension in enumerate(extensions)}
    rows: list[tuple[int, int, int, int]] = []
    for sample in samples:
        for name, row in sample.rows.items():
            rows.append((number_of[name], row.offset, row.size, row.crc))
    extension, offset, size, crc = np.array(rows, np.int64).reshape(-1, 4).T
    lengths = [len(sample.rows) for sample in samples]
    label_numbers: dict[str, int] = {}
    label_number = [
        label_numbers.setdefault(sample.label_text, len(label_numbers)) for sample in samples
    ]
    return TarIndex(
        sha256=file_sha256(path),
        bytes=os.path.getsize(path),
        label=label,
        keys=Texts.of(sample.key for sample in samples),
        label_texts=Texts.of(label_numbers),
        label_number=np.array(label_number, np.int32),
        member_start=np.cumsum([0, *lengths]).astype(np.int64),
        extensions=np.array(extensions, dtype=np.str_),
        member_extension=extension.astype(np.int16),
        offset=offset,
        size=size,
        crc=crc.astype(np.uint32),
        damaged=Texts.of(key for key, _ in corruption),
        reasons=Texts.of(reason for _, reason in corruption),
        countable=countable,
    )


def index_path(shard: str | Path) -> Path:
    return Path(f"{shard}.index.npz")


def index_bytes(index: TarIndex) -> int:
    """At least what `save_index` writes: the arrays, and the headers of a member for each."""
    values = _as_arrays(index).values()
    return sum(np.asarray(value).nbytes for value in values) + 512 * (len(values) + 2)


def _as_arrays(index: TarIndex) -> dict:
    values: dict = {}
    for field in fields(index):
        value = getattr(index, field.name)
        if isinstance(value, Texts):
            values[field.name], values[f"{field.name}_start"] = value.buffer, value.start
        else:
            values[field.name] = value
    return values


def save_index(shard: str | Path, index: TarIndex) -> bool:
    """Keep `index` beside the shard, with the shard's size and time.

    The file itself gets the shard's time as well, see `is_fresh`.
    False where the directory cannot be written.
    """
    stat = os.stat(shard)
    path = index_path(shard)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.npz")
    values = _as_arrays(index)
    try:
        np.savez(temporary, schema=SCHEMA, stat=[stat.st_size, stat.st_mtime_ns], **values)
        os.utime(temporary, ns=(time.time_ns(), stat.st_mtime_ns))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def is_fresh(shard: str | Path, size: int) -> bool:
    """Whether the shard has `size` bytes and the time of its index: nothing is opened.

    An index gets its shard's time when the two were last compared.
    """
    try:
        now, index = os.stat(shard), os.stat(index_path(shard))
    except OSError:
        return False
    return now.st_size == size and now.st_mtime_ns == index.st_mtime_ns


def load_index(shard: str | Path, check: bool = True) -> tuple[TarIndex, bool] | None:
    """(index, whether size and time of the shard are still those indexed).

    Its arrays are mapped.  None where there is no readable index.  check: compare it with its
    checksums, which touches all of it.
    """
    path = index_path(shard)
    try:
        arrays = map_npz(path, check)
        if int(arrays["schema"]) not in READABLE:
            return None
        values = _of_schema_1(arrays) if int(arrays["schema"]) == 1 else _of_schema_2(arrays)
        stat = arrays["stat"].tolist()
    except Exception:
        # A half-written or foreign file: numpy and zipfile raise a dozen kinds.  It is rebuilt.
        return None
    for name, kind in (("sha256", str), ("bytes", int), ("label", str), ("countable", bool)):
        values[name] = kind(values[name])
    now = os.stat(shard)
    unchanged = stat == [now.st_size, now.st_mtime_ns]
    if unchanged and not is_fresh(shard, now.st_size):
        with suppress(OSError):  # a directory that cannot be written
            os.utime(path, ns=(time.time_ns(), now.st_mtime_ns))
    return TarIndex(**values), unchanged


TEXTS = ("keys", "label_texts", "damaged", "reasons")


def _of_schema_2(file: Mapping[str, np.ndarray]) -> dict:
    values: dict = {field.name: file[field.name] for field in fields(TarIndex)}
    for name in TEXTS:
        values[name] = Texts(values[name], file[f"{name}_start"])
    return values


def _of_schema_1(file: Mapping[str, np.ndarray]) -> dict:
    names = {field.name for field in fields(TarIndex)} - {"label_number"}
    values: dict = {name: file[name] for name in names}
    distinct, numbers = np.unique(values["label_texts"], return_inverse=True)
    values["label_texts"] = distinct
    values["label_number"] = numbers.reshape(-1).astype(np.int32)
    for name in TEXTS:
        values[name] = Texts.of(values[name].tolist())
    return values


def intact(shard: str | Path, index: TarIndex) -> np.ndarray:
    """bool [n]: the samples whose files still have the checksums that the index recorded."""
    good = np.ones(len(index), bool)
    with open(shard, "rb") as file:
        for sample in range(len(index)):
            for row in range(index.member_start[sample], index.member_start[sample + 1]):
                size = int(index.size[row])
                content = os.pread(file.fileno(), size, int(index.offset[row]))
                if len(content) != size or zlib.crc32(content) != index.crc[row]:
                    good[sample] = False
    return good
