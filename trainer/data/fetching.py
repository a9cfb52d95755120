"""Shards behind URLs: fetched whole into a bounded directory, then read like any other file.

webdataset's opener fetches them.  data.fetch_dir holds

    KEY.tar     a shard: whole, checked, never changed
    KEY.json    a manifest
    KEY.npy     the classes of a split's samples, which a manifest names
    KEY.*.part  being written
    lease-*     names of the shards that a process reads, which nobody may evict; the file is locked
                as long as its process lives
    .lock       held while something is fetched or evicted, so that each shard is fetched once,
                whoever asks
"""

from __future__ import annotations

import bz2
import errno
import fcntl
import gzip
import hashlib
import lzma
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from pipeline.config import Data, UserError

from .tars import file_sha256, index_path
from .writing import MANIFEST, parse_manifest

ATTEMPTS = 3
PAUSE_S = 0.2  # before the second attempt; four times as long before each further one
BLOCK = 1 << 20
END_MARK = 1024  # bytes of zeros that a tar ends with
REFUSED = 22  # curl: the server answered, with an HTTP error
# webdataset lets curl itself try again for a minute: unknown hosts, HTTP 5xx, time-outs.
RETRIED_BY_CURL = (6, REFUSED, 28)
CURL = {
    6: "there is no such host",
    7: "the connection is refused",
    18: "its body is cut short",
    22: "the server answers with an error, such as 404",
    28: "it takes too long",
    35: "TLS fails",
    56: "the connection breaks",
    60: "the server's certificate is not trusted",
}
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}

_leases: dict[Path, TextIO] = {}  # by directory: this process's lease, an open and locked file


class FetchDir:
    """data.fetch_dir, of at most data.fetch_bytes.

    Least recently used shards make room for new ones, but none that a living process has asked for.
    """

    def __init__(self, data: Data):
        self.directory = Path(data.fetch_dir or "~/.cache/referral/shards").expanduser()
        self.limit = data.fetch_bytes
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.fetch_dir = {self.directory}: cannot be made: {error.strerror}"
            ) from None

    def shards(self, urls: Sequence[str], entries: Sequence[dict | None]) -> list[Path]:
        """Local copies of the shards, fetched where there are none.

        Parameters
        ----------
        urls : sequence of str
        entries : sequence of dict or None
            Each shard's entry of the manifest.  Without one a copy is checked for a tar's end mark,
            with one for its size and sha256.

        Raises
        ------
        UserError
            After ATTEMPTS, or where they take more than the directory or the disk may hold.
        """
        known = sum(entry["bytes"] for entry in entries if entry)
        if known > self.limit:
            raise UserError(
                f"{urls[0]} ...: {len(urls)} shards of {known} bytes, "
                f"more than data.fetch_bytes = {self.limit}"
            )
        return [self._fetched(url, entry) for url, entry in zip(urls, entries, strict=True)]

    def manifest(self, url: str, optional: bool = False) -> dict | None:
        """The manifest at `url` as it is now, or last time's copy if its server cannot be reached.

        optional: None where the server answers that there is none.
        """
        path = self.directory / f"{_key(url)}.json"
        with self._locked():
            try:
                self._write(url, path, lambda part: parse_manifest(part, url))
            except _Unfetched as error:
                if error.answered and optional:
                    return None
                if error.answered or not path.exists():
                    raise
                print(f"{error}; its copy in {path} is used", file=sys.stderr)
            return parse_manifest(path, url)

    def label_file(self, url: str, said: dict) -> Path:
        """A local copy of the array that a manifest names ({"bytes", "sha256", ...})."""
        path = self.directory / f"{_key(url, said['sha256'])}.npy"
        return self._kept(url, path, lambda part: _check_content(part, said), said["bytes"])

    def _fetched(self, url: str, entry: dict | None) -> Path:
        # Renewed shards have another checksum in the manifest, so they are other files here.
        sha256, size = (entry["sha256"], entry["bytes"]) if entry else ("", 0)
        path = self.directory / f"{_key(url, sha256)}.tar"
        return self._kept(url, path, lambda part: _check_whole(part, entry), size)

    def _kept(self, url: str, path: Path, check: Callable[[Path], object], size: int) -> Path:
        """`path`, which holds what is at `url`; fetched unless it is there.  See _write."""
        with self._locked():
            self._hold(path.name)
            if path.exists():
                # The access time says when it was used last.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            else:
                self._write(url, path, check, size)
        return path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            file = open(self.directory / ".lock", "w")
        except OSError as error:
            raise UserError(
                f"data.fetch_dir = {self.directory}: cannot be written: {error.strerror}"
            ) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _hold(self, name: str) -> None:
        """Add `name` to what this process's lease keeps from eviction."""
        directory = self.directory.resolve()
        if directory not in _leases:
            self._leased()  # clears away the leases of processes that have ended
            mark = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            lease = open(directory / f"lease-{mark}", "w")
            fcntl.flock(lease, fcntl.LOCK_EX)
            _leases[directory] = lease
        _leases[directory].write(name + "\n")
        _leases[directory].flush()

    def _leased(self) -> set[str]:
        """Names of the shards that living processes have asked for."""
        names: set[str] = set()
        for path in self.directory.glob("lease-*"):
            with open(path) as lease:
                try:
                    fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:  # its process lives
                    names.update(lease.read().split())
                else:
                    path.unlink()
        return names

    def _make_room(self, url: str, needed: int, written: int) -> int:
        """Evict until a file of `needed` bytes, of which `written` are on disk, has room.

        Returns the bytes that it may take.
        """
        files = [path for path in self.directory.iterdir() if path.suffix != ".part"]
        sizes = {path: path.stat().st_size for path in files}
        leased = self._leased()
        evictable = [path for path in sizes if path.suffix in (".tar", ".npy")]
        idle = [path for path in evictable if path.name not in leased]
        idle.sort(key=lambda path: path.stat().st_atime_ns, reverse=True)
        while True:
            free = shutil.disk_usage(self.directory).free + written
            room = min(self.limit - sum(sizes.values()), free)
            if needed <= room:
                return room
            if not idle:
                break
            oldest = idle.pop()
            for path in (oldest, index_path(oldest)):
                path.unlink(missing_ok=True)
                sizes.pop(path, None)
        if needed > free:
            raise UserError(
                f"{url}: takes {needed} bytes or more, the disk of {self.directory} has {free} "
                "left; set data.fetch_dir to a place on a larger one"
            )
        raise UserError(
            f"{url}: takes {needed} bytes or more, beside {sum(sizes.values())} bytes of shards "
            f"in use that is more than data.fetch_bytes = {self.limit}"
        )

    def _write(self, url: str, path: Path, check: Callable[[Path], object], size: int = 0) -> None:
        """Fetch a URL's whole content to `path`, in up to ATTEMPTS attempts.

        What `check` refuses is no content.  size: if known, else 0.
        """
        # What is left is of a process that was killed: the lock is ours.
        for left in self.directory.glob("*.part"):
            left.unlink()
        part = path.with_name(f"{path.name}.part")
        for attempt in range(ATTEMPTS):
            try:
                self._copy(url, part, size)
                check(part)
                os.replace(part, path)
                return
            except (OSError, ValueError, ImportError, EOFError, lzma.LZMAError) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(
                        f"{url}: the disk of {self.directory} is full; "
                        "set data.fetch_dir to a place on another"
                    ) from None
                if attempt == ATTEMPTS - 1 or getattr(error, "final", False):
                    raise _Unfetched(url, error) from None
                time.sleep(PAUSE_S * 4**attempt)
            finally:
                part.unlink(missing_ok=True)

    def _copy(self, url: str, part: Path, size: int) -> None:
        from webdataset.gopen import gopen, set_options

        room = self._make_room(url, size, 0)
        written = 0
        stream = gopen(url, "rb")
        # webdataset's own check is silent where GOPEN_VERBOSE is set.
        set_options(stream, ignore_errors=True)
        with stream, open(part, "wb") as file:
            while block := stream.read(BLOCK):
                if written + len(block) > room:
                    room = self._make_room(url, written + len(block), written)
                written += file.write(block)
        status = getattr(stream, "status", 0)
        if status not in getattr(stream, "ignore_status", [0]):
            raise _Exit(url, status)


