"""Shards behind URLs: fetched whole into a bounded directory, then read like any other file.

data.fetch_dir holds

    KEY.tar     a shard: whole, checked, never changed. Its index beside it
    KEY.json    a manifest
    KEY.npy     the classes of a split's samples, which a manifest names
    KEY.*.part  KEY.tar.part is locked by who fetches KEY.tar, and empty.  What it writes
                has a name with a random part, is locked, and as large as it will be, if
                that is known
    lease-*     names of the files that a process reads, which nobody may evict, each with
                the bytes to leave free until it is there. Locked as long as its process
                lives
    .lock       held while files get their names or are evicted

So each shard is fetched once, whoever asks, and several at once.
"""

from __future__ import annotations

import errno
import fcntl
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
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pipeline.config import Data, UserError
from pipeline.redaction import printable, shown

from .packing import is_packed, unpacked
from .private_files import LOOK_S, is_ours, lock, lock_file, new_file, private_name
from .tars import TarIndex, file_sha256, index_bytes, index_path, save_index, scan_tar
from .transport import Broken, blocks, longest_wait
from .watching import watched
from .window import Copy, evictions, reserved
from .writing import MANIFEST, parse_manifest

ATTEMPTS = 3
BUSY_ATTEMPTS = 6  # where the server says that it may answer later
PAUSE_S = 0.2  # before the second attempt. Four times as long before each further one
LONGEST_PAUSE_S = 20.0
WAIT_S = 0.05  # between two looks whether there is room
STALE_S = 3600.0  # after that a half-written index is what a killed process left
ROOM_S = 60.0  # how long a shard that is read now waits for room that others hold
PARALLEL = 8  # shards that are fetched at once
BLOCK = 1 << 20
INDEX_BYTES, SAMPLE_BYTES = 8192, 200  # of an index whose keys are not known yet
END_MARK = 1024  # bytes of zeros that a tar ends with
MANIFEST_BYTES = 256 << 20  # of a manifest.json behind a URL
SILENT_S = 60.0  # after which it is said that another process is waited for


class Lease:
    """What this process keeps from eviction in one directory. .lock is held wherever it changes.

    kept: {name: bytes}, for as long as the process lives.
    wanted: {reader: {name: bytes to leave free until it is there}}.
    """

    def __init__(self, directory: Path):
        mark = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.file = new_file(directory / f"lease-{mark}")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.kept: dict[str, int] = {}
        self.wanted: dict[object, dict[str, int]] = {}
        self._written = ""

    def write(self) -> None:
        names = dict.fromkeys(self.kept, 0)
        for wanted in list(self.wanted.values()):
            for name, size in wanted.items():
                names[name] = max(size, names.get(name, 0))
        content = "".join(f"{name} {size}\n" for name, size in names.items())
        if content != self._written:
            self.file.seek(0)
            self.file.truncate()
            self.file.write(content.encode())
            self.file.flush()
            self._written = content

    def close(self) -> None:
        self.file.close()


_leases: dict[Path, Lease] = {}  # by directory: this process's own


def _forget_leases() -> None:
    """In a forked process: an inherited lease would outlive the process that it speaks for."""
    for lease in _leases.values():
        lease.close()
    _leases.clear()


os.register_at_fork(after_in_child=_forget_leases)


