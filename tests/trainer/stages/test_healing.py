"""What specialists of a few groups heal, against numbers worked by hand and invariants."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.stages.pilots.healing import (
    FeaturePlan,
    by_ceiling,
    healed,
    mixture_log_prior,
    opened,
    pilot_batch,
    plan_features,
    share_a_group,
)


def test_groups_come_by_their_ceilings_and_those_without_one_not_at_all():
    assert by_ceiling([0.1, 0.3, 0.0, 0.3, 0.2], skipped={4}) == [1, 3, 0]


def test_an_error_counts_once_however_many_groups_hold_it():
    labels = np.array([0, 0, 1, 3, 2, 0])
    predicted = np.array([1, 2, 0, 0, 2, 0])
    members = [np.array([0, 1]), np.array([0, 1, 3])]
    expected = [True, False, True, True, False, False]
    assert share_a_group(labels, predicted, members, 4).tolist() == expected
    # The first group alone does not hold 3.
    assert (
        share_a_group(labels, predicted, members[:1], 4).tolist()
        == [True, False, True] + [False] * 3
    )


def test_the_gate_opens_a_group_for_any_of_the_classes_that_it_looks_at():
    top = np.array([[0, 5], [5, 1], [4, 5]])
    assert opened(top, [np.array([0]), np.array([1, 2])]).tolist() == [True, True, False]


def test_healing_is_net_and_its_error_is_the_ratios():
    before, after = np.array([1, 0, 0, 1]) > 0, np.array([1, 1, 0, 0]) > 0
    possible = np.array([0, 1, 1, 0]) > 0
    # One corrected, one lost: differences 0, 1, 0, -1, whose standard error is sqrt(1/2) / 2. Of
    # half of the examples errors can be healed.
    assert healed(before, after, possible) == pytest.approx((0.0, math.sqrt(0.5)))


def test_a_ratio_without_noise_has_no_error():
    before = np.array([1, 0, 0, 1, 0]) > 0
    possible = np.array([0, 1, 1, 0, 0]) > 0
    assert healed(before, before | possible, possible) == (1.0, 0.0)
    assert healed(before, before, possible) == (0.0, 0.0)


def test_the_error_of_healing_is_what_resampling_finds():
    random = np.random.default_rng(0)
    n = 2000
    before = random.random(n) < 0.7
    possible = ~before & (random.random(n) < 0.6)
    after = np.where(possible, random.random(n) < 0.4, before & (random.random(n) < 0.98))
    _, error = healed(before, after, possible)
    ratios = []
    for _ in range(400):
        rows = random.integers(n, size=n)
        ratios.append(healed(before[rows], after[rows], possible[rows])[0])
    assert error == pytest.approx(np.std(ratios), rel=0.15)


def test_what_oversampling_adds_to_the_logits_worked_by_hand():
    # Of 10, 10 and 20 examples half of a batch is of class 0: 1/2, 1/6 and 1/3 of it, instead of
    # 1/4, 1/4 and 1/2.
    log_prior = mixture_log_prior(np.array([10, 10, 20]), np.array([0]), 0.5, 0.0)
    assert np.exp(log_prior) == pytest.approx([2, 2 / 3, 2 / 3])
    # Balanced, 3 and 1 examples of a group fill half of a batch alike: 1/4 each, instead of 3/8
    # and 1/8.
    balanced = mixture_log_prior(np.array([3, 1, 4]), np.array([0, 1]), 0.5, 1.0)
    assert np.exp(balanced) == pytest.approx([2 / 3, 2, 1])


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=3, max_size=8).filter(lambda counts: sum(counts[:2]) > 0),
    st.floats(0.05, 0.95),
    st.floats(0, 1),
)
def test_the_batches_hold_every_example_once(counts, fraction, balance):
    counts = np.array(counts)
    if counts[2:].sum() == 0:
        fraction = 1.0  # there is nothing to fill the rest with
    log_prior = mixture_log_prior(counts, np.array([0, 1]), fraction, balance)
    sampled = counts / counts.sum() * np.exp(log_prior)
    assert sampled.sum() == pytest.approx(1)
    assert sampled[:2].sum() == pytest.approx(fraction)
    assert (log_prior[counts == 0] == 0).all()


# How much is affordable


def test_a_pilots_batch_makes_as_many_steps_as_the_training_where_it_is_not_too_small():
    assert pilot_batch(256, 160 * 100, 160, 1) == 100
    assert pilot_batch(256, 160 * 20, 160, 1) == 64
    assert pilot_batch(256, 160 * 256, 160, 1) == 256
    assert pilot_batch(48, 160 * 20, 160, 1) == 48  # as it is
    assert pilot_batch(240, 160 * 100, 160, 6) == 102  # in 6 equal parts


def test_as_many_groups_as_can_be_trained_in_full_then_as_many_views():
    train, val = [100, 200, 300], [10, 20, 30]
    # Beside the full training of three groups 930 passes are left: 30 of val, 300 three times.
    assert plan_features(train, val, [2000, 1500, 930], 0, 4, 2) == FeaturePlan(3, 3, 1.0)
    assert plan_features(train, val, [2000, 1500, 2000], 0, 4, 2) == FeaturePlan(3, 4, 1.0)
    # Of three it is too little for one view.
    assert plan_features(train, val, [2000, 1500, 329], 0, 4, 2) == FeaturePlan(2, 4, 1.0)


def test_the_fewest_groups_get_what_there_is_where_none_can_be_trained_in_full():
    train, val = [100, 200, 300], [10, 20, 30]
    short = [-5, -10, -15]
    assert plan_features(train, val, short, 430, 4, 2) == FeaturePlan(2, 2, 1.0)
    assert plan_features(train, val, short, 120, 4, 2) == FeaturePlan(2, 1, 0.5)
    assert plan_features(train, val, short, 5, 4, 2) == FeaturePlan(2, 1, 0.0)


def test_one_group_is_enough_where_there_is_no_other():
    assert plan_features([100], [10], [-1], 60, 4, 1) == FeaturePlan(1, 1, 0.5)
