"""One pass over a webdataset tar: where each sample's members lie, their checksums, and what is damaged.

The result is kept beside the shard as NAME.tar.index.npz: later readers go straight to a sample with one `pread`.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
import tarfile
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

SCHEMA = 1
BLOCK = tarfile.BLOCKSIZE
NAME = re.compile(
    r"((?:.*/|)[^.]+)[.]([^/]*)"
)  # webdataset's rule: the key ends at the first dot of the base name


@dataclass
class TarIndex:
    """The intact samples of one tar.  Members of sample i are rows member_start[i] : member_start[i + 1].

    sha256, bytes: of the whole file.  label: the member (or "json:FIELD") that label_texts was read from.
    keys, label_texts: bytes[n].  extensions: str[k]; member_extension: int16[m] into it.
    offset, size: int64[m]; crc: uint32[m], zlib's.
    damaged, reasons: str[d], one for each sample (or place) that is not among the intact ones.
    countable: False where something is unreadable, so that the tar alone cannot say how many samples are lost.
    """

    sha256: str
    bytes: int
    label: str
    keys: np.ndarray
    label_texts: np.ndarray
    member_start: np.ndarray
    extensions: np.ndarray
    member_extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    damaged: np.ndarray
    reasons: np.ndarray
    countable: bool

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, kept: np.ndarray) -> TarIndex:
        """The same index with only the samples where `kept` (bool[n]) holds."""
        lengths = np.diff(self.member_start)
        rows = np.repeat(kept, lengths)
        changed = {
            name: getattr(self, name)[rows]
            for name in ("member_extension", "offset", "size", "crc")
        }
        changed |= {"keys": self.keys[kept], "label_texts": self.label_texts[kept]}
        start = np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64)
        return replace(self, member_start=start, **changed)


def split_name(name: str) -> tuple[str, str] | None:
    """("a/b", "png") of "a/b.png", as webdataset splits it; None for members that webdataset passes over."""
    match = NAME.fullmatch(name)
    if not match or re.match(r"__[^/]*__($|/)", name):
        return None
    return match.group(1), match.group(2).lower()


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_label(content: bytes, label: str) -> str:
    """The label's text.  content: the member `cls`, or the json of "json:FIELD".  Raises ValueError with the reason."""
    kind, colon, field = label.partition(":")
    if not colon:
        return content.decode("utf-8", "replace").strip()
    try:
        value = json.loads(content)
    except ValueError:
        raise ValueError(f"{kind} member is not valid JSON") from None
    if (
        not isinstance(value, dict)
        or not isinstance(value.get(field), str | int)
        or isinstance(value.get(field), bool)
    ):
        raise ValueError(f"{kind} member has no field {field!r} that is a number or a name")
    return json.dumps(value[field])  # a name keeps its quotes, which tell it from a number


def scan_tar(path: str | Path, label: str = "cls") -> TarIndex:
    """Read a tar once: headers, checksums, labels.  Damage is listed, not raised.  OSError if it cannot be read.

    label: the member with the label, or "json:FIELD"; "" reads none: unlabelled samples.
    """
    size = os.path.getsize(path)
    if size == 0:
        return _as_index(path, label, [], [("", "is an empty file")], countable=False)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        samples: list[tuple[str, dict]] = []
        damage: list[tuple[str, str]] = []
        countable = True
        seen: set[str] = set()
        key, members, doubtful = None, {}, ""

        def close():
            if key is None:
                return
            reason = doubtful or _what_is_wrong(members, label)
            if key in seen:
                reason = reason or "its key occurs twice, apart from each other"
            seen.add(key)
            if reason:
                damage.append((key, reason))
            else:
                samples.append((key, members))

        for name, offset, length in _members(content):
            if offset < 0:  # a gap: what stood next to it may have lost members
                doubtful = doubtful or "next to a damaged part of the file"
                close()
                key, members, doubtful = None, {}, "next to a damaged part of the file"
                damage.append(("", name))
                countable = False
                continue
            parts = split_name(name)
            if parts is None:
                continue
            if parts[0] != key:
                after_gap = doubtful if key is None else ""
                close()
                key, members, doubtful = parts[0], {}, after_gap
            if parts[1] in members:
                doubtful = doubtful or f"two members are called {name}"
            members[parts[1]] = (offset, length)
        close()
        for position, (key, members) in enumerate(samples):  # noqa: B020
            for extension, (offset, length) in members.items():
                members[extension] = (offset, length, zlib.crc32(content[offset : offset + length]))
            extension = label.partition(":")[0]
            try:
                offset, length, _ = members[extension] if label else (0, 0, 0)
                text = read_label(content[offset : offset + length], label) if label else ""
            except ValueError as reason:
                damage.append((key, str(reason)))
                samples[position] = None
            else:
                samples[position] = (key, members, text)
        return _as_index(path, label, [sample for sample in samples if sample], damage, countable)


