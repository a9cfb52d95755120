"""Losses: pure functions of tensors.  B batch, C classes, K members of a student or a teacher; every loss is a mean
over B."""

from __future__ import annotations

import math

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
