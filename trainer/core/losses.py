"""Losses: pure functions of tensors.  B batch, C classes, K members of a student or a teacher; every loss is a mean
over B."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.linear_logits import LinearLogits, Targets


def classification_loss(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, log_prior: Tensor | None = None
):
    """Cross-entropy of [B, C] logits, held or LinearLogits, with labels [B].

    log_prior: [C], log of (class share in training / natural share).  Added to the logits, it lets a network that is
    trained on resampled classes answer with the natural frequencies (logit adjustment, Menon et al. 2021, eq. 10).
    """
    if isinstance(logits, LinearLogits):
        targets = Targets.of_labels(labels, logits.num_classes, label_smoothing)
        return logits.add_bias(log_prior).cross_entropy(targets).mean()
    if log_prior is not None:
        logits = logits + log_prior
    return F.cross_entropy(to_float32(logits), labels, label_smoothing=label_smoothing)


def dustbin_shift(natural_share: float, training_share: float) -> float:
    """What to lower the dustbin's training logit by, so that the unshifted network is right at natural frequencies.

    natural_share: pi, the share of S_m's classes among all examples.  training_share: f, their share in the batches.
    log( f (1 - pi) / (pi (1 - f)) ): the odds of S_m in training over its natural odds.
    Hinton et al. 2015, section 5.3 correct by "the log of the proportion by which the specialist class is oversampled".
    """
    if not 0 < natural_share < 1:
        raise ValueError(
            f"natural share {natural_share} of a specialist's classes must lie strictly between 0 and 1"
        )
    if not 0 < training_share < 1:
        raise ValueError(
            f"training share {training_share} of a specialist's classes must lie strictly between 0 and 1"
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
):
    """Cross-entropy of a specialist's [B, |S_m| + 1] logits, dustbin last and lowered by `shift` (see dustbin_shift).

    targets: [B], the column of the example's class in S_m, or |S_m| for every other class.
    log_prior: [|S_m|], log of (class share among S_m in training / natural share among S_m), where these differ.
    """
    own = logits[:, :-1] if log_prior is None else logits[:, :-1] + log_prior
    lowered = torch.cat([own, logits[:, -1:] - shift], dim=1)
    return F.cross_entropy(to_float32(lowered), targets, label_smoothing=label_smoothing)


def full_specialist_loss(
    logits: Tensor,
    labels: Tensor,
    members: Tensor,
    p_general: Tensor | None,
    log_prior: Tensor,
    soft_weight: float = 1.0,
):
    """Loss of a specialist with a FULL softmax: hard targets on its own classes, soft ones on all others.

    Hinton et al. 2015, section 6.1, left open there.  logits: [B, C].  labels: [B], each a class.  members: bool [C],
    the classes of S_m, out the others.  p_general: [B, C], the generalist's probabilities, read where the label is out;
    None leaves the soft targets out.
    log_prior: [C], log of (class share in training / natural share): log(f / pi) in S_m and log((1 - f) / (1 - pi)) out
    where S_m, of natural share pi, is drawn as the fraction f (only the difference counts: dustbin_shift(pi, f)).

    With q = softmax(logits), the answer in natural frequencies, and q' = softmax(logits + log_prior), an example adds
        -log q'(label)                                                           where its label is in S_m,
        -log q'(out) + soft_weight KL( p_general(. | out) || q(. | out) )        where it is out.
    At soft_weight 0 this is specialist_loss whose dustbin logit is the log-sum-exp of the logits that are out.
    """
    # -log q'(label) splits exactly into "is it out?" and "which of those out?".  The examples come at training
    # frequencies, and so the question whether to trust S_m, whose hard answer is known, must see the adjusted logits.
    # A soft target p_general as a whole cannot answer it: it is right for an input drawn at random, whereas these were
    # picked for their label; its mass inside S_m would count for S_m on examples known to be out.  So p_general answers
    # the second question alone, conditioned on what is known.  There a log_prior that is constant out cancels, and one
    # that is not would have to weigh target and answer alike: both stay in natural frequencies.  The second term is
    # constant in q(out), so soft_weight does not move the balance, and q = p, the true posterior, is the minimiser
    # wherever p_general(. | out) is right.
    log_q = F.log_softmax(to_float32(logits) + log_prior, dim=1)
    out = (~members).nonzero()[:, 0]
    is_out = ~members[labels]
    hard = -torch.where(is_out, log_q[:, out].logsumexp(1), log_q.gather(1, labels[:, None])[:, 0])
    if p_general is None:
        return hard.mean()
    target = F.log_softmax(safe_log(p_general)[:, out], dim=1)
    answer = F.log_softmax(to_float32(logits)[:, out], dim=1)
    soft = (target.exp() * (target - answer)).sum(1)
    return (hard + soft_weight * soft * is_out).mean()


def to_float32(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def safe_log(probabilities: Tensor) -> Tensor:
    """log p, and of a p that is 0 the log of the smallest normal number (-87.3 in float32), so that it stays finite."""
    return (
        to_float32(probabilities).clamp_min(torch.finfo(to_float32(probabilities).dtype).tiny).log()
    )


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """softmax(log p / T) over the last dimension: what a softmax at temperature T makes of p's own logits."""
    if temperature == 1:
        return probabilities
    return F.softmax(safe_log(probabilities) / temperature, dim=-1)


