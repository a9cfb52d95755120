"""Losses of labels: pure functions of tensors, each a mean over the batch.

B batch, C classes, S_m the classes of specialist m.  The losses of a teacher's targets are in
distillation.py, that of Prior Networks in dirichlet.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.linear_logits import LinearLogits, Targets

from .probabilities import safe_log, to_float32

# logits [B, C], labels int64 [B], label_smoothing -> the mean loss, []
Loss = Callable[[Tensor, Tensor, float], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits [B, C] with labels [B], in float32 at least."""
    return F.cross_entropy(to_float32(logits), labels, label_smoothing=label_smoothing)


def classification_loss(
    logits: Tensor | LinearLogits,
    labels: Tensor,
    label_smoothing: float = 0.0,
    log_prior: Tensor | None = None,
    loss: Loss = cross_entropy,
) -> Tensor:
    """A loss of logits with labels, corrected for resampled classes.

    Parameters
    ----------
    logits : Tensor [B, C] or LinearLogits
    labels : int64 Tensor [B]
    label_smoothing : float
    log_prior : Tensor [C], optional
        log of (class share in training / natural share).  Added to the logits, it lets a network
        that is trained on resampled classes answer with the natural frequencies (logit
        adjustment).
    loss : callable
        (logits [B, C], labels [B], label_smoothing) -> scalar mean.

    Returns
    -------
    Tensor []

    Raises
    ------
    ValueError
        For LinearLogits with another loss than `cross_entropy`.

    References
    ----------
    Menon et al. 2021, "Long-tail learning via logit adjustment", eq. 10.
    """
    if isinstance(logits, LinearLogits):
        if loss is not cross_entropy:
            raise ValueError(
                f"loss {_name(loss)!r} needs dense logits [B, C]; a sharded head has only "
                'LinearLogits, which know "cross_entropy" alone'
            )
        targets = Targets.of_labels(labels, logits.num_classes, label_smoothing)
        return logits.add_bias(log_prior).cross_entropy(targets).mean()
    if log_prior is not None:
        logits = logits + log_prior
    return loss(logits, labels, label_smoothing)


