"""Shards behind URLs: fetched whole by webdataset's opener into a bounded directory, then read like any other file.

data.fetch_dir holds KEY.tar (whole, checked, never changed), KEY.json (a manifest), KEY.*.part (being written),
lease-* (locked as long as its process lives: the names of what that process reads, which nobody may evict) and .lock
(held while something is fetched or evicted, so that each shard is fetched once, whoever asks).
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import Data, UserError

from .tars import file_sha256, index_path
from .writing import MANIFEST, parse_manifest

ATTEMPTS, PAUSE_S = 3, 0.2
BLOCK = 1 << 20
END_MARK = 1024  # bytes of zeros that a tar ends with
REFUSED = 22  # curl: the server answered, with an HTTP error
TRIED = (
    6,
    REFUSED,
    28,
)  # webdataset lets curl itself try again for a minute: unknown hosts, HTTP 5xx, time-outs
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

_leases: dict[Path, object] = {}  # by directory: this process's lease, an open and locked file


class FetchDir:
    """data.fetch_dir, of at most data.fetch_bytes.

    Least recently used shards make room for new ones, but none that a living process has asked for.
    """

    def __init__(self, data: Data):
        self.directory = Path(data.fetch_dir or "~/.cache/referral/shards").expanduser()
        self.limit = data.fetch_bytes
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as mistake:
            raise UserError(
                f"data.fetch_dir = {self.directory}: cannot be made: {mistake.strerror}"
            ) from None

    def shards(self, urls: list[str], facts: list[dict | None]) -> list[Path]:
        """Local copies of the shards, fetched where there are none.  facts: each one's entry of the manifest, if any.

        Without a manifest a copy is checked for a tar's end mark, with one for its size and sha256.
        Raises UserError: after ATTEMPTS, or where they take more than the directory or the disk may hold.
        """
        known = sum(entry["bytes"] for entry in facts if entry)
        if known > self.limit:
            raise UserError(
                f"{urls[0]} ...: {len(urls)} shards of {known} bytes, more than data.fetch_bytes = {self.limit}"
            )
        return [self._fetched(url, entry) for url, entry in zip(urls, facts, strict=True)]

    def manifest(self, url: str, optional: bool = False) -> dict | None:
        """The manifest at `url`, as it is now; the copy of last time where its server cannot be reached.

        optional: None where the server answers that there is none.
        """
        path = self.directory / f"{_key(url)}.json"
        with self._locked():
            try:
                self._write(url, path, lambda part: parse_manifest(part, url))
            except _Unfetched as mistake:
                if mistake.answered and optional:
                    return None
                if mistake.answered or not path.exists():
                    raise
                print(f"{mistake}; its copy in {path} is used", file=sys.stderr)
            return parse_manifest(path, url)

    def _fetched(self, url: str, facts: dict | None) -> Path:
        # Renewed shards have another checksum in the manifest, so they are other files here.
        path = self.directory / f"{_key(url, facts['sha256'] if facts else '')}.tar"
        with self._locked():
            self._hold(path.name)
            if path.exists():
                os.utime(
                    path, ns=(time.time_ns(), path.stat().st_mtime_ns)
                )  # when it was used last
            else:
                self._write(
                    url,
                    path,
                    lambda part: _check_whole(part, facts),
                    facts["bytes"] if facts else 0,
                )
        return path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            file = open(self.directory / ".lock", "w")
        except OSError as mistake:
            raise UserError(
                f"data.fetch_dir = {self.directory}: cannot be written: {mistake.strerror}"
            ) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _hold(self, name: str) -> None:
        """Add `name` to what this process's lease keeps from eviction."""
        place = self.directory.resolve()
        if place not in _leases:
            self._leased()  # clears away the leases of processes that have ended
            lease = open(
                place / f"lease-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}", "w"
            )
            fcntl.flock(lease, fcntl.LOCK_EX)
            _leases[place] = lease
        _leases[place].write(name + "\n")
        _leases[place].flush()

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
        """Evict until a file of `needed` bytes, of which `written` are on disk, has room.  Returns what it may take."""
        sizes = {
            path: path.stat().st_size for path in self.directory.iterdir() if path.suffix != ".part"
        }
        leased = self._leased()
        idle = [path for path in sizes if path.suffix == ".tar" and path.name not in leased]
        idle.sort(key=lambda path: path.stat().st_atime_ns, reverse=True)
        while True:
            free = shutil.disk_usage(self.directory).free + written
            room = min(self.limit - sum(sizes.values()), free)
            if needed <= room:
                return room
            if not idle:
                break
            for path in (oldest := idle.pop(), index_path(oldest)):
                path.unlink(missing_ok=True)
                sizes.pop(path, None)
        if needed > free:
            raise UserError(
                f"{url}: takes {needed} bytes or more, the disk of {self.directory} has {free} left; set "
                "data.fetch_dir to a place on a larger one"
            )
        raise UserError(
            f"{url}: takes {needed} bytes or more, beside {sum(sizes.values())} bytes of shards in use that is more "
            f"than data.fetch_bytes = {self.limit}"
        )

    def _write(self, url: str, path: Path, check: Callable[[Path], object], size: int = 0) -> None:
        """Fetch a URL's whole content to `path`, in up to ATTEMPTS attempts; what `check` refuses is no content."""
        for left in self.directory.glob("*.part"):  # of a process that was killed: the lock is ours
            left.unlink()
        part = path.with_name(f"{path.name}.part")
        for attempt in range(ATTEMPTS):
            try:
                self._copy(url, part, size)
                check(part)
                os.replace(part, path)
                return
            except (OSError, ValueError, ImportError, EOFError, lzma.LZMAError) as mistake:
                if getattr(mistake, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    remedy = "set data.fetch_dir to a place on another"
                    raise UserError(
                        f"{url}: the disk of {self.directory} is full; {remedy}"
                    ) from None
                if attempt == ATTEMPTS - 1 or getattr(mistake, "final", False):
                    raise _Unfetched(url, mistake) from None
                time.sleep(PAUSE_S * 4**attempt)
            finally:
                part.unlink(missing_ok=True)

    def _copy(self, url: str, part: Path, size: int) -> None:
        from webdataset.gopen import gopen, set_options

        room, written = self._make_room(url, size, 0), 0
        stream = gopen(url, "rb")
        set_options(
            stream, ignore_errors=True
        )  # webdataset's own check is silent where GOPEN_VERBOSE is set
        with stream, open(part, "wb") as file:
            while block := stream.read(BLOCK):
                if written + len(block) > room:
                    room = self._make_room(url, written + len(block), written)
                written += file.write(block)
        if (status := getattr(stream, "status", 0)) not in getattr(stream, "ignore_status", [0]):
            raise _Exit(url, status)


class _Exit(OSError):
    """The command behind a URL failed."""

    def __init__(self, url: str, status: int):
        curl = url.startswith(("http:", "https:", "hf:"))
        self.answered = curl and status == REFUSED
        self.final = curl and status in TRIED
        super().__init__(
            CURL.get(status, f"curl's exit code is {status}") if curl else f"exit code {status}"
        )


class _Unfetched(UserError):
    def __init__(self, url: str, mistake: Exception):
        self.answered = getattr(mistake, "answered", False)
        super().__init__(f"{url}: cannot be fetched: {mistake}".replace("\n", " "))


def _key(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _check_whole(path: Path, facts: dict | None) -> None:
    """ValueError (EOFError or OSError from a decompressor) if the file is not the whole shard."""
    size = path.stat().st_size
    if facts and (size, file_sha256(path)) != (facts["bytes"], facts["sha256"]):
        raise ValueError(
            f"it is not what {MANIFEST} describes ({size} bytes, {facts['bytes']} expected, or another sha256)"
        )
    tail = b""
    with unpacked(path) as file:
        while block := file.read(BLOCK):
            tail = (tail + block)[-END_MARK:]
    if tail != bytes(END_MARK):
        raise ValueError(
            "it does not end as a tar does: it is cut short, or no tar" if size else "it is empty"
        )


def is_packed(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(5).startswith(tuple(PACKED))


def unpacked(path: Path):
    """The file's content as a binary stream, decompressed where it is gzip, bzip2 or xz."""
    with open(path, "rb") as file:
        start = file.read(5)
    return next((opened for magic, opened in PACKED.items() if start.startswith(magic)), open)(
        path, "rb"
    )
