"""What a network is asked to do with a batch: functions (network, batch) -> loss, a mean over the batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from networks.linear_logits import LinearLogits
from pipeline.config import Student

from ..data.streams import Batch
from .losses import (
    TopKTargets,
    average_members,
    classification_loss,
    distillation_loss,
    full_specialist_loss,
    hard_loss,
    lazy_distillation_loss,
    prior_network_loss,
    specialist_loss,
)

Objective = Callable[[nn.Module, Batch], Tensor]


def classify(
    label_smoothing: float = 0.0, log_prior: Tensor | None = None, negatives: int | None = None
) -> Objective:
    """Learn all classes; log_prior [C] where the stream resamples them.

    negatives: of a sharded head, learn each batch's own classes against so many others, drawn anew for each batch.
    """

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        prior = None if log_prior is None else log_prior.to(batch.labels.device)
        logits, labels = network(batch.inputs), batch.labels
        if isinstance(logits, Tensor) and logits.dim() == 3:  # each of several members by itself
            logits, labels = logits.flatten(0, 1), labels.repeat(len(logits))
        if negatives is not None:
            logits, labels = logits.add_bias(prior).sampled(
                labels, negatives, draw_for(batch, logits.comm)
            )
            prior = None
        return classification_loss(logits, labels, label_smoothing, prior)

    return objective


def draw_for(batch: Batch, comm) -> torch.Generator:
    """A generator that is a function of the global batch's examples and their order: alike on any number of ranks, and
    after a resume."""
    ids = comm.gather(batch.ids)
    ordered = ids.view(-1, len(batch.ids)).T.contiguous()  # rank r has every world_size-th example
    return torch.Generator().manual_seed(zlib.crc32(ordered.cpu().numpy().tobytes()))


def specialise_in(
    members: np.ndarray,
    num_classes: int,
    shift: float,
    label_smoothing: float = 0.0,
    log_prior: Tensor | None = None,
) -> Objective:
    """Learn the classes `members` and one dustbin for the rest, the shift of the oversampling inside the loss.

    log_prior: [|S_m|], where the stream resamples the members among themselves.
    """
    columns = specialist_columns(members, num_classes)

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        targets = columns.to(batch.labels.device)[batch.labels]
        prior = None if log_prior is None else log_prior.to(batch.labels.device)
        return specialist_loss(network(batch.inputs), targets, shift, label_smoothing, prior)

    return objective


def specialise_fully(
    generalist: nn.Module | None,
    members: np.ndarray,
    num_classes: int,
    shift: float,
    log_prior: Tensor | None = None,
    others_log_prior: Tensor | None = None,
    soft_weight: float = 1.0,
) -> Objective:
    """Learn the classes `members` from labels and, where the label is another, the others from the generalist; without
    one only that it is another.

    The network and the generalist answer with all classes, [B, C].  shift, log_prior: as specialise_in has them.
    others_log_prior: [C], where the stream resamples the other classes among themselves, 0 for members.
    soft_weight: of the KL from the generalist's answers.
    """
    inside = torch.zeros(num_classes, dtype=torch.bool)
    inside[torch.tensor(members)] = True
    prior = torch.where(inside, shift, 0.0)  # specialise_in lowers the rest, which is the same
    if log_prior is not None:
        prior[torch.tensor(members)] += log_prior
    if others_log_prior is not None:
        prior = prior + others_log_prior

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            p_general = None if generalist is None else generalist(batch.inputs).float().softmax(1)
        logits, device = network(batch.inputs), batch.labels.device
        return full_specialist_loss(
            logits, batch.labels, inside.to(device), p_general, prior.to(device), soft_weight
        )

    return objective


def distil(
    teacher: Callable[[Batch], Tensor | TopKTargets],
    student: Student,
    perturb: Callable[[Tensor], Tensor] | None = None,
) -> Objective:
    """Learn the teacher's distributions: teacher(batch) is [K, B, C] probabilities, or what is kept of them.

    A network with K members learns member k from member k; a single one their mean.
    perturb: raw inputs -> raw inputs that teacher and student answer instead; labels stay with the clean ones.
    """
    weights = (
        student.temperature,
        student.soft_weight,
        student.hard_weight,
        student.label_smoothing,
    )

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        if perturb is not None:
            return of_moved_inputs(network, batch, teacher, perturb, student)
        logits = network(batch.inputs)
        with torch.no_grad():
            target = teacher(batch)
        if isinstance(logits, LinearLogits):
            return lazy_distillation_loss(
                logits, for_single(target, student.mean), batch.labels, *weights
            )
        logits = as_members(logits)
        return distillation_loss(
            logits, for_members(target, student.mean, len(logits)), batch.labels, *weights
        )

    return objective


def of_moved_inputs(network, batch: Batch, teacher, perturb, student: Student) -> Tensor:
    """(1 - alpha) CE on x and alpha T^2 KL on x~, Nam et al. 2021, section 3; one forward pass of both."""
    moved = replace(batch, inputs=perturb(batch.inputs))
    with torch.no_grad():
        target = teacher(moved)
    inputs = (
        torch.cat([moved.inputs, batch.inputs.to(moved.inputs)])
        if student.hard_weight
        else moved.inputs
    )
    logits = as_members(network(inputs))
    answers, clean = logits[:, : len(batch)], logits[:, len(batch) :]
    target = for_members(target, student.mean, len(logits))
    loss = distillation_loss(
        answers, target, batch.labels, student.temperature, student.soft_weight, 0.0
    )
    if student.hard_weight:
        loss = loss + student.hard_weight * hard_loss(clean, batch.labels, student.label_smoothing)
    return loss


def as_members(logits: Tensor) -> Tensor:
    """[B, C] or [K, B, C] -> [K, B, C]"""
    return logits if logits.dim() == 3 else logits[None]


def for_members(target: Tensor | TopKTargets, mean: str, members: int) -> Tensor:
    """Teachers [K, B, C] as `members` students learn them: one each, or their mean."""
    target = target.spread() if isinstance(target, TopKTargets) else target
    return average_members(target, mean)[None] if members == 1 and len(target) > 1 else target


def for_single(target: Tensor | TopKTargets, mean: str) -> Tensor | TopKTargets:
    """[K, B, ...] -> [B, ...]: the one teacher's answers as they are kept, or the mean of several."""
    if isinstance(target, TopKTargets) and len(target.indices) == 1:
        return TopKTargets(
            target.indices[0], target.log_values[0], target.log_tail[0], target.num_classes
        )
    return for_members(target, mean, 1)[0]


def learn_priors() -> Objective:
    """A Prior Network: the labels as Dirichlet distributions over the simplex.  Malinin & Gales 2019."""

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        return prior_network_loss(network(batch.inputs), batch.labels)

    return objective


def specialist_columns(members: np.ndarray, num_classes: int) -> Tensor:
    """int64 [C]: the column of each class in a specialist's output; |S_m|, the dustbin's, for classes outside."""
    columns = torch.full((num_classes,), len(members), dtype=torch.int64)
    columns[torch.tensor(members)] = torch.arange(len(members))
    return columns


def with_dustbin(logits: Tensor, members: np.ndarray) -> Tensor:
    """Logits of all classes [B, C] as a specialist has them, [B, |S_m| + 1]: the others' log-sum-exp last."""
    own = torch.tensor(members, device=logits.device)
    others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    others[own] = False
    return torch.cat([logits[:, own], logits[:, others].logsumexp(1, keepdim=True)], dim=1)
