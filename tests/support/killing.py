"""Ends a process at one single file operation, by SIGKILL or by an exception that nobody catches.

Counted is what changes the names or the durability of files: unlink, rename, mkdir, link, fsync ...
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OPERATIONS = (
    "unlink",
    "remove",
    "rename",
    "replace",
    "rmdir",
    "mkdir",
    "link",
    "symlink",
    "fsync",
    "truncate",
    "ftruncate",
)


class Killed(BaseException):
    """The process would be dead now: every further operation raises it again."""


class Operations:
    """count: how many there were.  names: what each was."""

    def __init__(self, last: int | None, kill: Callable[[], None]):
        self.last = last
        self.kill = kill
        self.count = 0
        self.names: list[str] = []

    def watch(self, name: str, original: Callable) -> Callable:
        def operation(*arguments, **options):
            if self.last is not None and self.count >= self.last:
                self.kill()
            self.count += 1
            self.names.append(name)
            return original(*arguments, **options)

        return operation


def _raise() -> None:
    raise Killed


def _sigkill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def operations(last: int | None = None, really: bool = False) -> Iterator[Operations]:
    """While this holds, `last` file operations are done and the next one kills.

    really: by SIGKILL, in a process of its own.
    """
    counted = Operations(last, _sigkill if really else _raise)
    originals = {name: getattr(os, name) for name in OPERATIONS}
    for name, original in originals.items():
        setattr(os, name, counted.watch(name, original))
    try:
        yield counted
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
