"""What can be done next to a trained generalist, one row each, and the pilots that try it.

The config, the graph, the launcher, the stage `advice` and the docs read these tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..choices import CONTROL_ROWS, FEWEST_TO_RERANK

STUDENT = "main"  # the name of the student that average_student trains
OF_BAGS = {"perturb": "mix_bags"}  # keys of that student where inputs are bags of n-grams
# Of the values of a config, by "section.key". None leaves a key out, so that it has its default.
Overrides = dict[str, Any]


@dataclass(frozen=True)
class Scarcity:
    """Something that a user may be short of.

    words: what a sentence calls it.
    limit: the most of it that a lever may take unless advise.limit says otherwise, a multiple of
        the generalist's own. None for what has no degrees.
    quantity: the key of what a lever takes of it in advice.json. "" of the trunk, which is kept or
        not.
    of_answer: whether that is an absolute number, the whole predictor's, which the generalist's own
        divides, else it is a share of the generalist's already.
    """

    words: str
    limit: float | None
    quantity: str = ""
    of_answer: bool = False


SCARCITIES: dict[str, Scarcity] = {
    "training": Scarcity("training", 1.0, "training"),
    "wall_clock": Scarcity("time", 1.0, "wall_clock"),
    "multiplications": Scarcity("multiplications", 1.1, "multiplications", of_answer=True),
    "latency": Scarcity("latency", 1.5, "latency_ms", of_answer=True),
    "parameters": Scarcity("parameters", 1.25, "parameters", of_answer=True),
    "trunk": Scarcity("an untouched trunk", None),
}


@dataclass(frozen=True)
class Family:
    """Pilots of one kind, one for each round. What they train stands for one or several levers.

    what: what they train, in a few words.
    cost: of a share of the generalist's steps, in that share of its training compute.
    sections: of the config that they read beside the generalist's.
    schedule: the section by which they train.
    needs_groups: whether they train on groups of classes.
    classes: below so many it is not worth a pilot of its own.
    tells_more: whether a longer pilot narrows what is expected, so that it may go on.
    """

    name: str
    what: str
    cost: float
    sections: tuple[str, ...] = ()
    schedule: Literal["train", "specialists", "rerank"] = "train"
    needs_groups: bool = False
    classes: int = 0
    tells_more: bool = True


_FAMILIES = [
    Family("on", "the generalist trained on", 1.0),
    Family("wide", "a wider generalist", 1.0, tells_more=False),
    Family("second", "a second generalist", 1.0),
    Family(
        "rerank",
        "a network that learns from shortlists alone",
        0.5,
        sections=("rerank",),
        schedule="rerank",
        classes=FEWEST_TO_RERANK,
    ),
    Family(
        "copies",
        "a copy of the generalist for one group",
        1.0,
        sections=("specialists",),
        schedule="specialists",
        needs_groups=True,
    ),
    Family(
        "branches",
        "branches of the generalist for a few groups",
        1.0,
        sections=("specialists",),
        schedule="specialists",
        needs_groups=True,
    ),
]
FAMILIES: dict[str, Family] = {row.name: row for row in _FAMILIES}


@dataclass(frozen=True)
class Lever:
    """One way to go on.

    what: what is to be done, in a few words.
    families: whose pilots say what it is worth, the first that was piloted. None of `stop`.
    keeps_trunk: whether the answer comes from the generalist's trunk as it is, and no other.
    overrides: (values of the run's config, the lever's entry in advice.json) -> what differs in
        the config of a run that goes on with it.
    needs: what it asks of whoever serves it, a phrase.
    """

    name: str
    what: str
    families: tuple[str, ...]
    overrides: Callable[[dict, dict], Overrides]
    keeps_trunk: bool = False
    needs: str = ""


# Keys of [ensemble] and [specialists] that only one kind of ensemble or of specialist has.
OF_KIND = ("combine", "shortlist", "order", "networks")
OF_COPIES = (
    "from",
    "dustbin",
    "dustbin_rows",
    "soft_weight",
    "hard_negatives",
    "trainable",
    "freeze_norm",
)
OF_BRANCHES = ("blocks", "model", "views")


def ensemble_of(kind: str, members: int) -> Overrides:
    """An ensemble of generalists."""
    return left_out("ensemble", OF_KIND) | {"ensemble.kind": kind, "ensemble.members": members}


def left_out(section: str, keys: Iterable[str]) -> Overrides:
    return {f"{section}.{key}": None for key in keys}


def alone(values: dict, entry: dict) -> Overrides:
    """The generalist by itself, which teaches nobody."""
    return ensemble_of("deep", 1) | {"students": {}}


def row(name: str) -> Callable[[dict, dict], Overrides]:
    """The generalist by itself, and one of CONTROL_ROWS beside it."""
    assert name in CONTROL_ROWS

    def overrides(values: dict, entry: dict) -> Overrides:
        section = values.get("controls", {})
        rows = list(dict.fromkeys([*section.get("rows", []), name]))
        own_model = {"controls.model": entry["model"]} if entry.get("model") else {}
        return alone(values, entry) | {"controls.rows": rows} | own_model

    return overrides


def second(kind: str) -> Callable[[dict, dict], Overrides]:
    """One network beside the generalist."""

    def overrides(values: dict, entry: dict) -> Overrides:
        heads = 2 if kind == "deep" else 1
        return ensemble_of(kind, 2) | {"students": able_students(values, heads)}

    return overrides


def reranker(values: dict, entry: dict) -> Overrides:
    """Half as long as the generalist, where [rerank] says nothing of its own."""
    half: Overrides = {}
    for key, least in (("steps", 1), ("epochs", 0.0)):
        own = values["rerank"].get(key)
        if own is not None and own == values["train"].get(key):
            half[f"rerank.{key}"] = max(least, type(own)(own / 2))
    return second("rerank")(values, entry) | half


def able_students(values: dict, heads: int) -> dict:
    """The students that an ensemble of so many distributions can teach, and who learn from these.

    One of several heads learns from as many networks, each by itself.
    """
    students: dict = values.get("students", {})
    able = {
        name
        for name, student in students.items()
        if student["network"] == "single" or (heads > 1 and student.get("members", heads) == heads)
    }
    while True:
        lost = {
            name
            for name in able
            if (students.keys() - able) & {students[name]["teacher"], students[name]["start"]}
        }
        if not lost:
            return {name: student for name, student in students.items() if name in able}
        able -= lost


def sees_bags(model: str) -> bool:
    """Whether a network's inputs are bags of n-grams.  model: its name in [model]."""
    return model == "embedding_bag"


