"""Shards that are fetched when they are read: a window ahead of the readers, let go behind them."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config import Data, UserError

from .fetching import PARALLEL, FetchDir, NoRoom
from .patterns import Shard
from .window import Need, Window

AGAIN_S = 0.5  # after which a shard ahead that found no room is tried again


class Arrivals:
    """What one process holds of a set that does not lie on its disk.

    shards: {number: shard}, those that stream.  close: a method, close(number) lets go of a shard's
    files.

    Whatever it holds is leased: no process evicts it.  The processes that read fetch, by threads of
    their own.  A main process that leaves reading to its workers has no threads, so that it can be
    forked.
    """

    def __init__(self, data: Data, shards: Mapping[int, Shard], close: Callable[[int], None]):
        self.data = data
        self.shards = shards
        self.directory = FetchDir(data)
        self._close_method = weakref.WeakMethod(close)  # of the set, which must not live for it
        self._threads = PARALLEL
        if any(shard.url.startswith("pipe:") for shard in shards.values()):
            self._threads = 1  # what a command takes is not ours to say
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._window = Window(self.data.stream_shards)
        self._held: dict[int, bool] = {}
        self._fetches = _Fetches(self._fetch, self._threads)

    def _own(self) -> None:
        """A forked process begins anew: leases and threads are its parent's."""
        if self._pid == os.getpid():
            return
        for number in self.shards:
            self._close(number)
        self._begin()

    def _close(self, number: int) -> None:
        close = self._close_method()
        if close is not None:
            close(number)

    def announce(self, need: Need, reader: object = None, fetch: bool = True) -> None:
        """What a reader needs from here on: fetch it, what comes now first, and let others go.

        fetch: else another process does.
        """
        self._own()
        self._window.announce(reader, self._streaming(need))
        self._renew()
        if fetch:
            for number in (*need.now, *need.ahead):
                if number in self._held:
                    self._fetches.begin(number, self.shards[number], not self._held[number])

    def leave(self, reader: object) -> None:
        """The reader has ended."""
        self._own()
        self._window.leave(reader)
        self._renew()

    def have(self, number: int, keep: bool = False) -> None:
        """The shard is to be read: wait until it is there.  UserError where it cannot be fetched.

        keep: for as long as the set is open.
        """
        self._own()
        if keep:
            self._window.kept.add(number)
        self._window.read(number)
        self._renew()
        self._fetches.wait(number)
        self._fetch(self.shards[number], False)

    def holds(self, numbers: Sequence[int]) -> bool:
        """Whether all of these that stream are held already."""
        self._own()
        return all(number in self._held for number in numbers if number in self.shards)

    def end(self) -> None:
        """The set is no longer read. What it held may be evicted soon."""
        if self._pid == os.getpid() and self._held:
            self._fetches.keep(())
            self.directory.unwant(id(self))

    def _streaming(self, need: Need) -> Need:
        """The part of a need that streams: a set may have local shards too."""
        now, ahead = ([n for n in part if n in self.shards] for part in (need.now, need.ahead))
        return Need(tuple(now), tuple(ahead))

    def _renew(self) -> None:
        """Close what is no longer held, and lease what is."""
        held = self._window.held()
        if held == self._held:
            return
        for number in self._held.keys() - held.keys():
            self._close(number)
        self._held = held
        self._fetches.keep(held)
        names: dict[str, int] = {}
        for number, is_now in held.items():
            shard = self.shards[number]
            assert shard.entry is not None, shard
            names[os.path.basename(shard.path)] = FetchDir.taken(shard.entry) if is_now else 0
        self.directory.want(id(self), names)

    @property
    def _fetch(self) -> Callable[[Shard, bool], None]:
        """(shard, whether it is ahead) -> it is there.  It does not hold this object."""
        directory, label = self.directory, self.data.label

        def fetch(shard: Shard, ahead: bool) -> None:
            assert shard.entry is not None, shard
            directory.arrive(shard.url, shard.entry, label, ahead)

        return fetch


@dataclass
class _Job:
    """A shard that a thread is to fetch."""

    number: int
    shard: Shard
    ahead: bool
    done: threading.Event = field(default_factory=threading.Event)
    refused: float = 0.0  # when there was no room for it

    def is_due(self, ahead: bool) -> bool:
        """Whether it is to be tried again."""
        if not self.refused:
            return False
        return not ahead or self.refused + AGAIN_S <= time.monotonic()


class _Fetches:
    """Threads that fetch shards, as long as there are any to fetch.

    They are daemons: a process that ends does not wait for what it does not read.
    """

    def __init__(self, fetch: Callable[[Shard, bool], None], most: int):
        self.fetch = fetch
        self.most = most
        self._lock = threading.Lock()
        self._jobs: dict[int, _Job] = {}
        self._queue: deque[_Job] = deque()
        self._running = 0

    def begin(self, number: int, shard: Shard, ahead: bool) -> None:
        """Have a shard fetched, behind those that were asked for before."""
        with self._lock:
            job = self._jobs.get(number)
            if job is not None and not job.is_due(ahead):
                return
            job = self._jobs[number] = _Job(number, shard, ahead)
            self._queue.append(job)
            if self._running < self.most:
                self._running += 1
                threading.Thread(target=self._work, name="shards", daemon=True).start()

    def keep(self, numbers: Iterable[int]) -> None:
        """Forget all others: what is not begun yet is not fetched."""
        with self._lock:
            for number in self._jobs.keys() - set(numbers):
                job = self._jobs.pop(number)
                if job in self._queue:
                    self._queue.remove(job)
                    job.done.set()

    def wait(self, number: int) -> None:
        """Wait until the shard was tried, if it is among those to fetch."""
        with self._lock:
            job = self._jobs.get(number)
        if job is not None:
            job.done.wait()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._running -= 1
                    return
                job = self._queue.popleft()
            try:
                self.fetch(job.shard, job.ahead)
            except NoRoom:
                job.refused = time.monotonic()
            except UserError:
                pass  # whoever reads it tries once more, and says why it fails
            finally:
                job.done.set()
