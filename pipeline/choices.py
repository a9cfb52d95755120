"""What a user can choose by name.  Each dict maps a name to "module:function" of what does the work.

The config validates names against these dicts, the trainer resolves them, docs and tests list them.
So a new choice is one row here (or in the room's own `choices` module) and one function.  Nothing
heavy is imported: login nodes without torch read this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from clustering.choices import METHODS
from ensemble.choices import COMBINERS

from networks.choices import NETWORKS

__all__ = [
    "AUGMENTATIONS",
    "COMBINERS",
    "ENGINES",
    "LOSSES",
    "METHODS",
    "NETWORKS",
    "STUDENT_METHODS",
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
    """An engine and what it can do; the config's validators ask this row, never the name.

    engine: "module:Class" of a trainer.engines.Engine.
    sharded_head: the class that serves `engine.shard_head = true`; None if the engine cannot.
    splits_weights: whether no rank holds the whole network at a given zero_stage.
    whole_weights: the setting under which each rank holds all weights, for error messages.
    """

    engine: str
    sharded_head: str | None = None
    splits_weights: Callable[[int], bool] = lambda zero_stage: False
    whole_weights: str = ""


ENGINES: dict[str, EngineKind] = {
    "ddp": EngineKind(
        "trainer.engines.ddp:DDPEngine",
        sharded_head="trainer.engines.sharded:ShardedHeadEngine",
        whole_weights="shard_head = false",
    ),
    "deepspeed": EngineKind(
        "trainer.engines.zero:DeepSpeedEngine",
        splits_weights=lambda zero_stage: zero_stage == 3,
        whole_weights="zero_stage 0, 1 or 2",
    ),
}


@dataclass(frozen=True)
class LossKind:
    """A loss of class labels.

    function: "module:function" of (logits [B, C], labels [B], label_smoothing) -> scalar mean, nats.
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

    objective: "module:function" of (session, name, network, stream) -> trainer.core.objectives.Objective.
    single_only: whether a network of several members cannot learn so; `why` completes the message.
    """

    objective: str
    learns_from_teacher: bool = False
    single_only: bool = False
    why: str = ""


STUDENT_METHODS: dict[str, StudentMethod] = {
    "distill": StudentMethod("trainer.stages.student:soft_objective", learns_from_teacher=True),
    "hard": StudentMethod("trainer.stages.student:hard_objective"),
    "prior": StudentMethod(
        "trainer.stages.student:prior_objective",
        single_only=True,
        why="its one output says how unsure it is",
    ),
}

# "" stands for leaving the inputs as they are.
AUGMENTATIONS: dict[str, str] = {
    "none": "",
    "shift": "trainer.data.augment:shift",
    "flip-crop": "trainer.data.augment:flip_crop",
}
