"""From stored log-probabilities to gains over the generalist: pure functions of arrays.

N examples, C classes.  A gain is in points of top-1, paired over the same examples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ensemble import fit_temperature
from ensemble.shortlist import join_on_shortlist

WEIGHTS = np.linspace(0, 1, 21)  # of the second network
SHORTLIST = 100

Join = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def arithmetic(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """log p [N, C] of the weighted mean of two distributions."""
    p = (1 - weight) * np.exp(first) + weight * np.exp(second)
    return np.log(np.maximum(p, 1e-30))


def geometric(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    return normalised((1 - weight) * first + weight * second)


def on_shortlist(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """The geometric mean within the first one's likeliest classes, which keep its mass."""
    weight = min(max(weight, 1e-3), 1 - 1e-3)
    general = torch.from_numpy(first)
    indices = general.topk(min(SHORTLIST, general.shape[1]), 1).indices
    asked = torch.from_numpy(second).gather(1, indices)[None]
    return join_on_shortlist(general, indices, asked, 0.0, [1 - weight, weight]).numpy()


JOINS: dict[str, Join] = {
    "average": arithmetic,
    "geometric": geometric,
    "shortlist": on_shortlist,
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
    losses = [nll(join(first, second, weight), labels) for weight in WEIGHTS]
    return float(WEIGHTS[int(np.argmin(losses))])


def cross_fitted(
    join: Join, first: np.ndarray, second: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Joined with the weight fitted on the even positions, on the odd ones, and the reverse."""
    joined = np.empty_like(first)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - half.start, None, 2)
        weight = fitted_weight(join, first[other], second[other], labels[other])
        joined[half] = join(first[half], second[half], weight)
    return joined


def gain(log_p: np.ndarray, general: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{"top1": points over the generalist, "se": paired, "nll": nats below it, "nll_se"}."""
    right = correct(log_p, labels).astype(float) - correct(general, labels)
    lower = (at_label(log_p, labels) - at_label(general, labels)).astype(float)
    root = np.sqrt(len(labels))
    return {
        "top1": round(100 * float(right.mean()), 3),
        "se": round(100 * float(right.std()) / root, 3),
        "nll": round(float(lower.mean()), 4),
        "nll_se": round(float(lower.std()) / root, 4),
    }


def calibrated(log_p: np.ndarray, val: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """log p at the temperature that fits val, and that temperature."""
    temperature = fit_temperature(torch.from_numpy(val), torch.from_numpy(labels))
    return normalised(log_p / temperature), temperature


def residual_correlation(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> float:
    """Of y - p of the two, over examples and classes."""
    residuals = []
    for log_p in (first, second):
        p = np.exp(log_p)
        p[np.arange(len(labels)), labels] -= 1
        residuals.append(p.ravel().astype(np.float64))
    a, b = residuals
    return round(float(a @ b / np.sqrt((a @ a) * (b @ b))), 4)
