"""The order in which a stream draws samples: a pure function of seed and position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.orders import ComputedOrder, balanced, expected_distinct, permuted, shuffled

settings.register_profile("data", max_examples=40, deadline=None)
settings.load_profile("data")


@given(count=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 10**6))
def test_every_id_occurs_once_per_epoch(count, seed, epoch):
    order = shuffled(count, seed)
    ids = order(np.arange(epoch * count, (epoch + 1) * count))
    assert sorted(ids.tolist()) == list(range(count))


@given(seed=st.integers(0, 1000), positions=st.lists(st.integers(0, 500), min_size=1, max_size=30))
def test_an_order_depends_on_seed_and_position_only(seed, positions):
    used, fresh = shuffled(37, seed), shuffled(37, seed)
    used(np.arange(1000))
    at_once = fresh(np.array(positions))
    assert at_once.tolist() == [int(used(np.array([position]))[0]) for position in positions]


def test_epochs_and_seeds_differ():
    order = shuffled(100, 0)
    first, second = order(np.arange(100)), order(np.arange(100, 200))
    assert (first != second).sum() > 80
    assert (first != shuffled(100, 1)(np.arange(100))).sum() > 80


@given(seed=st.integers(0, 100), counts=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_balance_0_is_every_id_once_per_epoch(seed, counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = balanced(labels, seed, 0.0)(np.arange(2 * len(labels)))
    assert sorted(ids[: len(labels)].tolist()) == list(range(len(labels)))
    assert sorted(ids[len(labels) :].tolist()) == list(range(len(labels)))


@given(
    seed=st.integers(0, 100),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    exponent=st.floats(0, 1),
)
def test_each_class_gets_its_weight_of_every_epoch_within_one_draw(seed, counts, exponent):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = balanced(labels, seed, exponent)
    weights = np.array(counts, float) ** (1 - exponent)
    exact = weights / weights.sum() * len(labels)
    for epoch in (0, 3):
        ids = order(np.arange(epoch * len(labels), (epoch + 1) * len(labels)))
        draws = np.bincount(labels[ids], minlength=len(counts))
        assert (abs(draws - exact) <= 1 + 1e-9).all()
        assert draws.min() >= 1


@given(seed=st.integers(0, 100), epochs=st.integers(1, 12))
def test_samples_of_a_class_take_turns(seed, epochs):
    labels = np.repeat([0, 1, 2], [50, 7, 1])
    ids = balanced(labels, seed, 1.0)(np.arange(epochs * len(labels)))
    times = np.bincount(ids, minlength=len(labels))
    for c in range(3):
        of_class = times[labels == c]
        assert of_class.max() - of_class.min() <= 1


def test_balance_1_on_a_tail_of_58_ids_by_hand():
    # 58 positions over 3 classes: 19.33 each, edges at 19.33, 38.67 and 58: 19, 20 and 19 points.
    labels = np.repeat([0, 1, 2], [50, 7, 1])
    ids = balanced(labels, 0, 1.0)(np.arange(58))
    assert np.bincount(labels[ids]).tolist() == [19, 20, 19]


def test_an_order_of_some_ids_yields_only_those():
    labels = np.arange(100) % 5
    chosen = np.flatnonzero(labels < 2)
    assert set(balanced(labels, 0, 0.5, chosen)(np.arange(400)).tolist()) == set(chosen.tolist())
    assert set(shuffled(chosen, 0)(np.arange(400)).tolist()) == set(chosen.tolist())


def test_distinct_classes_of_a_fair_draw_by_hand():
    # Two of the four samples a, a, b, c: 6 pairs, of which only (a, a) holds one class.
    assert expected_distinct([2, 1, 1], 2) == pytest.approx(11 / 6)
    assert expected_distinct([2, 1, 1], 4) == pytest.approx(3)
    # 100 of 100 x 50: close to the 100 (1 - 0.99^100) = 63.4 of a draw with replacement.
    assert expected_distinct([50] * 100, 100) == pytest.approx(63.7, abs=0.1)


def test_class_sorted_samples_are_mixed_as_by_a_fair_draw():
    # How mixing is measured: distinct classes per batch, over the number expected of a draw without
    # replacement.
    labels = np.repeat(np.arange(100), 50)
    ids = np.concatenate([shuffled(5000, seed)(np.arange(5000)) for seed in range(4)])
    distinct = [len(np.unique(labels[batch])) for batch in ids.reshape(-1, 100)]
    # A batch's number has a standard deviation of 3.0 (the occupancy problem's), the mean of 200
    # one of 0.21.
    assert np.mean(distinct) == pytest.approx(expected_distinct([50] * 100, 100), abs=4 * 0.21)
    # Samples in file order, or a buffer of 1,000, would start with 2 to 20.
    assert min(distinct) > 63.7 - 5 * 3.0


def test_an_exponent_beyond_1_is_refused():
    with pytest.raises(ValueError, match="between 0"):
        balanced(np.zeros(3, int), 0, 1.5)


@given(st.integers(1, 400), st.lists(st.integers(0, 2**63 - 1), min_size=6, max_size=6))
def test_a_computed_permutation_names_each_number_once(length, keys):
    images = permuted(np.arange(length), length, np.array(keys, np.uint64))
    assert sorted(images.tolist()) == list(range(length))


@given(st.integers(1, 200), st.sets(st.integers(0, 199)), st.integers(0, 99))
def test_an_epoch_of_a_computed_order_is_what_is_not_excluded(count, excluded, seed):
    excluded = np.array(sorted(id for id in excluded if id < count), np.int64)
    left = np.setdiff1d(np.arange(count), excluded)
    if not len(left):
        with pytest.raises(ValueError, match="at least one id"):
            ComputedOrder(count, excluded, seed)
        return
    order = ComputedOrder(count, excluded, seed)
    assert len(order) == len(left)
    for epoch in range(2):
        ids = order(epoch * len(left) + np.arange(len(left)))
        assert np.array_equal(np.sort(ids), left)


def test_a_computed_order_does_not_depend_on_how_much_is_asked_at_once():
    order = ComputedOrder(1000, np.arange(0, 1000, 7), 3)
    positions = np.arange(700, 1100)
    one_by_one = [int(order(np.array([position]))[0]) for position in positions]
    assert order(positions).tolist() == one_by_one


def test_a_computed_order_mixes_and_differs_between_epochs_and_seeds():
    n = 20_000
    first = ComputedOrder(n, np.array([], np.int64), 0)
    ids = first(np.arange(2 * n))
    epochs = ids[:n], ids[n:]
    other = ComputedOrder(n, np.array([], np.int64), 1)(np.arange(n))
    pairs = [(epochs[0], np.arange(n)), (epochs[0], epochs[1]), (epochs[0], other)]
    pairs.append((epochs[0][1:], epochs[0][:-1]))
    # The correlation of two independent permutations has a deviation of n^-1/2.
    for one, two in pairs:
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / np.sqrt(n)
    # Of the first tenth of an epoch each tenth of the ids has its share.
    shares = np.bincount(epochs[0][: n // 10] * 10 // n, minlength=10)
    assert np.abs(shares - n / 100).max() < 5 * np.sqrt(n / 100)
