"""From stored log-probabilities to gains over the generalist: pure functions of arrays.

N examples, C classes.  A gain is in points of top-1, paired over the same examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ensemble import fit_temperature
from ensemble.shortlist import GEOMETRIC, join_on_shortlist

TINY = 1e-30
WEIGHTS = np.linspace(0, 1, 21)  # of the second network
SHORTLIST = 100
MOST_FITTED = 1000  # examples that a temperature, or the geometric mean's weight, is fitted on


def arithmetic(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """log p [N, C] of the weighted mean of two distributions."""
    p = (1 - weight) * np.exp(first) + weight * np.exp(second)
    return np.log(np.maximum(p, TINY))


def arithmetic_losses(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """NLL at each of WEIGHTS."""
    own, other = at_label(first, labels), at_label(second, labels)
    return np.array([-arithmetic(own, other, weight).mean() for weight in WEIGHTS])


def geometric(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    return normalised((1 - weight) * first + weight * second)


def geometric_losses(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """NLL at each of WEIGHTS, of at most MOST_FITTED examples, evenly over them."""
    rows = np.linspace(0, len(labels) - 1, min(MOST_FITTED, len(labels))).astype(int)
    first, second, labels = first[rows], second[rows], labels[rows]
    return np.array([nll(geometric(first, second, weight), labels) for weight in WEIGHTS])


def on_shortlist(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """The geometric mean within the first one's likeliest classes, which keep its mass."""
    general = torch.from_numpy(first)
    indices = general.topk(min(SHORTLIST, general.shape[1]), 1).indices
    asked = torch.from_numpy(second).gather(1, indices)[None]
    weights = [max(1 - weight, TINY), max(weight, TINY)]
    return join_on_shortlist(general, indices, asked, GEOMETRIC, weights).numpy()


def shortlist_losses(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """NLL at each of WEIGHTS. A label that is not on the list costs the same at all of them."""
    top = torch.from_numpy(first).topk(min(SHORTLIST, first.shape[1]), 1)
    listed, own = top.indices.numpy(), top.values.numpy()
    other = np.take_along_axis(second, listed, 1)
    mass = np.log(np.exp(own).sum(1))
    hit = listed == labels[:, None]
    is_listed = hit.any(1)
    place = hit.argmax(1)[is_listed]
    outside = at_label(first, labels)[~is_listed].sum(dtype=np.float64)

    def loss(weight: float) -> float:
        joined = geometric(own[is_listed], other[is_listed], weight)
        inside = at_label(joined, place) + mass[is_listed]
        return -(inside.sum(dtype=np.float64) + outside) / len(labels)

    return np.array([loss(weight) for weight in WEIGHTS])


class Join(NamedTuple):
    """join: two log p [N, C] and the second one's weight -> log p.  losses: NLL by weight."""

    join: Callable[[np.ndarray, np.ndarray, float], np.ndarray]
    losses: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


JOINS: dict[str, Join] = {
    "average": Join(arithmetic, arithmetic_losses),
    "geometric": Join(geometric, geometric_losses),
    "shortlist": Join(on_shortlist, shortlist_losses),
}


def normalised(log_p: np.ndarray) -> np.ndarray:
    return torch.from_numpy(log_p).log_softmax(1).numpy()


def at_label(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return log_p[np.arange(len(labels)), labels]


def nll(log_p: np.ndarray, labels: np.ndarray) -> float:
    return float(-at_label(log_p, labels).mean(dtype=np.float64))


def correct(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return log_p.argmax(1) == labels


def fitted_weight(join: Join, first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> float:
    """Of WEIGHTS the one with the lowest NLL."""
    return float(WEIGHTS[int(np.argmin(join.losses(first, second, labels)))])


def cross_fitted(
    join: Join, first: np.ndarray, second: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Joined with the weight fitted on the even positions, on the odd ones, and the reverse."""
    joined = np.empty_like(first)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - half.start, None, 2)
        weight = fitted_weight(join, first[other], second[other], labels[other])
        joined[half] = join.join(first[half], second[half], weight)
    return joined


def gain(log_p: np.ndarray, general: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{"top1": points over the generalist, "se": paired, "nll": nats below it, "nll_se"}."""
    right = correct(log_p, labels).astype(float) - correct(general, labels)
    top1, se = mean_and_error(100 * right)
    nats, nats_se = mean_and_error(at_label(log_p, labels) - at_label(general, labels))
    return {"top1": round(top1, 3), "se": round(se, 3)} | nats_below(nats, nats_se)


def nats_below(mean: float, error: float, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}nll": round(mean, 4), f"{prefix}nll_se": round(error, 4)}


def mean_and_error(differences: np.ndarray) -> tuple[float, float]:
    """The mean of n differences, and its standard error."""
    wide = differences.astype(np.float64)
    return float(wide.mean()), float(wide.std() / np.sqrt(len(wide)))


def temperature_of(log_p: np.ndarray, labels: np.ndarray) -> float:
    """That fits at most MOST_FITTED examples, evenly over them."""
    rows = np.linspace(0, len(labels) - 1, min(MOST_FITTED, len(labels))).astype(int)
    return fit_temperature(torch.from_numpy(log_p[rows]), torch.from_numpy(labels[rows]))


def label_log_p(log_p: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """Of the true class at a temperature, [N]."""
    scaled = torch.from_numpy(log_p) / temperature
    return at_label(scaled.numpy(), labels) - scaled.logsumexp(1).numpy()


def ceiling(general: np.ndarray, labels: np.ndarray, members: list[list[int]]) -> float:
    """Points that perfect specialists would give: errors between classes of one group."""
    in_group = np.zeros((len(members), general.shape[1]), bool)
    for group, classes in zip(in_group, members, strict=True):
        group[classes] = True
    favourite = general.argmax(1)
    shared = (in_group[:, favourite] & in_group[:, labels]).any(0)
    return 100 * float((shared & (favourite != labels)).mean())


def residual_correlation(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> float:
    """Of y - p of the two, over examples and classes."""
    residuals = []
    for log_p in (first, second):
        p = np.exp(log_p)
        p[np.arange(len(labels)), labels] -= 1
        residuals.append(p.ravel().astype(np.float64))
    a, b = residuals
    return round(float(a @ b / np.sqrt((a @ a) * (b @ b))), 4)
