"""Losses of a teacher's targets: pure functions of tensors, each a mean over the batch.

B batch, C classes, K members of a student or a teacher, k classes that stored targets keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ensemble.listed import Listed
from networks.gathered_rows import top_k
from networks.linear_logits import LinearLogits, Targets

from .probabilities import safe_log, soften, to_float32


class LogitTargets(NamedTuple):
    """A teacher's logits [..., C], each row up to a constant.

    One softmax makes them targets at any temperature.
    """

    logits: Tensor

    def softened(self, temperature: float) -> Tensor:
        """The probabilities [..., C] at a temperature."""
        return F.softmax(_divided(to_float32(self.logits), temperature), dim=-1)


def distillation_loss(
    student_logits: Tensor,
    teacher: Tensor | LogitTargets,
    labels: Tensor,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = 0.0,
    wrong_weight: float = 0.0,
) -> Tensor:
    """soft_weight T^2 KL(teacher_T || student_T) + hard_weight CE(labels, student).

    The first term is the KL itself, not the cross-entropy: it is zero when student equals teacher.

    Parameters
    ----------
    student_logits : Tensor [K, B, C]
    teacher : Tensor [K, B, C] or LogitTargets of as many
        Probabilities, or logits up to a constant of each row.  K = 1 is plain distillation.
        Otherwise member k learns from teacher k (Tran et al. 2020).
    labels : int64 Tensor [B]
        -1 for unlabelled examples.  They add nothing to the second term, which is divided by B all
        the same.
    temperature : float
        T. math.inf is the limit, `matching_loss` of the logits.
    soft_weight, hard_weight, label_smoothing : float
    wrong_weight : float
        Where the teacher's likeliest class is not the label, so much of soft_weight goes from the
        first term to the second: 1 learns such an example from its label alone.

    Raises
    ------
    ValueError
        Where student and teacher differ in shape.

    References
    ----------
    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    Tran et al. 2020, "Hydra: Preserving Ensemble Diversity for Model Distillation".
    """
    values = teacher.logits if isinstance(teacher, LogitTargets) else teacher
    if student_logits.shape != values.shape:
        raise ValueError(
            f"student {tuple(student_logits.shape)} and teacher {tuple(values.shape)} "
            "differ in shape"
        )
    if wrong_weight:
        soft = soft_losses(student_logits, teacher, temperature)
        hard = hard_losses(student_logits, labels, label_smoothing)
        moved = soft_weight * wrong_weight * is_wrong(values, labels)
        return ((soft_weight - moved) * soft + (hard_weight + moved) * hard).mean()
    soft = soft_loss(student_logits, teacher, temperature)
    if hard_weight == 0:
        return soft_weight * soft
    return soft_weight * soft + hard_weight * hard_loss(student_logits, labels, label_smoothing)


def soft_loss(student_logits: Tensor, teacher: Tensor | LogitTargets, temperature: float) -> Tensor:
    """The mean of `soft_losses`."""
    if math.isinf(temperature) or isinstance(teacher, LogitTargets):
        return soft_losses(student_logits, teacher, temperature).mean()
    members, batch, _ = student_logits.shape
    log_q = F.log_softmax(to_float32(student_logits) / temperature, dim=-1)
    p = soften(to_float32(teacher), temperature)
    return F.kl_div(log_q, p, reduction="sum") / (members * batch) * temperature**2


def soft_losses(
    student_logits: Tensor, teacher: Tensor | LogitTargets, temperature: float
) -> Tensor:
    """T^2 KL(teacher_T || student_T) of each row, [K, B]. `matching_losses` at T = inf."""
    z = to_float32(student_logits)
    if not isinstance(teacher, LogitTargets):
        teacher = LogitTargets(safe_log(teacher))
    if math.isinf(temperature):
        return matching_losses(z, teacher.logits)
    v = to_float32(teacher.logits)
    kl = kl_of_logits(_divided(v, temperature), _divided(z, temperature))
    return kl * temperature**2


def is_wrong(teacher: Tensor, labels: Tensor) -> Tensor:
    """1 where the largest of a teacher's values [..., B, C] is not the label's, else 0, [..., B].

    Unlabelled rows (-1) count as right.
    """
    return ((teacher.argmax(-1) != labels) & (labels >= 0)).float()


def hard_loss(student_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each of K members [K, B, C] with labels [B].

    A label of -1 adds 0, and the divisor stays K B.
    """
    members, batch, _ = student_logits.shape
    total = F.cross_entropy(
        to_float32(student_logits).flatten(0, 1),
        labels.repeat(members),
        ignore_index=-1,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / (members * batch)


def hard_losses(student_logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of each row, [K, B]."""
    members, batch, _ = student_logits.shape
    each = F.cross_entropy(
        to_float32(student_logits).flatten(0, 1),
        labels.repeat(members),
        ignore_index=-1,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return each.view(members, batch)


def kl_of_logits(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) of each row [..., C], [...].

    Differentiable in the student's logits.  It holds two [..., C] tensors beside the logits, where
    softmax, log_softmax and kl_div together hold five: at 256 x 26,386 on a CPU core a training
    step takes .7 of the time.
    """
    return _KLOfLogits.apply(teacher_logits, student_logits)


class _KLOfLogits(torch.autograd.Function):
    """The gradient, q - p, is made with the value."""

    @staticmethod
    def forward(ctx: Any, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        log_p = F.log_softmax(teacher_logits, -1)
        log_q = F.log_softmax(student_logits, -1)
        p = log_p.exp()
        kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(log_q.exp_().sub_(p))
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        (difference,) = ctx.saved_tensors
        return None, difference * gradients[0][..., None]


def _divided(logits: Tensor, temperature: float) -> Tensor:
    """logits / T. At T = 1 the logits themselves, without a copy."""
    return logits if temperature == 1 else logits / temperature


def matching_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The mean of `matching_losses` over the rows."""
    return matching_losses(student_logits, teacher_logits).mean()


def matching_losses(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """||z - v||^2 / (2 C) of zero-mean logits [..., C], [...]: T^2 KL as T grows.

    Hinton et al. 2015, section 2.1 (eq. 4 is its gradient, (z - v) / C for each row).
    """
    # With z and v zero-mean, softmax(z / T)_i = (1 + z_i / T) / C + O(1 / T^2), likewise for v, and
    # for p near q
    #     KL(p || q) = sum (p - q)^2 / (2 q) + O(|p - q|^3)
    #                = sum ((v_i - z_i) / (C T))^2 C / 2 + O(1 / T^3).
    # Taking means away from z and v leaves the variance of z - v over the classes.
    return (to_float32(student_logits) - teacher_logits).var(-1, correction=0) / 2


class TopKTargets(NamedTuple):
    """Probabilities [..., C] as they are stored: the k largest, and the mass of the rest.

    indices     int64 [..., k]  the classes of the k largest, distinct in a row
    log_values  [..., k]        log p of these
    log_tail    [...]           log of the mass of the other C - k classes, spread evenly over them
    counts      int64 [...]     where rows keep different numbers of classes: how many of the k are
                                a row's own, at least 1. Behind them is padding, of any class and
                                of log -inf.  None where all rows keep k

    Logarithms, because a tail of 1e-9 is lost in 1 - sum of values but says much at a high
    temperature.  Rows are normalised where they are read: logs kept in float16 sum to 1 only to
    about 1e-3.
    """

    indices: Tensor
    log_values: Tensor
    log_tail: Tensor
    num_classes: int
    counts: Tensor | None = None

    @classmethod
    def of(cls, log_probabilities: Tensor, k: int) -> TopKTargets:
        """The k largest of log p [..., C], and the tail."""
        num_classes = log_probabilities.shape[-1]
        top = to_float32(log_probabilities).topk(min(k, num_classes), dim=-1)
        others = to_float32(log_probabilities).scatter(-1, top.indices, -torch.inf)
        return cls(top.indices, top.values, others.logsumexp(-1), num_classes)

    @classmethod
    def holding(
        cls,
        log_probabilities: Tensor,
        mass: float,
        temperature: float = 1.0,
        least: int = 1,
        most: int | None = None,
    ) -> TopKTargets:
        """Keep as many of the largest of log p [..., C] as hold `mass` of p at a temperature.

        At least `least` classes and at most `most`.  A higher temperature needs more classes for
        the same mass, and inf needs its share of all of them.
        """
        log_p = to_float32(log_probabilities)
        num_classes = log_p.shape[-1]
        most = min(num_classes, most or num_classes)
        least = min(least, most)
        values, indices = top_k(log_p.flatten(0, -2), most)
        values, indices = (each.unflatten(0, log_p.shape[:-1]) for each in (values, indices))

        def log_sum(T: float) -> Tensor:
            return _divided(log_p, T).logsumexp(-1)

        counts = _counts_holding(log_sum, num_classes, values, mass, temperature)
        values, indices, counts = _cut(values, indices, counts.clamp(least, most))
        log_tail = log_p.scatter(-1, indices, -torch.inf).logsumexp(-1)
        return cls(indices, values, log_tail, num_classes, counts)

    @classmethod
    def holding_listed(
        cls, q: Listed, mass: float, temperature: float = 1.0, least: int = 1, most: int = 1
    ) -> TopKTargets:
        """`holding` of rows that list some classes, of which the likeliest `most` are among them.

        Of a finite temperature q has the sums at 1 / T.
        """
        values, places = top_k(q.z, min(most, q.values.shape[1]))
        most, least = values.shape[1], min(least, values.shape[1])

        def log_sum(T: float) -> Tensor:
            return q.log_sum(1 / T)

        counts = _counts_holding(log_sum, q.num_classes, values, mass, temperature)
        values, places, counts = _cut(values, places, counts.clamp(least, most))
        left = q.values.double().scatter(1, places, 0.0).sum(1) + q.tail
        return cls(
            q.indices.gather(1, places),
            values.float(),
            safe_log(left.float()),
            q.num_classes,
            counts,
        )

    @property
    def others(self) -> int | Tensor:
        """C - k. Where rows keep different numbers of classes each row's, [...]."""
        if self.counts is None:
            return self.num_classes - self.indices.shape[-1]
        return self.num_classes - self.counts

    @property
    def padding(self) -> Tensor | None:
        """bool [..., k]: entries that stand for no class."""
        if self.counts is None:
            return None
        columns = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return columns >= self.counts[..., None]

    def log_parts(self, temperature: float) -> Tensor:
        """log of the softened p, [..., k + 1]. -inf for padding.

        Last comes that of each single one of the other classes.
        """
        log_others = self._log_others()
        each = to_float32(self.log_tail) - log_others.clamp_min(0)
        log_p = torch.cat([to_float32(self.log_values), each[..., None]], -1)
        log_p = log_p.clamp_min(math.log(torch.finfo(torch.float32).tiny)) / temperature
        padding = self.padding
        if padding is not None:
            log_p[..., :-1].masked_fill_(padding, -torch.inf)
        log_count = torch.zeros_like(log_p)
        log_count[..., -1] = log_others
        return log_p - (log_p + log_count).logsumexp(-1, keepdim=True)

    def _log_others(self) -> Tensor:
        """log(C - k), -inf where no class is left, [...] or []."""
        like = to_float32(self.log_tail)
        others = self.others
        if isinstance(others, int):
            return torch.full((), others, dtype=torch.float64, device=like.device).log().to(like)
        return others.double().log().to(like)

    def spread(self) -> Tensor:
        """The probabilities [..., C], the tail evenly over the other classes."""
        p = self.log_parts(1).exp()
        tail = p[..., -1:].expand(*p.shape[:-1], self.num_classes)
        indices, values = self.indices, p[..., :-1]
        padding = self.padding
        if padding is not None:  # it writes the first class once more
            indices = torch.where(padding, indices[..., :1], indices)
            values = torch.where(padding, values[..., :1], values)
        return tail.scatter(-1, indices, values)

    def softened(self, temperature: float) -> tuple[Targets, Tensor]:
        """The softened rows [B, k] as Targets, and their sum of p log p, [B]."""
        log_p = self.log_parts(temperature)
        p = log_p.exp()
        negative_entropy = p * log_p
        negative_entropy[:, -1] *= self.others
        padding = self.padding
        if padding is None:
            targets = Targets.of_top(
                self.indices, p[:, :-1], self.num_classes, p[:, -1] * self.others
            )
            return targets, negative_entropy.sum(1)
        # Entries of Targets add up, so padding adds 0 to whatever class it names.
        above_tail = (p[:, :-1] - p[:, -1:]).masked_fill(padding, 0)
        negative_entropy[:, :-1].masked_fill_(padding, 0)
        targets = Targets(self.indices, above_tail, p[:, -1].clone())
        return targets, negative_entropy.sum(1)


def _cut(values: Tensor, indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values, indices, counts) of rows that keep the first `counts` of theirs, as TopKTargets."""
    width = int(counts.max()) if counts.numel() else 1
    padding = torch.arange(width, device=counts.device) >= counts[..., None]
    values = values[..., :width].masked_fill(padding, -torch.inf)
    indices = torch.where(padding, indices[..., :1], indices[..., :width])
    return values, indices, None if bool((counts == width).all()) else counts


def _counts_holding(
    log_sum: Callable[[float], Tensor],
    num_classes: int,
    largest: Tensor,
    mass: float,
    temperature: float,
) -> Tensor:
    """How many of the `largest` log p, in falling order, hold `mass` of p at T.

    log_sum: T -> log of the sum of p^(1 / T) over all classes, [...].  Returns int64 [...], 1 more
    than there are in `largest` where they hold less.
    """
    if mass >= 1:
        return torch.full_like(largest[..., 0], num_classes, dtype=torch.int64)
    if math.isinf(temperature):
        count = math.ceil(mass * num_classes)
        return torch.full_like(largest[..., 0], count, dtype=torch.int64)
    total = log_sum(temperature)[..., None]
    held = (_divided(largest, temperature) - total).exp().cumsum(-1)
    return 1 + (held < mass).sum(-1)


def lazy_distillation_loss(
    student: LinearLogits,
    teacher: Tensor | TopKTargets | LogitTargets,
    labels: Tensor,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = 0.0,
    wrong_weight: float = 0.0,
) -> Tensor:
    """`distillation_loss` of one student whose logits are never held as a whole.

    Parameters
    ----------
    student : LinearLogits
        Of B rows and C classes.
    teacher : Tensor [B, C], TopKTargets or LogitTargets
        Probabilities, what is stored of them, or logits.
    labels, temperature, soft_weight, hard_weight, label_smoothing, wrong_weight
        As in `distillation_loss`.

    Raises
    ------
    ValueError
        At temperature inf: matching logits needs all of them.
    """
    if math.isinf(temperature):
        raise ValueError(
            "temperature inf matches logits, and a head that does not hold its logits cannot; "
            "use a finite temperature, of 20 say, or a plain linear head"
        )
    if isinstance(teacher, TopKTargets):
        targets, negative_entropy = teacher.softened(temperature)
    else:
        if isinstance(teacher, LogitTargets):
            p = teacher.softened(temperature)
        else:
            p = soften(to_float32(teacher), temperature)
        targets = Targets(dense=p)
        negative_entropy = torch.special.xlogy(p, p).sum(1)
    soft_cross_entropy = student.scale_by_temperature(temperature).cross_entropy(targets)
    soft = soft_cross_entropy + negative_entropy
    if hard_weight == 0 and wrong_weight == 0:
        return soft_weight * (soft.mean() * temperature**2)
    hard_targets = Targets.of_labels(labels, student.num_classes, label_smoothing)
    hard = student.cross_entropy(hard_targets)
    if wrong_weight == 0:
        return soft_weight * (soft.mean() * temperature**2) + hard_weight * hard.mean()
    wrong = _favourites(teacher).ne(labels) & (labels >= 0)
    moved = soft_weight * wrong_weight * wrong.float()
    return ((soft_weight - moved) * soft * temperature**2 + (hard_weight + moved) * hard).mean()


def _favourites(teacher: Tensor | TopKTargets | LogitTargets) -> Tensor:
    """The likeliest class of each row, int64 [B]."""
    if isinstance(teacher, TopKTargets):
        best = teacher.log_values.argmax(-1, keepdim=True)
        return teacher.indices.gather(-1, best)[..., 0]
    values = teacher.logits if isinstance(teacher, LogitTargets) else teacher
    return values.argmax(-1)


def gaussian_kl(
    teacher_mean: Tensor, teacher_log_var: Tensor, student_mean: Tensor, student_log_var: Tensor
) -> Tensor:
    """KL( N(teacher) || N(student) ) of independent outputs, the loss of Hydra's regression.

    Parameters
    ----------
    teacher_mean, teacher_log_var, student_mean, student_log_var : Tensor [K, B, D]
        Means and natural logs of variances.

    Returns
    -------
    Tensor []
        Summed over the D outputs, a mean over members and batch.

    Raises
    ------
    ValueError
        Where the four are not of one shape [K, B, D].

    References
    ----------
    Tran et al. 2020, "Hydra: Preserving Ensemble Diversity for Model Distillation".
    """
    parts = (teacher_mean, teacher_log_var, student_mean, student_log_var)
    shapes = [tuple(part.shape) for part in parts]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(
            f"teacher's and student's means and log variances {shapes} must all be of one shape "
            "[K, B, D]"
        )
    student_precision = (-to_float32(student_log_var)).exp()
    log_ratio = to_float32(teacher_log_var) - to_float32(student_log_var)
    squares = (to_float32(teacher_mean) - to_float32(student_mean)).square() * student_precision
    return (torch.expm1(log_ratio) - log_ratio + squares).sum(-1).mean() / 2
