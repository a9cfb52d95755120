"""Files that appear whole or not at all, and the one of several writers that is first."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from networks import regular
from networks.births import birth as birth
from networks.births import is_born as is_born
from networks.checksums import DONE
from networks.regular import parse as parse
from networks.temporaries import discard, temporary_beside
from networks.temporaries import sweep as sweep

from .config import UserError
from .failures import FULL, cannot_write, writing

CONTROLS = re.compile("[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Content = TypeVar("Content")
# What code raises that picks values from a file of another form than it expects.
OTHER_FORM = (AttributeError, LookupError, TypeError, ValueError, OverflowError, RecursionError)
UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)  # of a file system that has no fsync
WINNER = "WINNER"  # in a stage's, where the file system has no hard links: whose DONE it is


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    temporary = temporary_beside(path)
    try:
        with writing(path, len(content)):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        discard(temporary)


def write_json(path: Path, value) -> None:
    write_text(path, json_text(value, str(path), indent=2) + "\n")


class NotFinite(UserError, ValueError):
    """A number that JSON does not have: NaN or an infinity."""


def json_text(value, name: str, **options: Any) -> str:
    """JSON as every program reads it.

    name: what is written, for the error.  Raises NotFinite for NaN and infinity, which Python would
    write as words that others refuse.
    """
    try:
        text = json.dumps(value, allow_nan=False, **options)
    except ValueError:
        key = _not_finite(value, "")
        if key is None:
            raise
        raise NotFinite(
            f"{name}: {key} is no finite number, and JSON has no other: "
            "a network's weights, or the data, hold NaN or infinity"
        ) from None
    # Some terminals obey these, too, and JSON need not escape them.
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _not_finite(value, key: str) -> str | None:
    """The key of the first number in it that is NaN or infinite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else key or "it"
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for name, item in items:
        found = _not_finite(item, f"{key}.{name}".lstrip("."))
        if found:
            return found
    return None


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's names, to disk, so that a power loss spares them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """`sync` of every file and directory below `directory`, itself last."""
    for place, _, files in os.walk(directory, topdown=False):
        for file in files:
            path = Path(place, file)
            if path.is_file() and not path.is_symlink():
                with writing(path):
                    sync(path)
        sync(Path(place))


def sync_upwards(directory: Path, top: Path) -> None:
    """`sync` of the directories from `directory` up to `top`."""
    for place in (directory, *directory.parents):
        if os.access(place, os.R_OK):  # one may have no names to read there
            sync(place)
        if place == top:
            return


def make_below(top: Path, directory: Path) -> None:
    """Make a directory and those between it and `top`, unless they are there.

    Raises FileNotFoundError where `top` is not there: somebody has moved or removed it, and what is
    written would be left where nobody looks for it.
    """
    if not top.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(top))
    directory.mkdir(parents=True, exist_ok=True)


class DamagedFile(UserError, ValueError):
    """A file of a run that was truncated or overwritten."""


def read_json(path: Path):
    """A JSON file's content.  Raises DamagedFile where it is not JSON, OSError."""
    try:
        return regular.read_json(path)
    except ValueError as error:
        raise damaged(path, str(error)) from None


def read_rows(path: Path) -> list[dict]:
    """The objects of a file of JSON lines.  Raises DamagedFile where one is none, OSError."""
    try:
        rows = [parse(line) for line in regular.read_text(path).splitlines()]
        if all(isinstance(row, dict) for row in rows):
            return rows
        reason = "a line is no JSON object"
    except ValueError as error:
        reason = str(error)
    raise damaged(path, reason)


def holds(path: Path, text: str) -> bool:
    """Whether a file is there, and this is all that it holds."""
    try:
        return regular.read_text(path) == text
    except (OSError, ValueError):
        return False


def holds_something(path: Path) -> bool:
    """Whether a file is more than what a power loss leaves: nothing, or zeros."""
    try:
        return bool(regular.read_text(path).strip("\0"))
    except ValueError:  # no text, or no file
        return True


def checked(path: Path, content: Any, form: TypeAdapter[Content]) -> Content:
    """The content of a file, as its form has it.  Raises DamagedFile, which names the key."""
    try:
        return form.validate_python(content)
    except ValidationError as mistakes:
        first = mistakes.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{key}: {first['msg']}" if key else first["msg"]) from None


@contextmanager
def picking_from(path: Path) -> Iterator[None]:
    """Report whatever fails in here, over a file's values, as damage to the file."""
    try:
        yield
    except UserError:
        raise
    except OTHER_FORM as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from None


def damaged(path: Path, reason: str) -> DamagedFile:
    words = " ".join(reason.split())
    return DamagedFile(f"{path} is damaged ({words[:300]}); restore it, or remove it")


def home() -> Path | None:
    """The user's home directory. None if there is none, as in many containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def claim(source: Path, target: Path) -> None:
    """Make `target` the content of `source`, whole and at once, unless there is one already.

    Of several that do so at the same time exactly one is first, and its content stays.  A hard
    link does it in one call.  Some file systems have none between directories (BeeGFS) or none at
    all (SMB, exFAT): then a directory that holds the content is renamed into place.  A rename
    never replaces a directory that holds something, so that one is first there, too.
    """
    beside = temporary_beside(target)
    try:
        if _linked(source, target):
            sync(target.parent)
            return
        write_bytes(beside, source.read_bytes())
        if not _linked(beside, target):
            _claim_by_rename(source, target)
        sync(target.parent)
    finally:
        beside.unlink(missing_ok=True)


def _linked(source: Path, target: Path) -> bool:
    """Whether `target` is there now, by this link or another's. False where links are refused."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except (OSError, AttributeError):
        return False
    return True


def _claim_by_rename(source: Path, target: Path) -> None:
    """As `claim`.  Whoever comes later finishes what the first has begun, should it have died."""
    if target.exists():
        return
    winner = target.with_name(WINNER)
    own = temporary_beside(winner)
    own.mkdir()
    try:
        write_bytes(own / target.name, source.read_bytes())
        _rename_if_first(own, winner)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    write_bytes(target, (winner / target.name).read_bytes())


def _rename_if_first(own: Path, winner: Path) -> None:
    """Rename a directory, unless `winner` is there.  Raises the OSError that is no such thing."""
    try:
        if winner.is_dir() and not any(winner.iterdir()):
            winner.rmdir()  # half cleared
        os.rename(own, winner)
    except OSError:
        if not winner.is_dir() or not any(winner.iterdir()):
            raise


def probe(directory: Path) -> None:
    """Try in `directory` what finishing a stage needs, and leave nothing behind.

    Raises UserError, in one line, where its file system cannot do it.
    """
    place = temporary_beside(directory / "probe")
    try:
        try:
            place.mkdir()
            write_bytes(place / "first", b"first")
            write_bytes(place / "second", b"second")
            write_bytes(place / "second", b"again")
        except OSError as error:
            raise _unfit(directory, "write a file and rename it over another", error) from None
        try:
            claim(place / "first", place / DONE)
            claim(place / "second", place / DONE)
            held = (place / DONE).read_bytes()
        except OSError as error:
            raise _unfit(directory, "let one of two writers be first", error) from None
        if held != b"first":
            raise _unfit(directory, "let one of two writers be first", None)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _unfit(directory: Path, need: str, error: OSError | None) -> UserError:
    if error and error.errno in FULL:
        return cannot_write(directory, error)
    reason = f": {error.strerror or error}" if error else ""
    return UserError(
        f"{directory}: its file system cannot {need}{reason}; finishing a stage needs this, "
        "so choose --run on another one"
    )
