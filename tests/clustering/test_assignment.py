"""Assigning classes to groups of bounded size, and the local search that improves it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

import clustering.assignment
from clustering.assignment import (
    assign,
    captured_mass,
    fill_empty,
    local_search,
    place,
    sizes_of,
)


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 6), st.integers(0, 8))
@settings(deadline=None)
def test_assign_keeps_to_capacities_and_leaves_out_no_row_that_fits(seed, rows, groups, largest):
    rng = np.random.default_rng(seed)
    capacities = rng.integers(0, largest + 1, groups)
    assigned = assign(rng.random((rows, groups)), capacities)
    assert (np.bincount(assigned[assigned >= 0], minlength=groups) <= capacities).all()
    assert (assigned >= 0).sum() == min(rows, capacities.sum())


def test_assign_with_capacity_for_all_gives_every_row_its_best_group():
    scores = np.random.default_rng(0).random((20, 5))
    assert (assign(scores.copy(), np.full(5, 20)) == scores.argmax(axis=1)).all()


def test_a_full_group_keeps_the_rows_that_would_lose_most():
    scores = np.array([[1.0, 0.9], [1.0, 0.1], [1.0, 0.5]])
    assert assign(scores, np.array([1, 2])).tolist() == [1, 0, 1]


def test_weights_of_one_are_no_weights():
    scores = np.random.default_rng(0).random((40, 5))
    room = np.array([3, 9, 0, 20, 7])
    assert (assign(scores, room) == assign(scores, room, np.ones(40, np.int64))).all()


def test_a_heavy_row_chooses_before_the_light_ones_that_fit_into_what_is_left():
    """All want the first group, and the heavy one would lose least by another."""
    scores = np.array([[1.0, 0.9], [1.0, 0.1], [1.0, 0.2]])
    assert assign(scores, np.array([5, 5]), np.array([5, 2, 3])).tolist() == [0, 1, 1]


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 6))
@settings(deadline=None)
def test_weights_keep_to_the_room_and_a_row_left_out_fits_nowhere(seed, rows, groups):
    rng = np.random.default_rng(seed)
    room, weights = rng.integers(0, 20, groups), rng.integers(0, 12, rows)
    assigned = assign(rng.random((rows, groups)), room, weights)
    left = room - sizes_of(assigned, groups, weights)
    assert (left >= 0).all()
    assert (weights[assigned < 0] > left.max()).all()


def test_a_row_above_all_room_is_alone_and_the_others_keep_to_theirs():
    assigned = place(np.ones((4, 3)), np.array([4, 4, 4]), np.array([2, 9, 3, 2]))
    loads = sizes_of(assigned, 3, np.array([2, 9, 3, 2]))
    assert sorted(loads) == [3, 4, 9] and (assigned == assigned[1]).sum() == 1


def test_sizes_are_sums_of_weights_over_every_membership():
    member_of = np.array([[0, 1], [1, -1], [0, 2]])
    assert sizes_of(member_of, 3, np.array([5, 1, 2])).tolist() == [7, 6, 2]
    assert sizes_of(member_of, 3).tolist() == [2, 2, 1]


def test_forbidden_groups_are_not_given():
    scores = np.array([[-np.inf, 0.0], [-np.inf, -np.inf]])
    assert assign(scores, np.array([5, 5])).tolist() == [1, -1]


def test_assign_is_within_5_percent_of_the_best_assignment_on_average():
    assignments = itertools.product(range(3), repeat=6)
    choices = np.array([groups for groups in assignments if np.bincount(groups).max() <= 2])
    rows = np.arange(6)
    ratios = []
    for seed in range(100):
        scores = np.random.default_rng(seed).random((6, 3))
        assigned = assign(scores.copy(), np.full(3, 2))
        ratios.append(scores[rows, assigned].sum() / scores[rows, choices].sum(axis=1).max())
    assert np.mean(ratios) >= 0.95


def random_affinity(seed, n):
    a = np.random.default_rng(seed).exponential(size=(n, n)) ** 3
    return csr_array(np.triu(a, 1) + np.triu(a, 1).T, dtype=np.float32)


@given(st.integers(0, 2**32), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_local_search_never_loses_and_keeps_to_the_size(seed, memberships):
    affinity = random_affinity(seed, 24)
    start = np.full((24, memberships), -1, dtype=np.int32)
    start[:, 0] = np.arange(24) % 4
    size = 7 * memberships
    member_of = local_search(affinity, start, 4, size, seed=seed)
    assert captured_mass(affinity, member_of) >= captured_mass(affinity, start)
    assert sizes_of(member_of, 4).max() <= size
    for row in member_of:
        assert len(set(row[row >= 0])) == (row >= 0).sum()


def test_captured_mass_counts_a_pair_once_whatever_the_number_of_its_groups():
    affinity = csr_array(np.array([[0, 2, 1], [2, 0, 0], [1, 0, 0]], dtype=np.float32))
    assert captured_mass(affinity, np.array([[0, 1], [0, 1], [2, -1]])) == 4
    assert captured_mass(affinity, np.array([[0, -1], [1, -1], [2, -1]])) == 0
    assert captured_mass(affinity, np.array([[0, 1], [2, 1], [0, -1]])) == 6


def test_local_search_undoes_a_swap():
    blocks = np.kron(np.eye(3), np.ones((8, 8)) - np.eye(8)).astype(np.float32)
    start = np.repeat(np.arange(3), 8)
    start[[0, 8]] = start[[8, 0]]
    member_of = local_search(csr_array(blocks), start[:, None], 3, 8)
    assert captured_mass(csr_array(blocks), member_of) == blocks.sum()


def test_fill_empty_takes_from_the_largest():
    filled = fill_empty(np.array([[0], [0], [0], [2], [2]]), 4)
    assert (sizes_of(filled, 4) >= 1).all()
    assert sizes_of(filled, 4).sum() == 5


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_the_block_size_changes_no_bound(monkeypatch, block):
    monkeypatch.setattr(clustering.assignment, "_BLOCK_SCORES", block)
    start = np.stack([np.arange(24) % 4, np.full(24, -1)], axis=1)
    member_of = local_search(random_affinity(0, 24), start, 4, 13)
    assert sizes_of(member_of, 4).max() <= 13 and (member_of >= 0).all()
