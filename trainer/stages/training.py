"""Training one network of a run: what a stage hands to the loop, and for how long."""

from __future__ import annotations

import math
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from networks import Classifier, set_layer_decay, set_trainable
from networks.choices import MARGINS
from networks.cosine import with_margin
from networks.heads import ShardedHead
from networks.recomputing import recomputing
from networks.row_head import RowHead
from networks.sphere import close_rows, has_open_rows, open_rows
from pipeline.choices import LOSSES, resolve
from pipeline.config import ResolvedSchedule, ResolvedSpecialists, ResolvedTrain, UserError
from pipeline.scaling import steps_of
from pipeline.store import Attempt

from ..core.loop import Trainer, TrainingFiles, TrainingTask, Validate
from ..core.objectives import LabelMargin, classify
from ..core.tracking import config_of, trackers
from ..data.mixing import Mixing, mixing_of
from ..data.streams import Source, TrainingStream, balanced
from ..engines import build_engine
from ..session import Session


def train_network(
    session: Session, attempt: Attempt, task: TrainingTask, part: str = ""
) -> tuple[Classifier, dict]:
    """The trained network and what summary.json says of its training.

    A head that is split already stays so in the trained network.

    part: its name where an attempt trains several networks. Checkpoints and metrics lie below it.
    """
    ranks, config = session.ranks, session.config.engine
    if config.splits_weights and task.validate is not None:
        task = replace(task, validate=in_step(session, task.validate))
    if task.dense:
        config = config.model_copy(update={"shard_head": False})
    names, place = config.track if ranks.is_main else [], str(Path(attempt.stage.place, part))
    metrics = attempt.path(str(Path(part, "metrics.jsonl")))
    if ranks.is_main and not part:
        attempt.publish_growing("metrics.jsonl")
    assert isinstance(task.network, Classifier)
    open_rows(task.network)
    by_rows = isinstance(task.network.head, RowHead)
    split = isinstance(task.network.head, ShardedHead)
    again = config.checkpoint_activations
    with (
        recomputing(task.network.trunk) if again else nullcontext(),
        closing(build_engine(config, ranks, by_rows, split)) as engine,
        ranks.watching(),
        trackers(
            names, metrics.parent, session.run.root, place, config_of(session.config)
        ) as tracked,
    ):
        files = TrainingFiles(attempt.stage.checkpoints / part, metrics, tracked, place)
        network, summary = Trainer(task, engine, ranks, files).train()
    for source, sample, reason in summary.lost:
        session.losses.add(task.stream.sources[source].shards, {sample: reason})
    assert isinstance(network, Classifier)
    close_rows(network)
    return network, summary.to_json()


def open_layers(
    network: Classifier, schedule: ResolvedTrain | ResolvedSpecialists, section: str
) -> Classifier:
    """Which of its layers learn, and how fast each, as a section says. Changed in place."""
    try:
        set_trainable(network, schedule.trainable)
    except ValueError as error:
        raise UserError(f"{section}.{error}") from None
    return set_layer_decay(network, schedule.layer_decay)


def in_step(session: Session, validate: Validate) -> Validate:
    """`validate` of a network that no rank can ask alone: every rank asks it as often."""

    def validate_in_step(network: nn.Module) -> dict[str, float]:
        session.in_step = True
        try:
            return validate(network)
        finally:
            session.in_step = False

    return validate_in_step


def generalist_task(
    session: Session,
    network: nn.Module,
    schedule: ResolvedSchedule,
    validate: Validate | None,
    seed: int | None = None,
    steps: int | None = None,
) -> TrainingTask:
    """Learn all classes.  The prior of a balanced stream is carried through the loss.

    seed: of the stream, by default the run's.  steps: by default the schedule's.
    """
    if seed is None:
        seed = session.config.seed
    if steps is None:
        steps = count_steps(schedule, session.shards("train").num_samples)
    log_prior = log_prior_of(session, schedule)
    stream = labelled_stream(session, schedule, seed, mixing_of(schedule))
    objective = classify(
        schedule.label_smoothing,
        log_prior,
        schedule.negatives,
        loss=loss_of(schedule),
        margin=label_margin(network),
    )
    workers = session.workers
    return TrainingTask(network, objective, stream, schedule, steps, validate, workers)


def labelled_stream(
    session: Session, schedule: ResolvedSchedule, seed: int, mixing: Mixing | None = None
) -> TrainingStream:
    """Batches of train, balanced and augmented as the config says."""
    shards = session.shards("train")
    order = balanced(shards.labels, seed, schedule.balance)
    source = Source(shards, order, schedule.batch_size)
    return TrainingStream([source], seed, session.augmentation(), mixing=mixing)


def log_prior_of(session: Session, schedule: ResolvedSchedule) -> torch.Tensor | None:
    """What a balanced stream changes in the classes' frequencies, [C]. None of a natural one."""
    if not schedule.balance:
        return None
    return balanced_log_prior(session.shards("train").class_counts, schedule.balance)


def label_margin(network: nn.Module) -> LabelMargin | None:
    """What moves the label's logit of a network that learns from labels. None where nothing does.

    Its head then gives logits that are read in blocks while it trains.
    """
    cosine = network.spec.cosine if isinstance(network, Classifier) else None
    if cosine is None or not cosine["margin"]:
        return None
    assert isinstance(network, Classifier)
    open_rows(network, in_blocks=True)
    if not has_open_rows(network):  # several members, or a few rows that learn
        return None
    return partial(
        with_margin, margin=cosine["margin"], function=resolve(MARGINS[cosine["margin_kind"]])
    )


def loss_of(schedule: ResolvedSchedule):
    """The function (logits, labels, label_smoothing) -> mean loss that the schedule names."""
    return resolve(LOSSES[schedule.loss].function)


def balanced_log_prior(class_counts: np.ndarray, exponent: float) -> torch.Tensor:
    """log(fraction in a stream balanced by `exponent` / natural fraction) of each class, float32
    [C].

    It is 0 for a class without examples.
    """
    natural = class_counts / class_counts.sum()
    present = class_counts > 0
    sampled = np.where(present, np.power(np.maximum(natural, 1e-12), 1 - exponent), 0)
    sampled = sampled / sampled.sum()
    ratio = np.where(present, sampled / np.maximum(natural, 1e-12), 1)
    return torch.as_tensor(np.log(ratio), dtype=torch.float32)


def count_steps(schedule: ResolvedSchedule, examples: int) -> int:
    """Optimizer steps of a schedule over so many examples."""
    if schedule.steps is None and schedule.epochs is None:
        raise UserError("train.steps or train.epochs is missing: say how long to train")
    return steps_of(schedule, examples)


def branch_steps(schedule: ResolvedSpecialists, own_examples: list[int]) -> int:
    """Steps of all branches, which are trained at once. An epoch is the largest group's.

    own_examples: of each group.
    """
    return specialist_steps(schedule, max(own_examples))


def specialist_steps(schedule: ResolvedSpecialists, examples: int) -> int:
    """Steps of a specialist. An epoch is a pass over its classes, `fraction` of a batch."""
    return count_steps(schedule, math.ceil(examples / schedule.fraction))