def average_members(probabilities: Tensor, mean: str = "arithmetic") -> Tensor:
    """[K, B, C] of K members -> [B, C], their mean; Hinton et al. 2015, section 1, take either.

    geometric: softmax of the mean of log p, a p of 0 counting as in safe_log.
    """
    if mean == "arithmetic":
        return probabilities.mean(0)
    if mean == "geometric":
        return F.softmax(safe_log(probabilities).mean(0), dim=-1)
    raise ValueError(
        f"mean {mean!r} of the members' probabilities must be 'arithmetic' or 'geometric'"
    )


class TopKTargets(NamedTuple):
    """[..., C] probabilities as they are kept: of the k largest the classes `indices` (int64, distinct in a row) and
    their `log_values`, both [..., k]; `log_tail` [...], the log of what the other C - k classes hold, evenly.

    Logarithms, because a tail of 1e-9 is lost in 1 - sum of values but says much at a high temperature.  Rows are
    normalised where they are read: logs kept in float16 sum to 1 only to about 1e-3.
    """

    indices: Tensor
    log_values: Tensor
    log_tail: Tensor
    num_classes: int

    @classmethod
    def of(cls, log_probabilities: Tensor, k: int) -> TopKTargets:
        """What is kept of log p [..., C]."""
        num_classes = log_probabilities.shape[-1]
        top = to_float32(log_probabilities).topk(min(k, num_classes), dim=-1)
        rest = to_float32(log_probabilities).scatter(-1, top.indices, -torch.inf)
        return cls(top.indices, top.values, rest.logsumexp(-1), num_classes)

    @property
    def others(self) -> int:
        """C - k"""
        return self.num_classes - self.indices.shape[-1]

    def log_parts(self, temperature: float) -> Tensor:
        """[..., k + 1]: soften's log p of each kept class and, last, of each single one of the others."""
        each = to_float32(self.log_tail) - math.log(max(self.others, 1))
        log_p = torch.cat([to_float32(self.log_values), each[..., None]], -1)
        log_p = log_p.clamp_min(math.log(torch.finfo(torch.float32).tiny)) / temperature
        log_count = torch.zeros_like(log_p)
        log_count[..., -1] = math.log(self.others) if self.others else -math.inf
        return log_p - (log_p + log_count).logsumexp(-1, keepdim=True)

    def spread(self) -> Tensor:
        """[..., C]"""
        p = self.log_parts(1).exp()
        return (
            p[..., -1:]
            .expand(*p.shape[:-1], self.num_classes)
            .scatter(-1, self.indices, p[..., :-1])
        )

    def softened(self, temperature: float) -> tuple[Targets, Tensor]:
        """soften of these, rows [B, k], as Targets, and sum p log p, [B]."""
        log_p = self.log_parts(temperature)
        p = log_p.exp()
        targets = Targets.of_top(self.indices, p[:, :-1], self.num_classes, p[:, -1] * self.others)
        negative_entropy = p * log_p
        negative_entropy[:, -1] *= self.others
        return targets, negative_entropy.sum(1)


