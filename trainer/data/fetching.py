"""Shards behind URLs: fetched whole into a bounded directory, then read like any other file.

data.fetch_dir holds

    KEY.tar     a shard: whole, checked, never changed
    KEY.json    a manifest
    KEY.npy     the classes of a split's samples, which a manifest names
    KEY.*.part  KEY.tar.part is locked by who fetches KEY.tar, and empty.  What it writes has a name
                with a random part, is locked, and as large as it will be, if that is known
    lease-*     names of the shards that a process reads, which nobody may evict; the file is locked
                as long as its process lives
    .lock       held while files get their names or are evicted

So each shard is fetched once, whoever asks, and several at once.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from pipeline.config import Data, UserError
from pipeline.redaction import printable, shown

from .bounds import open_regular
from .private_files import LOOK_S, is_ours, lock, lock_file, new_file, private_name
from .tars import file_sha256, index_path
from .transport import Broken, blocks, longest_wait
from .watching import watched
from .writing import MANIFEST, parse_manifest

ATTEMPTS = 3
BUSY_ATTEMPTS = 6  # where the server says that it may answer later
PAUSE_S = 0.2  # before the second attempt; four times as long before each further one
LONGEST_PAUSE_S = 20.0
PARALLEL = 8  # shards that are fetched at once
BLOCK = 1 << 20
END_MARK = 1024  # bytes of zeros that a tar ends with
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}

MANIFEST_BYTES = 256 << 20  # of a manifest.json behind a URL
SILENT_S = 60.0  # after which it is said that another process is waited for

_leases: dict[Path, BinaryIO] = {}  # by directory: this process's lease, an open and locked file


class FetchDir:
    """data.fetch_dir, of at most data.fetch_bytes.

    Least recently used shards make room for new ones, but none that a living process has asked for.
    """

    def __init__(self, data: Data):
        try:
            self.directory = Path(data.fetch_dir or "~/.cache/referral/shards").expanduser()
        except RuntimeError:
            raise UserError(
                f"data.fetch_dir = {data.fetch_dir or 'not set'}: this user has no home directory; "
                "set it to a directory for fetched shards"
            ) from None
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
        if any(url.startswith("pipe:") for url in urls):  # what a command takes is not ours to say
            return [self._fetched(url, entry) for url, entry in zip(urls, entries, strict=True)]
        with ThreadPoolExecutor(PARALLEL) as threads:
            coming = list(map(partial(threads.submit, self._fetched), urls, entries))
            try:
                return [each.result() for each in coming]
            except BaseException:
                threads.shutdown(wait=True, cancel_futures=True)
                raise

    def manifest(self, url: str, optional: bool = False) -> dict | None:
        """The manifest at `url` as it is now, or last time's copy if its server cannot be reached.

        optional: None where the server answers that there is none.
        """
        path = self.directory / f"{_key(url)}.json"
        try:
            self._fetch(url, path, lambda part: parse_manifest(part, url), always=True)
        except _Unfetched as error:
            if error.answered and optional:
                return None
            if error.answered or not path.exists():
                raise
            print(shown(f"{error}; its copy in {path} is used"), file=sys.stderr)
        return parse_manifest(path, url)

    def label_file(self, url: str, said: dict) -> Path:
        """A local copy of the array that a manifest names ({"bytes", "sha256", ...})."""
        path = self.directory / f"{_key(url, said['sha256'])}.npy"
        return self._fetch(url, path, lambda part: _check_content(part, said), said["bytes"])

    def _fetched(self, url: str, entry: dict | None) -> Path:
        # Renewed shards have another checksum in the manifest, so they are other files here.
        sha256, size = (entry["sha256"], entry["bytes"]) if entry else ("", 0)
        path = self.directory / f"{_key(url, sha256)}.tar"
        return self._fetch(url, path, lambda part: _check_whole(part, entry), size)

    def _fetch(
        self,
        url: str,
        path: Path,
        check: Callable[[Path], object],
        size: int = 0,
        always: bool = False,
    ) -> Path:
        """`path`, with a URL's whole content; fetched unless it is there, or `always`.

        What `check` refuses is no content.  size: if known, else 0.  Who asks for what another
        thread or process is fetching waits for it.
        """
        claim = path.with_name(f"{path.name}.part")
        part = private_name(path, ".part")
        while True:
            with self._locked():
                self._hold(path.name)
                if is_ours(path) and not always:
                    # The access time says when it was used last.
                    used = (time.time_ns(), path.stat().st_mtime_ns)
                    os.utime(path, ns=used, follow_symlinks=False)
                    return path
                claimed = _lock_part(claim)
                if claimed is not None:
                    self._remove_stale_parts(claim)
                    written = new_file(part)
                    fcntl.flock(written, fcntl.LOCK_EX)
                    break
            _wait_for(claim, url)
        with claimed, written:
            try:
                self._attempt(url, written, check, size)
                with self._locked():
                    os.replace(part, path)
            finally:
                with self._locked():
                    part.unlink(missing_ok=True)
                    claim.unlink(missing_ok=True)
        return path

    def _remove_stale_parts(self, own: Path) -> None:
        """Delete what killed processes were writing; .lock is held."""
        for left in self.directory.glob("*.part"):
            if left.is_symlink():
                left.unlink()
            elif left != own and (stale := _lock_part(left)) is not None:
                left.unlink()
                stale.close()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.directory / ".lock"
        try:
            file = lock_file(path)
        except OSError as error:
            raise UserError(
                f"data.fetch_dir = {self.directory}: cannot be written: {error.strerror}"
            ) from None
        with file:
            lock(file, path)
            yield

    def _hold(self, name: str) -> None:
        """Add `name` to what this process's lease keeps from eviction."""
        directory = self.directory.resolve()
        if directory not in _leases:
            self._leased()  # clears away the leases of processes that have ended
            mark = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            lease = new_file(directory / f"lease-{mark}")
            fcntl.flock(lease, fcntl.LOCK_EX)
            _leases[directory] = lease
        _leases[directory].write(f"{name}\n".encode())
        _leases[directory].flush()

    def _leased(self) -> set[str]:
        """Names of the shards that living processes have asked for."""
        names: set[str] = set()
        for path in filter(is_ours, self.directory.glob("lease-*")):
            with open(path, "rb") as lease:
                try:
                    fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:  # its process lives
                    names.update(lease.read().decode().split())
                else:
                    path.unlink()
        return names

    def _make_room(self, url: str, own: Path, needed: int, written: int) -> int:
        """Evict until the file `own` of `needed` bytes, of which `written` are on disk, has room.

        Returns the bytes that it may take.  .lock is held.
        """
        others = (path for path in self.directory.iterdir() if path != own)
        sizes = {path: path.lstat().st_size for path in others}
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

    def _attempt(
        self, url: str, part: BinaryIO, check: Callable[[Path], object], size: int
    ) -> None:
        """Fetch into `part`, in up to ATTEMPTS attempts; BUSY_ATTEMPTS where the server is busy."""
        for attempt in range(BUSY_ATTEMPTS):
            try:
                self._copy(url, part, size)
                check(Path(part.name))
                return
            except (OSError, ValueError, ImportError, EOFError, lzma.LZMAError) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(
                        f"{url}: the disk of {self.directory} is full; "
                        "set data.fetch_dir to a place on another"
                    ) from None
                attempts = BUSY_ATTEMPTS if getattr(error, "busy", False) else ATTEMPTS
                if attempt >= attempts - 1 or getattr(error, "is_final", False):
                    raise _Unfetched(url, error) from None
                time.sleep(min(PAUSE_S * 4**attempt, LONGEST_PAUSE_S))

    def _copy(self, url: str, part: BinaryIO, size: int) -> None:
        own = Path(part.name)
        part.seek(0)
        part.truncate()
        with self._locked():
            room = self._make_room(url, own, size, 0)
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(part.fileno(), 0, size)
        written = 0
        most = MANIFEST_BYTES if url.rpartition("/")[2].startswith(MANIFEST) else 0
        limit_s = longest_wait(url)
        stalled = Broken(f"it stalls: nothing in {limit_s:.0f} s")
        with closing(watched(lambda: blocks(url, size), limit_s, stalled)) as content:
            for block in content:
                if most and written + len(block) > most:
                    raise Broken(f"more comes than the {most} bytes that a manifest may have")
                if written + len(block) > room:
                    with self._locked():
                        room = self._make_room(url, own, written + len(block), written)
                written += part.write(block)
        part.truncate(written)
        part.flush()


