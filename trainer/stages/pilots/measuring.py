"""What pilots are measured by: pure functions of a batch's predictions, and of losses.

    b   rows of a batch
    n   examples
    C   classes

Whatever is fitted on val is cross-fitted: on one half of the examples, and measured on the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ensemble.fitting import TEMPERATURES, WEIGHTS
from ensemble.shortlist import ARITHMETIC, generalised_mean, join_within
from networks import top_k
from pipeline.results.paired import mean_and_error


class Join(NamedTuple):
    """How a network is joined to the generalist.

    network    its name
    order      of the mean, as in `generalised_mean`
    shortlist  over so many of the generalist's likeliest classes. None is all
    """

    network: str
    order: float
    shortlist: int | None = None


def losses_at_temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """- log softmax(logits / T)[label] of logits [b, C] at each T of TEMPERATURES, [b, T]."""
    of_label = logits.gather(1, labels[:, None])[:, 0]
    columns = [(logits / T).logsumexp(1) - of_label / T for T in TEMPERATURES]
    return torch.stack(columns, 1)


def joined(join: Join, own: Tensor, other: Tensor, weight: float) -> Tensor:
    """log q [b, C] of the generalist's log-probabilities and another network's.

    weight: the other's, where the generalist's is 1.
    """
    weights = [1.0, weight]
    if join.shortlist is None:
        return generalised_mean(torch.stack([own, other]), join.order, weights)
    indices, listed = on_shortlist(join.shortlist, own, other)
    inside = join_within(listed, listed[0].logsumexp(1), join.order, weights)
    return own.scatter(1, indices, inside)


def losses_at_weights(join: Join, own: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """- log q[label] of `joined` at each of WEIGHTS, [b, W]. Own, other: [b, C]."""
    if join.shortlist is None and join.order == ARITHMETIC:
        # A linear pool sums to 1 as it is, so that the label's probabilities are enough.
        both = torch.stack([each.gather(1, labels[:, None])[:, 0] for each in (own, other)])
        shares = [both.new_tensor([[1.0], [w]]) / (1 + w) for w in WEIGHTS]
        return -torch.stack([(both + share.log()).logsumexp(0) for share in shares], 1)
    if join.shortlist is None:
        log_q = [joined(join, own, other, w).gather(1, labels[:, None])[:, 0] for w in WEIGHTS]
        return -torch.stack(log_q, 1)
    indices, listed = on_shortlist(join.shortlist, own, other)
    log_mass = listed[0].logsumexp(1)
    hits = indices == labels[:, None]
    column = hits.int().argmax(1, keepdim=True)
    outside = own.gather(1, labels[:, None])[:, 0]
    log_q = []
    for w in WEIGHTS:
        inside = join_within(listed, log_mass, join.order, [1.0, w]).gather(1, column)[:, 0]
        log_q.append(torch.where(hits.any(1), inside, outside))
    return -torch.stack(log_q, 1)


def on_shortlist(size: int, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(the generalist's likeliest classes int64 [b, k], both log-probabilities there [2, b, k])."""
    listed, indices = top_k(own, min(size, own.shape[1]))
    return indices, torch.stack([listed, other.gather(1, indices)])


def of_examples(log_q: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """For each row of log-probabilities [b, C]: is it right, log q[label], Brier's sum.

    brier: sum over classes of (q - y)^2, 0 to 2.
    """
    of_label = log_q.gather(1, labels[:, None])[:, 0]
    squares = (2 * log_q).exp().sum(1)
    return {
        "correct": log_q.argmax(1) == labels,
        "log_p": of_label,
        "brier": squares - 2 * of_label.exp() + 1,
    }


def residual_product(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """<y - p, y - q> of each row, [b], with y the label as a distribution."""
    p_label = log_p.gather(1, labels[:, None])[:, 0].exp()
    q_label = log_q.gather(1, labels[:, None])[:, 0].exp()
    return 1 - p_label - q_label + (log_p + log_q).exp().sum(1)


def residual_correlation(products: np.ndarray, brier: np.ndarray, other: np.ndarray) -> float:
    """How alike two predictors err: mean <y - p, y - q> / sqrt(mean |y - p|^2 mean |y - q|^2).

    The means are over examples, so that each counts by how wrong it is.  1 of two predictors that
    err alike everywhere, 0 of residuals that are orthogonal on average. 0 where one never errs.

    Parameters
    ----------
    products : array [n]
        <y - p, y - q> of each example, as in `residual_product`.
    brier, other : array [n]
        |y - p|^2 and |y - q|^2, the Brier sums of the two.
    """
    size = math.sqrt(brier.mean(dtype=np.float64) * other.mean(dtype=np.float64))
    if size == 0:
        return 0.0
    return float(products.mean(dtype=np.float64)) / size


def form_metrics(
    correct: np.ndarray, log_p: np.ndarray, brier: np.ndarray, reference: np.ndarray
) -> dict[str, float]:
    """What measured.json says of one form.

    Parameters
    ----------
    correct, reference : bool array [n]
        Whether the form, and the generalist, is right.
    log_p, brier : array [n]
        Of the label, and the sum over classes.

    Returns
    -------
    dict
        top1, nll in nats, brier, the gain in top-1 over the generalist as a fraction, and gain_se,
        the standard error of the paired difference.
    """
    gain, error = mean_and_error(correct.astype(float) - reference.astype(float))
    return {
        "top1": float(correct.mean()),
        "nll": float(0.0 - log_p.mean(dtype=np.float64)),
        "brier": float(brier.mean(dtype=np.float64)),
        "gain": gain,
        "gain_se": error,
    }