def lazy_distillation_loss(
    student: LinearLogits,
    teacher: Tensor | TopKTargets,
    labels: Tensor,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = 0.0,
):
    """distillation_loss of one student whose logits are not held; teacher: [B, C], or what is kept of it.

    Raises ValueError at temperature inf: matching logits needs all of them.
    """
    if math.isinf(temperature):
        raise ValueError(
            "temperature inf matches logits, and a head that does not hold its logits cannot; "
            "use a finite temperature, of 20 say, or a plain linear head"
        )
    if isinstance(teacher, TopKTargets):
        targets, negative_entropy = teacher.softened(temperature)
    else:
        p = soften(to_float32(teacher), temperature)
        targets, negative_entropy = Targets(dense=p), torch.special.xlogy(p, p).sum(1)
    soft = (
        student.scale_by_temperature(temperature).cross_entropy(targets) + negative_entropy
    ).mean() * temperature**2
    if hard_weight == 0:
        return soft_weight * soft
    hard = student.cross_entropy(
        Targets.of_labels(labels, student.num_classes, label_smoothing)
    ).mean()
    return soft_weight * soft + hard_weight * hard


def distillation_loss(
    student_logits: Tensor,
    teacher_probabilities: Tensor,
    labels: Tensor,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = 0.0,
):
    """soft_weight T^2 KL(teacher_T || student_T) + hard_weight CE(labels, student).  Hinton et al. 2015, section 2.

    student_logits, teacher_probabilities: [K, B, C] (K = 1: plain distillation; member k learns teacher k, Tran et al.
    2020); labels: [B], -1 for unlabelled examples, which have no second term (it is divided by B all the same).  The
    first term is the KL itself, not the cross-entropy: it is zero when student equals teacher.  temperature = math.inf:
    its limit, matching_loss of the logits.
    """
    if student_logits.shape != teacher_probabilities.shape:
        raise ValueError(
            f"student {tuple(student_logits.shape)} and teacher {tuple(teacher_probabilities.shape)} differ in shape"
        )
    members, batch, _ = student_logits.shape
    if math.isinf(temperature):
        soft = matching_loss(student_logits, safe_log(teacher_probabilities))
    else:
        log_q = F.log_softmax(to_float32(student_logits) / temperature, dim=-1)
        p = soften(to_float32(teacher_probabilities), temperature)
        soft = F.kl_div(log_q, p, reduction="sum") / (members * batch) * temperature**2
    if hard_weight == 0:
        return soft_weight * soft
    return soft_weight * soft + hard_weight * hard_loss(student_logits, labels, label_smoothing)


