"""Objectives: functions (network, batch) -> loss, a mean over the batch.

An objective says what a network is asked to do with a batch. The losses themselves are in
losses.py, distillation.py and dirichlet.py.  B batch, C classes, K members of a network,
S_m the classes of specialist m.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from networks.candidates import candidates_of, cross_entropy_among
from networks.drawing import draw_classes
from networks.linear_logits import Comm, LinearLogits
from networks.row_head import RowHead
from pipeline.config import ResolvedStudent

from ..data.streams import Batch
from .dirichlet import prior_network_loss
from .distillation import (
    LogitTargets,
    TopKTargets,
    distillation_loss,
    hard_loss,
    lazy_distillation_loss,
)
from .losses import (
    Loss,
    classification_loss,
    cross_entropy,
    full_specialist_loss,
    mixed_loss,
    specialist_loss,
)
from .probabilities import average_members

Objective = Callable[[nn.Module, Batch], Tensor]
# [K, B, C]: probabilities, what is stored of them, or logits
TeacherTargets = Tensor | TopKTargets | LogitTargets
Teacher = Callable[[Batch], TeacherTargets]
# (logits, labels [B]) -> these logits, the label's moved by a margin
LabelMargin = Callable[[LinearLogits, Tensor], LinearLogits]
Perturb = Callable[[Tensor], Tensor]  # raw inputs -> raw inputs


class Constant:
    """A tensor of an objective, moved once to each device that batches are on. None stays None."""

    def __init__(self, value: Tensor | None):
        self._on = {} if value is None else {value.device: value}
        self._value = value

    def beside(self, batch: Batch) -> Tensor | None:
        """The tensor on the batch's device."""
        if self._value is None:
            return None
        device = batch.labels.device
        if device not in self._on:
            self._on[device] = self._value.to(device)
        return self._on[device]


def classify(
    label_smoothing: float = 0.0,
    log_prior: Tensor | None = None,
    negatives: float | None = None,
    loss: Loss = cross_entropy,
    margin: LabelMargin | None = None,
) -> Objective:
    """Learn all classes from labels. Of mixed inputs from both examples'.

    Parameters
    ----------
    label_smoothing : float
    log_prior : Tensor [C], optional
        Where the stream resamples the classes. See `classification_loss`.
    negatives : int or float, optional
        Of a sharded head: learn each batch's own classes against so many others, or against this
        share of all classes, drawn anew for each batch.
    loss : callable
        (logits [B, C], labels [B], label_smoothing) -> scalar mean.
    margin : callable, optional
        Of a cosine head, which gives LinearLogits: moves the label's logit.
    """

    constant_prior = Constant(log_prior)

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        prior = constant_prior.beside(batch)
        logits = network(batch.inputs)
        labels = batch.labels
        if batch.own_share is not None:
            assert negatives is None and margin is None and loss is cross_entropy
            return mixed_classification(logits, batch, label_smoothing, prior)
        if isinstance(logits, Tensor) and logits.dim() == 3:  # each of several members by itself
            labels = labels.repeat(len(logits))
            logits = logits.flatten(0, 1)
        if negatives is not None:
            assert isinstance(logits, LinearLogits), "negatives are of a sharded head"
            count = _count(negatives, logits.num_classes)
            generator = negatives_generator(batch, logits.comm)
            logits, labels = logits.add_bias(prior).sampled(labels, count, generator)
            prior = None
        if margin is not None:
            assert isinstance(logits, LinearLogits), "a margin is of logits that are read in blocks"
            logits = margin(logits, labels)
        return classification_loss(logits, labels, label_smoothing, prior, loss)

    return objective


def mixed_classification(
    logits: Tensor | LinearLogits, batch: Batch, label_smoothing: float, log_prior: Tensor | None
) -> Tensor:
    """The loss of a batch whose inputs are mixed of two. Of several members their mean."""
    targets = [batch.labels, batch.partner_labels, batch.own_share]
    if isinstance(logits, Tensor) and logits.dim() == 3:
        targets = [each.repeat(len(logits)) for each in targets if each is not None]
        logits = logits.flatten(0, 1)
    labels, partner_labels, own_share = targets
    assert labels is not None and partner_labels is not None and own_share is not None
    return mixed_loss(logits, labels, partner_labels, own_share, label_smoothing, log_prior)


def _count(negatives: float, num_classes: int) -> int:
    """A whole number as it is, and a share below 1 of the classes."""
    return negatives if isinstance(negatives, int) else max(1, round(negatives * num_classes))


def negatives_generator(batch: Batch, comm: Comm) -> torch.Generator:
    """A generator seeded by the global batch's examples and their order.

    It is the same on any number of ranks, and after a resume.
    """
    return torch.Generator().manual_seed(seed_of_batch(batch, comm))


