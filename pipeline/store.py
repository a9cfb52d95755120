"""Files of a run directory, a stage's place in it, and attempts at a stage.  No torch here.

A stage's place holds `attempts/ID/` (one for each try), `checkpoints/`, and, once it is done,
`DONE`. The first attempt that puts its DONE into place wins, so two copies of one job cannot harm
each other (`claim`).  The winner's files are published by links, or as copies.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from networks import checksums, regular
from networks.temporaries import temporary_beside

from .config import UserError
from .failures import cannot_write
from .files import (
    OTHER_FORM,
    WINNER,
    DamagedFile,
    birth,
    checked,
    claim,
    damaged,
    holds_something,
    is_born,
    make_below,
    read_json,
    sync,
    sync_tree,
    sync_upwards,
    write_bytes,
    write_json,
    write_text,
)
from .identity import SCHEMA
from .stages import StageKind

__all__ = [
    "COMPLETE",
    "UNCHECKED",
    "Attempt",
    "Stage",
    "complete_checkpoints",
    "new_attempt_id",
    "read_json",
    "write_bytes",
    "write_json",
    "write_text",
]
log = logging.getLogger("referral")
DONE = checksums.DONE
KEY = "KEY"
# What is written to after DONE: logs, and an index that a reader makes anew.
UNLISTED = (".index.npz",)
NAMED_FILES = 8  # of those that may be damaged
NEVER_EMPTY = (".json", ".npy", ".npz", ".safetensors", ".tar")
OWNER = "OWNER"  # in a directory of unfinished files: the process that writes them
COMPLETE = "COMPLETE"  # in a checkpoint's directory
UNCHECKED = "UNCHECKED"  # in RUN: the networks could not be tried where it was laid out


Seconds = Annotated[float, Field(ge=-1e12, le=1e12)]


class Done(TypedDict):
    """What DONE says. Other versions may say more.  attempt: a name below attempts/, no path."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore
    schema: int
    hash: str
    attempt: Annotated[str, Field(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$")]
    seconds: NotRequired[Seconds]
    finished: NotRequired[Annotated[float, Field(ge=0, le=1e11)]]


DONE_FORM = TypeAdapter(Done)


def complete_checkpoints(directory: Path) -> list[Path]:
    """step-STEP/ that hold all they should, oldest first: the marker is what is written last."""
    return sorted(path.parent for path in directory.glob(f"step-*/{COMPLETE}"))


class Stage:
    """One stage's place in the run: what it is, whether it is done, and where an attempt writes.

    kind: its row of pipeline.stages.  address: the index or name in its family, None without one.
    keys: hashes of the config that it reads and of its inputs' keys, so that a changed section
    changes the key of every stage behind it.  The first is today's. The others are those by which
    earlier versions know the same stage.
    former: keys of a stage of this place that earlier versions made otherwise: its results can be
    read, but not gone on with.  None where all made it as today.
    """

    def __init__(
        self,
        run: Path,
        kind: StageKind,
        keys: tuple[str, ...],
        inputs: Iterable[Stage] = (),
        address: int | str | None = None,
        former: tuple[str, ...] | None = None,
    ):
        self.run = Path(run)
        self.kind = kind
        self.name = kind.name
        self.address = address
        self.place = kind.place_of(address)
        self.keys = keys
        self.key = keys[0]
        self.former = former or keys
        self.inputs = tuple(inputs)
        self.directory = self._directory()
        self._run_was_there = self.run.is_dir()
        self._whole: str | None = None  # the attempt whose files were seen to be there

    def _directory(self) -> Path:
        """Where it lies: where an earlier version put it, if that is there."""
        directory = self.run / self.place
        if self.kind.former_place and not directory.exists():
            former = self.run / self.kind.former_place.format(index=self.address, name=self.address)
            if former.exists():
                return former
        return directory

    @property
    def arguments(self) -> tuple:
        """What its function takes beside session and stage."""
        return () if self.address is None else (self.address,)

    def done(self) -> dict | None:
        """The content of DONE. None where there is none, or where its files are not whole."""
        content = self.recorded()
        return None if content is None or self._lacks(content) else content

    @property
    def lacks(self) -> str:
        """What a stage with a DONE is not done for, as after a power loss. Empty if nothing."""
        content = self.recorded()
        if content is not None:
            return self._lacks(content)
        return f"{DONE} is empty" if self._done_path.exists() else ""

    @property
    def _done_path(self) -> Path:
        return self.directory / DONE

    def recorded(self) -> dict | None:
        """What DONE says. None where there is none, or an empty one."""
        path = self._done_path
        try:
            content = read_json(path)
        except FileNotFoundError:
            return None
        except DamagedFile:
            if holds_something(path):
                raise
            return None
        return dict(checked(path, content, DONE_FORM))

    def _lacks(self, content: dict) -> str:
        """What the sizes of its files say against a DONE.  Whole is looked up once."""
        if content["attempt"] == self._whole:
            return ""
        directory = self.directory / "attempts" / content["attempt"]
        if not directory.is_dir():
            return f"{directory} is missing"
        try:
            files = checksums.files_of(content)
        except ValueError as error:
            raise damaged(self._done_path, str(error)) from None
        for name, entry in files.items():
            if reason := checksums.lacks(directory / name, entry):
                return f"{directory / name}: {reason}"
        for name in files.keys() & content.get("published", ()):
            if reason := checksums.differs(self.run / name, files[name]):
                return f"{self.run / name}: {reason}"
        if not files:  # of an earlier version
            for path in sorted(directory.rglob("*")):
                if path.suffix in NEVER_EMPTY and path.is_file() and not path.stat().st_size:
                    return f"{path}: it has 0 bytes"
        self._whole = content["attempt"]
        return ""

    @property
    def is_done(self) -> bool:
        done = self.done()
        return done is not None and done["hash"] in self.keys

    @property
    def is_older(self) -> bool:
        """Finished by a version that made it otherwise, or whose keys this one cannot compare.

        Readable, but not to resume.
        """
        done = self.done()
        if done is None or done["hash"] in self.keys:
            return False
        return done["schema"] < SCHEMA or done["hash"] in self.former

    @property
    def is_begun(self) -> bool:
        return (self.directory / KEY).exists()

    @property
    def is_stale(self) -> bool:
        """Finished or begun under another config."""
        try:
            return regular.read_text(self.directory / KEY) not in self.keys
        except FileNotFoundError:
            return False
        except ValueError:  # it is no text, or no file
            return True

    def path(self, file: str) -> Path:
        """A finished stage's file, in the winning attempt (links are for people, DONE counts).

        Of a directory: with all files below it.  Each is compared with its checksum when this
        process first asks for it.  Raises DamagedFile where one differs.
        """
        done = self.done()
        assert done is not None, f"{self.place} is not done"
        directory = self.directory / "attempts" / done["attempt"]
        files = checksums.files_of(done)
        if not files:
            _note_unchecked(self.run, directory / file)
        below = "" if file in ("", ".") else f"{file}/"
        for name, entry in files.items():
            if name == file or name.startswith(below):
                self._compare(directory / name, entry)
        return directory / file

    def folder(self, *files: str) -> Path:
        """The directory of a finished stage's files, each compared as `path` does."""
        return [self.path(file) for file in files][0].parent

    def _compare(self, path: Path, entry: checksums.Entry) -> None:
        if reason := checksums.differs(path, entry):
            remedy = checksums.remedy(self._done_path)
            raise DamagedFile(f"{path} is damaged: {reason}; {remedy}")

    def link(self) -> None:
        """Show the winning attempt's files in the stage, where a kill or a power loss kept them."""
        done = self.done()
        if done is None:
            return
        winner = Attempt(self, done["attempt"], self.directory / "attempts" / done["attempt"])
        for file in sorted(path.name for path in winner.directory.iterdir()):
            if file != DONE and not file.startswith(".") and not winner.is_shown(file):
                winner.publish(file)

    def shown(self, file: str) -> Path:
        """An attempt's file for who watches: by its link, or the newest one's where links fail."""
        link = self.directory / file
        if link.is_symlink():
            return link
        files = sorted((self.directory / "attempts").glob(f"*/{file}"))
        return files[-1] if files else link

    def begin(self, attempt: str | None = None) -> Attempt:
        """A new attempt.  Raises UserError if the directory was begun under another config.

        A DONE whose files are not whole is taken away first, and so are checkpoints of which no
        KEY says by which config they were made.
        """
        if self.is_stale:
            raise UserError(
                f"{self.directory} was made with another config; run again with --force to redo it"
            )
        attempt = attempt or new_attempt_id()
        directory = self.directory / "attempts" / attempt
        try:
            if self._run_was_there:
                make_below(self.run, self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.lacks:
                self._forget_done()
            has_checkpoints = self.checkpoints.exists()
            if not self.is_begun:
                if has_checkpoints:
                    _remove_aside(self.checkpoints)
                write_text(self.directory / KEY, self.key)
                sync_upwards(self.directory, self.run)
            make_below(self.directory, directory)
        except OSError as error:
            raise cannot_write(self.directory, error) from None
        return Attempt(self, attempt, directory)

    def _forget_done(self) -> None:
        """Take DONE away, unless another attempt has put a whole one there meanwhile."""
        aside = temporary_beside(self._done_path)
        try:
            if (self.directory / WINNER).exists():  # it would bring DONE back
                _remove_aside(self.directory / WINNER)
            os.rename(self._done_path, aside)
        except FileNotFoundError:
            return
        try:
            content = read_json(aside)
            if not self._lacks(content):
                claim(aside, self._done_path)
        except DamagedFile:
            pass
        finally:
            aside.unlink(missing_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def clear(self) -> None:
        """Forget everything of this stage.

        Killed at any operation it leaves a stage that is done as before, or is not done and has
        the old KEY.  WINNER goes before DONE, which it would bring back.  Checkpoints and attempts
        get a hidden name at once and are then deleted, so that none is ever half there.  KEY, which
        says by which config they were made, goes last.
        """
        if not self.directory.exists():
            return
        if not self.directory.resolve().is_relative_to(self.run.resolve()):
            raise UserError(
                f"{self.directory} is a link out of {self.run}, and so nothing in it is deleted; "
                "remove the link"
            )
        if (self.directory / WINNER).exists():
            _remove_aside(self.directory / WINNER)
        self._done_path.unlink(missing_ok=True)
        self._whole = None
        for name in ("checkpoints", "attempts"):  # other directories are stages of their own
            if (self.directory / name).is_dir():
                _remove_aside(self.directory / name)
        for child in list(self.directory.iterdir()):
            if child.name != KEY and (child.is_symlink() or child.is_file()):
                child.unlink(missing_ok=True)
        sync(self.directory)
        (self.directory / KEY).unlink(missing_ok=True)
        sync(self.directory)


def _remove_aside(directory: Path) -> None:
    """Delete a directory that is whole to every reader, or gone."""
    aside = temporary_beside(directory)
    os.rename(directory, aside)
    shutil.rmtree(aside)


def _note_unchecked(run: Path, path: Path) -> None:
    """Note a file that is read as it is, and say once per process what its run lacks."""
    if run not in _unchecked:
        log.info("%s has no checksums, for an older version made it: its files are read as is", run)
    files = _unchecked.setdefault(run, {})
    files.pop(path, None)
    files[path] = None  # the last that is asked for stands last


_unchecked: dict[Path, dict[Path, None]] = {}  # of each such run, in this process


@contextmanager
def blaming_unchecked(run: Path) -> Iterator[None]:
    """Say what fails in here for the form of a value as the damage of a file of RUN.

    Only in a run without checksums, some of whose files were read: nothing else says of these
    whether they are what they were.  In every other run such an error is ours, and stays.
    """
    try:
        yield
    except UserError:
        raise
    except OTHER_FORM as error:
        files = [path for read in _unchecked.values() for path in read][-NAMED_FILES:]
        if not files:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{run}: {reason}; an older version made it, without checksums: restore what is "
            "damaged, or remove the DONE of its stage; read were "
            f"{', '.join(map(str, reversed(files)))}"
        ) from None


class Attempt:
    """One try at a stage: `path` is where to write, `publish` shows early, `finish` wins."""

    def __init__(self, stage: Stage, attempt: str, directory: Path):
        self.stage = stage
        self.id = attempt
        self.directory = directory
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began, by a clock that nobody sets."""
        return time.monotonic() - self._began

    def path(self, file: str) -> Path:
        path = self.directory / file
        make_below(self.directory, path.parent)
        return path

    def unfinished(self, name: str) -> Path:
        """Where this attempt writes what a later one can go on with: checkpoints/NAME-ATTEMPT."""
        return self.stage.checkpoints / f"{name}-{self.id}"

    def take_over(self, name: str) -> None:
        """Make `unfinished`, of what an attempt has written that was ended, if there is such.

        Whoever has it is alone with it: of two copies of one job neither writes into the files
        that the other moves away.  A living process on this machine keeps its own.  On another
        machine nobody can tell: one that does live there finds its directory gone, fails, and can
        be tried again.
        """
        own = self.unfinished(name)
        make_below(self.stage.directory, self.stage.checkpoints)
        earlier = [own.with_name(name), *sorted(own.parent.glob(f"{name}-*"))]
        for directory in earlier:
            if directory.is_dir() and not _has_owner(directory):
                try:
                    os.rename(directory, own)
                    break
                except FileNotFoundError:  # another attempt was faster
                    continue
        else:
            own.mkdir()
        pid = os.getpid()
        write_json(own / OWNER, {"host": socket.gethostname(), "pid": pid, "born": birth(pid)})

    def drop_unfinished(self, name: str) -> None:
        """Remove what was written there, and what nobody will go on with."""
        own = self.unfinished(name)
        for directory in own.parent.glob(f"{name}-*"):
            if directory == own or not _has_owner(directory):
                shutil.rmtree(directory, ignore_errors=True)

    def publish(self, file: str) -> None:
        """Link STAGE/file to this attempt's, replacing an earlier attempt's link.

        Where there are no symbolic links (exFAT, many a file share), a file is copied as it is now.
        Of a file that is not there no link is left, an earlier attempt's neither.
        """
        source = self.directory / file
        link = self.stage.directory / file
        if not source.exists():
            link.unlink(missing_ok=True)
            return
        make_below(self.stage.directory, link.parent)
        temporary = temporary_beside(link)
        try:
            os.symlink(os.path.relpath(source, link.parent), temporary)
        except (OSError, NotImplementedError):
            if not source.is_file():
                return
            shutil.copyfile(source, temporary)
        os.replace(temporary, link)

    def publish_growing(self, file: str) -> Path:
        """The path of a file that is to be watched while it grows: it is there at once, empty."""
        path = self.path(file)
        path.touch()
        self.publish(file)
        return path

    def is_shown(self, file: str) -> bool:
        """Whether STAGE/file is a link to this attempt's file, or a whole copy of it."""
        link = self.stage.directory / file
        source = self.directory / file
        if link.is_symlink():
            return os.path.realpath(link) == os.path.realpath(source)
        return link.is_file() and link.stat().st_size == source.stat().st_size

    def finish(self, published: Sequence[str] = (), **more) -> bool:
        """Declare this attempt finished, `more` beside what DONE always holds.

        All its files are on the disk before DONE is, with their checksums in it.  published: names
        of those that are copied to RUN. Without them the stage is not done.
        Returns whether it won. A loser's files stay unread.
        """
        done = {
            "schema": SCHEMA,
            "stage": self.stage.name,
            "hash": self.stage.key,
            "attempt": self.id,
            "seconds": round(self.seconds, 3),
            "finished": time.time(),
            **more,
            "published": list(published),
            "files": checksums.entries_of(self.directory, _is_listed),
        }
        sync_tree(self.directory)
        write_json(self.directory / DONE, done)
        sync_upwards(self.directory, self.stage.directory)
        claim(self.directory / DONE, self.stage.directory / DONE)
        winner = self.stage.recorded()
        if winner is None or winner["attempt"] != self.id:
            return False
        for file in published:
            write_bytes(self.stage.run / file, (self.directory / file).read_bytes())
        self.stage.link()
        # Weights lie in one file or in several: none of another attempt's may stay beside them.
        for shown in self.stage.directory.glob("model*.safetensors*"):
            if not (self.directory / shown.name).is_file():
                shown.unlink()
        sync_upwards(self.stage.directory, self.stage.run)
        return True


def _has_owner(directory: Path) -> bool:
    """Whether another living process of this machine writes there."""
    try:
        owner = read_json(directory / OWNER)
        is_other = owner["host"] == socket.gethostname() and owner["pid"] != os.getpid()
        return is_other and is_born(owner["pid"], owner["born"])
    except (FileNotFoundError, DamagedFile, *OTHER_FORM):
        return False


def _is_listed(name: str) -> bool:
    """Whether DONE has a checksum of an attempt's file."""
    own = os.path.basename(name)
    is_log = name.startswith("log-") and name.endswith(".txt")
    return not (is_log or own.startswith(".") or own.endswith(UNLISTED) or name == DONE)


def new_attempt_id() -> str:
    """Unique on a cluster, and in the order of time."""
    job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    now = time.strftime("%Y%m%d-%H%M%S")
    return f"{now}-{socket.gethostname()}-{job}-{uuid.uuid4().hex[:4]}"