def _lock_part(name: Path) -> BinaryIO | None:
    """The file, made if need be and locked; None where another one has it.  .lock is held."""
    file = lock_file(name)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _wait_for(claim: Path, url: str) -> None:
    """Until nobody fetches what is claimed; every fetcher has its limits."""
    began, is_said = time.monotonic(), False
    try:
        with open(claim, "rb", opener=_plain) as file:
            while not _is_free(file):
                if not is_said and time.monotonic() - began > SILENT_S:
                    print(shown(f"{url}: another process fetches it; waiting"), file=sys.stderr)
                    is_said = True
                time.sleep(LOOK_S)
    except FileNotFoundError:
        pass


def _plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _is_free(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class _Unfetched(UserError):
    def __init__(self, url: str, error: Exception):
        self.answered: bool = getattr(error, "is_final", False)
        # One line, whatever the server says.
        reason = printable(" ".join(str(error).split()))
        super().__init__(f"{url}: cannot be fetched: {reason}")


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
        if not is_packed(path):
            file.seek(max(0, size - END_MARK))
        while block := file.read(BLOCK):
            tail = (tail + block)[-END_MARK:]
    if not size:
        raise ValueError("it is empty")
    if tail != bytes(END_MARK):
        raise ValueError("it does not end as a tar does: it is cut short, or no tar")


def is_packed(path: Path) -> bool:
    """Whether the file is compressed."""
    with open_regular(path) as file:
        return file.read(5).startswith(tuple(PACKED))


def unpacked(path: Path) -> BinaryIO:
    """The file's content as a binary stream, decompressed where it is gzip, bzip2 or xz."""
    with open_regular(path) as file:
        start = file.read(5)
    for magic, opener in PACKED.items():
        if start.startswith(magic):
            return cast(BinaryIO, opener(path, "rb"))
    return open(path, "rb")
