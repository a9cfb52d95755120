"""Checkpoints: a directory under a temporary name, then renamed; complete only with its marker.

`state.pt` holds tensors and plain values only, and reading it is `weights_only=True`: nothing is unpickled into code.
An engine whose state is spread over the ranks keeps its own files beside it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from .config import UserError
from .distributed import ALONE, Ranks, broadcast, gather

MARKER = "COMPLETE"


def save_checkpoint(
    directory: Path, step: int, state: dict, keep: int, *, best: int | None = None, ranks: Ranks = ALONE,
    write_part: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """Write directory/step-STEP and drop all but the newest `keep` and that of step `best`.

    state: rank 0's.  write_part(place): called on every rank, for what the engine has there; it may be collective.
    A copy that another attempt wrote stays.  Raises UserError, on every rank, where any of them cannot write: nothing
    is left of this one, and the earlier ones are as they were.
    """
    final, temporary = _places(directory, step, ranks)
    if final is None:
        return
    problem = None
    try:
        if write_part:
            write_part(temporary)
        if ranks.is_main:
            _write_state(temporary, state)
    except (OSError, RuntimeError) as mistake:  # torch's writer turns a full disk into a RuntimeError
        if isinstance(mistake, RuntimeError) and not _about_files(mistake):
            raise
        problem = getattr(mistake, "strerror", None) or str(mistake).splitlines()[0]
    problems = [each for each in gather(problem, ranks) if each]
    if ranks.is_main:
        if not problems:
            _complete(temporary, final)
            _prune(directory, keep, best)
        shutil.rmtree(temporary, ignore_errors=True)
    if problems:
        raise UserError(_refusal(directory, step, problems[0]))
    gather(None, ranks)  # no rank goes on, and perhaps dies, before the checkpoint is there


class BackgroundSaver:
    """save_checkpoint in a thread, one at a time, for a state that one rank holds and that nobody writes to."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.last: Future | None = None

    def save(self, directory: Path, step: int, state: dict, keep: int, best: int | None = None) -> None:
        """Begin to write.  Raises what the one before came to, for which it waits."""
        self.wait()
        self.last = self.thread.submit(save_checkpoint, directory, step, state, keep, best=best)

    def wait(self) -> None:
        last, self.last = self.last, None
        if last is not None:
            last.result()


def complete_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{MARKER}"))


def newest_step(directory: Path) -> int | None:
    found = complete_checkpoints(directory)
    return int(found[-1].name.removeprefix("step-")) if found else None


def checkpoint_place(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def load_checkpoint(directory: Path, step: int, device="cpu") -> dict:
    return torch.load(checkpoint_place(directory, step) / "state.pt", map_location=device, weights_only=True)


def _places(directory: Path, step: int, ranks: Ranks) -> tuple[Path | None, Path | None]:
    """Where the checkpoint goes and the temporary directory that every rank writes to; None where it is there."""
    final = checkpoint_place(directory, step)
    name, problem = None, None
    if ranks.is_main and not (final / MARKER).exists():
        name = f".{final.name}.{uuid.uuid4().hex[:8]}"
        try:
            (directory / name).mkdir(parents=True)
        except OSError as mistake:
            problem = mistake.strerror
    name, problem = broadcast((name, problem), ranks)
    if problem:
        raise UserError(_refusal(directory, step, problem))
    return (final, directory / name) if name else (None, None)


def _write_state(temporary: Path, state: dict) -> None:
    with open(temporary / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _complete(temporary: Path, final: Path) -> None:
    (temporary / MARKER).touch()
    try:
        os.rename(temporary, final)
    except OSError:
        if not (final / MARKER).exists():
            raise


def _prune(directory: Path, keep: int, best: int | None) -> None:
    kept = None if best is None else checkpoint_place(directory, best)
    for old in complete_checkpoints(directory)[:-keep]:
        if old != kept:
            (old / MARKER).unlink(missing_ok=True)  # first, so that a half-removed one is none
            shutil.rmtree(old, ignore_errors=True)


def _about_files(mistake: RuntimeError) -> bool:
    text = str(mistake)
    return any(word in text for word in ("PytorchStreamWriter", "No space left", "unexpected pos", "file"))


def _refusal(directory: Path, step: int, problem: str) -> str:
    newest = newest_step(directory)
    earlier = f"that of step {newest} stands" if newest is not None else "there is no earlier one"
    return f"the checkpoint of step {step} cannot be written in {directory}: {problem}; {earlier}"
