"""What a user can choose by name: each dict maps a name to the "module:function" that does it.

The config validates names against these dicts, the trainer resolves them, docs and tests list them.
So a new choice is one row here (or in the room's own `choices` module) and one function.
docs/extending.md shows each.  Nothing heavy is imported: login nodes without torch read this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from clustering.choices import CHOOSE_ALL_GROUPS, METHODS
from ensemble.choices import COMBINER_ALIASES, COMBINERS, MEANS
from networks.choices import MARGINS, NETWORKS

__all__ = [
    "AUGMENTATIONS",
    "AUGMENT_OPTIONS",
    "CONTROL_ROWS",
    "CHOOSE_ALL_GROUPS",
    "COMBINERS",
    "COMBINER_ALIASES",
    "FEWEST_TO_RERANK",
    "NOT_OF_RERANKERS",
    "MEANS",
    "ENGINES",
    "LOSSES",
    "MARGINS",
    "METHODS",
    "NETWORKS",
    "STUDENT_METHODS",
    "TAKE_SHARE",
    "ControlRow",
    "EngineKind",
    "LossKind",
    "StudentMethod",
    "resolve",
]


def resolve(target: str):
    """The object that "module:name" names.  Imports the module."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class EngineKind:
    """An engine and what it can do. The config's validators ask this row, never the name.

    engine: "module:Class" of a trainer.engines.Engine.
    sharded_head: the class that serves `engine.shard_head = true`, of (config, ranks, split). None
        if the engine cannot.
    splits_weights: whether no rank holds the whole network at a given zero_stage.
    whole_weights: the setting of [engine] with which each rank holds all weights, for messages.
    package: what it needs to be installed beside torch.
    changes_layers: whether the network may train in another form (`engine.compile`,
        `channels_last`, `sync_batchnorm`).
    """

    engine: str
    sharded_head: str | None = None
    splits_weights: Callable[[int], bool] = lambda zero_stage: False
    whole_weights: str = ""
    package: str = ""
    changes_layers: bool = False


ENGINES: dict[str, EngineKind] = {
    "ddp": EngineKind(
        "trainer.engines.ddp:DDPEngine",
        sharded_head="trainer.engines.sharded:ShardedHeadEngine",
        whole_weights="shard_head = false",
        changes_layers=True,
    ),
    "deepspeed": EngineKind(
        "trainer.engines.zero:DeepSpeedEngine",
        splits_weights=lambda zero_stage: zero_stage == 3,
        whole_weights="zero_stage 0, 1 or 2",
        package="deepspeed",
    ),
}


@dataclass(frozen=True)
class LossKind:
    """A loss of class labels.

    function: "module:function" of (logits [B, C], labels [B], label_smoothing) -> mean in nats.
    on_lazy_logits: whether engine.shard_head, which holds no [B, C] logits, can compute it.
    """

    function: str
    on_lazy_logits: bool = False


LOSSES: dict[str, LossKind] = {
    "cross_entropy": LossKind("trainer.core.losses:cross_entropy", on_lazy_logits=True),
}


@dataclass(frozen=True)
class StudentMethod:
    """How a student learns.

    objective: "module:function" of (session, name, network, stream) -> Objective, a function of
        trainer.core.objectives.
    learns: what it learns, as the report says it. Of a teacher the report says more.
    single_only: whether a network of several members cannot learn so. `why` completes the message.
    dirichlet: whether its logits are a Dirichlet's log concentrations, so that test measures mu.
    """

    objective: str
    learns_from_teacher: bool = False
    learns: str = "labels"
    single_only: bool = False
    why: str = ""
    dirichlet: bool = False


STUDENT_METHODS: dict[str, StudentMethod] = {
    "distill": StudentMethod("trainer.stages.student:soft_objective", learns_from_teacher=True),
    "hard": StudentMethod("trainer.stages.student:hard_objective", learns="hard labels"),
    "prior": StudentMethod(
        "trainer.stages.student:prior_objective",
        learns="labels, as a Prior Network: its prediction is a distribution over distributions",
        single_only=True,
        why="its one output says how unsure it is",
        dirichlet=True,
    ),
}


@dataclass(frozen=True)
class ControlRow:
    """A rival of the ensemble that is made where the user asks for it, and named where not.

    function: "module:function" of (session, stage, name), its stage.
    trains: whether the stage takes optimizer steps, by [train].
    of_second: whether it is made of the generalist and a second one, which another stage trains.
    goes_on: whether it starts as the generalist. One that trains and does not starts from scratch.
    asked_by: a control that asks the same: where that is made, nobody misses this one.
    what: what it is, in a few words.
    """

    function: str
    what: str
    trains: bool = False
    of_second: bool = False
    goes_on: bool = False
    asked_by: str = ""


CONTROL_ROWS: dict[str, ControlRow] = {
    "train_on": ControlRow(
        "trainer.stages.control_rows:train_on",
        "the generalist trained on for as long again",
        trains=True,
        goes_on=True,
        asked_by="control_compute",
    ),
    "wider": ControlRow(
        "trainer.stages.control_rows:wider",
        "a generalist of the ensemble's multiplications",
        trains=True,
    ),
    "average": ControlRow(
        "trainer.stages.control_rows:average", "two generalists averaged", of_second=True
    ),
    "shortlist": ControlRow(
        "trainer.stages.control_rows:shortlist",
        "two generalists, the second asked about a shortlist alone",
        of_second=True,
    ),
}

# Below so many classes the rows that a re-ranker's batch reads take longer than all of them:
# docs/combiner.md has the measurement.
FEWEST_TO_RERANK = 2_000
# Keys of a schedule that no re-ranker is trained by, and why: a step has the logits of few classes.
NOT_OF_RERANKERS = {
    "label_smoothing": "spreads over all classes, of which a step sees few",
    "loss": "needs all logits, of which a step has few",
    "ema": "averages all rows in each step, and few have changed",
    "clip_norm": "needs one norm of trunk and head, which are stepped apart",
    "negatives": "is of a sharded head; rerank.random says how many",
    "row_rate": "is of a head of which a step changes all rows",
}

# "" stands for leaving the inputs as they are.
AUGMENTATIONS: dict[str, str] = {
    "none": "",
    "shift": "trainer.data.augment:shift",
    "flip-crop": "trainer.data.augment:flip_crop",
    "drop_ngrams": "trainer.data.augment:drop_ngrams",
    "rrc": "trainer.data.vision:random_resized_crop",
    "rrc-randaugment": "trainer.data.vision:crop_and_randaugment",
}
# Those whose functions take augment_share as their argument `share`.
TAKE_SHARE = frozenset({"drop_ngrams"})
OF_CROP = {
    "scale": [0.35, 1.0],  # the share of the area that is cut out
    "ratio": [3 / 4, 4 / 3],  # width to height of what is cut out
    "flip": 0.5,  # the share of views that are mirrored. 0 of characters
    "interpolation": "bilinear",  # bilinear | bicubic | nearest
}
# data.augment_options, with their defaults: the arguments of these augmentations' functions.
AUGMENT_OPTIONS: dict[str, dict[str, Any]] = {
    "rrc": OF_CROP,
    "rrc-randaugment": {**OF_CROP, "num_ops": 2, "magnitude": 9},
}
