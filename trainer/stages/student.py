"""One network learns what its teacher predicts: generalist and specialists together, say.

Hinton et al. 2015, section 8: that the specialists' knowledge can be put back into one network
was left open there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ensemble.fitting import fit_shift_to_odds, log_odds
from networks import Classifier, lazy_logits
from pipeline.choices import STUDENT_METHODS, resolve
from pipeline.config import ResolvedStudent, UserError
from pipeline.store import Stage, read_json

from ..core.distillation import LogitTargets
from ..core.loop import TrainingTask
from ..core.objectives import Objective, classify, distil, learn_priors
from ..data.orders import part_of_each_class
from ..data.shards import ShardSet
from ..data.streams import Batch, Source, TrainingStream, shuffled
from ..session import Session
from .networks import save_network, student_network
from .stored_targets import stored_targets
from .targets import answers_summary, views_of
from .teachers import Teacher, check_members, find_teacher, perturbation
from .training import count_steps, label_margin, loss_of, train_network
from .validate import validate_classifier


def student(session: Session, stage: Stage, name: str) -> None:
    """A student by name, taught as `students.NAME.method` says."""
    schedule = session.config.students[name]
    make_objective = resolve(STUDENT_METHODS[schedule.method].objective)
    with session.attempt(stage) as attempt:
        stream, steps = student_stream(session, schedule, schedule.learns_from_teacher)
        network = student_network(session, name, schedule)
        objective = make_objective(session, name, network, stream)
        answers = answers_summary(session, name)
        task = student_task(session, network, objective, stream, schedule, steps)
        network, summary = train_network(session, attempt, task)
        if answers:
            summary["answers"] = answers
        if schedule.bias_correction:
            absent = left_out(session, schedule)
            summary["bias_shift"] = correct_bias(session, network, absent)
        save_network(session, attempt, network, summary)


def hard_twin_task(session: Session, name: str) -> TrainingTask:
    """The task of a student's twin: the same network, stream and steps, but labels alone."""
    schedule = session.config.students[name]
    stream, steps = student_stream(session, schedule, transfer=False)
    network = student_network(session, name, schedule)
    objective = hard_objective(session, name, network, stream)
    return student_task(session, network, objective, stream, schedule, steps)


def student_task(
    session: Session,
    network: Classifier,
    objective: Objective,
    stream: TrainingStream,
    schedule: ResolvedStudent,
    steps: int,
) -> TrainingTask:
    validate = validate_classifier(session)
    workers = session.workers
    return TrainingTask(network, objective, stream, schedule, steps, validate, workers)


# What a student learns: pipeline.choices.STUDENT_METHODS names these


def hard_objective(
    session: Session, name: str, network: Classifier, stream: TrainingStream
) -> Objective:
    """Labels alone."""
    schedule = session.config.students[name]
    return classify(
        schedule.label_smoothing,
        negatives=schedule.negatives,
        loss=loss_of(schedule),
        margin=label_margin(network),
    )


def prior_objective(
    session: Session, name: str, network: Classifier, stream: TrainingStream
) -> Objective:
    """A Prior Network: Dirichlets from labels.  Malinin & Gales 2018."""
    return learn_priors()


def soft_objective(
    session: Session, name: str, network: Classifier, stream: TrainingStream
) -> Objective:
    """A teacher's predictions: stored ones, or made while the student trains.

    Inputs are perturbed first where the student says so.
    """
    schedule = session.config.students[name]
    stored = session.run.targets_for(name)
    if stored is not None:
        teach = stored_targets(stored.path(""), session, stream.sources, stream.views)
        count = read_json(stored.path("train/answers.json"))["members"]
        check_members(name, schedule, count, network.num_members)
        return distil(teach, schedule)
    return live_objective(name, schedule, find_teacher(session, schedule), network)


