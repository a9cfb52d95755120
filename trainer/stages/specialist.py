"""The generalist again, or another one, for one group of confusable classes and a dustbin."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch
from torch import Tensor

from networks import (
    Classifier,
    ResidualRow,
    fit_residual_row,
    freeze_norm,
    specialise,
)
from pipeline.config import ResolvedSpecialists
from pipeline.store import Attempt, Stage

from ..core.loop import TrainingTask
from ..core.losses import dustbin_shift
from ..core.objectives import Objective, specialise_fully, specialise_in
from ..data.orders import weighted
from ..data.routing import open_routed
from ..data.shards import ShardSet
from ..data.streams import Batch, Source, TrainingStream, balanced, shuffled
from ..session import Session
from .grouping import confusion_with, groups_of, skipped_groups
from .networks import load_network, save_network
from .training import (
    balanced_log_prior,
    loss_of,
    open_layers,
    specialist_steps,
    train_network,
)
from .validate import SpecialistValidator

# Examples that a row for the rest of the classes is fitted to, and products with all classes' rows.
MOST_FITTED, FEWEST_FITTED = 2**16, 2**12
FITTED_PRODUCTS = 2**31


def specialist(session: Session, stage: Stage, index: int) -> None:
    """Half of each batch from the group's classes, half from the rest, which is the dustbin."""
    classes = groups_of(session).members[index]
    with session.attempt(stage) as attempt:
        if index in skipped_groups(session):
            save_skipped(session, attempt, index)
            return
        validator = SpecialistValidator(session, classes)
        task, notes = specialist_task(session, index, classes, validator)
        network, summary = train_network(session, attempt, task)
        if session.config.specialists.trains_all_rows:
            # The same predictions, and inference needs no more rows than before.
            network = specialise(network, classes, "preserving")
        summary |= {"classes": len(classes), **notes}
        summary["temperature"] = validator.temperature(network)
        say_if_dropped(session, index, summary["best_step"])
        save_network(session, attempt, network, summary)


def say_if_dropped(session: Session, index: int, best_step: int) -> None:
    if best_step == 0 and not session.config.specialists.starts_elsewhere:
        session.say(
            "group %d: no step of its specialist was better on val than the generalist: the "
            "ensemble goes without it",
            index,
        )


def save_skipped(session: Session, attempt: Attempt, index: int) -> None:
    """A group without a specialist: its stage is done at once, for nothing."""
    session.say("group %d has too little to gain, or to learn from: no specialist", index)
    free = {"seconds": 0.0, "examples_seen": 0, "peak_memory_bytes": 0}
    session.write_json(attempt.path("summary.json"), {"skipped": True, **free})


def specialist_task(
    session: Session, index: int, classes: np.ndarray, validate: SpecialistValidator
) -> tuple[TrainingTask, dict]:
    """What a specialist starts from, sees and learns, and notes for summary.json."""
    mixture = mix_batches(session, index, classes)
    return task_from(session, starting_network(session), classes, mixture, validate)


def task_from(
    session: Session,
    start: Classifier,
    classes: np.ndarray,
    mixture: Mixture,
    validate: SpecialistValidator | None,
    begun: Classifier | None = None,
) -> tuple[TrainingTask, dict]:
    """A specialist of `start`, a network for all classes, and notes for summary.json.

    begun: goes on instead, a specialist of these classes that was trained by such a task before.
    """
    schedule = session.config.specialists
    notes = {"natural_share": mixture.natural_fraction, "shift": mixture.shift}
    torch.manual_seed(mixture.seed)
    if schedule.trains_all_rows:
        teacher = start if schedule.dustbin == "full" else None
        objective = full_softmax_objective(session, teacher, classes, mixture)
        network = begun or copy.deepcopy(start)
    else:
        objective = dustbin_objective(session, classes, mixture)
        network = begun
        if network is None:
            network, dustbin = dustbin_network(session, start, classes, mixture.seed)
            notes |= dustbin
    freeze_norm(open_layers(network, schedule, "specialists"), schedule.freeze_norm)
    stream = TrainingStream(mixture.sources, mixture.seed, session.augmentation())
    steps = specialist_steps(schedule, mixture.num_inside)
    workers = session.workers
    task = TrainingTask(network, objective, stream, schedule, steps, validate, workers)
    return dataclasses.replace(task, dense=schedule.trains_all_rows), notes


def starting_network(session: Session) -> Classifier:
    """What specialists start as: the generalist, or another one of the same classes.

    Groups and gate are the generalist's that asks them in either case, for it is its confusions
    that they are asked about.
    """
    return load_network(session, starting_stage(session))


def starting_stage(session: Session) -> Stage:
    others = session.run.members
    return others[0] if others else session.run.generalist


@dataclasses.dataclass
class Mixture:
    """What a specialist's batches are made of.

    natural_fraction: of train that is of its classes.  shift: what the oversampling adds to their
    logits.  log_prior: of the classes among themselves, [|S_m|].  others_log_prior: of the other
    classes, [C]. None where they come at natural frequencies.
    """

    sources: list[Source]
    seed: int
    num_inside: int
    natural_fraction: float
    shift: float
    log_prior: Tensor
    others_log_prior: Tensor | None


def mix_batches(session: Session, index: int, classes: np.ndarray) -> Mixture:
    """A `fraction` of each batch from the group's own shards, the rest from the other classes."""
    train = session.shards("train")
    inside, inside_ids = open_routed(session.run.route.path(f"{index:03d}"), train)
    return mixture_of(session, classes, inside, inside_ids, session.seed("specialist", index))


