"""Every objective of a run once, on two examples: what would stop its first step is said before it.

The networks are the run's, by name, fresh. Groups and teachers that training has yet to find are
stood in for by some of the right shape.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clustering import ClassGroups
from networks import (
    BranchedClassifier,
    Classifier,
    branch_off,
    build_classifier,
    freeze_norm,
    lazy_logits,
    merge_grown_head,
    multiplications,
    specialise,
)
from networks.linear_logits import LinearLogits, LocalComm
from networks.user_code import blame
from pipeline.choices import CONTROL_ROWS, STUDENT_METHODS, resolve
from pipeline.config import ResolvedSchedule, ResolvedStudent, UserError, check_batch_size
from pipeline.controls import COMPUTE, is_wall

from ..core.objectives import Objective, classify, rerank, specialise_fully, specialise_in
from ..data.augment import MACHINES, failure, find_augment
from ..data.mixing import check_mixable, mixing_of
from ..data.streams import Batch, Source, TrainingStream, shuffled
from ..distributed.ranks import autocast
from ..session import Session
from .control_rows import widened
from .extending import grown_generalist
from .networks import builders_of, fresh_network, given_generalist, load_given, student_network
from .rerank import by_rows
from .student import left_out, live_objective
from .teachers import Teacher, from_elsewhere, of_networks
from .training import loss_of, open_layers

EXAMPLES = 2
NAMED = 3  # parameters in an error


@dataclass
class Part:
    """One network that the run trains, and how.

    section: of the config.  ranks: of its job.  count: how many such networks the run trains.
    columns: logits of an example that a step has, where it has not all.  dense: whether it has them
    all, though engine.shard_head is set.
    """

    section: str
    network: Classifier | BranchedClassifier
    objective: Objective
    schedule: ResolvedSchedule
    ranks: int
    augment: str
    count: int = 1
    columns: int | None = None
    dense: bool = False


def rehearse(session: Session, processes: int) -> tuple[list[Part], list[str]]:
    """One forward and backward pass of each objective of the run.

    processes: ranks of the generalist.  Returns the parts that will be trained, and notes on how
    weights from elsewhere are read.  Raises UserError for the first that fails, in one line.
    """
    parts: list[Part] = []
    notes: list[str] = []
    for part in _parts(session, processes, notes):
        _try_step(session, part)
        parts.append(part)
    return parts, notes


def _parts(session: Session, processes: int, notes: list[str]) -> Iterator[Part]:
    """What the run trains, in the order in which it does."""
    config = session.config
    augment = config.data.augment
    mixing = mixing_of(config.train)
    if mixing is not None:
        train = session.shards("train")
        check_mixable(mixing, tuple(train.input_shape), train.input_dtype)
    generalist, trained = _generalist(session, notes)
    if trained:
        objective = _of_labels(config.train)
        learner = generalist
        if config.generalist.init:
            learner = open_layers(copy.deepcopy(generalist), config.train, "train")
        yield Part("train", learner, objective, config.train, processes, augment)
    if config.has_rerankers:
        yield _reranker(session, generalist)
    elif trained and not config.has_specialists:
        count = config.ensemble.members - 1
        yield Part("train", generalist, objective, config.train, 1, augment, count)
    for path in config.ensemble.networks:
        load_given(session, "ensemble.networks", path)
    if config.extend.run:
        generalist = merge_grown_head(generalist)
    if session.run.method.has_groups:
        start = generalist
        if config.specialists.starts_elsewhere:
            start, trained = _another_generalist(session)
            if trained:
                objective = _of_labels(config.train)
                yield Part("train", start, objective, config.train, 1, augment)
        yield _specialist(session, start)
    yield from _controls(session, generalist)
    started = {"generalist": generalist}
    for name in config.students:
        yield _student(session, name, started)


def _controls(session: Session, generalist: Classifier) -> Iterator[Part]:
    """Networks that the controls train. A student's twin is tried as the student."""
    config, names = session.config, session.run.controls
    augment = config.data.augment
    trained_on = [name for name in names if name == COMPUTE or is_wall(name)]
    if trained_on:
        schedule, count = config.specialists, len(trained_on)
        yield Part("specialists", generalist, _of_labels(schedule), schedule, 1, augment, count)
    rows = [row for name, row in CONTROL_ROWS.items() if name in names]
    if any(row.of_second for row in rows) and session.run.second not in session.run.members:
        network, schedule = fresh_network(session), config.train
        yield Part("train", network, _of_labels(schedule), schedule, 1, augment)
    for row in rows:
        if row.trains:
            network = generalist if row.goes_on else _wider(session, generalist)
            yield Part("train", network, _of_labels(config.train), config.train, 1, augment)


