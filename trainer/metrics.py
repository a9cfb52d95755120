"""What a network is judged by: pure functions of predictions.  n examples, C classes."""

from __future__ import annotations

import numpy as np

ECE_BINS = 15


def summarise(labels, top5, top5_probability, label_probability, squared_error) -> dict[str, float]:
    """The figures of one row.

    labels: [n].  top5: [n, 5], most probable class first.  top5_probability: [n, 5].  label_probability: [n], of the
    true
    class.  squared_error: [n], sum over classes of (p - y)^2, the usual Brier score.  nll is in nats.
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
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    mean = [np.bincount(place, weights=value, minlength=bins) / np.maximum(count, 1) for value in (confidence, right)]
    return [
        {"lo": b / bins, "hi": (b + 1) / bins, "count": int(count[b]), "confidence": float(mean[0][b]),
         "accuracy": float(mean[1][b])}
        for b in range(bins)
    ]  # fmt: skip


def expected_calibration_error(bins: list[dict[str, float]]) -> float:
    """sum over bins of n_b / n |accuracy - confidence| (Guo et al. 2017, eq. 3)."""
    total = sum(b["count"] for b in bins)
    return sum(b["count"] / total * abs(b["accuracy"] - b["confidence"]) for b in bins)
