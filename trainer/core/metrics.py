"""What a network is eval_model by: pure functions of predictions.  n examples, C classes, K members."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ECE_BINS = 15


def summarise(labels, top5, top5_probability, label_probability, squared_error) -> dict[str, float]:
    """The figures of one row.

    labels: [n].  top5: [n, 5], most probable class first.  top5_probability: [n, 5].  label_probability: [n], of the
    true class.  squared_error: [n], sum over classes of (p - y)^2, the usual Brier score, 0 to 2 (Tran et al. 2020
    print sum p^2 - 2 p_y, which is one less).  nll is in nats.
    """
    labels, top5 = np.asarray(labels), np.asarray(top5)
    right = top5[:, 0] == labels
    seen = np.bincount(labels)
    hits = np.bincount(labels, weights=right, minlength=len(seen))
    bins = reliability(np.asarray(top5_probability)[:, 0], right)
    return {
        "n": int(len(labels)),
        "top1": float(right.mean()),
        "top5": float((top5 == labels[:, None]).any(axis=1).mean()),
        "nll": float(-np.log(np.maximum(np.asarray(label_probability, np.float64), 1e-30)).mean()),
        "brier": float(np.asarray(squared_error, np.float64).mean()),
        "ece": expected_calibration_error(bins),
        "macro_top1": float((hits[seen > 0] / seen[seen > 0]).mean()),
    }


def reliability(confidence, right, bins: int = ECE_BINS) -> list[dict[str, float]]:
    """Equal-width bins (lo, hi] on the top probability: how confident, and how often right (Guo et al. 2017)."""
    rows = by_confidence(confidence, right, bins)
    return [
        {"accuracy" if key == "value" else key: number for key, number in row.items()}
        for row in rows
    ]


def by_confidence(confidence, value, bins: int = ECE_BINS) -> list[dict[str, float]]:
    """The mean of value [n] in equal-width bins (lo, hi] of confidence [n], each beside its mean confidence.

    Both means are 0 in an empty bin, whose count is 0.
    """
    confidence, value = np.asarray(confidence, np.float64), np.asarray(value, np.float64)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    mean = [
        np.bincount(place, weights=each, minlength=bins) / np.maximum(count, 1)
        for each in (confidence, value)
    ]
    return [
        {
            "lo": b / bins,
            "hi": (b + 1) / bins,
            "count": int(count[b]),
            "confidence": float(mean[0][b]),
            "value": float(mean[1][b]),
        }
        for b in range(bins)
    ]


def expected_calibration_error(bins: list[dict[str, float]]) -> float:
    """sum over bins of n_b / n |accuracy - confidence| (Guo et al. 2017, eq. 3)."""
    total = sum(b["count"] for b in bins)
    return sum(b["count"] / total * abs(b["accuracy"] - b["confidence"]) for b in bins)


def model_uncertainty(p: Tensor) -> Tensor:
    """H[mean_k p_k] - mean_k H[p_k] of p [K, n, C]: [n] nats, 0 where all members agree, at most log K.

    The mutual information of class and member.  Tran et al. 2020, who average it over the data.
    """
    p = p.double()  # figures of 1e-5 are differences of entropies of size 1
    return (
        (torch.special.entr(p.mean(0)) - torch.special.entr(p).mean(0)).sum(-1).clamp_min(0).float()
    )


def dirichlet_uncertainty(logits: Tensor) -> Tensor:
    """The same of a Prior Network, whose members are all draws of Dir(alpha), alpha = exp(logits [n, C]): [n] nats.

    H[p] + sum p (psi(alpha + 1) - psi(alpha_0 + 1)) with p = alpha / alpha_0, alpha_0 = sum alpha.  Malinin & Gales
    2018.  No finite logits overflow.
    """
    logits = logits.double()
    log_total = logits.logsumexp(-1, keepdim=True)
    p = (logits - log_total).exp()
    # With d(x) = psi(x + 1) - log x it is sum p (d(alpha) - d(alpha_0)): the logarithms have cancelled.
    return (p * (_digamma_excess(logits) - _digamma_excess(log_total))).sum(-1).clamp_min(0).float()


def _digamma_excess(log_x: Tensor) -> Tensor:
    """psi(x + 1) - log x in float64, about 1 / (2 x) for large x."""
    log_x = log_x.clamp_max(30)  # the difference is below 1e-13 there, and exp overflows at 709
    return torch.digamma(log_x.exp() + 1) - log_x


def pairwise_kl(log_p: Tensor) -> Tensor:
    """KL(p_j || p_k) of members' log-probabilities [K, n, C], a mean over the K (K - 1) ordered pairs: [n] nats.

    Nam et al. 2021.  inf where one member excludes a class that another does not.
    Raises ValueError for fewer than two members.
    """
    members = _at_least_two(log_p)
    log_p = log_p.double()
    p = log_p.exp()
    # sum_{j, k} sum_c p_j (log p_j - log p_k), j = k adding 0, without a tensor of all pairs.
    own = members * -torch.special.entr(p).sum(0)
    crossed = torch.where(
        p.sum(0) > 0, p.sum(0) * log_p.sum(0), 0.0
    )  # 0 of a class that nobody thinks possible
    return ((own - crossed).sum(-1) / (members * (members - 1))).clamp_min(0).float()


def disagreement(p: Tensor) -> Tensor:
    """The share of unordered pairs of members whose most probable classes differ, of p [K, n, C]: [n].

    Raises ValueError for fewer than two members.
    """
    members, votes = _at_least_two(p), p.argmax(-1)
    differ = (votes[:, None] != votes[None]).sum((0, 1))  # each pair twice, none with itself
    return differ / (members * (members - 1))


def _at_least_two(members: Tensor) -> int:
    if len(members) < 2:
        raise ValueError(
            f"how far members differ needs two or more of them; there is {len(members)}"
        )
    return len(members)


def deep_ensemble_equivalent(nll: float, nlls: Sequence[float]) -> float:
    """The size of the deep ensemble that would be as good: nlls[m - 1] is the NLL of m members, nll that to be placed.

    All after temperature scaling on validation data.  The smallest size >= 1, a real number, at which the line through
    (1, nlls[0]), (2, nlls[1]), ... is down to nll (DEE, Ashukha et al. 2020).  So 1 is a single network or worse,
    math.inf is better than every size, and where a further member happened to hurt, the line's first descent counts.
    Raises ValueError for no sizes, or a figure that is not a number.
    """
    if not len(nlls) or any(math.isnan(each) for each in (nll, *nlls)):
        raise ValueError(
            f"a deep ensemble equivalent needs NLLs; nll = {nll}, deep ensembles {list(nlls)}"
        )
    if nll >= nlls[0]:
        return 1.0
    for size, (before, after) in enumerate(zip(nlls, nlls[1:], strict=False), start=1):
        if after <= nll:
            return size + (before - nll) / (
                before - after
            )  # before > nll, or an earlier size had been enough
    return math.inf


def format_equivalent(equivalent: float, largest: int) -> str:
    """A deep_ensemble_equivalent among ensembles of up to `largest` members: "2.74", or ">4" beyond them."""
    return f">{largest}" if math.isinf(equivalent) else f"{equivalent:.2f}"


def auroc(inside, outside) -> float:
    """The chance that an example of `inside` scores higher than one of `outside`, ties counting half.

    inside: [n], outside: [m], scores that are higher the more in-distribution an input looks.  The area under the ROC
    curve, as the Mann-Whitney U of the two / (n m).
    Raises ValueError if either is empty or has a score that is not a number.
    """
    inside, outside = np.asarray(inside, np.float64), np.sort(np.asarray(outside, np.float64))
    if not len(inside) or not len(outside) or np.isnan(inside).any() or np.isnan(outside).any():
        missing = int(np.isnan(inside).sum() + np.isnan(outside).sum())
        raise ValueError(
            f"AUROC needs numbers on both sides: {len(inside)} inside, {len(outside)} outside, {missing} not a number"
        )
    below, up_to = (np.searchsorted(outside, inside, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(outside)))