def _wider(session: Session, generalist: Classifier) -> Classifier:
    """Of controls.model, or of twice the generalist's multiplications: how many it will have, is
    known of a finished ensemble."""
    own_model = session.config.controls.model
    if own_model:
        return fresh_network(session, own_model=own_model)
    target = 2 * multiplications(generalist, generalist.zero_input())
    return build_classifier(widened(session, generalist.spec, target), builders_of(session.config))


def _of_labels(schedule: ResolvedSchedule) -> Objective:
    return classify(schedule.label_smoothing, negatives=schedule.negatives, loss=loss_of(schedule))


def _generalist(session: Session, notes: list[str]) -> tuple[Classifier, bool]:
    """The network that all else starts from, and whether this run trains it."""
    if session.config.extend.run:
        return grown_generalist(session), True
    given = given_generalist(session)
    if given is None:
        return fresh_network(session), True
    source = session.config.generalist.init
    notes += given.notes
    shape, needed = tuple(session.shards("train").input_shape), given.network.spec.input.shape
    if shape != needed:
        raise UserError(
            f"generalist.from = {source} reads inputs of shape {list(needed)}, "
            f"the data's are {list(shape)}"
        )
    fresh = not session.config.has_specialists and session.config.ensemble.members > 1
    if session.config.has_rerankers:
        fresh = fresh and session.config.rerank.start == "scratch"
    if fresh:
        notes.append(
            f"generalist.from = {source} is the first member alone; the other members of the "
            f"{session.config.ensemble.kind} ensemble start from scratch"
        )
    return given.network, not given.finished


def _reranker(session: Session, generalist: Classifier) -> Part:
    """A re-ranker, and shortlists of any classes."""
    schedule = session.config.rerank
    network = copy.deepcopy(generalist)
    if schedule.start == "scratch":
        network = fresh_network(session, schedule)
    by_rows(copy.deepcopy(network))

    def shortlists(batch: Batch) -> Tensor:
        return torch.arange(schedule.k, device=batch.labels.device).repeat(len(batch), 1)

    objective = rerank(
        shortlists, schedule.random, session.num_classes, comm=lambda batch: LocalComm()
    )
    return Part(
        "rerank",
        network,
        objective,
        schedule,
        1,
        session.config.data.augment,
        session.config.ensemble.members - 1,
        columns=1 + schedule.k + min(schedule.random, session.num_classes),
    )


def _another_generalist(session: Session) -> tuple[Classifier, bool]:
    """The network that specialists start as instead, and whether this run trains it."""
    given = session.config.specialists.given_start
    if given:
        return load_given(session, "specialists.from", given), False
    return fresh_network(session, seed=session.seed("member", 1)), True


def _specialist(session: Session, generalist: Classifier) -> Part:
    """A specialist of a group as large as groups will be."""
    schedule, classes = session.config.specialists, some_group(session)
    if schedule.batch_size < 2:
        raise UserError(
            "specialists.batch_size = 1: a batch holds examples of the group and of the other "
            "classes; try 2"
        )
    if schedule.is_branch:
        return _branch(session, generalist, classes)
    try:
        network, objective = _specialist_network(session, generalist, classes)
    except ValueError as error:
        raise UserError(f"specialists: {error}") from None
    freeze_norm(open_layers(network, schedule, "specialists"), schedule.freeze_norm)
    count = sum(stage.kind.trains for stage in session.run.specialists)
    augment = session.config.data.augment
    dense = schedule.trains_all_rows
    return Part("specialists", network, objective, schedule, 1, augment, count, dense=dense)


