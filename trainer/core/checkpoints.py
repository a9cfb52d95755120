"""Checkpoints: a directory under a temporary name, then renamed; complete only with its marker.

`state.pt` holds tensors and plain values only, and reading it is `weights_only=True`: nothing is unpickled into code.
"""

from __future__ import annotations

import os
import shutil
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from pipeline.config import UserError
from pipeline.store import COMPLETE, complete_checkpoints

from ..distributed.ranks import ALONE, Ranks, broadcast


def save_checkpoint(
    directory: Path,
    step: int,
    state: dict,
    keep: int,
    *,
    best: int | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write rank 0's `state` as directory/step-STEP; drop all but the newest `keep` and that of step `best`.

    A copy that another attempt wrote stays.  Raises UserError, on every rank, where it cannot be written: nothing is
    left of this one, and the earlier ones are as they were.  No rank goes on before the checkpoint is there.
    """
    problem = _write(directory, checkpoint_place(directory, step), state) if ranks.is_main else None
    if problem := broadcast(problem, ranks):
        raise UserError(_refusal(directory, step, problem))
    if ranks.is_main:
        _prune(directory, keep, best)


class Saver:
    """The checkpoints of one training run: written at once, or by a thread while training goes on."""

    def __init__(self, directory: Path, keep: int, ranks: Ranks):
        self.directory, self.keep, self.ranks = directory, keep, ranks
        self.thread = (
            ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if in_background(ranks) else None
        )
        self.last: Future | None = None

    def save(self, step: int, state: dict, best: int | None) -> None:
        """Write, or begin to: then this raises what the one before came to, for which it waits."""
        if self.thread is None:
            save_checkpoint(self.directory, step, state, self.keep, best=best, ranks=self.ranks)
        elif self.ranks.is_main:
            self.wait()
            self.last = self.thread.submit(
                save_checkpoint, self.directory, step, on_cpu(state), self.keep, best=best
            )

    def wait(self) -> None:
        """On rank 0, until what was begun is there."""
        last, self.last = self.last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """On every rank, until it is: a rank that ends first takes the others with it."""
        self.wait()
        broadcast(None, self.ranks)


def in_background(ranks: Ranks) -> bool:
    """Whether a thread writes: where a copy on the CPU is needed anyway."""
    return ranks.device.type == "cuda"


def on_cpu(state):
    """A deep copy whose tensors are on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, (list, tuple)) else state


def newest_step(directory: Path) -> int | None:
    found = complete_checkpoints(directory)
    return int(found[-1].name.removeprefix("step-")) if found else None


def checkpoint_place(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def load_checkpoint(directory: Path, step: int, device="cpu") -> dict:
    return torch.load(
        checkpoint_place(directory, step) / "state.pt", map_location=device, weights_only=True
    )


def _write(directory: Path, final: Path, state: dict) -> str | None:
    """What went wrong with the disk, or None."""
    if (final / COMPLETE).exists():
        return None
    temporary = directory / f".{final.name}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        (temporary / COMPLETE).touch()
        os.rename(temporary, final)
    except (
        OSError,
        RuntimeError,
    ) as mistake:  # torch's writer turns a full disk into a RuntimeError
        if (final / COMPLETE).exists():  # another attempt was first
            return None
        if isinstance(mistake, RuntimeError) and not _about_files(mistake):
            raise
        return getattr(mistake, "strerror", None) or str(mistake).splitlines()[0]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return None


def _prune(directory: Path, keep: int, best: int | None) -> None:
    kept = None if best is None else checkpoint_place(directory, best)
    for old in complete_checkpoints(directory)[:-keep]:
        if old != kept:
            (old / COMPLETE).unlink(missing_ok=True)  # first, so that a half-removed one is none
            shutil.rmtree(old, ignore_errors=True)


def _about_files(mistake: RuntimeError) -> bool:
    text = str(mistake)
    return any(
        word in text for word in ("PytorchStreamWriter", "No space left", "unexpected pos", "file")
    )


def _refusal(directory: Path, step: int, problem: str) -> str:
    newest = newest_step(directory)
    earlier = f"that of step {newest} stands" if newest is not None else "there is no earlier one"
    return f"the checkpoint of step {step} cannot be written in {directory}: {problem}; {earlier}"
