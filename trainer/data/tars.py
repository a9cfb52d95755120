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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from networks.checksums import digest_of
from networks.temporaries import discard, sweep, temporary_beside
from pipeline.config import UserError

from .bounds import (
    HEADER_BYTES,
    HEADERS,
    JSON_BYTES,
    LABEL_BYTES,
    MEMBER_BYTES,
    NAME_BYTES,
    SAMPLE_MEMBERS,
    SHARD_EXTENSIONS,
    SHARD_MEMBERS,
    abbreviated,
    exceeds,
    open_regular,
)
from .mapped import map_npz
from .texts import Texts

SCHEMA = 3
# 1 held keys, labels and reasons as arrays of fixed width. 1 and 2 had no digest of the whole.
READABLE = (1, 2, SCHEMA)
BLOCK = tarfile.BLOCKSIZE
# webdataset's rule: the key ends at the first dot of the base name.
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
MAGIC, TYPE = 257, 156  # where in a header "ustar" and the member's type stand
# Types of headers that say something about the next one: pax, GNU's long names, Solaris' pax.
EXTENDED = (b"x", b"g", b"X", b"L", b"K")
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
        """The index with only the samples where `kept` (bool [n]) holds."""
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
    """("a/b", "png") of "a/b.png", as webdataset splits it. None for files that it passes over."""
    match = NAME.fullmatch(name)
    if not match or re.match(r"__[^/]*__($|/)", name):
        return None
    return match.group(1), match.group(2).lower()