def _branch(session: Session, generalist: Classifier, classes: np.ndarray) -> Part:
    """A branch beside a frozen generalist."""
    schedule, augment = session.config.specialists, session.config.data.augment
    frozen = copy.deepcopy(generalist).requires_grad_(False)
    try:
        branch = branch_off(frozen, classes, schedule.embedding, schedule.blocks)
    except ValueError as error:
        raise UserError(f"specialists: {error}") from None
    objective = specialise_in(
        classes, session.num_classes, 0.0, schedule.label_smoothing, loss=loss_of(schedule)
    )
    count = len(session.run.specialists)
    network = BranchedClassifier(frozen, branch.requires_grad_(True))
    return Part("specialists", network, objective, schedule, 1, augment, count)


def _specialist_network(
    session: Session, generalist: Classifier, classes: np.ndarray
) -> tuple[Classifier, Objective]:
    schedule = session.config.specialists
    if schedule.trains_all_rows:
        teacher = generalist if schedule.dustbin == "full" else None
        objective = specialise_fully(
            teacher, classes, session.num_classes, 0.0, soft_weight=schedule.soft_weight
        )
        return copy.deepcopy(generalist), objective
    objective = specialise_in(
        classes, session.num_classes, 0.0, schedule.label_smoothing, loss=loss_of(schedule)
    )
    return specialise(generalist, classes, schedule.dustbin), objective


def some_group(session: Session) -> np.ndarray:
    """The first of the user's groups, or as many classes as a group will have on average."""
    config, counts = session.config.clusters, session.shards("train").class_counts
    if config.groups_file:
        return ClassGroups.load(config.groups_file).members[0]
    size = max(1, math.ceil(session.num_classes * config.overlap / config.num_groups))
    return np.sort(np.argsort(counts == 0, kind="stable")[:size])


def _student(session: Session, name: str, started: dict[str, Classifier]) -> Part:
    """A student by name, and teachers that know nothing yet."""
    schedule = session.config.students[name]
    if len(left_out(session, schedule)) == session.num_classes:
        raise UserError(f"students.{name}.leave_out leaves no class to learn")
    network = _network_of(session, name, started)
    augment = session.run.augment_of(schedule)
    if schedule.learns_from_teacher:
        objective = _taught(session, name, network, started)
    else:
        make_objective = resolve(STUDENT_METHODS[schedule.method].objective)
        stream = _stream(session, augment, EXAMPLES)
        objective = make_objective(session, name, network, stream)
    return Part(f"students.{name}", network, objective, schedule, 1, augment)


def _network_of(session: Session, name: str, started: dict[str, Classifier]) -> Classifier:
    """The network of the generalist or a student, built once, after what it starts from."""
    if name not in started:
        student = session.config.students[name]
        copied = {start: _network_of(session, start, started) for start in _starts(student)}
        try:
            started[name] = student_network(
                session, name, student, lambda start: copy.deepcopy(copied[start])
            )
        except UserError as error:
            said = str(error).removeprefix(f"students.{name}: ")
            raise UserError(f"students.{name}: {said}") from None
    return started[name]


def _starts(student: ResolvedStudent) -> list[str]:
    """The name of what it starts from, if it is a network."""
    return [] if student.start == "scratch" else [student.start]


def _taught(
    session: Session, name: str, network: Classifier, started: dict[str, Classifier]
) -> Objective:
    """Like `soft_objective`, with teachers as they are before training."""
    schedule = session.config.students[name]
    return live_objective(name, schedule, _teacher(session, schedule, started), network)


