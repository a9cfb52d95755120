"""What went wrong, in one line: for `referral` and `python -P -m trainer` alike.

A user's mistake, a full disk, a missing package, Ctrl-C and a closed pipe are not bugs. Each gets
one line that says what to do. Whatever else is raised keeps its traceback.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from networks.checksums import ChangedFile

from .config import UserError
from .extras import missing_package
from .interrupts import INTERRUPTED, SIGNALS
from .redaction import shown

# Exit codes.
FAILED = 1
USER_ERROR = 2

FULL = (errno.ENOSPC, errno.EDQUOT)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
FULL_WORDS = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "os error 122",
    "PytorchStreamWriter failed writing",
    " requested and ",  # numpy: "1000 requested and 512 written"
)
NEEDED = "needed_bytes"  # an attribute that `writing` adds to an OSError
MEMORY_WORDS = (
    "can't allocate memory",  # torch, of a CPU
    "Unable to allocate",  # numpy
    "CUDA out of memory",
    "HIP out of memory",
    "CUDA error: out of memory",  # outside torch's own allocator
    "Cuda failure 2 'out of memory'",  # NCCL, for its buffers
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS, for its workspace
)
MEMORY_REMEDY = "take a smaller batch or network, or a machine with more memory"
# Another try may succeed: not the user's mistake.
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET)
REMEDIES = {
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: this machine has too many files open",
    errno.EADDRINUSE: "another program has this port; end it, or try again",
    errno.ENAMETOOLONG: "choose shorter names",
    errno.ELOOP: "it is a link, and what it leads to is not written; remove the link",
    errno.EFBIG: "choose a file system without so low a limit, or raise it (ulimit -f)",
}


def answer(
    work: Callable[[], int | None],
    places: Sequence[str | Path] = (),
    signals: Sequence[int] = SIGNALS,
    before_saying: Callable[[], None] = lambda: None,
    passing: Sequence[int] = PASSING,
) -> int:
    """Do the work of a command and return its exit code, or that of what went wrong in it.

    places: where it writes, for a full disk of which nothing else is known.  signals: which end it
    in one line.  before_saying: called before an error is printed.  passing: numbers of OSError
    that another try may not meet, and whose exit code is 1.
    Raises SystemExit as it is, and every error that is ours.
    """
    there = [Path(place) for place in places if os.path.isdir(place)]
    _escape_odd_names()
    with _interruptible(signals) as received:
        try:
            code = work() or 0
            sys.stdout.flush()
            return code
        except SystemExit:
            raise
        except BaseException as error:
            if received or isinstance(error, KeyboardInterrupt):
                _ignore(signals)
                say_interrupted()
                return INTERRUPTED
            if isinstance(error, BrokenPipeError):  # `| head` has seen enough
                close_output()
                return 0
            explained = gone(error, there) or explain(error, places, passing)
            if explained is None:
                raise
            before_saying()
            code, text = explained
            print_error(text)
            return code


def _escape_odd_names() -> None:
    """Let bytes of file names that are no text be printed as escapes. Else they are an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _ignore(numbers: Sequence[int]) -> None:
    """Ignore a second Ctrl-C while the first one is reported and cleaned up."""
    try:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
    except ValueError:  # not the main thread
        pass


@contextmanager
def _interruptible(numbers: Sequence[int]) -> Iterator[list[int]]:
    """While this holds, these signals raise KeyboardInterrupt. Those that came are in the list.

    A library that turns it into an error of its own is found out by the list.  Where it comes in
    a destructor, which cannot raise it, the signal is sent again.
    """
    received: list[int] = []

    def interrupt(number, _frame):
        received.append(number)
        raise KeyboardInterrupt

    def again(unraisable):
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            return hook(unraisable)
        signal.raise_signal(received[-1] if received else signal.SIGINT)

    hook, sys.unraisablehook = sys.unraisablehook, again

    # What is ignored stays ignored: nohup and a shell's `&` rely on it.
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    try:
        before = {number: signal.signal(number, interrupt) for number in heeded}
    except ValueError:  # not the main thread, as in a server or a test
        before = {}
    try:
        yield received
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if signal.getsignal(number) in (interrupt, signal.SIG_IGN):
                signal.signal(number, handler)