def average_student(values: dict, entry: dict) -> Overrides:
    """Two generalists, and one student of both: the generalist's own network and schedule.

    Teachers that have memorised train say little of it but its labels. Of mixed bags they say more.
    """
    student = OF_BAGS if sees_bags(values["model"]["name"]) else {}
    return ensemble_of("deep", 2) | {"students": {STUDENT: dict(student)}}


def specialists(kind: str, foreign: tuple[str, ...]) -> Callable[[dict, dict], Overrides]:
    """foreign: keys that only the other kind of specialist has."""

    def overrides(values: dict, entry: dict) -> Overrides:
        changed: Overrides = {"specialists.kind": kind}
        if values["specialists"]["kind"] != kind:
            changed |= left_out("specialists", foreign)
        if kind == "branch":
            if entry.get("model"):  # as it was piloted, where the config has copies
                changed["specialists.model"] = entry["model"]
            changed["specialists.ema"] = 0.0  # a branch keeps its best step instead
        if values["ensemble"]["kind"] != "specialists":
            changed |= left_out("ensemble", (*OF_KIND, "members"))
            changed |= {"ensemble.kind": "specialists", "students": able_students(values, 1)}
        return changed

    return overrides


_LEVERS = [
    Lever("stop", "leave the generalist as it is", (), alone, keeps_trunk=True),
    Lever("train_on", "train the generalist on", ("on",), row("train_on")),
    Lever(
        "wider",
        "train a wider network in the generalist's place",
        ("wide",),
        row("wider"),
        needs="a larger network to serve",
    ),
    Lever(
        "average",
        "train a second generalist and average the two",
        ("second",),
        second("deep"),
        needs="a second network to serve",
    ),
    Lever(
        "shortlist",
        "train a second generalist and ask it about the first one's likeliest classes",
        ("second",),
        second("shortlist"),
        needs="a second network to serve",
    ),
    Lever(
        "average_student",
        "train a second generalist and distil the average of the two into one student",
        ("second",),
        average_student,
    ),
    Lever(
        "rerank",
        "train a re-ranker of the generalist's likeliest classes",
        ("rerank", "second"),
        reranker,
        needs="a second network to serve",
    ),
    Lever(
        "copies",
        "train a copy of the generalist for each group of classes",
        ("copies",),
        specialists("copy", OF_BRANCHES),
        needs="a network for each group to serve",
    ),
    Lever(
        "branches",
        "train a branch of the generalist for each group of classes",
        ("branches",),
        specialists("branch", OF_COPIES),
        keeps_trunk=True,
        needs="a small head for each group to serve",
    ),
]
LEVERS: dict[str, Lever] = {each.name: each for each in _LEVERS}


def overridden(values: dict, overrides: Overrides) -> dict:
    """The values of a config with others set. Those that are None are left out."""
    changed = {key: dict(each) if isinstance(each, dict) else each for key, each in values.items()}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if not name:
            changed[section] = value
        elif value is None:
            changed.get(section, {}).pop(name, None)
        else:
            changed.setdefault(section, {})[name] = value
    return changed
