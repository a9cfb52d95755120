import numpy as np
import pytest

from trainer.metrics import expected_calibration_error, reliability, summarise


def test_figures_of_a_hand_worked_example():
    # Three examples of two classes (0, 0, 1); answers: right at .8, wrong at .6 (so p(true) = .4), right at .9.
    labels = [0, 0, 1]
    top5 = [[0, 1, -1, -1, -1], [1, 0, -1, -1, -1], [1, 0, -1, -1, -1]]
    probability = [[0.8, 0.2, 0, 0, 0], [0.6, 0.4, 0, 0, 0], [0.9, 0.1, 0, 0, 0]]
    squared = [0.2**2 * 2, 0.6**2 * 2, 0.1**2 * 2]
    row = summarise(labels, top5, np.array(probability), [0.8, 0.4, 0.9], squared)
    assert row["n"] == 3
    assert row["top1"] == pytest.approx(2 / 3)
    assert row["top5"] == 1
    assert row["nll"] == pytest.approx(-np.log([0.8, 0.4, 0.9]).mean())
    assert row["brier"] == pytest.approx((0.08 + 0.72 + 0.02) / 3)
    assert row["macro_top1"] == pytest.approx((1 / 2 + 1) / 2)
    # Bins of 1/15: .8, .6 and .9 stand alone, so ECE = (|1 - .8| + |0 - .6| + |1 - .9|) / 3.
    assert row["ece"] == pytest.approx((0.2 + 0.6 + 0.1) / 3)


def test_reliability_bins_are_open_below_and_closed_above():
    bins = reliability(np.array([1 / 15, 1 / 15 + 1e-9, 1.0]), np.array([1, 0, 1]))
    assert [b["count"] for b in bins] == [1, 1] + [0] * 12 + [1]


def test_a_calibrated_forecaster_has_no_calibration_error():
    bins = reliability(np.full(10, 0.7), np.array([1] * 7 + [0] * 3))
    assert expected_calibration_error(bins) == pytest.approx(0)


def test_macro_top1_leaves_out_classes_without_examples():
    row = summarise([5, 5], [[5, 0, 1, 2, 3], [0, 5, 1, 2, 3]], np.full((2, 5), 0.2), [0.2, 0.2], [1, 1])
    assert row["macro_top1"] == 0.5
