"""Checkpoints: a directory under a temporary name, then renamed. Complete only with its marker.

`state.pt` holds tensors and plain values only.  It is read with `weights_only=True`, so that
nothing is unpickled into code.  Of a head that is split over the ranks each writes its own rows,
state-00001-of-00002.safetensors and so on (networks.row_files). trainer.core.split_state has them.
The marker, COMPLETE, holds the checksums of all these files, which are compared before they are
read.  One of an earlier version is empty.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

import torch
from safetensors import SafetensorError

from networks import checksums, regular
from networks.row_files import write_index, write_part
from networks.temporaries import temporary_beside
from pipeline.config import UserError
from pipeline.failures import existing, size_text
from pipeline.files import make_below, sync_tree, sync_upwards
from pipeline.store import COMPLETE, complete_checkpoints

from ..distributed.ranks import ALONE, Ranks, broadcast, gather
from .split_state import PREFIX, is_split, read_rows, take_own

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
    problem, final = None, checkpoint_path(directory, step)
    temporary = temporary_beside(final)
    if is_split(state):
        temporary = Path(broadcast(str(temporary), ranks))
        problem, state = write_rows(temporary, state, ranks)
    if ranks.is_main and problem is None:
        problem = _write(temporary, final, state)
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
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
        # Of a split state every rank writes a part, and they agree on when it is done.
        if self.thread is None or is_split(state):
            self.wait()
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
    """What is wrong with a complete checkpoint. Empty if nothing.

    Earlier versions kept no checksum. Torch's file is a zip, which has weaker ones.
    """
    try:
        text = regular.read_text(checkpoint / COMPLETE)
        files = checksums.files_of(regular.parse(text)) if text else {}
    except (OSError, ValueError, AttributeError):
        return f"its {COMPLETE} cannot be read"
    for name, entry in files.items():
        if reason := checksums.differs(checkpoint / name, entry):
            return f"{name}: {reason}"
    if STATE in files:
        return ""
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


def load_checkpoint(
    directory: Path,
    step: int,
    device: torch.device | str = "cpu",
    own_rows: Mapping[str, slice] | None = None,
) -> State:
    """The state, mapped from its file on a CPU. Of tensors in `own_rows` these rows alone.

    Raises UserError for one that is damaged.
    """
    path = checkpoint_path(directory, step)
    if reason := fault(path):
        raise UserError(f"{path} is damaged ({reason}); remove it and run again")
    state = torch.load(path / STATE, map_location=device, weights_only=True, mmap=True)
    return read_rows(path, state, own_rows or {})


def write_rows(temporary: Path, state: State, ranks: Ranks) -> tuple[str | None, State]:
    """(what went wrong on any rank, the state without what is now in files). Collective."""
    rows, bounds, state = take_own(state)
    problem = None
    try:
        make_below(temporary.parents[1], temporary)
        write_part(temporary, PREFIX, ranks.rank, ranks.world_size, rows)
    except (OSError, SafetensorError) as error:
        problem = f"{_reason(error)}; a rank's part of it takes {size_text(_bytes_of(rows))}"
    problems = [each for each in gather(problem, ranks) if each]
    if not problems and ranks.is_main:
        write_index(temporary, PREFIX, bounds)
    return next(iter(problems), None), state


def _write(temporary: Path, final: Path, state: State) -> str | None:
    """What went wrong with the disk, or None."""
    if (final / COMPLETE).exists():
        return None
    try:
        make_below(temporary.parents[1], temporary)
        files = checksums.entries_of(temporary, lambda name: True)  # the rows of each rank
        with open(temporary / STATE, "wb") as file:
            hashing = checksums.Hashing(file)
            torch.save(state, cast(IO[bytes], hashing))  # write and flush are all that it calls
        files[STATE] = hashing.entry
        (temporary / COMPLETE).write_text(json.dumps({"files": files}), encoding="utf-8")
        sync_tree(temporary)
        os.rename(temporary, final)
        sync_upwards(final.parent, final.parent.parent)
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