def _teacher(
    session: Session, schedule: ResolvedStudent, started: dict[str, Classifier]
) -> Teacher:
    if os.sep in schedule.teacher:
        return from_elsewhere(schedule.teacher, session)
    if schedule.teacher != "ensemble":
        return of_networks([copy.deepcopy(_network_of(session, schedule.teacher, started))])
    generalist = copy.deepcopy(started["generalist"])
    if session.config.is_deep:
        return of_networks([generalist] * session.config.ensemble.num_networks)
    return Teacher(of_networks([generalist]).predict, 1)


# One step


def _stream(session: Session, augment: str, examples: int) -> TrainingStream:
    train = session.shards("train")
    order = shuffled(np.flatnonzero(train.labels >= 0), 0)
    data = session.config.data
    view = find_augment(augment, data.augment_share, data.augment_options)
    return TrainingStream([Source(train, order, examples)], 0, view)


def _first_batch(session: Session, augment: str, examples: int) -> Batch:
    """Raises UserError for whatever an augmentation of the user's raises at its first call."""
    try:
        return _stream(session, augment, examples).batch(0)
    except MACHINES as error:
        if ":" not in augment:
            raise
        raise UserError(failure(augment, error)) from None


def _try_step(session: Session, part: Part) -> None:
    """Forward and backward on as many examples as a rank has in a micro-batch, two at most.

    Raises UserError where that fails or leaves a parameter without a gradient, which ends a
    training on several ranks in its second step.
    """
    check_batch_size(part.schedule.batch_size, part.ranks, part.schedule.accumulation)
    examples = min(EXAMPLES, share_of_batch(part))
    device = session.ranks.device
    batch = _first_batch(session, part.augment, examples).to(device)
    network = part.network.to(device).train()
    module = network
    split = session.config.engine.shard_head and not part.dense
    sharded = split and network.spec.head["kind"] == "linear"
    if sharded or part.columns is not None:
        assert isinstance(network, Classifier), "a branch has no linear head"
        module = LazyNetwork(network)
    try:
        with autocast(session.config.engine, device):
            loss = part.objective(module, batch)
        loss.backward()
    except UserError:
        raise
    except Exception as error:  # a network of the user's raises what it likes
        raise UserError(_failure(part, examples, error)) from None
    _check_gradients(part, float(loss.detach()))
    network.zero_grad()


def share_of_batch(part: Part) -> int:
    """Examples of a rank's micro-batch."""
    return part.schedule.batch_size // (part.ranks * part.schedule.accumulation)


class LazyNetwork(nn.Module):
    """A network whose [B, C] logits are never held, as with engine.shard_head, or by rows."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.network = network

    def forward(self, raw: Tensor) -> LinearLogits:
        return lazy_logits(self.network, raw)


def _failure(part: Part, examples: int, error: Exception) -> str:
    norms = [
        name
        for name, module in part.network.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    ]
    if examples == 1 and norms and "more than 1 value per channel" in str(error):
        parts = part.ranks * part.schedule.accumulation
        return (
            f"{part.section}.batch_size = {part.schedule.batch_size} over {part.ranks} ranks x "
            f"{part.schedule.accumulation} accumulation steps is one example at a time, which "
            f"batch norm ({norms[0]}) cannot normalise; try {2 * parts}"
        )
    return f"{part.section}: the first training step fails: {blame(error)}"


def _check_gradients(part: Part, loss: float) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"{part.section}: the loss of the first training step is {loss}; look for NaN or huge "
            "numbers in the inputs, data.mean and data.std, or the weights"
        )
    unreached = [
        name
        for name, parameter in part.network.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if unreached:
        named = ", ".join(unreached[:NAMED])
        if len(unreached) > NAMED:
            named += f" and {len(unreached) - NAMED} more"
        raise UserError(
            f"{part.section}: the loss does not reach {named}; leave layers that the output does "
            "not depend on out of the network"
        )