def seed_of_batch(batch: Batch, comm: Comm) -> int:
    """A hash of the global batch's examples and their order, the same on any number of ranks."""
    ids = batch.ids
    if comm.share < 1:  # ranks exchange what is on their devices
        ids = comm.gather(ids.to(batch.labels.device)).cpu()
    ordered = ids.view(-1, len(batch.ids)).T.contiguous()  # rank r has every world_size-th example
    return zlib.crc32(ordered.numpy().tobytes())


def rerank(
    shortlists: Callable[[Batch], Tensor],
    random: int,
    num_classes: int,
    comm: Callable[[Batch], Comm],
    head: RowHead | None = None,
    log_prior: Tensor | None = None,
) -> Objective:
    """Learn each label against its example's shortlist, and some classes drawn at random.

    Parameters
    ----------
    shortlists : callable
        batch -> int64 [B, k], distinct classes of each row.
    random : int
        Classes drawn for the batch, which stand for all others. See networks.candidates.
    num_classes : int
    comm : callable
        batch -> what gathers it from the ranks.
    head : RowHead, optional
        The network's, which gives features.  None of a network that gives LinearLogits.
    log_prior : Tensor [C], optional
        Where the stream resamples the classes. See `classification_loss`.
    """

    constant_prior = Constant(log_prior)

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        drawn = None
        if random:
            drawn = draw_classes(num_classes, random, seed_of_batch(batch, comm(batch)))
            drawn = drawn.to(batch.labels.device, non_blocking=True)
        asked = candidates_of(batch.labels, shortlists(batch), drawn)
        logits, prior = network(batch.inputs), constant_prior.beside(batch)
        if head is not None:
            classes, asked = asked.numbered()
            logits = head.read(logits, classes)
            prior = None if prior is None else prior[classes]
        return cross_entropy_among(logits, asked, num_classes, prior).mean()

    return objective


def specialise_in(
    group_classes: np.ndarray,
    num_classes: int,
    shift: float,
    label_smoothing: float = 0.0,
    log_prior: Tensor | None = None,
    loss: Loss = cross_entropy,
) -> Objective:
    """Learn the classes of one group and a dustbin for the rest.

    Parameters
    ----------
    group_classes : int array [|S_m|]
    num_classes : int
    shift : float
        How far the dustbin is lowered for the oversampling of S_m. See `dustbin_shift`.
    label_smoothing : float
    log_prior : Tensor [|S_m|], optional
        Where the stream resamples the group's classes among themselves.
    loss : callable
        (logits [B, |S_m| + 1], labels [B], label_smoothing) -> scalar mean.
    """
    columns = Constant(specialist_columns(group_classes, num_classes))
    constant_prior = Constant(log_prior)

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        of_classes = columns.beside(batch)
        assert of_classes is not None
        targets, prior = of_classes[batch.labels], constant_prior.beside(batch)
        return specialist_loss(network(batch.inputs), targets, shift, label_smoothing, prior, loss)

    return objective


def specialise_fully(
    generalist: nn.Module | None,
    group_classes: np.ndarray,
    num_classes: int,
    shift: float,
    log_prior: Tensor | None = None,
    others_log_prior: Tensor | None = None,
    soft_weight: float = 1.0,
) -> Objective:
    """Learn one group's classes from labels, and the other classes from the generalist.

    Parameters
    ----------
    generalist : nn.Module, optional
        inputs -> logits [B, C].  It is the teacher where the label is outside the group. Without
        one a network learns there only that the label is outside.
    group_classes, num_classes, shift, log_prior
        As in `specialise_in`.
    others_log_prior : Tensor [C], optional
        Where the stream resamples the other classes among themselves. 0 in the group.
    soft_weight : float
        Of the KL from the generalist's predictions.

    References
    ----------
    Hinton et al. 2015, section 6.1. See `full_specialist_loss`.
    """
    own = torch.tensor(group_classes)
    inside = torch.zeros(num_classes, dtype=torch.bool)
    inside[own] = True
    full_prior = torch.where(inside, shift, 0.0)  # specialise_in lowers the rest, which is the same
    if log_prior is not None:
        full_prior[own] += log_prior
    if others_log_prior is not None:
        full_prior = full_prior + others_log_prior
    constant_inside, constant_prior = Constant(inside), Constant(full_prior)
    constant_out = Constant((~inside).nonzero()[:, 0])

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        p_general = None
        if generalist is not None:
            with torch.no_grad():
                p_general = generalist(batch.inputs).float().softmax(1)
        logits = network(batch.inputs)
        inside_here, prior = constant_inside.beside(batch), constant_prior.beside(batch)
        assert inside_here is not None and prior is not None
        return full_specialist_loss(
            logits,
            batch.labels,
            inside_here,
            p_general,
            prior,
            soft_weight,
            constant_out.beside(batch),
        )

    return objective


