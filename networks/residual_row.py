"""One linear row for the log-sum-exp of many classes: what a specialist keeps of those it is hardly confused with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .linear_logits import LinearLogits

RIDGE = 1e-4  # of the mean squared feature: there may be fewer examples than features


class ResidualRow(NamedTuple):
    """weight [D], bias []: the row.  kl: mean KL (nats) of the specialist with all rows from the one with this row, and
    rms: the root mean square error of the row's logit, both on the half of the examples that it was not fitted to."""

    weight: Tensor
    bias: Tensor
    kl: float
    rms: float


def fit_residual_row(head: nn.Linear, features: Tensor, members, kept) -> ResidualRow:
    """The row w x + b nearest to l = log sum exp of head's logits of the classes neither in `members` nor in `kept`.

    features: [n, D], of examples at their natural frequencies.  An error e of the row moves the dustbin's logit by
    about r e, with r the share of these classes in the dustbin's mass, and that costs the specialist
    KL = p (1 - p) (r e)^2 / 2, with p the dustbin's probability: least squares with the weights p (1 - p) r^2.
    The figures are of a fit to every second example; the row is fitted to all.
    Raises ValueError where no class is left, or fewer than four examples.
    """
    x = features.double()
    others = torch.ones(len(head.weight), dtype=torch.bool, device=head.weight.device)
    members, kept = (
        torch.tensor([int(c) for c in some], dtype=torch.int64, device=x.device)
        for some in (members, kept)
    )
    others[members] = others[kept] = False
    if not others.any() or len(x) < 4:
        raise ValueError(
            f"a row for {int(others.sum())} classes cannot be fitted to {len(x)} examples"
        )
    inside, near, rest = (
        _log_sum(head, features, classes) for classes in (members, kept, others.nonzero()[:, 0])
    )
    dustbin = torch.logaddexp(near, rest)
    p = torch.sigmoid(dustbin - inside)
    weights = p * (1 - p) * (rest - dustbin).exp() ** 2
    half = torch.arange(len(x), device=x.device) % 2 == 0
    row = _least_squares(x[half], rest[half], weights[half])
    error = (x @ row[:-1] + row[-1] - rest)[~half]
    moved = torch.logaddexp(near[~half], rest[~half] + error) - inside[~half]
    kl = _binary_kl((dustbin - inside)[~half], moved)
    row = _least_squares(x, rest, weights).to(head.weight)
    return ResidualRow(row[:-1], row[-1], float(kl.mean()), float(error.square().mean().sqrt()))


def _log_sum(head: nn.Linear, features: Tensor, classes: Tensor) -> Tensor:
    """[n] in float64; -inf of no classes."""
    if not len(classes):
        return features.new_full((len(features),), -torch.inf, dtype=torch.float64)
    with torch.no_grad():
        some = LinearLogits(
            features.to(head.weight), head.weight[classes], head.bias[classes], len(classes)
        )
        return some.logsumexp_and_dot()[0].double()


def _least_squares(x: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """[D + 1], the bias last, which the ridge leaves alone."""
    weights = weights / weights.sum().clamp_min(1e-300)
    mean_x, mean = weights @ x, weights @ wanted
    centred = x - mean_x
    ridge = RIDGE * centred.square().mean() * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    scaled = centred * weights[:, None]
    slope = torch.linalg.solve(scaled.T @ centred + ridge, scaled.T @ (wanted - mean))
    return torch.cat([slope, (mean - mean_x @ slope)[None]])


def _binary_kl(logit: Tensor, other: Tensor) -> Tensor:
    """KL of two coins with these log-odds."""
    log = torch.nn.functional.logsigmoid
    p = torch.sigmoid(logit)
    return p * (log(logit) - log(other)) + (1 - p) * (log(-logit) - log(-other))