def live_objective(
    name: str, schedule: ResolvedStudent, teacher: Teacher, network: Classifier
) -> Objective:
    """A teacher that predicts while the student trains, on perturbed inputs where it says so."""
    check_members(name, schedule, teacher.num_members, network.num_members)
    move = None
    if schedule.perturb != "none":
        move = perturbation(name, schedule, teacher, network.spec.input)
    of_single = teacher.logits_for_single(schedule.mean)
    if network.num_members == 1 and of_single is not None:
        return distil(partial(_as_logits, of_single), schedule, move)
    return distil(lambda batch: teacher.predict(batch.inputs), schedule, move)


def _as_logits(predict: Callable[[Tensor], Tensor], batch: Batch) -> LogitTargets:
    """A teacher's logits [1, b, C]: one softmax, at the student's temperature, is left to do."""
    with torch.inference_mode():
        return LogitTargets(predict(batch.inputs)[None])


# What a student sees


def student_stream(
    session: Session, schedule: ResolvedStudent, transfer: bool
) -> tuple[TrainingStream, int]:
    """A student's stream and number of steps. An epoch is one of its part of train.

    The stream's sources are train and, with `transfer`, the transfer inputs of [data], about
    which only a teacher can say something.
    """
    train, seed = session.shards("train"), session.seed("student", 0)
    ids = transfer_set(session, schedule)
    parts: list[tuple[ShardSet, np.ndarray, int]] = [(train, ids, schedule.batch_size)]
    if transfer and session.config.data.transfer:
        further = session.shards("transfer")
        fraction = schedule.transfer_share
        if fraction is None:
            fraction = len(further) / (len(ids) + len(further))
        unlabelled = round(fraction * schedule.batch_size)
        parts = [
            (train, ids, schedule.batch_size - unlabelled),
            (further, np.arange(further.num_samples), unlabelled),
        ]
    sources = [
        Source(shards, shuffled(chosen, seed + index), count)
        for index, (shards, chosen, count) in enumerate(parts)
        if count
    ]
    augment = session.run.augment_of(schedule)
    views = views_of(session, schedule.views) if augment != "none" else None
    stream = TrainingStream(sources, seed, session.augmentation(schedule), views)
    return stream, count_steps(schedule, len(ids))


def transfer_set(session: Session, schedule: ResolvedStudent) -> np.ndarray:
    """Ids of train that a student sees, int64 [n].

    They are a fraction `share` of each class, at least one example. None of the classes left out.
    """
    labels, absent = session.shards("train").labels, left_out(session, schedule)
    ids = np.flatnonzero(~np.isin(labels, absent))
    if not len(ids):
        raise UserError("leave_out leaves no example to learn from")
    if schedule.share == 1:
        return ids
    return part_of_each_class(labels, ids, schedule.share, session.seed("share", 0))


def left_out(session: Session, schedule: ResolvedStudent) -> np.ndarray:
    """The classes that a student does not see, int64, sorted.

    Raises UserError for an unknown name.
    """
    indices = {name: index for index, name in enumerate(session.class_names)}
    unknown = [name for name in schedule.leave_out if name not in indices]
    if unknown:
        raise UserError(
            f"leave_out = {unknown[0]!r} is no class; "
            f"classes are called like {session.class_names[:3]}"
        )
    return np.array(sorted(indices[name] for name in schedule.leave_out), np.int64)


def correct_bias(session: Session, network: Classifier, classes: np.ndarray) -> float:
    """Raise the biases of classes that the network was not shown by what fits val best.

    Hinton et al. 2015, section 3, did so by hand.
    """

    left = torch.zeros(session.num_classes, dtype=torch.bool)
    left[torch.from_numpy(classes)] = True
    mask = left.to(session.ranks.device)

    def measure(batch: Batch) -> dict[str, Tensor]:
        logits = lazy_logits(network, batch.inputs).materialize()
        return {"log_odds": log_odds(logits, mask), "left_out": mask[batch.labels]}

    values = session.measured(session.shards("val"), measure)
    fraction = float(values["left_out"].mean(dtype=np.float64))
    shift = fit_shift_to_odds(torch.from_numpy(values["log_odds"]), fraction)
    bias = network.linear_head.bias
    with torch.no_grad():
        bias[torch.from_numpy(classes).to(bias.device)] += shift
    session.say(
        "the biases of %d classes that were left out are raised by %.2f", len(classes), shift
    )
    return shift
