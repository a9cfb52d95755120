"""The controls: what the same examples do for the generalist alone.

control_wall trains on for as long as one specialist does, at several peak rates; the best on val is
evaluated.  control_compute trains on for as many examples as all specialists together saw, and the
other generalist that they start as, where the run trains one.
student_hard is the twin of students.main that learns from labels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .config import Config
from .store import Stage, read_json

if TYPE_CHECKING:
    from .graph import RunDirectory

WALL, COMPUTE, HARD_TWIN = "control_wall", "control_compute", "student_hard"


def wall_names(config: Config) -> list[str]:
    """control_wall-0, ...: one for each peak rate."""
    return [f"{WALL}-{index}" for index in range(len(config.controls.learning_rates))]


def is_wall(name: str) -> bool:
    return name.startswith(f"{WALL}-")


def wall_rate(config: Config, name: str) -> float:
    """The peak learning rate of one of the wall controls."""
    return config.controls.learning_rates[int(name.removeprefix(f"{WALL}-"))]


def best_wall(run: RunDirectory) -> str | None:
    """The finished wall control with the lowest loss on val; it counts as control_wall."""
    losses = {}
    for name, stage in run.controls.items():
        if is_wall(name) and stage.done() is not None:
            val = read_json(stage.path("summary.json")).get("val") or {}
            losses[name] = val.get("loss", math.inf)
    return min(losses, key=lambda name: losses[name]) if losses else None


def control_names(run: RunDirectory) -> list[str]:
    """The controls as they are evaluated: the wall controls are candidates for one."""
    names = [WALL if is_wall(name) else name for name in run.controls]
    return list(dict.fromkeys(names))


def evaluated_controls(run: RunDirectory) -> dict[str, Stage]:
    """Each control that is evaluated, the best of the wall controls for all of them."""
    best = best_wall(run)
    stages = {WALL: run.controls[best]} if best else {}
    return stages | {name: stage for name, stage in run.controls.items() if not is_wall(name)}