def _what_is_wrong(members: dict, label: str) -> str:
    label_extension = label.partition(":")[0]
    if not label:
        return ""
    if label_extension not in members:
        return f"has no member .{label_extension}"
    if len(members) == 1 and ":" not in label:
        return f"has only the member .{label_extension}"
    for extension in members:
        if extension.endswith(f".{label_extension}"):
            return f"dots in its key merge samples: it has both .{label_extension} and .{extension}"
    return ""


def _members(content: mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each plain file in the tar; (what is wrong, -1, 0) where it is damaged, then on."""
    # tarfile's own loop takes a broken header for the end of the archive, so only its header parser is used here: the
    # archive is opened on an empty one, and headers are then read from `content`, one by one.
    archive = tarfile.open(fileobj=io.BytesIO(bytes(tarfile.RECORDSIZE)), mode="r:")
    archive.fileobj = content
    end, offset = len(content), 0
    while True:
        content.seek(min(offset, end))
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:
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
    place = content.find(b"ustar", offset)
    while place >= 0:
        start = place - 257
        if start >= offset and start % BLOCK == 0:
            try:
                tarfile.TarInfo.frombuf(content[start : start + BLOCK], "utf-8", "surrogateescape")
                return start
            except tarfile.HeaderError:
                pass
        place = content.find(b"ustar", place + 1)
    return len(content)


def _as_index(path, label, samples, damage, countable) -> TarIndex:
    extensions = sorted({extension for _, members, _ in samples for extension in members})
    numbers = {extension: number for number, extension in enumerate(extensions)}
    rows = [
        (numbers[extension], *place)
        for _, members, _ in samples
        for extension, place in members.items()
    ]
    extension, offset, size, crc = np.array(rows, np.int64).reshape(-1, 4).T
    return TarIndex(
        sha256=file_sha256(path),
        bytes=os.path.getsize(path),
        label=label,
        keys=_bytes([key for key, _, _ in samples]),
        label_texts=_bytes([text for _, _, text in samples]),
        member_start=np.cumsum([0] + [len(members) for _, members, _ in samples]).astype(np.int64),
        extensions=np.array(extensions, dtype=np.str_),
        member_extension=extension.astype(np.int16),
        offset=offset,
        size=size,
        crc=crc.astype(np.uint32),
        damaged=np.array([key for key, _ in damage], dtype=np.str_),
        reasons=np.array([reason for _, reason in damage], dtype=np.str_),
        countable=countable,
    )


def _bytes(texts: list[str]) -> np.ndarray:
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts], dtype=np.bytes_)


def index_path(shard: str | Path) -> Path:
    return Path(f"{shard}.index.npz")


def save_index(shard: str | Path, index: TarIndex) -> bool:
    """Keep `index` beside the shard, with the shard's size and time.  False where the directory cannot be written."""
    stat = os.stat(shard)
    path = index_path(shard)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.npz")
    values = {field.name: getattr(index, field.name) for field in fields(index)}
    try:
        np.savez(temporary, schema=SCHEMA, stat=[stat.st_size, stat.st_mtime_ns], **values)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def load_index(shard: str | Path) -> tuple[TarIndex, bool] | None:
    """(index, whether size and time of the shard are still those indexed), or None where there is no readable index."""
    try:
        with np.load(index_path(shard), allow_pickle=False) as file:
            if int(file["schema"]) != SCHEMA:
                return None
            values = {field.name: file[field.name] for field in fields(TarIndex)}
            stat = file["stat"].tolist()
    except (
        Exception
    ):  # a half-written or foreign file: numpy and zipfile raise a dozen kinds; it is rebuilt
        return None
    for name, kind in (("sha256", str), ("bytes", int), ("label", str), ("countable", bool)):
        values[name] = kind(values[name])
    now = os.stat(shard)
    return TarIndex(**values), stat == [now.st_size, now.st_mtime_ns]


def intact(shard: str | Path, index: TarIndex) -> np.ndarray:
    """bool[n]: the samples whose members still have the checksums that the index recorded."""
    good = np.ones(len(index), bool)
    with open(shard, "rb") as file:
        for sample in range(len(index)):
            for row in range(index.member_start[sample], index.member_start[sample + 1]):
                content = os.pread(file.fileno(), int(index.size[row]), int(index.offset[row]))
                good[sample] &= (
                    len(content) == index.size[row] and zlib.crc32(content) == index.crc[row]
                )
    return good
