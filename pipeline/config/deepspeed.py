"""DeepSpeed's config: what this program sets of it, and what a user adds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .base import UserError

# Ours are defaults, of pace and memory alone: a user's count instead.
PACE = {
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.sub_group_size",
    "steps_per_print",
    "wall_clock_breakdown",
}
# Keys of DeepSpeed's that would set anew what these keys of the config say.
SAID_BY = {
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "torch_autocast": "engine.precision",
    "amp": "engine.precision",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "train.clip_norm",
    "zero_optimization.stage": "engine.zero_stage",
}


def merged_deepspeed(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config with the user's keys in it.

    Raises UserError, with both values, where they contradict what this program has to set.
    """
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in ours.items()}
    known = dict(_leaves(ours))
    for path, value in _leaves(theirs):
        own = known.get(path)
        if path in known and own != value and path not in PACE:
            says = SAID_BY.get(path)
            raise UserError(_conflict(path, value, own, says))
        first = path.split(".")[0]
        if first in SAID_BY and path not in known:
            raise UserError(_conflict(path, value, ours.get(first), SAID_BY[first]))
        _put(merged, path.split("."), value)
    return merged


def _conflict(path: str, theirs: object, ours: object, says: str | None) -> str:
    sets = f"{says} makes it {_text(ours)}" if says else f"this program needs {_text(ours)}"
    if says and ours is None:
        sets = f"{says} says it, and nothing is set here"
    remedy = f"leave it out and set {says}" if says else "leave it out"
    return f"engine.deepspeed.{path} = {_text(theirs)}, but {sets}; {remedy}"


def _text(value: object) -> str:
    return json.dumps(value)


def _leaves(values: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{within}{key}.")
        else:
            yield within + key, value


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
    values[path[-1]] = value
