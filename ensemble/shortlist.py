"""Distributions joined by a generalised mean, over all classes or on each row's shortlist.

    K   networks, the generalist first
    B   rows of the batch
    C   classes
    k   classes of a row's shortlist: its k likeliest of the generalist's

Pure functions of log-probabilities, differentiable in them and in the weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from networks.full_precision import full_precision

ARITHMETIC, GEOMETRIC = 1.0, 0.0


@full_precision
def generalised_mean(
    log_p: Tensor, order: float = GEOMETRIC, weights: Tensor | Sequence[float] | None = None
) -> Tensor:
    """log q with q proportional to (sum_k w_k p_k^r)^(1 / r), and to prod_k p_k^(w_k) at r = 0.

    Order 1 is the arithmetic mean, order 0 the geometric mean, the limit of r -> 0.

    Parameters
    ----------
    log_p : Tensor [K, B, C]
        Log-probabilities. -inf is a probability of 0.
    order : float
        r, within [0, 1].
    weights : [K], optional
        Positive. Only their ratios matter.  None is all alike.

    Returns
    -------
    Tensor [B, C]
        log q, normalised.

    Raises
    ------
    ValueError
        For an order outside [0, 1], and for weights that are not K positive numbers.

    References
    ----------
    Razafindralambo, Sun, Precioso, Garreau and Mattei 2026, arXiv 2603.04204: no order outside
    [0, 1] is sure to be at least as good, in log-likelihood, as its members are on average.
    """
    check_order(order)
    w = _shares(log_p, weights)
    if order == ARITHMETIC:
        return (log_p + w.log()).logsumexp(0).log_softmax(-1)
    if order == GEOMETRIC:
        return (w * log_p).sum(0).log_softmax(-1)
    # Shifted by the largest, (1 / r) log sum w exp(r l) loses no digits however small r is.  The
    # shift cancels, and so has no gradient.
    largest = log_p.detach().amax(0)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    growth = (w * torch.expm1(order * (log_p - largest))).sum(0)
    return (largest + torch.log1p(growth) / order).log_softmax(-1)


@full_precision
def join_within(
    logits: Tensor,
    log_mass: Tensor,
    order: float = GEOMETRIC,
    weights: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """log q of the classes of a shortlist: the generalist's mass there, shared out by everybody.

    Each distribution is renormalised within the shortlist, and these are joined by the generalised
    mean.

    Parameters
    ----------
    logits : Tensor [K, B, k]
        Log-probabilities at the shortlist, each network's up to a constant of the row.
    log_mass : Tensor [B]
        The log of the generalist's probability of the whole shortlist.
    order, weights
        As in `generalised_mean`.

    Returns
    -------
    Tensor [B, k]
    """
    if order != GEOMETRIC:  # there, what is the same for all classes of a row cancels
        logits = logits.log_softmax(-1)
    return generalised_mean(logits, order, weights) + log_mass[:, None]


@full_precision
def join_on_shortlist(
    log_p_general: Tensor,
    indices: Tensor,
    log_p_members: Tensor,
    order: float = GEOMETRIC,
    weights: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """log q [B, C]: joined within the shortlist, and the generalist's own outside of it.

    With k = C it is `generalised_mean`.

    Parameters
    ----------
    log_p_general : Tensor [B, C]
    indices : Tensor int64 [B, k]
        The shortlist: distinct classes of each row.
    log_p_members : Tensor [K - 1, B, k]
        The other networks' at the shortlist, each up to a constant of the row.
    order, weights
        As in `generalised_mean`. The generalist's weight first.

    Returns
    -------
    Tensor [B, C]
    """
    own = log_p_general.gather(1, indices)
    logits = torch.cat([own[None], log_p_members])
    joined = join_within(logits, own.logsumexp(1), order, weights)
    return log_p_general.scatter(1, indices, joined)


def check_order(order: float) -> None:
    """ValueError for an order that the generalised mean does not have."""
    if not 0 <= order <= 1:
        raise ValueError(
            f"order = {order}; a generalised mean needs 0 (geometric) to 1 (arithmetic)"
        )


def check_weights(weights: Sequence[float], count: int) -> None:
    """ValueError for weights that are not `count` positive numbers."""
    if len(weights) != count or not all(0 < float(w) < float("inf") for w in weights):
        raise ValueError(
            f"weights = {[float(w) for w in weights]}; {count} positive numbers are needed, "
            "one for each network"
        )


def _shares(log_p: Tensor, weights: Tensor | Sequence[float] | None) -> Tensor:
    """The weights with sum 1, [K, 1, 1]."""
    count = len(log_p)
    if weights is None:
        shares = log_p.new_full((count,), 1 / count)
    elif isinstance(weights, Tensor):
        shares = weights.to(log_p) / weights.sum().to(log_p)
    else:
        check_weights(weights, count)
        total = sum(weights)
        shares = log_p.new_tensor([float(w) / total for w in weights])
    return shares.view(-1, *[1] * (log_p.dim() - 1))