class FetchDir:
    """data.fetch_dir, of at most data.fetch_bytes.

    Least recently used shards make room for new ones, but none that a living process has asked for.
    """

    def __init__(self, data: Data):
        self.data = data
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
            remedy = ""
            if all(entries):
                remedy = "; with data.stream_shards = N they stream, N mixed at a time"
            raise UserError(
                f"{urls[0]} ...: {len(urls)} shards of {known} bytes, "
                f"more than data.fetch_bytes = {self.limit}{remedy}"
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

    @property
    def kept(self) -> int:
        """Bytes that this process keeps for as long as it lives."""
        lease = _leases.get(self.directory.resolve())
        return sum(lease.kept.values()) if lease else 0

    def place_of(self, url: str, entry: dict) -> Path:
        """Where a shard is, or will be."""
        # Renewed shards have another checksum in the manifest, so they are other files here.
        return self.directory / f"{_key(url, entry['sha256'])}.tar"

    @staticmethod
    def taken(entry: dict) -> int:
        """Bytes that a shard takes here, with its index."""
        return entry["bytes"] + INDEX_BYTES + SAMPLE_BYTES * entry["samples"]

    def want(self, reader: object, names: dict[str, int]) -> None:
        """Keep these files from eviction, in place of those that the reader wanted before.

        names: {name: bytes to leave free until it is there, 0 where it may wait}.
        """
        with self._locked():
            lease = self._lease()
            lease.wanted[reader] = names
            lease.write()

    def unwant(self, reader: object) -> None:
        """The reader is gone. Takes effect when this process's lease is written next."""
        lease = _leases.get(self.directory.resolve())
        if lease is not None:
            lease.wanted.pop(reader, None)

    def arrive(self, url: str, entry: dict, label: str, ahead: bool) -> Path:
        """A shard that this process wants, with its index by `label`. Fetched unless it is there.

        ahead: it is not read yet, so it takes only what those that are leave.

        Raises UserError. NoRoom at once where it is ahead, else after ROOM_S.
        """
        path = self.place_of(url, entry)

        def check(part: Path) -> None:
            _check_whole(part, entry)
            self._save_index(url, part, scan_tar(part, label))

        if is_ours(path):  # what is wanted is not evicted
            with suppress(OSError):
                _mark_used(path)
            return path
        beside = self.taken(entry) - entry["bytes"]
        return self._fetch(url, path, check, entry["bytes"], beside, wanted=True, ahead=ahead)

    def _save_index(self, url: str, part: Path, index: TarIndex) -> None:
        """Keep the index beside a part, in place of the file that holds its room."""
        with self._with_room(url, index_path(part), index_bytes(index)):
            index_path(part).unlink(missing_ok=True)
            if not len(index.damaged):
                save_index(part, index)

    def label_file(self, url: str, said: dict) -> Path:
        """A local copy of the array that a manifest names ({"bytes", "sha256", ...})."""
        path = self.directory / f"{_key(url, said['sha256'])}.npy"
        return self._fetch(url, path, lambda part: _check_content(part, said), said["bytes"])

    def _fetched(self, url: str, entry: dict | None) -> Path:
        if entry:
            path, size = self.place_of(url, entry), entry["bytes"]
        else:
            path, size = self.directory / f"{_key(url, '')}.tar", 0
        return self._fetch(url, path, lambda part: _check_whole(part, entry), size)

    def _fetch(
        self,
        url: str,
        path: Path,
        check: Callable[[Path], object],
        size: int = 0,
        beside: int = 0,
        always: bool = False,
        wanted: bool = False,
        ahead: bool = False,
    ) -> Path:
        """`path`, with a URL's whole content. Fetched unless it is there, or `always`.

        What `check` refuses is no content.  size: if known, else 0.  Who asks for what another
        thread or process is fetching waits for it.  beside: bytes that its index may take.
        wanted: see `want`. Other files are kept for as long as this process lives.
        """
        patience = 0.0 if ahead or not wanted else ROOM_S
        claim = path.with_name(f"{path.name}.part")
        part = private_name(path, ".part")
        while True:
            with self._locked():
                if not wanted:
                    self._hold(path.name, size)
                if is_ours(path) and not always:
                    _mark_used(path)
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
                self._attempt(url, written, check, (size, beside), ahead, patience)
                with self._locked():
                    if index_path(part).exists():
                        os.replace(index_path(part), index_path(path))
                    os.replace(part, path)
            finally:
                with self._locked():
                    for left in (index_path(part), part, claim):
                        left.unlink(missing_ok=True)
                # A process that was forked meanwhile has the files open too.
                fcntl.flock(written, fcntl.LOCK_UN)
                fcntl.flock(claimed, fcntl.LOCK_UN)
        return path

    def _remove_stale_parts(self, own: Path) -> None:
        """Delete what killed processes were writing. .lock is held."""
        for left in self.directory.glob("*.part"):
            if left.is_symlink():
                left.unlink()
            elif left != own and (stale := _lock_part(left)) is not None:
                left.unlink()
                stale.close()
        for index in self.directory.glob("*.npz"):
            shard = index.with_name(index.name.removesuffix(".index.npz"))
            is_coming = index.name.startswith(".") and time.time() - index.stat().st_ctime < STALE_S
            if not shard.exists() and not is_coming:
                index.unlink()

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
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # see _fetch

    def _lease(self) -> Lease:
        """This process's. .lock is held."""
        directory = self.directory.resolve()
        if directory not in _leases:
            self._leased()  # clears away the leases of processes that have ended
            _leases[directory] = Lease(directory)
        return _leases[directory]

    def _hold(self, name: str, size: int) -> None:
        """Keep a file from eviction for as long as this process lives. .lock is held."""
        lease = self._lease()
        lease.kept[name] = size
        lease.write()

    def _leased(self) -> dict[str, int]:
        """{name: bytes to leave free for it} of what living processes keep. .lock is held."""
        names: dict[str, int] = {}
        for path in filter(is_ours, self.directory.glob("lease-*")):
            with open(path, "rb") as lease:
                try:
                    fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:  # its process lives
                    for line in lease.read().decode().splitlines():
                        name, size = line.split()
                        names[name] = max(int(size), names.get(name, 0))
                else:
                    path.unlink()
        return names

    @contextmanager
    def _with_room(
        self,
        url: str,
        own: Path,
        needed: int,
        ahead: bool = False,
        patience: float = 0.0,
        written: int = 0,
    ) -> Iterator[int]:
        """Like `_make_room`, with .lock held inside. Waits for room up to `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            with self._locked():
                try:
                    room = self._make_room(url, own, needed, written, ahead)
                except NoRoom:
                    if time.monotonic() >= deadline:
                        raise
                else:
                    yield room
                    return
            time.sleep(WAIT_S)

    def _make_room(self, url: str, own: Path, needed: int, written: int, ahead: bool) -> int:
        """Evict until the file `own` of `needed` bytes, of which `written` are on disk, has room.

        Returns the bytes that it may take.  Raises NoRoom.  .lock is held.
        """
        sizes: dict[Path, int] = {}
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):
                sizes[path] = path.lstat().st_size
        for path in (own, index_path(own)):
            sizes.pop(path, None)
        leased = self._leased()
        limit = self.limit
        if ahead:  # parts are as large as they will be
            there = (path.name.removesuffix(".part") for path in (*sizes, own))
            limit -= reserved(leased, there)
        idle = self._idle(sizes, leased)
        free = shutil.disk_usage(self.directory).free + written
        room = min(limit - sum(sizes.values()), free)
        gone = evictions(idle, needed - room)
        if gone is not None:
            for path in map(self.directory.joinpath, gone):
                path.unlink(missing_ok=True)
                index_path(path).unlink(missing_ok=True)
            return room + sum(idle[name].size for name in gone)
        idle_bytes = sum(copy.size for copy in idle.values())
        if needed > free + idle_bytes:
            raise NoRoom(
                f"{url}: takes {needed} bytes or more, the disk of {self.directory} has {free} "
                "left; set data.fetch_dir to a place on a larger one"
            )
        raise NoRoom(
            f"{url}: takes {needed} bytes or more, beside {sum(sizes.values()) - idle_bytes} bytes "
            f"of shards in use that is more than data.fetch_bytes = {self.limit}"
        )

    def _idle(self, sizes: dict[Path, int], leased: dict[str, int]) -> dict[str, Copy]:
        """The files that nobody keeps."""
        idle: dict[str, Copy] = {}
        for path, size in sizes.items():
            if path.suffix in (".tar", ".npy") and path.name not in leased:
                used = path.lstat().st_atime_ns
                idle[path.name] = Copy(size + sizes.get(index_path(path), 0), used)
        return idle

    def _attempt(
        self,
        url: str,
        part: BinaryIO,
        check: Callable[[Path], object],
        sizes: tuple[int, int],
        ahead: bool,
        patience: float,
    ) -> None:
        """Fetch into `part`, in up to ATTEMPTS attempts. BUSY_ATTEMPTS where the server is busy."""
        for attempt in range(BUSY_ATTEMPTS):
            try:
                self._copy(url, part, sizes, ahead, patience)
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

    def _copy(
        self, url: str, part: BinaryIO, sizes: tuple[int, int], ahead: bool, patience: float
    ) -> None:
        """sizes: of the content, 0 where it is not known, and of its index."""
        own, (size, beside) = Path(part.name), sizes
        part.seek(0)
        part.truncate()
        with self._with_room(url, own, size + beside, ahead, patience) as room:
            _allocate(part, size)
            if beside:
                with open(index_path(own), "wb") as index:
                    _allocate(index, beside)
        written = 0
        most = MANIFEST_BYTES if url.rpartition("/")[2].startswith(MANIFEST) else 0
        limit_s = longest_wait(url)
        stalled = Broken(f"it stalls: nothing in {limit_s:.0f} s")
        with closing(watched(lambda: blocks(url, size), limit_s, stalled)) as content:
            for block in content:
                if most and written + len(block) > most:
                    raise Broken(f"more comes than the {most} bytes that a manifest may have")
                if written + len(block) > room:
                    needed = written + len(block)
                    with self._with_room(url, own, needed, ahead, patience, written) as room:
                        pass
                written += part.write(block)
        part.truncate(written)
        part.flush()


def _allocate(file: BinaryIO, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def _mark_used(path: Path) -> None:
    """The access time says when a file was used last."""
    used = (time.time_ns(), path.stat().st_mtime_ns)
    os.utime(path, ns=used, follow_symlinks=False)


def _lock_part(name: Path) -> BinaryIO | None:
    """The file, made if need be and locked. None where another one has it.  .lock is held."""
    file = lock_file(name)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _wait_for(claim: Path, url: str) -> None:
    """Wait until nobody fetches what is claimed. Every fetcher has its limits."""
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


class NoRoom(UserError):
    """What is in use leaves too little of data.fetch_bytes, or of the disk."""


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