def hard_loss(student_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each of K members, [K, B, C], with labels [B]; one of -1 adds 0, and the divisor stays K B."""
    members, batch, _ = student_logits.shape
    logits, every = to_float32(student_logits).flatten(0, 1), labels.repeat(members)
    total = F.cross_entropy(
        logits, every, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (members * batch)


def matching_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """||z - v||^2 / (2 C) of zero-mean logits [..., C], a mean over the rows: T^2 KL as T grows.

    Hinton et al. 2015, section 2.1 (eq. 4 is its gradient, (z - v) / C for each row).
    """
    # With z and v zero-mean, softmax(z / T)_i = (1 + z_i / T) / C + O(1 / T^2), likewise for v, and for p near q
    # KL(p || q) = sum (p - q)^2 / (2 q) + O(|p - q|^3) = sum ((v_i - z_i) / (C T))^2 C / 2 + O(1 / T^3).
    # Taking means away from z and v leaves the variance of z - v over the classes.
    return (to_float32(student_logits) - teacher_logits).var(-1, correction=0).mean() / 2


def dirichlet_kl(alpha: Tensor, beta: Tensor) -> Tensor:
    """KL( Dir(alpha) || Dir(beta) ), [B], of positive parameters [B, C], computed in float64 and returned in that.

    Malinin & Gales 2019, "Reverse KL-Divergence Training of Prior Networks".  Accurate to rounding, in value
    and gradient, for parameters from 1e-150 (where digamma's own slope overflows) up to 1e300 / C.
    """
    alpha, beta = alpha.double(), beta.double()
    total = alpha.sum(-1)
    # ln G(a0) - sum ln G(a_i) + sum a_i (psi(a_i) - psi(a0)), a0 = sum a_i, is a difference of numbers of size
    # a log a.  With h(x) = ln G(x) - x psi(x) + x it is h(a0) - sum h(a_i), of size log a, as the x cancel.
    own = entropic(total) - entropic(alpha).sum(-1)
    other = torch.lgamma(beta).sum(-1) - torch.lgamma(beta.sum(-1))
    return own + other + (beta * (torch.digamma(total)[..., None] - torch.digamma(alpha))).sum(-1)


def entropic(x: Tensor) -> Tensor:
    """h(x) = ln Gamma(x) - x psi(x) + x in float64, without its cancellation: about -log(x) / 2 for large x."""
    # Stirling's series for ln Gamma and psi; the first term left out, x^-7 / 210, is below 1e-15 from here on.
    start = 64.0
    low, high = (
        x.clamp_max(start),
        x.clamp_min(start),
    )  # each branch sees only its own arguments: no nan in gradients
    near = torch.lgamma(low) - low * torch.digamma(low) + low
    inverse = 1 / high
    series = inverse * (1 / 6 - inverse**2 * (1 / 90 - inverse**2 / 210))
    far = (math.log(2 * math.pi) + 1 - high.log()) / 2 + series
    return torch.where(x < start, near, far)


def prior_network_loss(logits: Tensor, labels: Tensor, concentration: float = 1e3) -> Tensor:
    """Reverse KL( Dir(exp(logits)) || Dir(1 + concentration onehot(label)) ), a mean over B.  Malinin & Gales 2019.

    logits: [B, C].  labels: [B], each a class.  Computed in float64, finite for logits from -345 to 690; the loss
    itself grows like exp(-logit) for a class that is thought impossible, which float32 cannot hold below -88.
    """
    target = torch.ones_like(logits, dtype=torch.float64)
    target.scatter_(1, labels[:, None], 1 + concentration)
    return dirichlet_kl(logits.double().exp(), target).mean().to(to_float32(logits).dtype)


def gaussian_kl(
    teacher_mean: Tensor, teacher_log_var: Tensor, student_mean: Tensor, student_log_var: Tensor
) -> Tensor:
    """KL( N(teacher) || N(student) ) of independent outputs, the loss of Hydra's regression (Tran et al. 2020).

    All [K, B, D], natural logs of variances: summed over the D outputs, a mean over members and batch.
    """
    shapes = [
        tuple(part.shape) for part in (teacher_mean, teacher_log_var, student_mean, student_log_var)
    ]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(
            f"teacher's and student's means and log variances {shapes} must all be of one shape [K, B, D]"
        )
    ratio = to_float32(teacher_log_var) - to_float32(student_log_var)
    square = (to_float32(teacher_mean) - to_float32(student_mean)).square() * (
        -to_float32(student_log_var)
    ).exp()
    return (torch.expm1(ratio) - ratio + square).sum(-1).mean() / 2
