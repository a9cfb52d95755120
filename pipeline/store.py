"""Files of a run directory, a stage's place in it, and attempts at a stage.  No torch here.

A stage's place holds `attempts/ID/` (one for each try), `checkpoints/`, and, once it is done,
`DONE`. The first attempt that puts its DONE into place wins, so two copies of one job cannot harm
each other (`claim`).  The winner's files are published by links, or as copies.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from .config import UserError
from .failures import cannot_write
from .files import WINNER, claim, damaged, read_json, write_bytes, write_json, write_text
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
DONE_KEYS = {"schema", "hash", "attempt"}  # without which DONE says nothing
COMPLETE = "COMPLETE"  # in a checkpoint's directory
UNCHECKED = "UNCHECKED"  # in RUN: the networks could not be tried where it was laid out


def complete_checkpoints(directory: Path) -> list[Path]:
    """step-STEP/ that hold all they should, oldest first: the marker is what is written last."""
    return sorted(path.parent for path in directory.glob(f"step-*/{COMPLETE}"))


class Stage:
    """One stage's place in the run: what it is, whether it is done, and where an attempt writes.

    kind: its row of pipeline.stages.  address: the index or name in its family, None without one.
    keys: hashes of the config that it reads and of its inputs' keys, so that a changed section
    changes the key of every stage behind it.  The first is today's; the others are those by which
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
        """The content of DONE, or None."""
        path = self.directory / "DONE"
        try:
            content = read_json(path)
        except FileNotFoundError:
            return None
        if not isinstance(content, dict) or not DONE_KEYS <= content.keys():
            raise damaged(path, f"it lacks {', '.join(sorted(DONE_KEYS))}")
        return content

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
        return (self.directory / "KEY").exists()

    @property
    def is_stale(self) -> bool:
        """Finished or begun under another config."""
        try:
            return (self.directory / "KEY").read_text() not in self.keys
        except FileNotFoundError:
            return False

    def path(self, file: str) -> Path:
        """A finished stage's file, in the winning attempt (links are for people; DONE counts)."""
        done = self.done()
        assert done is not None, f"{self.place} is not done"
        return self.directory / "attempts" / done["attempt"] / file

    def shown(self, file: str) -> Path:
        """An attempt's file for who watches: by its link, or the newest one's where links fail."""
        link = self.directory / file
        if link.is_symlink():
            return link
        files = sorted((self.directory / "attempts").glob(f"*/{file}"))
        return files[-1] if files else link

    def begin(self, attempt: str | None = None) -> Attempt:
        """A new attempt.  Raises UserError if the directory was begun under another config."""
        if self.is_stale:
            raise UserError(
                f"{self.directory} was made with another config; run again with --force to redo it"
            )
        attempt = attempt or new_attempt_id()
        directory = self.directory / "attempts" / attempt
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not (self.directory / "KEY").exists():
                write_text(self.directory / "KEY", self.key)
        except OSError as error:
            raise cannot_write(self.directory, error) from None
        return Attempt(self, attempt, directory)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def clear(self) -> None:
        """Forget everything of this stage: DONE first, so that no half-cleared stage looks done."""
        shutil.rmtree(self.directory / WINNER, ignore_errors=True)  # it would bring DONE back
        (self.directory / "DONE").unlink(missing_ok=True)
        if not self.directory.exists():
            return
        for child in list(self.directory.iterdir()):
            if child.is_symlink() or child.is_file():
                child.unlink()
            elif child.name in ("attempts", "checkpoints"):  # others are stages of their own
                shutil.rmtree(child)


class Attempt:
    """One try at a stage: `path` is where to write, `publish` shows early, `finish` wins."""

    def __init__(self, stage: Stage, attempt: str, directory: Path):
        self.stage = stage
        self.id = attempt
        self.directory = directory
        self.started = time.time()

    def path(self, file: str) -> Path:
        path = self.directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, file: str) -> None:
        """Link STAGE/file to this attempt's, replacing an earlier attempt's link.

        Where there are no symbolic links (exFAT, many a file share), a file is copied as it is now.
        """
        source = self.directory / file
        link = self.stage.directory / file
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
        try:
            os.symlink(os.path.relpath(source, link.parent), temporary)
        except (OSError, NotImplementedError):
            if not source.is_file():
                return
            shutil.copyfile(source, temporary)
        os.replace(temporary, link)

    def finish(self, **more) -> bool:
        """Declare this attempt finished, `more` beside what DONE always holds.

        Returns whether it won; a loser's files stay unread.
        """
        done = {
            "schema": SCHEMA,
            "stage": self.stage.name,
            "hash": self.stage.key,
            "attempt": self.id,
            "seconds": round(time.time() - self.started, 3),
            "finished": time.time(),
            **more,
        }
        write_json(self.directory / "DONE", done)
        claim(self.directory / "DONE", self.stage.directory / "DONE")
        winner = self.stage.done()
        if winner is None or winner["attempt"] != self.id:
            return False
        for file in sorted(path.name for path in self.directory.iterdir() if path.name != "DONE"):
            self.publish(file)
        # Weights lie in one file or in several: none of another attempt's may stay beside them.
        for shown in self.stage.directory.glob("model*.safetensors*"):
            if not (self.directory / shown.name).is_file():
                shown.unlink()
        return True


def new_attempt_id() -> str:
    """Unique on a cluster, and in the order of time."""
    job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    now = time.strftime("%Y%m%d-%H%M%S")
    return f"{now}-{socket.gethostname()}-{job}-{uuid.uuid4().hex[:4]}"