def explain(
    error: BaseException,
    places: Iterable[str | Path] = (),
    passing: Sequence[int] = PASSING,
) -> tuple[int, str] | None:
    """(exit code, text) of an error that is no bug. None for the others."""
    if isinstance(error, (UserError, ChangedFile)):
        return USER_ERROR, str(error)
    if isinstance(error, OSError) and error.errno:
        code = FAILED if error.errno in passing else USER_ERROR
        return code, os_error_text(error, places)
    if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY_WORDS):
        return USER_ERROR, f"out of memory: {_one_line(error)}; {MEMORY_REMEDY}"
    if isinstance(error, ImportError):
        text = missing_package(error)
        return (USER_ERROR, text) if text else None
    # Libraries make errors of their own of these (numpy, safetensors and torch).
    if any(word in str(error) for word in FULL_WORDS):
        return USER_ERROR, full_text(fullest(places))
    if "EADDRINUSE" in str(error):
        return FAILED, f"{_one_line(error)}; {REMEDIES[errno.EADDRINUSE]}"
    return None


def gone(error: BaseException, there: Iterable[Path]) -> tuple[int, str] | None:
    """(exit code, text) of an error because a directory has disappeared.

    there: those that were when the command began.
    """
    if isinstance(error, OSError) and error.errno in GONE:
        for place in there:
            if not place.is_dir():
                return USER_ERROR, moved_text(place)
    return None


def moved_text(place: Path) -> str:
    return (
        f"{place}: it was moved or removed while this ran; move it back, or give the place where "
        "it is now, and run the same command again"
    )


# Files and disks


def os_error_text(error: OSError, places: Iterable[str | Path] = ()) -> str:
    """One line: which file, what is wrong, and what helps."""
    number = error.errno or 0
    path = error.filename if isinstance(error.filename, str) else ""
    if number in FULL:
        return full_text(Path(path) if path else fullest(places), _needed(error), number)
    reason = error.strerror or os.strerror(number)
    remedy = REMEDIES.get(number)
    text = reason[:1].lower() + reason[1:]
    if path:
        text = f"{path}: {text}"
    return f"{text}; {remedy}" if remedy else text


def full_text(path: Path, needed: int | None = None, number: int = errno.ENOSPC) -> str:
    """`PATH: the disk is full: 1.2 GiB are needed and 0.1 GiB are free; ...`."""
    reason = "the disk is full"
    if number == errno.EDQUOT:
        reason = "your quota of disk space is used up"
    free = size_text(shutil.disk_usage(existing(path)).free)
    amounts = f"{free} are free and more is needed"
    if needed is not None:
        amounts = f"{size_text(needed)} are needed and {free} are free"
    return f"{path}: {reason}: {amounts}; remove something, or choose another disk"


@contextmanager
def writing(path: str | Path, needed: int | None = None) -> Iterator[None]:
    """Note in an OSError from inside what was to be written, and how many bytes, if known."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        setattr(error, NEEDED, needed)
        raise


def cannot_write(
    path: str | Path, error: OSError, needed: int | None = None, option: str = ""
) -> UserError:
    """The error about something that a command was to write.

    needed: bytes, where they are known.  option: of the command line, which named the path.
    """
    text = f"{path}: cannot be written: {error.strerror or error}"
    if error.errno in FULL:
        text = full_text(Path(path), needed or _needed(error), error.errno)
    return UserError(f"{option} {text}".lstrip())


def fullest(places: Iterable[str | Path] = ()) -> Path:
    """Of the places where a command may write, the one whose disk has least room."""
    candidates = [Path(place) for place in places] or [Path.cwd()]
    candidates.append(Path(tempfile.gettempdir()))
    return min(candidates, key=lambda path: shutil.disk_usage(existing(path)).free)


def paths_among(arguments: Sequence[str]) -> list[Path]:
    """The arguments of a command that are paths, or are to be."""
    values = [argument.partition("=")[2] or argument for argument in arguments]
    paths = [Path(value) for value in values if value and not value.startswith("-")]
    return [path for path in paths if path.exists() or path.parent.exists()]


def existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def _needed(error: OSError) -> int | None:
    return getattr(error, NEEDED, None)


def size_text(count: int) -> str:
    """`12 bytes`, `3.4 KiB`, `5.6 MiB` or `7.8 GiB`."""
    if count < 1024:
        return f"{count} bytes"
    size = count / 1024
    for unit in ("KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


# What is printed


def print_error(text: str) -> None:
    try:
        lines = shown(text).splitlines()
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        sys.stderr.flush()
    except OSError:  # standard error is a file on the disk that is full
        pass


def say_interrupted() -> None:
    try:
        print("interrupted", file=sys.stderr, flush=True)
    except OSError:
        pass


def close_output() -> None:
    """Write nothing more to a pipe whose reader has gone, at exit neither."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
