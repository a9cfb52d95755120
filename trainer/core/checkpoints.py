"""Checkpoints: a directory under a temporary name, then renamed; complete only with its marker.

`state.pt` holds tensors and plain values only.  It is read with `weights_only=True`, so that
nothing is unpickled into code.  The marker, COMPLETE, holds its checksum, which is compared before
it is read.  One of an earlier version is empty.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from networks import checksums
from networks.temporaries import temporary_beside
from pipeline.config import UserError
from pipeline.failures import existing, size_text
from pipeline.files import sync_tree, sync_upwards
from pipeline.store import COMPLETE, complete_checkpoints

from ..distributed.ranks import ALONE, Ranks, broadcast

State = dict  # of tensors and plain values, nested in dicts and lists
STATE = "state.pt"
log = logging.getLogger("referral")


def save_checkpoint(
    directory: Path,
    step: int,
    state: State,
    keep: int,
    *,
    best: int | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write rank 0's `state` as directory/step-STEP, then drop old checkpoints.

    The newest `keep` stay, and that of step `best`.  One that another attempt wrote stays too.
    No rank continues before the checkpoint is complete.
    Raises UserError, on every rank, where it cannot be written.  Nothing is left of it then, and
    the earlier checkpoints are unchanged.
    """
    problem = None
    if ranks.is_main:
        problem = _write(directory, checkpoint_path(directory, step), state)
    problem = broadcast(problem, ranks)
    if problem:
        raise UserError(_refusal(directory, step, problem))
    if ranks.is_main:
        _prune(directory, keep, best)


class Saver:
    """The checkpoints of one training run, written at once or by a thread beside the training."""

    def __init__(self, directory: Path, keep: int, ranks: Ranks):
        self.directory = directory
        self.keep = keep
        self.ranks = ranks
        self.thread: ThreadPoolExecutor | None = None
        if in_background(ranks):
            self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None

    def save(self, step: int, state: State, best: int | None) -> None:
        """Save now, or start an asynchronous save.

        An asynchronous save waits for the previous one and raises its error.
        """
        if self.thread is None:
            save_checkpoint(self.directory, step, state, self.keep, best=best, ranks=self.ranks)
        elif self.ranks.is_main:
            self.wait()
            self.pending = self.thread.submit(
                save_checkpoint, self.directory, step, on_cpu(state), self.keep, best=best
            )

    def wait(self) -> None:
        """Wait, on rank 0, for the save that was started, and raise its error."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait on every rank: one that ends before the save is done ends the others too."""
        self.wait()
        broadcast(None, self.ranks)


def in_background(ranks: Ranks) -> bool:
    """Whether a thread writes: on CUDA, where a copy on the CPU is needed anyway."""
    return ranks.device.type == "cuda"


def on_cpu(state: State) -> State:
    """A deep copy whose tensors are on the CPU."""
    return {key: _copy_on_cpu(value) for key, value in state.items()}


def _copy_on_cpu(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return on_cpu(value)
    if isinstance(value, (list, tuple)):
        return [_copy_on_cpu(item) for item in value]
    return value


def newest_step(directory: Path) -> int | None:
    """The step of the newest complete checkpoint, None where there is none."""
    checkpoints = complete_checkpoints(directory)
    if not checkpoints:
        return None
    return step_of(checkpoints[-1])


def whole_step(directories: Sequence[Path]) -> int | None:
    """The newest step of which every directory has a whole checkpoint, None where none has any.

    Later ones that are damaged are named in the log, and removed: training writes them again.
    Raises UserError where there are checkpoints in all of them and none is whole.
    """
    steps = [{step_of(path) for path in complete_checkpoints(each)} for each in directories]
    common = sorted(set.intersection(*steps), reverse=True)
    damaged: list[tuple[Path, str]] = []
    for step in common:
        paths = [checkpoint_path(directory, step) for directory in directories]
        faults = [(path, reason) for path in paths if (reason := fault(path))]
        if faults:
            damaged += faults
            continue
        for path, reason in damaged:
            log.warning("%s is damaged (%s): going on from step %d", path, reason, step)
            _remove(path)
        return step
    if damaged:
        path, reason = damaged[0]
        raise UserError(
            f"no checkpoint in {path.parent} is whole ({path.name}: {reason}): remove that "
            "directory and run the same command again, which trains from the start"
        )
    return None


def fault(checkpoint: Path) -> str:
    """What is wrong with a complete checkpoint; empty if nothing.

    Earlier versions kept no checksum; torch's file is a zip, which has weaker ones.
    """
    try:
        text = (checkpoint / COMPLETE).read_text(encoding="utf-8")
        files = checksums.files_of(json.loads(text)) if text else {}
    except (OSError, ValueError, AttributeError):
        return f"its {COMPLETE} cannot be read"
    if STATE in files:
        reason = checksums.differs(checkpoint / STATE, files[STATE])
        return f"{STATE}: {reason}" if reason else ""
    if text.strip():
        return f"its {COMPLETE} has no checksum"
    try:
        with zipfile.ZipFile(checkpoint / STATE) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        return f"{STATE}: {error}"
    return f"{STATE}: {damaged} has another checksum" if damaged else ""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def load_checkpoint(directory: Path, step: int, device: torch.device | str = "cpu") -> State:
    """Raises UserError for one that is damaged."""
    checkpoint = checkpoint_path(directory, step)
    if reason := fault(checkpoint):
        raise UserError(f"{checkpoint} is damaged ({reason}); remove it and run again")
    return torch.load(checkpoint / STATE, map_location=device, weights_only=True)


def _write(directory: Path, final: Path, state: State) -> str | None:
    """What went wrong with the disk, or None."""
    if (final / COMPLETE).exists():
        return None
    temporary = temporary_beside(final)
    try:
        temporary.mkdir(parents=True)
        with open(temporary / STATE, "wb") as file:
            hashing = checksums.Hashing(file)
            torch.save(state, hashing)
        marker = json.dumps({"files": {STATE: hashing.entry}})
        (temporary / COMPLETE).write_text(marker, encoding="utf-8")
        sync_tree(temporary)
        os.rename(temporary, final)
        sync_upwards(directory, directory.parent)
    except (OSError, RuntimeError) as error:  # torch's writer makes a full disk a RuntimeError
        if (final / COMPLETE).exists():  # another attempt was first
            return None
        if isinstance(error, RuntimeError) and not _about_files(error):
            raise
        return f"{_reason(error)}; it takes {size_text(_bytes_of(state))}"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


def _prune(directory: Path, keep: int, best: int | None) -> None:
    best_path = None
    if best is not None:
        best_path = checkpoint_path(directory, best)
    for path in complete_checkpoints(directory)[:-keep]:
        if path != best_path:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """The marker goes first, so that a half-removed checkpoint is not taken for one."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _about_files(error: RuntimeError) -> bool:
    message = str(error)
    words = ("PytorchStreamWriter", "No space left", "unexpected pos", "file")
    return any(word in message for word in words)


def _refusal(directory: Path, step: int, problem: str) -> str:
    newest = newest_step(directory)
    earlier = "there is no earlier one"
    if newest is not None:
        earlier = f"that of step {newest} stands"
    free = size_text(shutil.disk_usage(existing(directory)).free)
    return (
        f"the checkpoint of step {step} cannot be written in {directory}: {problem}, and {free} "
        f"are free; {earlier}"
    )


def _reason(error: Exception) -> str:
    """The system's words, which torch's writer hides behind an error of its own."""
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error).splitlines()[0]


def _bytes_of(value: object) -> int:
    """What the tensors of a state take."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes_of(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes_of(item) for item in value)
    return 0
