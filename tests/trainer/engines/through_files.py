"""A state as the next attempt at a stage finds it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from trainer.core.checkpoints import load_checkpoint, save_checkpoint
from trainer.distributed.ranks import Ranks, broadcast


def through_a_checkpoint(state: dict, ranks: Ranks) -> dict:
    """What a checkpoint of an engine's state gives, whose parts each rank wrote. Collective."""
    made = tempfile.mkdtemp() if ranks.is_main else ""
    directory = Path(broadcast(made, ranks))
    save_checkpoint(directory, 1, state, 1, ranks=ranks)
    # In memory, since the files go.
    read = _copied(load_checkpoint(directory, 1))
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(directory)
    return read


def _copied(value):
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return value.clone() if hasattr(value, "clone") else value