def mixture_of(
    session: Session, classes: np.ndarray, inside: ShardSet, inside_ids: np.ndarray, seed: int
) -> Mixture:
    """inside, inside_ids: where the group's own samples are read, and which they are."""
    schedule, train = session.config.specialists, session.shards("train")
    outside_ids = np.flatnonzero(~np.isin(train.labels, classes))
    natural = len(inside_ids) / train.num_samples
    batch = schedule.batch_size
    own = own_examples(schedule, bool(len(outside_ids)))
    order = balanced(inside.labels, seed, schedule.balance, inside_ids)
    sources = [Source(inside, order, own)]
    shift, others_log_prior = 0.0, None
    if len(outside_ids):  # otherwise nothing falls into the dustbin
        order = shuffled(outside_ids, seed + 1)
        if schedule.hard_negatives:
            weights, others_log_prior = hard_negatives(session, classes)
            order = weighted(train.labels, seed + 1, weights, outside_ids)
        sources.append(Source(train, order, batch - own))
        shift = dustbin_shift(natural, own / batch)
    log_prior = balanced_log_prior(train.class_counts[classes], schedule.balance)
    return Mixture(sources, seed, len(inside_ids), natural, shift, log_prior, others_log_prior)


def own_examples(schedule: ResolvedSpecialists, with_others: bool) -> int:
    """How many of a batch are of the group's classes. with_others: whether there are others."""
    batch = schedule.batch_size
    if not with_others:
        return batch
    return min(max(1, round(schedule.fraction * batch)), batch - 1)


def full_softmax_objective(
    session: Session, teacher: Classifier | None, classes: np.ndarray, mixture: Mixture
) -> Objective:
    """All rows of the head learn, with a teacher also from its predictions."""
    return specialise_fully(
        teacher,
        classes,
        session.num_classes,
        mixture.shift,
        mixture.log_prior,
        mixture.others_log_prior,
        session.config.specialists.soft_weight,
    )


def dustbin_objective(session: Session, classes: np.ndarray, mixture: Mixture) -> Objective:
    """The group's classes and one row for all others."""
    schedule = session.config.specialists
    return specialise_in(
        classes,
        session.num_classes,
        mixture.shift,
        schedule.label_smoothing,
        mixture.log_prior,
        loss=loss_of(schedule),
    )


def dustbin_network(
    session: Session, generalist: Classifier, classes: np.ndarray, seed: int
) -> tuple[Classifier, dict]:
    """The network with |S_m| + 1 logits, and notes on the dustbin's rows."""
    kept, residual = dustbin_rows(session, generalist, classes)
    torch.manual_seed(seed)
    network = specialise(generalist, classes, session.config.specialists.dustbin, kept, residual)
    if kept is None or residual is None:
        return network, {}
    return network, {"dustbin": {"rows": len(kept), "kl": residual.kl, "rms": residual.rms}}


def hard_negatives(session: Session, classes: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """(weights [C] of the other classes' examples, log of their fraction over the natural one [C]).

    A fraction of them is drawn in proportion to the confusion with the group, the rest at natural
    frequencies.  Both are 0 for the group's own classes.
    """
    fraction = session.config.specialists.hard_negatives
    counts = session.shards("train").class_counts.astype(float)
    counts[classes] = 0
    natural = counts / counts.sum()
    confusion = confusion_with(session, classes) * (counts > 0)
    confusion = confusion / confusion.sum() if confusion.any() else natural
    weights = (1 - fraction) * natural + fraction * confusion
    ratio = np.divide(weights, natural, out=np.ones_like(natural), where=natural > 0)
    return weights, torch.as_tensor(np.log(ratio), dtype=torch.float32)


def dustbin_rows(
    session: Session, generalist: Classifier, classes: np.ndarray
) -> tuple[np.ndarray | None, ResidualRow | None]:
    """(the other classes whose rows a specialist keeps, the row that stands for the rest).

    It keeps those that it is confused with most. The row is fitted on val.  (None, None) where all
    rows are kept.
    """
    count = session.config.specialists.dustbin_rows
    if count is None or len(classes) + count >= session.num_classes:
        return None, None
    confusion = confusion_with(session, classes)
    confusion[classes] = -1
    kept = np.sort(np.argsort(-confusion, kind="stable")[:count])

    inputs = torch.from_numpy(val_features(session, generalist)).to(session.ranks.device)
    residual = fit_residual_row(generalist.linear_head, inputs, classes, kept)
    session.say(
        "dustbin: %d rows and one fitted to %d classes; on half of val KL %.2g from all rows, "
        "its logit's error %.2g",
        count,
        session.num_classes - len(classes) - count,
        residual.kl,
        residual.rms,
    )
    return kept, residual


def val_features(session: Session, generalist: Classifier) -> np.ndarray:
    """What the generalist's head reads of val's examples, or of some of many, [n, D].

    All specialists of a process share them: they start as the same network.
    """

    def measure(batch: Batch) -> dict[str, Tensor]:
        return {"features": generalist.trunk(generalist.preprocess(batch.inputs))}

    def make() -> np.ndarray:
        ids = residual_ids(len(session.shards("val")), session.num_classes)
        return session.measured(session.shards("val"), measure, ids=ids)["features"]

    return session.kept(("features of val", str(starting_stage(session).place)), make)


def residual_ids(val: int, num_classes: int) -> np.ndarray:
    """Val examples that a row for the rest is fitted to, evenly over it.

    Each costs C products for every specialist.  No more than MOST_FITTED, and of huge label sets
    as many as cost FITTED_PRODUCTS, but FEWEST_FITTED.
    """
    most = min(MOST_FITTED, max(FEWEST_FITTED, FITTED_PRODUCTS // num_classes))
    return np.unique(np.linspace(0, val - 1, min(most, val)).astype(np.int64))