def file_sha256(path: str | Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_label(content: bytes, label: str) -> str:
    """The raw label. trainer.data.labels says what it means.  Raises ValueError with the reason.

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
    text = json.dumps(value)  # a name keeps its quotes, which tell it from a number
    if reason := exceeds(f"its label ({label})", len(text), LABEL_BYTES):
        raise ValueError(reason)
    return text


def scan_tar(path: str | Path, label: str = "cls") -> TarIndex:
    """Read a tar once: headers, checksums, labels.

    Corruption is listed, not raised.

    Parameters
    ----------
    path : path
    label : str
        The member with the label, or "json:FIELD". "" reads none: unlabelled samples.

    Raises
    ------
    OSError
        If the file cannot be read.
    UserError
        For what is no regular file, and for a tar of more members than bounds.py has it.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return _as_index(path, label, [], [("", "is an empty file")], countable=False)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _scan(path, content, label)


def plain_files(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each plain file in a tar. What is corrupt is passed over.

    Raises as scan_tar.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for name, offset, size in _files(content):
                if 0 <= offset and size <= MEMBER_BYTES:
                    yield name, content[offset : offset + size]


def _scan(path: str | Path, content: mmap.mmap, label: str) -> TarIndex:
    with memoryview(content) as view:
        grouping = _Grouping(label)
        for number, (name, offset, size) in enumerate(_files(content)):
            if reason := exceeds("it", number + 1, SHARD_MEMBERS, "members"):
                raise UserError(f"{path}: {reason}; divide it into several shards")
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
                extension: _Row(offset, size, zlib.crc32(view[offset : offset + size]))
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
        encoded = len(name.encode("utf-8", "surrogateescape"))
        too_long = exceeds("its name", encoded, NAME_BYTES)
        if too_long:
            # The sample is lost. What names it, and what is kept of it, is short.
            digest = hashlib.sha256(name.rpartition(".")[0].encode("utf-8", "surrogateescape"))
            start, end = abbreviated(name).replace(".", "_"), name[-32:].rpartition(".")[2]
            name = f"{start} {digest.hexdigest()[:8]}.{end}"
        parts = split_name(name)
        if parts is None:
            return
        key, extension = parts
        if key != self._key:
            behind_a_gap = self._doubt if self._key is None else ""
            self.close()
            self._begin(key, behind_a_gap)
        self._doubt = self._doubt or too_long
        self._doubt = self._doubt or exceeds(f"its member .{extension}", size, MEMBER_BYTES)
        if len(self._extents) >= SAMPLE_MEMBERS:
            self._doubt = f"it has more than {SAMPLE_MEMBERS} members"
            return
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
    kind, colon, _ = label.partition(":")
    offset, size = extents[kind]
    limit = JSON_BYTES if colon else LABEL_BYTES
    if reason := exceeds(f"its label (.{kind})", size, limit):
        raise ValueError(reason)
    return read_label(content[offset : offset + size], label)


def _files(content: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each plain file in the tar.

    Where it is corrupt, (what is wrong, -1, 0). Then it goes on behind that.
    """
    # tarfile's own loop takes a broken header for the end of the archive, so only its header parser
    # is used here: the archive is opened on an empty one, and headers are then read from `content`,
    # one by one.
    archive = tarfile.open(fileobj=io.BytesIO(bytes(tarfile.RECORDSIZE)), mode="r:")
    archive.fileobj = content  # pyright: ignore[reportAttributeAccessIssue] - reads, seeks and tells
    end = len(content)
    offset = 0
    global_bytes = 0  # of pax headers for all members behind them
    while True:
        behind, refused, global_bytes = _extended_headers(content, offset, global_bytes)
        if refused:
            following = _next_header(content, behind)
            yield refused, -1, 0
            if following == end:
                return
            offset = following
            continue
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
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, OSError, MemoryError):
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
    """Start of the first valid header at or behind `offset`. The file's length if there is none."""
    start = -(-offset // BLOCK) * BLOCK
    while True:
        magic = content.find(b"ustar", start + MAGIC)
        if magic < 0:
            return len(content)
        # Once a block: a tar full of these letters is passed over as fast as any.
        start = (magic - MAGIC) // BLOCK * BLOCK
        if magic - MAGIC == start:
            try:
                tarfile.TarInfo.frombuf(content[start : start + BLOCK], "utf-8", "surrogateescape")
                return start
            except (tarfile.HeaderError, ValueError):
                pass
        start += BLOCK


def _extended_headers(content: mmap.mmap, offset: int, global_bytes: int) -> tuple[int, str, int]:
    """The pax and longname headers at `offset`, before tarfile reads them.

    It reads them by recursion, whole, and copies the global ones for every member.
    Returns (where they end, why they are refused or "", bytes of global headers so far).
    """
    count = total = 0
    while content[offset + TYPE : offset + TYPE + 1] in EXTENDED:
        kind = content[offset + TYPE]
        try:
            header = content[offset : offset + BLOCK]
            size = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
        except (tarfile.HeaderError, ValueError):
            break  # tarfile finds it broken, too
        count, total = count + 1, total + max(0, size)
        start, offset = offset + BLOCK, offset + BLOCK - (-max(0, size) // BLOCK) * BLOCK
        if chr(kind) == "g":
            global_bytes += total
        limited = max(total, global_bytes)
        refused = exceeds("a chain of pax and longname headers", limited, HEADER_BYTES)
        refused = refused or exceeds("a chain of headers", count, HEADERS, "headers")
        if not refused and chr(kind) in "xgX":
            refused = _wrong_pax(content[start : start + size])
        if refused:
            return offset, f"{_following_name(content, offset)}: {refused}", global_bytes
    return offset, "", global_bytes


def _wrong_pax(records: bytes) -> str:
    """Why pax records are not given to tarfile. "" where each is `LENGTH KEY=VALUE` and a newline.

    Its search goes on through what is none, record by record.
    """
    place = 0
    while place < len(records) and records[place]:
        digits, space, _ = records[place : place + 20].partition(b" ")
        if not (space and digits.isdigit()):
            return "a pax header is broken"
        end = place + int(digits)
        record = records[place:end]
        if not int(digits) or end > len(records) or record[-1:] != b"\n" or b"=" not in record:
            return "a pax header is broken"
        if record[len(digits) + 1 :].startswith(b"GNU.sparse"):
            return "it is a sparse file"
        place = end
    return ""


def _following_name(content: mmap.mmap, offset: int) -> str:
    """The short name of the member behind its extended headers, for a message."""
    name = content[offset : offset + 100].partition(b"\0")[0].decode("utf-8", "replace")
    return f"the member at byte {offset} ({abbreviated(name) or 'without a name'})"


def _as_index(
    path: str | Path,
    label: str,
    samples: Sequence[_Sample],
    corruption: Sequence[tuple[str, str]],
    countable: bool,
) -> TarIndex:
    extensions = sorted(set().union(*(sample.rows for sample in samples)))
    if reason := exceeds("it", len(extensions), SHARD_EXTENSIONS, "kinds of members"):
        raise UserError(
            f"{path}: {reason}; a key ends at its first dot, what follows is the kind: rename them"
        )
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
    return sum(value.nbytes for value in values) + 512 * (len(values) + 4)


def _as_arrays(index: TarIndex) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for field in fields(index):
        value = getattr(index, field.name)
        if isinstance(value, Texts):
            values[field.name], values[f"{field.name}_start"] = value.buffer, value.start
        else:
            values[field.name] = np.asarray(value)
    return values


def save_index(shard: str | Path, index: TarIndex) -> bool:
    """Keep `index` beside the shard, with the shard's size and time.

    The file itself gets the shard's time as well, see `is_fresh`.
    False where the directory cannot be written.
    """
    stat = os.stat(shard)
    path = index_path(shard)
    _sweep_once(path.parent)
    temporary = temporary_beside(path)
    values = _as_arrays(index)
    values["stat"] = np.array([stat.st_size, stat.st_mtime_ns], np.int64)
    values["schema"] = np.asarray(SCHEMA)
    try:
        with open(temporary, "wb") as file:
            arrays: dict[str, Any] = values | {"digest": np.asarray(_digest(values))}
            np.savez(file, **arrays)
        os.utime(temporary, ns=(time.time_ns(), stat.st_mtime_ns))
        os.replace(temporary, path)
    except OSError:
        discard(temporary)
        return False
    return True


def _digest(values: Mapping[str, np.ndarray]) -> str:
    """A hash of all arrays of an index, and so of the shard's sha256, size and time."""
    parts: list[bytes | memoryview] = []
    for name in sorted(values):
        array = np.ascontiguousarray(values[name])
        parts.append(f"{name} {array.dtype.str} {array.shape};".encode())
        parts.append(array.reshape(-1).view(np.uint8).data)
    return digest_of(parts)


def _sweep_once(directory: Path) -> None:
    """Remove what killed processes left beside the shards. Once per process and directory."""
    if directory not in _swept:
        _swept.add(directory)
        sweep(directory, recursive=False)


_swept: set[Path] = set()


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
    checksums, which touches all of it, and its labels with the checksums of the label members.
    """
    path = index_path(shard)
    try:
        arrays = map_npz(path, check)
        if int(arrays["schema"]) not in READABLE:
            return None
        if check and int(arrays["schema"]) == SCHEMA:
            digest = str(arrays.pop("digest"))
            if digest != _digest(arrays):
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
    index = TarIndex(**values)
    if check and not labels_agree(shard, index):
        return None
    return index, unchanged


def labels_agree(shard: str | Path, index: TarIndex) -> bool:
    """Whether the labels are those of the members `cls` whose checksums the index holds.

    Samples of one label and one checksum are alike, so one of each kind is looked at: by its
    checksum, and where blanks surround the label by its member in the shard.
    """
    numbers = np.flatnonzero(index.extensions == index.label)
    if not len(numbers):  # no labels, or fields of a json
        return True
    rows = np.flatnonzero(index.member_extension == numbers[0])
    samples = np.searchsorted(index.member_start, rows, side="right") - 1
    kinds = np.stack([index.label_number[samples].astype(np.int64), index.crc[rows]], axis=1)
    kinds, first = np.unique(kinds, axis=0, return_index=True)
    for (number, crc), row in zip(kinds.tolist(), rows[first].tolist(), strict=True):
        text = index.label_texts[number]
        if zlib.crc32(text) == crc or zlib.crc32(text + b"\n") == crc:
            continue
        content = _member(shard, int(index.offset[row]), int(index.size[row]))
        said = read_label(content, index.label).encode("utf-8", "surrogateescape")
        if zlib.crc32(content) == crc and said != text:
            return False
    return True


def _member(shard: str | Path, offset: int, size: int) -> bytes:
    with open(shard, "rb") as file:
        return os.pread(file.fileno(), size, offset)


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
    with open_regular(shard) as file:
        for sample in range(len(index)):
            for row in range(index.member_start[sample], index.member_start[sample + 1]):
                size = int(index.size[row])
                content = os.pread(file.fileno(), size, int(index.offset[row]))
                if len(content) != size or zlib.crc32(content) != index.crc[row]:
                    good[sample] = False
    return good
