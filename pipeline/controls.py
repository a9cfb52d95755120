"""The controls: what the same examples, or multiplications, do without specialists.

control_wall trains the generalist on for as long as one specialist trained, at several peak rates.
The best on val is evaluated.  control_compute trains it on for as many examples as all specialists
together saw, and the other generalist that they start as, where the run trains one, or for
controls.max_share of them.  It waits for control_wall, whose runs choose its rate: beside them it
would have to be trained at every rate.  Both keep their best step on val, calibrated, the start
among the candidates.
NAME_hard is the twin of students.NAME that learns from labels. Main's is student_hard.
The rows of pipeline.choices.CONTROL_ROWS are made where controls.rows asks for them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection
from typing import TYPE_CHECKING

from .choices import CONTROL_ROWS, MEANS
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
    """The finished wall control with the lowest loss on val. It counts as control_wall.

    Its loss is after temperature scaling, as in `trainer.stages.control`.
    """
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


# Twins of students


def twin_name(student: str) -> str:
    """What the twin of a student is called."""
    return HARD_TWIN if student == "main" else f"{student}_hard"


def possible_twins(config: Config) -> dict[str, str]:
    """{name of the twin: its student} of all that a teacher teaches.

    A student of the user's own that is called so stands for the twin.
    """
    taught = [name for name, student in config.students.items() if student.learns_from_teacher]
    named = {twin_name(name): name for name in taught}
    return {twin: name for twin, name in named.items() if twin not in config.students}


def twins(config: Config) -> dict[str, str]:
    """{name of the twin: its student} of the twins that the run trains."""
    if not config.controls.enabled:
        return {}
    wanted = {"all": tuple(config.students), "main": ("main",), "none": ()}
    chosen = wanted[config.controls.twins]
    return {twin: name for twin, name in possible_twins(config).items() if name in chosen}


# What was not made


def missing_controls(run: RunDirectory, made: Collection[str]) -> list[str]:
    """Rivals that could stand in the results and do not.

    A run that adds classes has a generalist that cannot be had again, wider or from another seed.
    """
    config = run.config
    names = [] if config.extend.run else rivals(run, made)
    if config.controls.enabled:
        names += possible_twins(config)
    return [name for name in names if name not in made]


def rivals(run: RunDirectory, made: Collection[str]) -> list[str]:
    """The rows that say what those that were made do not."""
    return [
        name
        for name, row in CONTROL_ROWS.items()
        if name != itself(run) and row.asked_by not in made
    ]


def itself(run: RunDirectory) -> str:
    """The row that is the run's ensemble under another name. "" where none is."""
    ensemble = run.config.ensemble
    if len(run.members) != 1 or ensemble.networks:
        return ""
    if ensemble.kind == "deep":
        return "average" if ensemble.mean_order == MEANS["arithmetic"] else ""
    return ensemble.kind  # a shortlist of two


def command_for(run: RunDirectory, missing: Collection[str], root: str) -> str:
    """The line that makes the missing ones, and what was evaluated anew with them.

    root: the run's directory, as the line is to name it.
    """
    words = ["referral", "run", "--run", root]
    if CONTROL_ROWS.keys() & set(missing):
        asked = {*run.config.controls.rows, *missing}
        listed = ", ".join(f'"{name}"' for name in CONTROL_ROWS if name in asked)
        words += ["--set", f"controls.rows=[{listed}]"]
    if set(missing) - CONTROL_ROWS.keys() and run.config.controls.twins != "all":
        words += ["--set", "controls.twins=all"]
    return shlex.join([*words, "--force"])
