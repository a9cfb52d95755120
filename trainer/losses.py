"""Losses: pure functions of tensors.  B batch, C classes, K members of a student or a teacher; every loss is a mean
over B."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.linear_logits import LinearLogits, Targets


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, log_prior: Tensor | None = None):
    """Cross-entropy of [B, C] logits, held or LinearLogits, with labels [B].

    log_prior: [C], log of (class share in training / natural share).  Added to the logits, it lets a network that is
    trained on resampled classes answer with the natural frequencies (logit adjustment, Menon et al. 2021, eq. 10).
    """
    if isinstance(logits, LinearLogits):
        targets = Targets.of_labels(labels, logits.num_classes, label_smoothing)
        return logits.plus(log_prior).cross_entropy(targets).mean()
    if log_prior is not None:
        logits = logits + log_prior
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def dustbin_shift(natural_share: float, training_share: float) -> float:
    """What to lower the dustbin's training logit by, so that the unshifted network is right at natural frequencies.

    natural_share: pi, the share of S_m's classes among all examples.  training_share: f, their share in the batches.
    log( f (1 - pi) / (pi (1 - f)) ): the odds of S_m in training over its natural odds.
    Hinton et al. 2015, section 5.3 correct by "the log of the proportion by which the specialist class is oversampled".
    """
    if not 0 < natural_share < 1:
        raise ValueError(f"natural share {natural_share} of a specialist's classes must lie strictly between 0 and 1")
    if not 0 < training_share < 1:
        raise ValueError(f"training share {training_share} of a specialist's classes must lie strictly between 0 and 1")
    odds = training_share / (1 - training_share)
    natural_odds = natural_share / (1 - natural_share)
    return math.log(odds / natural_odds)


def specialist_loss(
    logits: Tensor, targets: Tensor, shift: float, label_smoothing: float = 0.0, log_prior: Tensor | None = None
):
    """Cross-entropy of a specialist's [B, |S_m| + 1] logits, dustbin last and lowered by `shift` (see dustbin_shift).

    targets: [B], the column of the example's class in S_m, or |S_m| for every other class.
    log_prior: [|S_m|], log of (class share among S_m in training / natural share among S_m), where these differ.
    """
    own = logits[:, :-1] if log_prior is None else logits[:, :-1] + log_prior
    lowered = torch.cat([own, logits[:, -1:] - shift], dim=1)
    return F.cross_entropy(lowered.float(), targets, label_smoothing=label_smoothing)


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """softmax(log p / T) over the last dimension: what a softmax at temperature T makes of p's own logits."""
    if temperature == 1:
        return probabilities
    return F.softmax(probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log() / temperature, dim=-1)


class TopAnswers(NamedTuple):
    """[B, C] probabilities as they are kept: the k largest, indices (int64) and values [B, k]; what is missing to 1 is
    even over the other C - k classes."""

    indices: Tensor
    values: Tensor
    num_classes: int

    @property
    def tail(self) -> Tensor:
        """[B]"""
        return (1 - self.values.sum(1)).clamp_min(0)

    def spread(self) -> Tensor:
        """[B, C]"""
        others = self.num_classes - self.indices.shape[1]
        each = (self.tail / max(others, 1))[:, None]
        return each.expand(-1, self.num_classes).scatter(1, self.indices, self.values)

    def softened(self, temperature: float) -> tuple[Targets, Tensor]:
        """soften of these as Targets, and sum p log p, [B]."""
        others = self.num_classes - self.indices.shape[1]
        p = torch.cat([self.values.float(), (self.tail / max(others, 1))[:, None]], 1)  # the last: of each other class
        count = torch.ones_like(p[0])
        count[-1] = others
        if temperature != 1:
            p = p.clamp_min(torch.finfo(p.dtype).tiny) ** (1 / temperature)
            p = p / (p * count).sum(1, keepdim=True)
        targets = Targets.of_top(self.indices, p[:, :-1], self.num_classes, p[:, -1] * others)
        return targets, (torch.special.xlogy(p, p) * count).sum(1)


def unheld_distillation_loss(
    student: LinearLogits, teacher: Tensor | TopAnswers, labels: Tensor, temperature: float, soft_weight: float,
    hard_weight: float, label_smoothing: float = 0.0,
):  # fmt: skip
    """distillation_loss of one student whose logits are not held; teacher: [B, C], or what is kept of it."""
    if isinstance(teacher, TopAnswers):
        targets, negative_entropy = teacher.softened(temperature)
    else:
        p = soften(teacher.float(), temperature)
        targets, negative_entropy = Targets(dense=p), torch.special.xlogy(p, p).sum(1)
    soft = (student.divided(temperature).cross_entropy(targets) + negative_entropy).mean() * temperature**2
    if hard_weight == 0:
        return soft_weight * soft
    hard = student.cross_entropy(Targets.of_labels(labels, student.num_classes, label_smoothing)).mean()
    return soft_weight * soft + hard_weight * hard


def distillation_loss(
    student_logits: Tensor, teacher_probabilities: Tensor, labels: Tensor, temperature: float, soft_weight: float,
    hard_weight: float, label_smoothing: float = 0.0,
):  # fmt: skip
    """soft_weight T^2 KL(teacher_T || student_T) + hard_weight CE(labels, student).  Hinton et al. 2015, section 2.

    student_logits, teacher_probabilities: [K, B, C] (K = 1: plain distillation; member k learns teacher k); labels:
    [B], -1
    for unlabelled examples, which have no second term (it is divided by B all the same).  The first term is the KL
    itself, not the cross-entropy: it is zero when student equals teacher.
    """
    if student_logits.shape != teacher_probabilities.shape:
        raise ValueError(
            f"student {tuple(student_logits.shape)} and teacher {tuple(teacher_probabilities.shape)} differ in shape"
        )
    members, batch, classes = student_logits.shape
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    p = soften(teacher_probabilities.float(), temperature)
    soft = F.kl_div(log_q, p, reduction="sum") / (members * batch) * temperature**2
    if hard_weight == 0:
        return soft_weight * soft
    logits = student_logits.float().reshape(members * batch, classes)
    every = labels.repeat(members)
    hard = F.cross_entropy(logits, every, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
    hard = hard / (members * batch)
    return soft_weight * soft + hard_weight * hard
