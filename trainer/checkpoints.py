"""Checkpoints: a directory under a temporary name, then renamed; complete only with its marker.

`torch.save` writes tensors and plain values only, and reading is `weights_only=True`: nothing is unpickled into code.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import torch

MARKER = "COMPLETE"


def save_checkpoint(directory: Path, step: int, state: dict, keep: int) -> None:
    """Write `state` as directory/step-STEP and drop all but the newest `keep`.  A copy that another attempt wrote
    stays."""
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{step:08d}"
    if (final / MARKER).exists():
        return
    temporary = directory / f".{final.name}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        (temporary / MARKER).touch()
        try:
            os.rename(temporary, final)
        except OSError:
            if not (final / MARKER).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in complete_checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{MARKER}"))


def newest_step(directory: Path) -> int | None:
    found = complete_checkpoints(directory)
    return int(found[-1].name.removeprefix("step-")) if found else None


def load_checkpoint(directory: Path, step: int, device="cpu") -> dict:
    return torch.load(directory / f"step-{step:08d}" / "state.pt", map_location=device, weights_only=True)
