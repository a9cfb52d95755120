"""What a network is asked to do with a batch: functions (network, batch) -> loss, a mean over the batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from networks.linear_logits import LinearLogits

from .config import Student
from .data.streams import Batch
from .losses import TopAnswers, classification_loss, distillation_loss, specialist_loss, unheld_distillation_loss

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
        if negatives is not None:
            logits, labels = logits.plus(prior).sampled(labels, negatives, draw_for(batch, logits.exchange))
            prior = None
        return classification_loss(logits, labels, label_smoothing, prior)

    return objective


def draw_for(batch: Batch, exchange) -> torch.Generator:
    """A generator that is a function of the global batch's examples and their order: alike on any number of ranks, and
    after a resume."""
    ids = exchange.gather(batch.ids)
    ordered = ids.view(-1, len(batch.ids)).T.contiguous()  # rank r has every world_size-th example
    return torch.Generator().manual_seed(zlib.crc32(ordered.cpu().numpy().tobytes()))


def specialise_in(
    members: np.ndarray, num_classes: int, shift: float, label_smoothing: float = 0.0, log_prior: Tensor | None = None
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


def distil(teacher: Callable[[Batch], Tensor | TopAnswers], student: Student) -> Objective:
    """Learn the teacher's distributions: teacher(batch) is [B, C] probabilities, or what is kept of them."""
    weights = (student.temperature, student.soft_weight, student.hard_weight, student.label_smoothing)

    def objective(network: nn.Module, batch: Batch) -> Tensor:
        logits = network(batch.inputs)
        with torch.no_grad():
            target = teacher(batch)
        if isinstance(logits, LinearLogits):
            return unheld_distillation_loss(logits, target, batch.labels, *weights)
        target = target.spread() if isinstance(target, TopAnswers) else target
        return distillation_loss(logits[None], target[None].to(logits.device), batch.labels, *weights)

    return objective


def specialist_columns(members: np.ndarray, num_classes: int) -> Tensor:
    """int64 [C]: the column of each class in a specialist's output; |S_m|, the dustbin's, for classes outside."""
    columns = torch.full((num_classes,), len(members), dtype=torch.int64)
    columns[torch.tensor(members)] = torch.arange(len(members))
    return columns
