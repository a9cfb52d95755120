"""advice.json: what the stage `advice` writes, and what every reader may rely on."""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired, TypedDict

from ..files import damaged, picking_from, read_json

SCHEMA = 1
FILE = "advice.json"
OPTIONAL = {"elsewhere"}


class Interval(TypedDict):
    """A gain in top-1 over the generalist, in points, and its 90 % interval."""

    gain: float
    low: float
    high: float


class Pilot(Interval):
    """What a pilot measured on val.  share: its steps over the generalist's."""

    share: float


class Amounts(TypedDict):
    """What a lever takes in full.

    training, wall_clock: shares of the generalist's own.  multiplications, parameters, latency_ms:
        of the whole predictor, the generalist in it. None where nothing says.
    """

    training: float
    wall_clock: float
    multiplications: float | None
    parameters: float | None
    latency_ms: float | None


class Lever(Interval, Amounts):
    """A lever and what it is expected to do in full.

    gain, low, high: of top-1 on val, in points, the 90 % interval.
    measured: the pilot's, None where the lever has none.
    pareto: the scarcities on whose front of gain against amount it is.
    needs: what it asks of the user, a phrase.  command: the line that goes on with it.
    shortlist: how many of the generalist's likeliest classes it is asked about, where it is.
    model: of branches, `specialists.model` as it was piloted.
    """

    name: str
    measured: NotRequired[Pilot | None]
    pareto: NotRequired[list[str]]
    needs: NotRequired[str]
    command: NotRequired[str]
    shortlist: NotRequired[int | None]
    model: NotRequired[dict]


class GeneralistSize(TypedDict):
    """The generalist itself, on val."""

    top1: float
    nll: float
    steps: int
    multiplications: float | None
    parameters: float | None
    latency_ms: float | None


class Under(Interval):
    """The lever that is best under a scarcity.  limit: a multiple of the generalist's own."""

    lever: str
    limit: float | None


class Diagnosis(TypedDict):
    """What the generalist is short of: "capacity", "data", "steps" or "none"."""

    state: str
    sentences: list[str]


class Round(TypedDict):
    """A round of pilots.  share: what it spent. dropped: families that went no further."""

    families: list[str]
    dropped: list[str]
    share: float


class Advice(TypedDict):
    """advice.json.

    best: the advised lever.  scarce: what the user said is scarce, "" for nothing.
    sentence: the advice.  elsewhere: what is best under other scarcities, "" where all agree.
    spent, budget: shares of the generalist's training compute.
    """

    schema: int
    best: str
    scarce: str
    limit: float | None
    sentence: str
    elsewhere: NotRequired[str]
    spent: float
    budget: float
    best_for: dict[str, Under]
    diagnosis: Diagnosis
    generalist: GeneralistSize
    levers: list[Lever]
    rounds: list[Round]
    not_possible: dict[str, str]


def read_advice(path: Path) -> Advice | None:
    """An advice.json. None where there is none.  Raises DamagedFile for any other content."""
    try:
        advice = read_json(path)
    except FileNotFoundError:
        return None
    with picking_from(path):
        missing = [key for key in Advice.__annotations__ if key not in {*advice, *OPTIONAL}]
        if missing:
            raise damaged(path, f"it lacks {', '.join(missing)}")
        if advice["best"] not in {lever["name"] for lever in advice["levers"]}:
            raise damaged(path, f"it has no lever {advice['best']!r}, which it advises")
    return advice