def distil(teacher: Teacher, student: ResolvedStudent, perturb: Perturb | None = None) -> Objective:
    """Learn a teacher's distributions.

    Parameters
    ----------
    teacher : callable
        batch -> probabilities [K, B, C], what is stored of them (TopKTargets), or logits
        (LogitTargets).  A network with K members learns member k from teacher k. A single one
        learns their mean.
    student : ResolvedStudent
        Temperature, weights and the kind of mean.
    perturb : callable, optional
        Raw inputs -> the raw inputs that teacher and student see instead.  Labels stay with the
        clean ones.
    """

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        if perturb is not None and student.hard_weight:
            return _perturbed_loss(network, batch, teacher, perturb, student)
        if perturb is not None:
            batch = replace(batch, inputs=perturb(batch.inputs))
        logits = network(batch.inputs)
        with torch.no_grad():
            target = teacher(batch)
        if isinstance(logits, LinearLogits):
            single = for_single(target, student.mean)
            return lazy_distillation_loss(logits, single, batch.labels, *_weights(student))
        logits = as_members(logits)
        target = for_members(target, student.mean, len(logits))
        return distillation_loss(logits, target, batch.labels, *_weights(student))

    return objective


def _weights(student: ResolvedStudent) -> tuple[float, float, float, float, float]:
    """The weights of both distillation losses, in the order of their parameters."""
    return (
        student.temperature,
        student.soft_weight,
        student.hard_weight,
        student.label_smoothing,
        student.wrong_weight,
    )


def _perturbed_loss(
    network: nn.Module, batch: Batch, teacher: Teacher, perturb: Perturb, student: ResolvedStudent
) -> Tensor:
    """(1 - alpha) CE on x and alpha T^2 KL on x~, in one forward pass of both.

    Nam et al. 2021, section 3.
    """
    perturbed = replace(batch, inputs=perturb(batch.inputs))
    with torch.no_grad():
        target = teacher(perturbed)
    inputs = torch.cat([perturbed.inputs, batch.inputs.to(perturbed.inputs)])
    logits = as_members(network(inputs))
    soft_logits = logits[:, : len(batch)]
    clean_logits = logits[:, len(batch) :]
    target = for_members(target, student.mean, len(logits))
    loss = distillation_loss(
        soft_logits, target, batch.labels, student.temperature, student.soft_weight, hard_weight=0.0
    )
    hard = hard_loss(clean_logits, batch.labels, student.label_smoothing)
    return loss + student.hard_weight * hard


def as_members(logits: Tensor) -> Tensor:
    """[B, C] or [K, B, C] -> [K, B, C]"""
    if logits.dim() == 3:
        return logits
    return logits[None]


def for_members(target: TeacherTargets, mean: str, members: int) -> Tensor | LogitTargets:
    """The teachers' [K, B, C] as `members` students learn them: one each, or their mean."""
    if isinstance(target, LogitTargets):
        return target
    if isinstance(target, TopKTargets):
        target = target.spread()
    if members == 1 and len(target) > 1:
        return average_members(target, mean)[None]
    return target


def for_single(target: TeacherTargets, mean: str) -> TeacherTargets:
    """[K, B, ...] -> [B, ...]: the one teacher's targets as they are, or the mean of several."""
    if isinstance(target, TopKTargets) and len(target.indices) == 1:
        return TopKTargets(
            target.indices[0], target.log_values[0], target.log_tail[0], target.num_classes
        )
    if isinstance(target, LogitTargets):
        return LogitTargets(target.logits[0])
    return for_members(target, mean, 1)[0]


def learn_priors() -> Objective:
    """Learn the labels as Dirichlet distributions over the simplex: a Prior Network.

    References
    ----------
    Malinin & Gales 2019, "Reverse KL-Divergence Training of Prior Networks".
    """

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        return prior_network_loss(network(batch.inputs), batch.labels)

    return objective


def specialist_columns(group_classes: np.ndarray, num_classes: int) -> Tensor:
    """int64 [C]: the column of each class in a specialist's output.

    It is |S_m|, the dustbin's, for classes outside.
    """
    columns = torch.full((num_classes,), len(group_classes), dtype=torch.int64)
    columns[torch.tensor(group_classes)] = torch.arange(len(group_classes))
    return columns


def with_dustbin(logits: Tensor, group_classes: np.ndarray) -> Tensor:
    """Logits of all classes [B, C] as a specialist has them, [B, |S_m| + 1].

    Last comes the dustbin, the log-sum-exp of the others.
    """
    own = torch.tensor(group_classes, device=logits.device)
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[own] = False
    return torch.cat([logits[:, own], logits[:, others].logsumexp(1, keepdim=True)], dim=1)
