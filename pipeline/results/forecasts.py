"""What is said of groups before their specialists are trained, and which split it is about.

Nobody else writes the name of that split: it is `judged_on`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files import read_json

if TYPE_CHECKING:
    from ..graph import RunDirectory
    from ..store import Stage

VAL_EXAMPLES_PER_CLASS = 10  # fewer than this, and groups are found by train's predictions
# What the log of `measure` said in versions that then counted errors on train.
_MEASURED_ON_TRAIN = "predictions are measured on train"


def is_thin(examples: int, classes: int) -> bool:
    """Whether a split has too few examples a class to find groups by."""
    return examples < VAL_EXAMPLES_PER_CLASS * classes


def judged_on(run: RunDirectory) -> str:
    """The split whose errors the groups' figures count: captured confusion, forecasts.

    It is "val". Only in runs whose predictions an earlier version measured it is "train", where
    val had fewer than ten examples a class.
    """
    directory = run.cluster.directory
    if (directory / "summary.json").exists():
        split = read_json(directory / "summary.json").get("split")
        if split is not None:
            return split
    return measured_on(run.measure)


def measured_on(measure: Stage) -> str:
    """The split whose errors a finished stage `measure` counted."""
    if measure.done() is None:
        return "val"
    log = measure.path("log-0.txt")
    if log.exists() and _MEASURED_ON_TRAIN in log.read_text(encoding="utf-8", errors="replace"):
        return "train"
    return "val"


def captured_text(captured: float | None, chance: float, split: str) -> str:
    """`hold 76.3 % of the generalist's errors on val (chance 17.6 %)`. captured: None of none."""
    if captured is None:
        return f"are not judged, since the generalist makes no error on {split}"
    return (
        f"hold {100 * captured:.1f} % of the generalist's errors on {split} "
        f"(chance {100 * chance:.1f} %)"
    )


def ceiling_text(split: str) -> str:
    """What the forecast of a group is."""
    return (
        f"gain at most: a ceiling, the fraction of {split} that a perfect specialist would "
        "correct; what share of it is reached nobody has measured; shared errors count in every "
        "group"
    )
