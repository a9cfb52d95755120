"""Captured confusion, chance and forecasts, by hand and pair by pair."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

import clustering.judging
from clustering import (
    ClassGroups,
    PredictionStatistics,
    captured_confusion,
    captured_unlabelled,
    forecast,
    forecast_table,
)

CONFUSION = np.array([[90, 3, 0, 1], [2, 80, 4, 0], [0, 0, 70, 0], [0, 5, 0, 60]])  # 15 errors


@st.composite
def groups_and_confusion(draw):
    num_classes = draw(st.integers(2, 9))
    group = st.lists(st.integers(0, num_classes - 1), min_size=1, unique=True)
    groups = ClassGroups(draw(st.lists(group, min_size=1, max_size=5)), num_classes)
    cells = draw(st.lists(st.integers(0, 3), min_size=num_classes**2, max_size=num_classes**2))
    return groups, np.array(cells).reshape(num_classes, num_classes)


def brute_force(groups, confusion):
    """Fraction of the off-diagonal mass whose two classes are in one group, pair by pair."""
    inside = total = 0
    for i, j in itertools.permutations(range(groups.num_classes), 2):
        total += confusion[i, j]
        together = any({i, j} <= set(classes.tolist()) for classes in groups.members)
        inside += confusion[i, j] * together
    if not total:
        return float("nan")
    return inside / total


def test_captured_confusion_by_hand():
    # Errors inside {0, 1}: 3 + 2.  Inside {1, 2}: 4.  The 1 and the 5 with class 3 are in no group.
    captured, chance = captured_confusion(ClassGroups([[0, 1], [1, 2]], 4), CONFUSION)
    assert captured == pytest.approx(9 / 15)
    assert chance == pytest.approx(2 / 6)


def test_a_pair_that_shares_two_groups_counts_once():
    once, twice = ClassGroups([[0, 1, 2]], 4), ClassGroups([[0, 1, 2], [0, 1]], 4)
    assert captured_confusion(once, CONFUSION) == captured_confusion(twice, CONFUSION)


@given(groups_and_confusion())
@settings(deadline=None)
def test_captured_confusion_agrees_with_counting_pair_by_pair(case):
    groups, confusion = case
    captured, chance = captured_confusion(groups, csr_array(confusion))
    assert captured == pytest.approx(brute_force(groups, confusion), nan_ok=True)
    assert chance == pytest.approx(brute_force(groups, np.ones_like(confusion)))


def test_chance_is_the_mean_over_random_relabellings():
    groups = ClassGroups([[0, 1, 2], [2, 3]], 5)
    confusion = np.random.default_rng(0).integers(0, 9, (5, 5))
    captured = []
    for order in itertools.permutations(range(5)):
        relabelled = ClassGroups([np.array(order)[classes] for classes in groups.members], 5)
        captured.append(captured_confusion(relabelled, confusion)[0])
    assert captured_confusion(groups, confusion)[1] == pytest.approx(np.mean(captured))


def test_many_entries_are_counted_in_blocks(monkeypatch):
    confusion = np.random.default_rng(1).integers(0, 5, (40, 40))
    groups = ClassGroups([range(0, 25), range(15, 40), [3, 39]], 40)
    whole = captured_confusion(groups, confusion)
    monkeypatch.setattr(clustering.judging, "_BLOCK_ENTRIES", 7)
    assert captured_confusion(groups, confusion) == pytest.approx(whole)


def test_one_group_of_everything_captures_everything():
    assert captured_confusion(ClassGroups([range(4)], 4), CONFUSION) == (1, 1)


def test_without_errors_captured_confusion_is_not_a_number():
    captured, chance = captured_confusion(ClassGroups([[0, 1]], 4), np.diag([5, 5, 5, 5]))
    assert np.isnan(captured) and chance == pytest.approx(1 / 6)


def test_one_class_has_no_chance_level():
    assert np.isnan(captured_confusion(ClassGroups([[0]], 1), [[3]])).all()


def test_a_confusion_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"the confusion is \(4, 4\), the groups are of 5 classes"):
        captured_confusion(ClassGroups([[0]], 5), CONFUSION)


def statistics_of(p, labels=None):
    statistics = PredictionStatistics(len(p[0]))
    statistics.update(np.array(p), labels=labels)
    return statistics


PREDICTIONS = [
    [0.6, 0.3, 0.1],  # true 1: wrong, inside {0, 1}
    [0.6, 0.4, 0.0],  # true 0: right
    [0.2, 0.0, 0.8],  # true 0: wrong, outside {0, 1}, inside {0, 2}
    [0.0, 0.3, 0.7],  # true 2: right
    [0.9, 0.1, 0.0],  # true 2: wrong, inside {0, 2}
]


def labelled_forecast(*groups):
    return forecast(ClassGroups(groups, 3), statistics_of(PREDICTIONS, labels=[1, 0, 0, 2, 2]))


def test_forecast_by_hand():
    first, second = labelled_forecast([0, 1], [0, 2])
    assert first == {
        "classes": 2,
        "examples": 3,
        "errors_inside": 1,
        "gain": 0.2,
        "gain_unlabelled": pytest.approx((0.3 + 0.4 + 0.1) / 5),
    }
    assert second == {
        "classes": 2,
        "examples": 4,
        "errors_inside": 2,
        "gain": 0.4,
        "gain_unlabelled": pytest.approx((0.1 + 0.2) / 5),
    }


def test_forecast_without_labels_has_only_what_needs_none():
    (row,) = forecast(ClassGroups([[0, 1]], 3), statistics_of(PREDICTIONS))
    assert row == {
        "classes": 2,
        "examples": None,
        "errors_inside": None,
        "gain": None,
        "gain_unlabelled": pytest.approx((0.3 + 0.4 + 0.1) / 5),
    }


def test_forecast_of_no_examples_is_no_gain():
    (row,) = forecast(ClassGroups([[0]], 2), PredictionStatistics(2))
    assert row["gain_unlabelled"] == 0 and row["gain"] is None


@given(groups_and_confusion())
@settings(deadline=None, max_examples=40)
def test_gains_of_disjoint_groups_add_up_to_the_captured_errors(case):
    groups, confusion = case
    num_classes = groups.num_classes
    parts = np.array_split(np.arange(num_classes), min(3, num_classes))
    disjoint = ClassGroups(parts, num_classes)
    true, predicted = np.repeat(np.nonzero(confusion), confusion[confusion > 0], axis=1)
    statistics = PredictionStatistics(num_classes, top_k=1)
    if not len(true):
        return
    statistics.update(predicted[:, None], np.full((len(true), 1), 0.5), true)
    gain = sum(row["gain"] or 0 for row in forecast(disjoint, statistics))
    errors = (true != predicted).mean()
    captured, _ = captured_confusion(disjoint, statistics.confusion)
    expected = 0 if errors == 0 else captured * errors  # without errors captured is nan
    assert gain == pytest.approx(expected)


def test_captured_unlabelled_is_of_the_expected_confusion():
    statistics = statistics_of(PREDICTIONS)
    # Mass off the predicted class: .3 + .1, .4, .2, .3, .1. Inside {0, 1}: .3 + .4 + .1.
    assert captured_unlabelled(ClassGroups([[0, 1]], 3), statistics)[0] == pytest.approx(0.8 / 1.4)


def test_the_table_has_the_group_with_the_largest_gain_first_and_marks_skipped_ones():
    rows = labelled_forecast([0, 1], [0, 2])
    assert forecast_table(rows, skipped=[0]) == [
        "group  classes  examples  errors inside  gain at most  expected",
        "    1        2         4              2        40.00%     6.00%",
        "    0        2         3              1        20.00%    16.00%  skipped",
    ]


def test_the_table_of_many_groups_sums_up_the_rest():
    rows = labelled_forecast([0, 1], [0, 2], [1])
    lines = forecast_table(rows, skipped=[0, 2], most=1)
    assert lines[2:] == ["... and 2 more of at most 20.00% each, 2 of them skipped"]


def test_the_table_without_labels_is_sorted_by_the_expected_gain():
    lines = forecast_table(forecast(ClassGroups([[0, 2], [0, 1]], 3), statistics_of(PREDICTIONS)))
    assert lines[1] == "    1        2         -              -             -    16.00%"
