"""fit_shift: one number for the biases of classes that were left out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble import fit_shift


def test_with_uninformative_logits_the_shift_makes_the_mass_the_classes_frequency():
    logits, labels = torch.zeros(8, 4), torch.tensor([3, 3, 3, 3, 0, 1, 2, 0])
    assert fit_shift(logits, labels, [3]) == pytest.approx(math.log(3))  # e^b / (3 + e^b) = 1/2


def test_two_classes_share_one_shift():
    logits, labels = torch.zeros(4, 4), torch.tensor([0, 1, 2, 2])
    # 3 e^b / (1 + 3 e^b) = 1/2
    assert fit_shift(logits, labels, [0, 1, 3]) == pytest.approx(math.log(1 / 3))


def test_without_examples_of_the_classes_the_shift_stays_finite():
    assert fit_shift(torch.zeros(3, 2), torch.tensor([0, 0, 0]), [1]) == pytest.approx(-64, abs=40)
    assert math.isfinite(fit_shift(torch.zeros(3, 2), torch.tensor([1, 1, 1]), [1]))


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_no_other_shift_fits_better(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, 5, (50,), generator=generator)

    def nll(b: float) -> float:
        moved = logits.clone()
        moved[:, [1, 4]] += b
        return float(torch.nn.functional.cross_entropy(moved, labels))

    best = fit_shift(logits, labels, [1, 4])
    assert nll(best) <= min(nll(best - 0.01), nll(best + 0.01))
