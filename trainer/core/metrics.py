"""Metrics of predictions: pure functions.  n examples, C classes, K members."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from networks.full_precision import full_precision

ECE_BINS = 15
LEAST_PROBABILITY = 1e-30  # of the true class, in nll


def summarise(
    labels: ArrayLike,
    top5: ArrayLike,
    top5_probability: ArrayLike,
    label_probability: ArrayLike,
    squared_error: ArrayLike,
) -> dict[str, float]:
    """The metrics of one row of results.json.

    Parameters
    ----------
    labels : int array [n]
    top5 : int array [n, 5]
        The most probable classes, most probable first.
    top5_probability : array [n, 5]
    label_probability : array [n]
        Of the true class.
    squared_error : array [n]
        Sum over classes of (p - y)^2, the usual Brier score, 0 to 2.  (Tran et al. 2020 print
        sum p^2 - 2 p_y, which is one less.)

    Returns
    -------
    dict
        n, top1, top5, nll (in nats), brier, ece, and macro_top1, the mean over the classes that
        occur of each one's accuracy.
    """
    labels = np.asarray(labels)
    top5 = np.asarray(top5)
    correct = top5[:, 0] == labels
    class_counts = np.bincount(labels)
    class_correct = np.bincount(labels, weights=correct, minlength=len(class_counts))
    occurs = class_counts > 0
    bins = reliability(np.asarray(top5_probability)[:, 0], correct)
    label_probability = np.asarray(label_probability, np.float64)
    log_p = np.log(np.maximum(label_probability, LEAST_PROBABILITY))
    return {
        "n": int(len(labels)),
        "top1": float(correct.mean()),
        "top5": float((top5 == labels[:, None]).any(axis=1).mean()),
        "nll": float(0.0 - log_p.mean()),  # 0 - x, since -x would print -0.0
        "brier": float(np.asarray(squared_error, np.float64).mean()),
        "ece": expected_calibration_error(bins),
        "macro_top1": float((class_correct[occurs] / class_counts[occurs]).mean()),
    }


def reliability(
    confidence: ArrayLike, correct: ArrayLike, bins: int = ECE_BINS
) -> list[dict[str, float]]:
    """How confident, and how often correct, in equal-width bins (lo, hi] of the top probability.

    Guo et al. 2017, "On Calibration of Modern Neural Networks".

    Parameters
    ----------
    confidence : array [n]
        The probability of each example's most probable class.
    correct : bool array [n]
    bins : int

    Returns
    -------
    list of dict
        lo, hi, count, confidence, accuracy of each bin.
    """
    rows = by_confidence(confidence, correct, bins)
    for row in rows:
        row["accuracy"] = row.pop("value")
    return rows


def by_confidence(
    confidence: ArrayLike, value: ArrayLike, bins: int = ECE_BINS
) -> list[dict[str, float]]:
    """The mean of `value` [n] in equal-width bins (lo, hi] of `confidence` [n].

    Returns lo, hi, count and the means `confidence` and `value` of each bin.  Both means are 0 in
    an empty bin.
    """
    confidence = np.asarray(confidence, np.float64)
    value = np.asarray(value, np.float64)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)

    def means(values: np.ndarray) -> np.ndarray:
        return np.bincount(index, weights=values, minlength=bins) / np.maximum(count, 1)

    mean_confidence, mean_value = means(confidence), means(value)
    return [
        {
            "lo": b / bins,
            "hi": (b + 1) / bins,
            "count": int(count[b]),
            "confidence": float(mean_confidence[b]),
            "value": float(mean_value[b]),
        }
        for b in range(bins)
    ]


def expected_calibration_error(bins: list[dict[str, float]]) -> float:
    """sum over the bins of `reliability` of n_b / n |accuracy - confidence|.

    Guo et al. 2017, eq. 3.
    """
    total = sum(b["count"] for b in bins)
    return sum(b["count"] / total * abs(b["accuracy"] - b["confidence"]) for b in bins)


@full_precision
def model_uncertainty(p: Tensor) -> Tensor:
    """H[mean_k p_k] - mean_k H[p_k] of p [K, n, C]: [n] nats, the information that members add.

    It is the mutual information of class and member: 0 where all members agree, at most log K.
    Tran et al. 2020 average it over the data.
    """
    total = torch.zeros(p.shape[1], dtype=torch.float64, device=p.device)
    for part in _class_blocks(p):
        # With p = m (1 + x), m the mean: p log(p / m) - p + m = m ((1 + x) log(1 + x) - x), which
        # is small where members agree, and p - m adds up to 0.  A difference of entropies would
        # be of numbers of size 1, whose float32 has no digit left at 1e-7.
        mean = part.mean(0)
        x = torch.where(mean > 0, (part - mean) / mean, 0.0)
        # Where p is 0, and x -1, the product is 0 whatever finite logarithm stands there.
        excess = (1 + x) * x.clamp_min(-1 + 2**-24).log1p() - x
        total += (mean * excess).mean(0).sum(-1)
    return total.clamp_min(0).float()


@full_precision
def dirichlet_uncertainty(logits: Tensor) -> Tensor:
    """`model_uncertainty` of a Prior Network, of logits [n, C]: [n] nats.

    Its members are all draws of Dir(alpha), alpha = exp(logits).  With p = alpha / alpha_0 and
    alpha_0 = sum alpha it is H[p] + sum p (psi(alpha + 1) - psi(alpha_0 + 1)).  Malinin & Gales
    2018.  No finite logits overflow.
    """
    logits = logits.double()
    log_total = logits.logsumexp(-1, keepdim=True)
    p = (logits - log_total).exp()
    # With d(x) = psi(x + 1) - log x it is sum p (d(alpha) - d(alpha_0)): the logarithms cancel.
    excess = _digamma_excess(logits) - _digamma_excess(log_total)
    return (p * excess).sum(-1).clamp_min(0).float()


def _digamma_excess(log_x: Tensor) -> Tensor:
    """psi(x + 1) - log x in float64, about 1 / (2 x) for large x."""
    log_x = log_x.clamp_max(30)  # the difference is below 1e-13 there, and exp overflows at 709
    return torch.digamma(log_x.exp() + 1) - log_x


@full_precision
def pairwise_kl(log_p: Tensor) -> Tensor:
    """KL(p_j || p_k) of members' log-probabilities [K, n, C], a mean over the ordered pairs.

    Nam et al. 2021.  There are K (K - 1) pairs.

    Returns
    -------
    Tensor [n]
        In nats. inf where one member excludes a class that another does not.

    Raises
    ------
    ValueError
        For fewer than two members.
    """
    members = _at_least_two(log_p)
    total = torch.zeros(log_p.shape[1], dtype=torch.float64, device=log_p.device)
    for part in _class_blocks(log_p):
        # sum_{j, k} p_j (log p_j - log p_k) = K sum_j (p_j - mean p) (log p_j - mean log p), whose
        # factors are both small where members agree.
        p, mean = part.exp(), part.mean(0)
        excluded = mean.isinf()
        apart = torch.where(excluded, 0.0, part - mean)
        total += ((p - p.mean(0)) * apart).sum((0, -1))
        total += torch.where(excluded & (p.sum(0) > 0), torch.inf, 0.0).sum(-1)
    return (total / (members - 1)).clamp_min(0).float()


CLASSES_AT_ONCE = 2048  # sums are of so many float32 numbers, and in float64 over these


def _class_blocks(members: Tensor) -> tuple[Tensor, ...]:
    """[K, n, C] in parts of its classes, which are summed in float32 and fit in a cache."""
    return members.split(CLASSES_AT_ONCE, dim=-1)


def disagreement(p: Tensor) -> Tensor:
    """The fraction [n] of unordered pairs of members whose most probable classes differ.

    Parameters
    ----------
    p : Tensor [K, n, C]

    Raises
    ------
    ValueError
        For fewer than two members.
    """
    members = _at_least_two(p)
    votes = p.argmax(-1)
    differ = (votes[:, None] != votes[None]).sum((0, 1))  # each pair twice, none with itself
    return differ / (members * (members - 1))


def _at_least_two(members: Tensor) -> int:
    if len(members) < 2:
        raise ValueError(
            f"how far members differ needs two or more of them; there is {len(members)}"
        )
    return len(members)


def deep_ensemble_equivalent(nll: float, nlls: Sequence[float]) -> float:
    """The size of the deep ensemble that would be as good (DEE).

    It is the smallest real number >= 1 at which the line through (1, nlls[0]), (2, nlls[1]), ... is
    down to nll.  So 1 is a single network or worse, and math.inf is better than every size.  Where
    a further member happened to hurt, the line's first descent counts.

    Parameters
    ----------
    nll : float
        Of the model in question.
    nlls : sequence of float
        nlls[m - 1] is the NLL of a deep ensemble of m members.  All NLLs are after temperature
        scaling on validation data.

    Raises
    ------
    ValueError
        For no sizes, or an NLL that is not a number.

    References
    ----------
    Ashukha et al. 2020, "Pitfalls of In-Domain Uncertainty Estimation and Ensembling in Deep
    Learning".
    """
    if not len(nlls) or any(math.isnan(value) for value in (nll, *nlls)):
        raise ValueError(
            f"a deep ensemble equivalent needs NLLs; nll = {nll}, deep ensembles {list(nlls)}"
        )
    if nll >= nlls[0]:
        return 1.0
    for size, (before, after) in enumerate(zip(nlls, nlls[1:], strict=False), start=1):
        if after <= nll:
            # before > nll, or an earlier size would have been enough.
            return size + (before - nll) / (before - after)
    return math.inf


def format_equivalent(equivalent: float, largest: int) -> str:
    """A `deep_ensemble_equivalent` among ensembles of up to `largest` members: "2.74", or ">4"."""
    return f">{largest}" if math.isinf(equivalent) else f"{equivalent:.2f}"


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """The chance that an example of `inside` scores higher than one of `outside`.

    Ties count half.  It is the area under the ROC curve, as the Mann-Whitney U of the two / (n m).

    Parameters
    ----------
    inside : array [n]
        Scores that are higher the more in-distribution an input looks.
    outside : array [m]
        The same of out-of-distribution inputs.

    Raises
    ------
    ValueError
        If either is empty or has a score that is not a number.
    """
    inside = np.asarray(inside, np.float64)
    outside = np.sort(np.asarray(outside, np.float64))
    missing = int(np.isnan(inside).sum() + np.isnan(outside).sum())
    if not len(inside) or not len(outside) or missing:
        raise ValueError(
            f"AUROC needs numbers on both sides: {len(inside)} inside, {len(outside)} outside, "
            f"{missing} not a number"
        )
    below = np.searchsorted(outside, inside, "left")
    up_to = np.searchsorted(outside, inside, "right")
    return float((below + up_to).mean() / (2 * len(outside)))