class _Exit(OSError):
    """The command behind a URL failed.

    answered: the server did answer.  final: another attempt is of no use.
    """

    def __init__(self, url: str, status: int):
        is_curl = url.startswith(("http:", "https:", "hf:"))
        self.answered = is_curl and status == REFUSED
        self.final = is_curl and status in RETRIED_BY_CURL
        reason = f"exit code {status}"
        if is_curl:
            reason = CURL.get(status, f"curl's exit code is {status}")
        super().__init__(reason)


class _Unfetched(UserError):
    def __init__(self, url: str, error: Exception):
        self.answered: bool = getattr(error, "answered", False)
        super().__init__(f"{url}: cannot be fetched: {error}".replace("\n", " "))


def _key(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _check_content(path: Path, entry: dict) -> None:
    """ValueError if the file is not the one that a manifest's entry describes."""
    size = path.stat().st_size
    if (size, file_sha256(path)) != (entry["bytes"], entry["sha256"]):
        raise ValueError(
            f"it is not what {MANIFEST} describes ({size} bytes, {entry['bytes']} expected, "
            "or another sha256)"
        )


def _check_whole(path: Path, entry: dict | None) -> None:
    """ValueError (EOFError or OSError from a decompressor) if the file is not the whole shard."""
    size = path.stat().st_size
    if entry:
        _check_content(path, entry)
    tail = b""
    with unpacked(path) as file:
        while block := file.read(BLOCK):
            tail = (tail + block)[-END_MARK:]
    if not size:
        raise ValueError("it is empty")
    if tail != bytes(END_MARK):
        raise ValueError("it does not end as a tar does: it is cut short, or no tar")


def is_packed(path: Path) -> bool:
    """Whether the file is compressed."""
    with open(path, "rb") as file:
        return file.read(5).startswith(tuple(PACKED))


def unpacked(path: Path) -> BinaryIO:
    """The file's content as a binary stream, decompressed where it is gzip, bzip2 or xz."""
    with open(path, "rb") as file:
        start = file.read(5)
    for magic, opener in PACKED.items():
        if start.startswith(magic):
            return cast(BinaryIO, opener(path, "rb"))
    return open(path, "rb")
