"""Paired differences of rows, from what the stage `evaluate` kept of each test example."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .rows import Paired

TINY = np.finfo(np.float32).tiny  # what a probability of 0 counts as


class Answers(NamedTuple):
    """Of each test example: its id, whether the row is right, and the label's -log p."""

    ids: np.ndarray
    correct: np.ndarray
    nll: np.ndarray


def read_answers(path: Path) -> Answers | None:
    """Of evaluation/NAME.npz. None where there is none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            p_label = arrays["label_probability"].astype(np.float64)
            correct = arrays["top5"][:, 0] == arrays["labels"]
            return Answers(arrays["ids"], correct, -np.log(np.maximum(p_label, TINY)))
    except (OSError, ValueError, KeyError):
        return None


def paired(answers: Answers, other: Answers) -> Paired | None:
    """One row less another. None where they were not measured on the same examples."""
    if not np.array_equal(answers.ids, other.ids):
        return None
    top1, top1_half = mean_and_half(answers.correct.astype(float) - other.correct.astype(float))
    nll, nll_half = mean_and_half(answers.nll - other.nll)
    return Paired(top1=top1, top1_half=top1_half, nll=nll, nll_half=nll_half)


def mean_and_half(differences: np.ndarray) -> tuple[float, float]:
    """The mean of n differences, and half its 95 % interval by the normal approximation."""
    mean, error = mean_and_error(differences)
    return mean, 1.96 * error


def mean_and_error(differences: np.ndarray) -> tuple[float, float]:
    """The mean of n differences, and its standard error."""
    return float(differences.mean()), float(differences.std()) / math.sqrt(len(differences))