def mixed_loss(
    logits: Tensor | LinearLogits,
    labels: Tensor,
    partner_labels: Tensor,
    own_share: Tensor,
    label_smoothing: float = 0.0,
    log_prior: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of inputs that are mixed of two examples.

    The target of a row is own_share onehot(label) + (1 - own_share) onehot(partner_label), smoothed
    as a whole.  Cross-entropy is linear in its target, so that it is the mixture of two.

    Parameters
    ----------
    logits : Tensor [B, C] or LinearLogits
    labels, partner_labels : int64 Tensor [B]
    own_share : Tensor [B]
    label_smoothing : float
    log_prior : Tensor [C], optional
        As in `classification_loss`.
    """
    if isinstance(logits, LinearLogits):
        indices = torch.stack([labels, partner_labels], dim=1)
        values = torch.stack([own_share, 1 - own_share], dim=1) * (1 - label_smoothing)
        uniform = None
        if label_smoothing:
            uniform = torch.full_like(own_share, label_smoothing / logits.num_classes)
        targets = Targets(indices, values, uniform)
        return logits.add_bias(log_prior).cross_entropy(targets).mean()
    if log_prior is not None:
        logits = logits + log_prior
    logits = to_float32(logits)
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    own = F.cross_entropy(logits, labels, **options)
    others = F.cross_entropy(logits, partner_labels, **options)
    return (own_share * own + (1 - own_share) * others).mean()


def dustbin_shift(natural_share: float, training_share: float) -> float:
    """How far to lower the dustbin's training logit, so that the unshifted network is calibrated.

    log( f (1 - pi) / (pi (1 - f)) ): the odds of S_m in training over its natural odds.

    Parameters
    ----------
    natural_share : float
        pi, the share of S_m's classes among all examples.
    training_share : float
        f, their share in the batches.

    Raises
    ------
    ValueError
        Where a share is not strictly between 0 and 1.

    References
    ----------
    Hinton et al. 2015, section 5.3, correct by "the log of the proportion by which the specialist
    class is oversampled".
    """
    for kind, share in (("natural", natural_share), ("training", training_share)):
        if not 0 < share < 1:
            raise ValueError(
                f"{kind} share {share} of a specialist's classes must lie strictly between 0 and 1"
            )
    odds = training_share / (1 - training_share)
    natural_odds = natural_share / (1 - natural_share)
    return math.log(odds / natural_odds)


def specialist_loss(
    logits: Tensor,
    targets: Tensor,
    shift: float,
    label_smoothing: float = 0.0,
    log_prior: Tensor | None = None,
    loss: Loss = cross_entropy,
) -> Tensor:
    """A loss of a specialist's logits, whose dustbin is lowered by `shift` (see dustbin_shift).

    Parameters
    ----------
    logits : Tensor [B, |S_m| + 1]
        Dustbin last.
    targets : int64 Tensor [B]
        The column of the example's class in S_m, or |S_m| for every other class.
    shift : float
    label_smoothing : float
    log_prior : Tensor [|S_m|], optional
        log of (class share among S_m in training / natural share among S_m), where these differ.
    loss : callable
        (logits [B, |S_m| + 1], targets [B], label_smoothing) -> scalar mean.
    """
    own = logits[:, :-1]
    if log_prior is not None:
        own = own + log_prior
    lowered = torch.cat([own, logits[:, -1:] - shift], dim=1)
    return loss(lowered, targets, label_smoothing)


def full_specialist_loss(
    logits: Tensor,
    labels: Tensor,
    in_group: Tensor,
    p_general: Tensor | None,
    log_prior: Tensor,
    soft_weight: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Loss of a specialist with a FULL softmax: hard targets in S_m, soft ones on all others.

    Hinton et al. 2015, section 6.1, left open there.  With q = softmax(logits), the answer in
    natural frequencies, and q' = softmax(logits + log_prior), an example adds

        -log q'(label)                                        where its label is in S_m,
        -log q'(out) + soft_weight KL( p_general(. | out) || q(. | out) )    where it is out.

    At soft_weight 0 this is specialist_loss whose dustbin logit is the log-sum-exp of the logits
    that are out.

    Parameters
    ----------
    logits : Tensor [B, C]
    labels : int64 Tensor [B]
        Each a class.
    in_group : bool Tensor [C]
        The classes of S_m. The others are "out".
    p_general : Tensor [B, C], optional
        The generalist's probabilities, read where the label is out.  None leaves the soft targets
        out.
    log_prior : Tensor [C]
        log of (class share in training / natural share): log(f / pi) in S_m and
        log((1 - f) / (1 - pi)) out, where S_m, of natural share pi, is drawn as the fraction f.
        Only the difference counts: dustbin_shift(pi, f).
    soft_weight : float
    out : int64 Tensor, optional
        The classes that are out, where they are known: a GPU waits to count them.
    """
    # -log q'(label) splits exactly into "is it out?" and "which of those out?".  The examples come
    # at training frequencies, and so the question whether to trust S_m, whose hard answer is known,
    # must see the adjusted logits.  A soft target p_general as a whole cannot answer it: it is
    # right for an input drawn at random, whereas these were picked for their label. Its mass inside
    # S_m would count for S_m on examples known to be out.  So p_general answers the second question
    # alone, conditioned on what is known.  There a log_prior that is constant out cancels, and one
    # that is not would have to weigh target and answer alike: both stay in natural frequencies.
    # The second term is constant in q(out), so soft_weight does not move the balance, and q = p,
    # the true posterior, is the minimiser wherever p_general(. | out) is right.
    log_q = F.log_softmax(to_float32(logits) + log_prior, dim=1)
    if out is None:
        out = (~in_group).nonzero()[:, 0]
    is_out = ~in_group[labels]
    log_q_label = log_q.gather(1, labels[:, None])[:, 0]
    hard = -torch.where(is_out, log_q[:, out].logsumexp(1), log_q_label)
    if p_general is None:
        return hard.mean()
    log_target = F.log_softmax(safe_log(p_general)[:, out], dim=1)
    log_answer = F.log_softmax(to_float32(logits)[:, out], dim=1)
    soft = (log_target.exp() * (log_target - log_answer)).sum(1)
    return (hard + soft_weight * soft * is_out).mean()


def _name(loss: Loss) -> str:
    return getattr(loss, "__name__", repr(loss))
