"""Paired differences of rows, from what the stage `evaluate` kept of each test example."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .rows import Paired

CALIBRATED = "calibrated_label_probability"
TINY = np.finfo(np.float32).tiny  # what a probability of 0 counts as


class Answers(NamedTuple):
    """Each test example's id, whether the row is right, and the label's -log p.

    cnll: the same after temperature scaling. None where an earlier version kept no such thing.
    """

    ids: np.ndarray
    correct: np.ndarray
    nll: np.ndarray
    cnll: np.ndarray | None = None


def read_answers(path: Path) -> Answers | None:
    """The answers in evaluation/NAME.npz. None where there is no file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            correct = arrays["top5"][:, 0] == arrays["labels"]
            nll = _nll(arrays["label_probability"])
            cnll = None
            if CALIBRATED in arrays.files:
                cnll = _nll(arrays[CALIBRATED])
            return Answers(arrays["ids"], correct, nll, cnll)
    except (OSError, ValueError, KeyError):
        return None


def _nll(p_label: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(p_label.astype(np.float64), TINY))


def paired(answers: Answers, other: Answers) -> Paired | None:
    """One row less another. None where they were not measured on the same examples."""
    if not np.array_equal(answers.ids, other.ids):
        return None
    top1, top1_half = mean_and_half(answers.correct.astype(float) - other.correct.astype(float))
    nll, nll_half = mean_and_half(answers.nll - other.nll)
    difference = Paired(top1=top1, top1_half=top1_half, nll=nll, nll_half=nll_half)
    if answers.cnll is not None and other.cnll is not None:
        cnll, cnll_half = mean_and_half(answers.cnll - other.cnll)
        difference["cnll"], difference["cnll_half"] = cnll, cnll_half
    return difference


def mean_and_half(differences: np.ndarray) -> tuple[float, float]:
    """The mean of n differences, and half its 95 % interval by the normal approximation."""
    mean, error = mean_and_error(differences)
    return mean, 1.96 * error


def mean_and_error(differences: np.ndarray) -> tuple[float, float]:
    """The mean of n differences, and its standard error."""
    return float(differences.mean()), float(differences.std()) / math.sqrt(len(differences))
