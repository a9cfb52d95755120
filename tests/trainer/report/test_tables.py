import numpy as np
import pytest

from trainer.report.svg import log_ticks, ticks
from trainer.report.tables import (
    confusion_weights,
    coverage_table,
    covering_specialists,
    curve,
    families,
    frequency_deciles,
    paired_difference,
    spread,
    typical_examples,
)


def test_coverage_counts_specialists_of_the_true_class():
    covering = covering_specialists([[0, 1, 2], [2, 3]], 6)
    assert covering.tolist() == [1, 1, 2, 1, 0, 0]
    assert covering_specialists([[0, 1, 2], [2, 3]], 6, missing=[1]).tolist() == [1, 1, 1, 0, 0, 0]
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
    before = np.array([1, 0, 1, 0, 0, 1, 1, 0, 1, 0], bool)
    after = np.array([1, 1, 1, 0, 1, 1, 1, 0, 1, 0], bool)
    rows = coverage_table(labels, before, after, covering)
    assert [(row.specialists, row.n, row.delta, row.relative) for row in rows] == [
        (0, 2, 0, 0.0),
        (1, 6, 1, pytest.approx(1 / 3)),
        (2, 2, 1, 1.0),
    ]


def test_coverage_of_ten_and_more_is_one_row():
    rows = coverage_table(
        np.array([0, 1, 2]), np.zeros(3, bool), np.ones(3, bool), np.array([9, 10, 14])
    )
    assert [(row.specialists, row.or_more, row.n) for row in rows] == [
        (9, False, 1),
        (10, True, 2),
    ]
    assert rows[0].relative is None  # nothing was right before


def test_deciles_go_from_the_rarest_classes_to_the_most_frequent():
    counts = np.array([50, 10, 40, 20, 30, 60])
    labels = np.array([0, 1, 1, 2, 3, 4, 5, 5])
    right = np.array([1, 0, 0, 1, 0, 1, 1, 0], bool)
    rows = frequency_deciles(counts, labels, {"generalist": right}, parts=3)
    assert [(row.least, row.most, row.classes, row.n) for row in rows] == [
        (10, 20, 2, 3),
        (30, 40, 2, 2),
        (50, 60, 2, 3),
    ]
    assert [row.accuracy["generalist"] for row in rows] == [0, 1, pytest.approx(2 / 3)]


def test_classes_without_test_examples_are_in_no_decile():
    rows = frequency_deciles([5, 6, 7], np.array([0, 2]), {"generalist": np.ones(2, bool)})
    assert [(row.least, row.n) for row in rows] == [(5, 1), (7, 1)]


def test_paired_difference_knows_only_the_examples_that_changed():
    before = np.array([1] * 60 + [0] * 40, bool)
    after = before.copy()
    after[60:66], after[:2] = True, False  # six fixed, two broken
    difference, half = paired_difference(before, after)
    assert difference == pytest.approx(0.04)
    assert half == pytest.approx(1.96 * np.sqrt((8 / 100 - 0.04**2) / 100))


def test_confusion_is_the_probability_on_the_other_class_both_ways():
    labels = np.array([0, 1, 1])
    top5 = np.array([[0, 1, -1], [0, 1, 2], [1, 2, 0]])
    p = np.array([[0.7, 0.3, 0.0], [0.5, 0.4, 0.1], [0.8, 0.15, 0.05]])
    weights = confusion_weights(labels, top5, p)
    assert weights[0, 1] == pytest.approx(0.3 + 0.5 + 0.05)
    assert weights[1, 2] == pytest.approx(0.1 + 0.15)
    assert set(weights) == {(0, 1), (1, 2)}
    assert confusion_weights(labels, top5, p, most=1) == {(0, 1): pytest.approx(0.85)}


def test_families_join_look_alikes_up_to_a_limit_and_stay_inside_the_group():
    weights = {(0, 1): 5.0, (1, 2): 4.0, (3, 4): 6.0, (2, 3): 1.0, (5, 9): 100.0}
    assert families([0, 1, 2, 3, 4, 5], weights, most=4) == [[0, 1, 2], [3, 4]]
    assert families([0, 1, 2, 3, 4, 5], weights, most=5) == [[0, 1, 2, 3, 4]]
    assert families([5, 6], weights) == []


def test_sample_is_spread_evenly():
    assert spread(np.arange(100), 4).tolist() == [0, 25, 50, 75]
    assert spread([3, 1], 4).tolist() == [3, 1]


def test_typical_example_is_the_one_the_generalist_is_surest_of():
    assert typical_examples(np.array([1, 0, 1, 1]), np.array([0.2, 0.9, 0.8, 0.5])) == {0: 1, 1: 2}


def test_curve_keeps_its_end_and_drops_what_is_not_finite():
    points = [(float(x), float(x % 2)) for x in range(1000)] + [(1000.0, float("nan"))]
    short = curve(points, most=50)
    assert len(short) == 50 and short[-1] == (999.0, 1.0)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.62, 0.66, [0.62, 0.63, 0.64, 0.65, 0.66]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_log_ticks_stay_inside():
    assert log_ticks(0.8, 12) == pytest.approx([1, 2, 5, 10])
    assert log_ticks(0.15, 0.35) == pytest.approx([0.15, 0.2, 0.25, 0.3, 0.35])
    assert log_ticks(0.5, 2000) == pytest.approx([1, 10, 100, 1000])
