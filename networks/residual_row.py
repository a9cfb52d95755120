"""One linear row for the log-sum-exp of many classes, which a specialist hardly confuses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .linear_logits import LinearLogits

BLOCK = 8192  # examples that are in float64 at a time
RIDGE = 1e-4  # of the mean squared feature: there may be fewer examples than features


class ResidualRow(NamedTuple):
    """One linear row that stands for all classes without a row, and what that costs.

    weight  [D]
    bias    []
    kl      mean KL (nats) of the specialist with all rows from the one with this row
    rms     root mean square error of the row's logit

    kl and rms are measured on the half of the examples that a first fit left out.
    """

    weight: Tensor
    bias: Tensor
    kl: float
    rms: float


def fit_residual_row(
    head: nn.Linear, features: Tensor, classes: Iterable[int], kept: Iterable[int]
) -> ResidualRow:
    """The row w x + b nearest to the log-sum-exp of the logits of all classes without a row.

    An error e of the row moves the dustbin's logit by about r e, with r the fraction of the
    dustbin's mass that these classes hold.  That costs the specialist KL = p (1 - p) (r e)^2 / 2,
    with p the dustbin's probability: least squares with the weights p (1 - p) r^2.

    Parameters
    ----------
    head : nn.Linear
        The generalist's, with a row for every class.
    features : Tensor [n, D]
        Features of examples at their natural class frequencies.
    classes : iterable of int
        The specialist's.
    kept : iterable of int
        Other classes that keep their own rows.

    Returns
    -------
    ResidualRow
        Fitted to all examples. Its kl and rms are of a fit to every second one.

    Raises
    ------
    ValueError
        Where no class is left without a row, or there are fewer than four examples.
    """
    others = torch.ones(len(head.weight), dtype=torch.bool, device=head.weight.device)
    own = _indices(classes, features.device)
    near = _indices(kept, features.device)
    others[own] = others[near] = False
    if not others.any() or len(features) < 4:
        raise ValueError(
            f"a row for {int(others.sum())} classes cannot be fitted to {len(features)} examples"
        )
    left = others.nonzero()[:, 0]
    sums = [_sums_of(head, block, own, near, left) for block in features.split(BLOCK)]
    inside, outside_kept, rest = (torch.cat(each) for each in zip(*sums, strict=True))
    dustbin = torch.logaddexp(outside_kept, rest)
    p = torch.sigmoid(dustbin - inside)
    weights = p * (1 - p) * (rest - dustbin).exp() ** 2
    half = torch.arange(len(features), device=features.device) % 2 == 0
    row = _least_squares(features[half], rest[half], weights[half])
    error = torch.cat([x.double() @ row[:-1] + row[-1] for x in features.split(BLOCK)]) - rest
    error = error[~half]
    fitted = torch.logaddexp(outside_kept[~half], rest[~half] + error)
    kl = _binary_kl((dustbin - inside)[~half], fitted - inside[~half])
    row = _least_squares(features, rest, weights).to(head.weight)
    return ResidualRow(row[:-1], row[-1], float(kl.mean()), float(error.square().mean().sqrt()))


def _sums_of(
    head: nn.Linear, x: Tensor, own: Tensor, near: Tensor, left: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log-sum-exp of the logits of three parts of the classes, float64 [n] each."""
    return _log_sum(head, x, own), _log_sum(head, x, near), _log_sum(head, x, left)


def _indices(classes: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor([int(c) for c in classes], dtype=torch.int64, device=device)


def _log_sum(head: nn.Linear, features: Tensor, classes: Tensor) -> Tensor:
    """[n] in float64. -inf of no classes."""
    if not len(classes):
        return features.new_full((len(features),), -torch.inf, dtype=torch.float64)
    with torch.no_grad():
        weight, bias = head.weight[classes], head.bias[classes]
        logits = LinearLogits(features.to(head.weight), weight, bias, len(classes))
        return logits.logsumexp_and_dot()[0].double()


def _least_squares(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """[D + 1] in float64, the bias last, which the ridge leaves alone.

    x: [n, D] in the network's type, of which a block at a time is in float64.
    """
    weights = weights / weights.sum().clamp_min(1e-300)
    blocks = list(zip(*(each.split(BLOCK) for each in (x, y, weights)), strict=True))
    size = x.shape[1]
    mean_x, mean_y = y.new_zeros(size), weights @ y
    for rows, _, w in blocks:
        mean_x = mean_x + w @ rows.double()
    matrix, right, squares = y.new_zeros(size, size), y.new_zeros(size), y.new_zeros(())
    for rows, of_rows, w in blocks:
        centred = rows.double() - mean_x
        scaled = centred * w[:, None]
        matrix = matrix + scaled.T @ centred
        right = right + scaled.T @ (of_rows - mean_y)
        squares = squares + centred.square().sum()
    ridge = RIDGE * squares / x.numel() * torch.eye(size, dtype=y.dtype, device=y.device)
    slope = torch.linalg.solve(matrix + ridge, right)
    return torch.cat([slope, (mean_y - mean_x @ slope)[None]])


def _binary_kl(logit: Tensor, other: Tensor) -> Tensor:
    """KL of two coins with these log-odds."""
    log = torch.nn.functional.logsigmoid
    p = torch.sigmoid(logit)
    return p * (log(logit) - log(other)) + (1 - p) * (log(-logit) - log(-other))
