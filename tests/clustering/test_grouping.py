"""group_classes: planted groups are found, within capacity, overlap and coverage."""

import importlib.util
import itertools
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

import clustering.methods
from clustering import (
    METHODS,
    ClassGroups,
    PredictionStatistics,
    captured_unlabelled,
    group_classes,
)
from clustering.methods import InitialGroups

_spec = importlib.util.spec_from_file_location("planted", Path(__file__).with_name("planted.py"))
assert _spec is not None and _spec.loader is not None
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

LEARNED = [method for method in METHODS if method != "random"]
WITHOUT_ROWS = [method for method in METHODS if method != "classifier"]


def planted_statistics(num_classes, num_groups, per_class, exact=False, **options):
    predictions = planted.planted_predictions(num_classes, num_groups, per_class, **options)
    indices, values, labels, group_of = predictions
    if not exact:
        statistics = PredictionStatistics(num_classes, indices.shape[1])
        statistics.update(indices, values, labels)
        return statistics, group_of
    rest = (1 - values.sum(axis=1, keepdims=True)) / num_classes
    p = np.tile(rest, (1, num_classes))
    rows, columns = np.nonzero(indices >= 0)
    p[rows, indices[rows, columns]] += values[rows, columns]
    statistics = PredictionStatistics(num_classes)
    statistics.update(p, labels=labels)
    return statistics, group_of


def memberships_of(groups):
    """How many groups each class is in, [C]."""
    return groups.membership().sum(axis=1)


@pytest.fixture(scope="module")
def small():
    """60 classes in 6 planted groups, and which."""
    return planted_statistics(60, 6, 20)


def arguments_of(method, group_of) -> dict[str, Any]:
    if method != "classifier":
        return {"method": method}
    directions = np.random.default_rng(0).standard_normal((group_of.max() + 1, 16))
    noise = np.random.default_rng(1).standard_normal((len(group_of), 16))
    return {"method": method, "classifier_rows": directions[group_of] + 0.3 * noise}


@st.composite
def weighted_cases(draw):
    """Statistics of a few classes, and what each class counts for."""
    num_classes = draw(st.integers(4, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    statistics = PredictionStatistics(num_classes, top_k=3)
    statistics.update(rng.dirichlet(np.full(num_classes, 0.2), 60))
    spread = draw(st.sampled_from([1, 3, 30, 1000]))
    options = {
        "num_groups": draw(st.integers(1, max(1, num_classes // 3))),
        "capacity": draw(st.sampled_from([1.0, 1.3, 2.0])),
        "method": draw(st.sampled_from(["kmeans", "graph", "raw"])),
        "seed": draw(st.integers(0, 3)),
    }
    if options["num_groups"] > 1 and draw(st.booleans()):
        options |= {"overlap": 2, "coverage": draw(st.sampled_from([None, 0.8]))}
    return statistics, rng.integers(0, spread + 1, num_classes) + (spread == 1), options


@given(weighted_cases())
@settings(deadline=None, max_examples=40)
def test_groups_bound_the_weights_of_their_classes(case):
    """By capacity x mean, and where a class is too heavy to fit, by mean + the heaviest inside."""
    statistics, weights, options = case
    groups = group_classes(statistics, weights=weights, **options)
    assert groups == group_classes(statistics, weights=weights, **options)
    assert (memberships_of(groups) >= 1).all()
    loads = np.array([weights[classes].sum() for classes in groups.members])
    # A further membership that found no room is not given: the mean was planned to be larger.
    planned = max(loads.sum(), weights.sum() * options.get("overlap", 1)) / len(groups)
    bound = max(np.floor(options["capacity"] * planned + 1e-9), np.ceil(planned))
    heaviest = np.array([weights[classes].max() for classes in groups.members])
    assert (loads <= np.maximum(bound, planned + heaviest)).all()
    if weights.max() <= (options["capacity"] - 1) * loads.mean():
        assert loads.max() <= bound


def test_weights_bound_examples_where_sizes_bound_classes():
    """A long tail: bounded in classes the frequent ones' group has most of the examples."""
    statistics, group_of = planted_statistics(120, 6, 20)
    weights = np.where(group_of == 0, 100, 10)
    loads = {}
    for name, given_weights in (("classes", None), ("examples", weights)):
        groups = group_classes(statistics, 6, weights=given_weights)
        loads[name] = np.array([weights[classes].sum() for classes in groups.members])
    mean = weights.sum() / 6
    assert loads["classes"].max() > 2 * mean
    assert loads["examples"].max() <= 1.3 * mean


def test_equal_weights_give_the_groups_of_no_weights(small):
    for options in ({}, {"overlap": 2}, {"overlap": 2, "coverage": 0.9}):
        groups = group_classes(small[0], 4, weights=np.full(60, 1), **options)
        assert groups == group_classes(small[0], 4, **options)


@pytest.mark.parametrize(
    "weights, method, message",
    [
        (np.ones(3, np.int64), "kmeans", "weights are int64 \\(3,\\); they must be integers"),
        (np.full(24, 0.5), "kmeans", "weights are float64 \\(24,\\); they must be integers"),
        (np.full(24, -1), "kmeans", "weights are -1 to -1; none may be negative"),
        (np.zeros(24, np.int64), "graph", "weights are 0 to 0; none may be negative, and one"),
        (np.ones(24, np.int64), "random", "method 'random' chooses all groups itself"),
    ],
)
def test_weights_that_bound_nothing_are_refused(weights, method, message):
    statistics, _ = planted_statistics(24, 4, 5)
    with pytest.raises(ValueError, match=message):
        group_classes(statistics, 4, method=method, weights=weights)


@pytest.mark.parametrize("method", [method for method in LEARNED if method != "raw"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "top10"])
def test_planted_groups_are_found(method, exact):
    statistics, group_of = planted_statistics(60, 6, 20, exact=exact)
    groups = group_classes(statistics, 6, **arguments_of(method, group_of))
    assert adjusted_rand_score(group_of, planted.labels_of(groups)) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_many_planted_groups_are_found(seed):
    statistics, group_of = planted_statistics(3000, 60, 10, seed=seed)
    groups = group_classes(statistics, 60, seed=seed)
    assert adjusted_rand_score(group_of, planted.labels_of(groups)) >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_classes", [15_000, 100_000])
def test_planted_groups_are_found_among_many_classes(num_classes):
    statistics, group_of = planted_statistics(num_classes, 300, 10)
    groups = group_classes(statistics, 300)
    assert adjusted_rand_score(group_of, planted.labels_of(groups)) >= 0.95


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("overlap", [1, 2, 3])
@pytest.mark.parametrize("capacity", [1.0, 1.3])
def test_no_group_is_larger_than_the_capacity_and_every_class_has_its_groups(
    small, method, overlap, capacity
):
    statistics, group_of = small
    arguments = arguments_of(method, group_of)
    groups = group_classes(statistics, 7, capacity=capacity, overlap=overlap, **arguments)
    assert len(groups) == 7
    mean = 60 * overlap / 7
    assert groups.sizes.max() <= max(np.floor(capacity * mean), np.ceil(mean))
    memberships = memberships_of(groups)
    assert memberships.max() == overlap and memberships.min() >= 1
    assert memberships.sum() >= 0.95 * 60 * overlap


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_groups(small, method):
    statistics, group_of = small
    arguments: dict[str, Any] = {**arguments_of(method, group_of), "overlap": 2, "seed": 5}
    assert group_classes(statistics, 6, **arguments) == group_classes(statistics, 6, **arguments)


def test_groups_depend_on_no_label(small):
    indices, values, labels, _ = planted.planted_predictions(60, 6, 20)
    blind = PredictionStatistics(60, 10)
    blind.update(indices, values)
    assert group_classes(blind, 6, overlap=2) == group_classes(small[0], 6, overlap=2)


def test_refinement_captures_more_and_a_second_membership_more_again():
    statistics, _ = planted_statistics(300, 30, 10, noise=0.5)

    def captured(**options: Any):
        return captured_unlabelled(group_classes(statistics, 10, **options), statistics)[0]

    fractions = [captured(method="random"), captured(refine=False)]
    fractions += [captured(overlap=overlap) for overlap in (1, 2, 3)]
    assert fractions == sorted(fractions)
    assert fractions[2] > fractions[0] + 0.2 and fractions[3] > fractions[2] + 0.1


def class_8_between_two_groups():
    """Classes 0-3 and 4-7 are confused among themselves, class 8 with 0-3 and with 4-7."""
    statistics = PredictionStatistics(9, 2)
    pairs = [*itertools.permutations(range(4), 2), *itertools.permutations(range(4, 8), 2)]
    pairs = np.array(3 * [*pairs, *itertools.product([8], range(8))])
    statistics.update(pairs, np.tile([0.6, 0.4], (len(pairs), 1)))
    return statistics


def test_a_class_between_two_groups_joins_both():
    statistics = class_8_between_two_groups()
    groups = group_classes(statistics, 2, capacity=1.2, overlap=1)
    assert sorted(map(len, groups.members)) == [4, 5]
    both = group_classes(statistics, 3, capacity=1.0, overlap=2)
    assert captured_unlabelled(both, statistics)[0] == 1


@pytest.mark.parametrize("method", LEARNED)
def test_a_coverage_is_reached_and_hardly_passed_within_the_capacity(method):
    statistics, group_of = planted_statistics(120, 24, 10, noise=0.5)
    arguments = arguments_of(method, group_of)
    groups = group_classes(statistics, 8, overlap=3, coverage=0.75, **arguments)
    assert 0.75 <= captured_unlabelled(groups, statistics)[0] < 0.8
    memberships = memberships_of(groups)
    assert memberships.min() >= 1 and memberships.max() <= 3
    assert groups.sizes.max() <= max(1.3 * groups.sizes.mean(), np.ceil(groups.sizes.mean()))


def test_a_coverage_costs_fewer_memberships_than_putting_every_class_in_two_groups():
    # Every third class is confused with classes of any group, the others with their own group's.
    noise = np.where(np.arange(300).repeat(10) % 3 == 0, 0.6, 0)[:, None]
    statistics, _ = planted_statistics(300, 10, 10, noise=noise)
    both = group_classes(statistics, 10, overlap=2)
    captured, _ = captured_unlabelled(both, statistics)
    covering = group_classes(statistics, 10, overlap=3, coverage=captured)
    assert captured_unlabelled(covering, statistics)[0] >= captured
    assert covering.sizes.sum() < 0.95 * both.sizes.sum()


def test_where_disjoint_groups_capture_enough_no_class_joins_another(small):
    statistics, _ = small
    disjoint = group_classes(statistics, 6)
    captured, _ = captured_unlabelled(disjoint, statistics)
    assert group_classes(statistics, 6, overlap=3, coverage=captured - 0.01) == disjoint


def test_only_the_class_between_two_groups_joins_both():
    groups = group_classes(class_8_between_two_groups(), 2, overlap=2, coverage=1.0)
    both = [[0, 1, 2, 3, 8], [4, 5, 6, 7, 8]]
    assert sorted(classes.tolist() for classes in groups.members) == both


def test_a_coverage_out_of_reach_ends_where_all_overlap_is_used():
    statistics, _ = planted_statistics(300, 30, 10, noise=0.9)
    groups = group_classes(statistics, 30, overlap=2, coverage=1.0)
    assert captured_unlabelled(groups, statistics)[0] < 1
    assert memberships_of(groups).max() == 2 and groups.sizes.sum() >= 0.95 * 600


def test_without_confusion_no_class_joins_a_second_group():
    assert group_classes(certain(6, [0, 1, 2]), 3, overlap=2, coverage=0.9).sizes.sum() == 6


def test_where_raw_columns_and_correlation_fail_scaled_confusion_finds_the_groups():
    # The generalist is surer of half the groups: in raw distances these hardly count, in those of
    # the correlation they are lost in the ones of the diagonal.
    indices, values, labels, group_of = planted.planted_predictions(200, 10, 20)
    sure = group_of[labels] >= 5
    values[sure, 1:] *= 0.3
    values[sure, 0] = 1 - values[sure, 1:].sum(axis=1)
    statistics = PredictionStatistics(200, 10)
    statistics.update(indices, values)
    score = {}
    for method in ("kmeans", "correlation", "raw"):
        groups = group_classes(statistics, 10, method, capacity=None, refine=False)
        score[method] = adjusted_rand_score(group_of, planted.labels_of(groups))
    assert score["kmeans"] == 1 and score["correlation"] < 0.8 and score["raw"] < 0.5


def test_classifier_rows_may_be_a_torch_parameter(small):
    statistics, group_of = small
    rows = torch.as_tensor(arguments_of("classifier", group_of)["classifier_rows"])
    rows = torch.nn.Parameter(rows)
    groups = group_classes(statistics, 6, "classifier", classifier_rows=rows)
    assert adjusted_rand_score(group_of, planted.labels_of(groups)) == 1


# Methods of the user


@pytest.fixture
def use_method(monkeypatch):
    """function -> a row of METHODS called "mine" and a module that holds it."""

    def use(function):
        module = ModuleType("methods_of_mine")
        module.mine = function  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "methods_of_mine", module)
        monkeypatch.setitem(METHODS, "mine", "methods_of_mine:mine")

    return use


def test_a_new_method_is_one_row_and_one_function(small, use_method):
    statistics, group_of = small
    use_method(lambda num_groups, seed: InitialGroups(group_of, refine=False))
    groups = group_classes(statistics, 6, "mine")
    assert (planted.labels_of(groups) == group_of).all()


def test_a_method_gets_only_the_arguments_that_it_declares(small, use_method):
    statistics, group_of = small
    received = []

    def mine(classifier_rows, overlap, confused, seed):
        received.extend([classifier_rows, overlap, confused.shape, seed])
        return InitialGroups(group_of)

    use_method(mine)
    group_classes(statistics, 6, "mine", overlap=2, seed=3, classifier_rows=[7])
    assert received == [[7], 2, (60, 60), 3]
    with pytest.raises(ValueError, match="classifier_rows"):
        group_classes(statistics, 6, "mine")


def test_labels_without_columns_are_kept_within_the_capacity(small, use_method):
    statistics, _ = small
    use_method(lambda seed: InitialGroups(np.zeros(60, dtype=int), refine=False))
    groups = group_classes(statistics, 6, "mine", capacity=1.0)
    assert groups.sizes.tolist() == [10] * 6


def test_labels_of_other_groups_are_refused(small, use_method):
    use_method(lambda seed: InitialGroups(np.full(60, 6)))
    with pytest.raises(ValueError, match="from 6 to 6; they must be .60., from 0 to 5"):
        group_classes(small[0], 6, "mine")


def test_a_method_that_chooses_all_groups_leaves_a_coverage_nothing(small, use_method):
    use_method(lambda overlap: InitialGroups(np.zeros((60, overlap), dtype=int)))
    with pytest.raises(ValueError, match="method 'mine' chooses all groups itself"):
        group_classes(small[0], 6, "mine", overlap=2, coverage=0.5)


def test_importing_the_choices_loads_nothing_heavy():
    code = (
        "import sys, clustering.choices; from clustering import METHODS; METHODS['kmeans']; "
        "heavy = {'torch', 'sklearn', 'scipy', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Degenerate inputs


def certain(num_classes, predicted, **options):
    statistics = PredictionStatistics(num_classes, **options)
    statistics.update(np.eye(num_classes)[predicted])
    return statistics


@pytest.mark.parametrize("method", WITHOUT_ROWS)
@pytest.mark.parametrize("top_k", [None, 1], ids=["exact", "top1"])
@pytest.mark.parametrize(
    "predicted",
    [[0, 1, 2, 3, 4, 5], [0, 0, 0], [0, 3, 3, 0]],
    ids=["never unsure", "one class only, no variance", "most classes never predicted"],
)
def test_predictions_without_confusion_give_bounded_groups_of_every_class(method, top_k, predicted):
    for overlap in (1, 2):
        groups = group_classes(certain(6, predicted, top_k=top_k), 3, method, overlap=overlap)
        assert len(groups) == 3 and memberships_of(groups).min() >= 1
        assert groups.sizes.max() <= max(np.floor(1.3 * 6 * overlap / 3), np.ceil(6 * overlap / 3))


@pytest.mark.parametrize("method", WITHOUT_ROWS)
def test_one_class_is_one_group(method):
    assert group_classes(certain(1, [0, 0]), 1, method) == ClassGroups([[0]], 1)


@pytest.mark.parametrize("method", WITHOUT_ROWS)
def test_as_many_groups_as_classes_leaves_none_empty(method):
    for capacity in (1.3, None):
        groups = group_classes(certain(5, [0, 1, 1]), 5, method, capacity=capacity)
        assert sorted(classes.tolist() for classes in groups.members) == [[0], [1], [2], [3], [4]]


def test_fewer_distinct_columns_than_groups_still_fill_every_group():
    statistics = PredictionStatistics(8)
    statistics.update(np.repeat([[0.25] * 4 + [0] * 4, [0] * 4 + [0.25] * 4], 3, axis=0))
    groups = group_classes(statistics, 4, refine=False)
    assert len(groups) == 4 and groups.sizes.tolist() == [2, 2, 2, 2]


def test_without_capacity_one_group_may_take_nearly_all():
    groups = group_classes(certain(30, [0, 1]), 3, capacity=None, refine=False)
    assert groups.sizes.min() >= 1 and memberships_of(groups).min() >= 1


def test_one_group_holds_everything(small):
    assert group_classes(small[0], 1).sizes.tolist() == [60]


@st.composite
def degenerate(draw):
    """Statistics of few predictions of few kinds, and arguments of group_classes that fit them."""
    num_classes = draw(st.integers(1, 9))
    kinds = {
        "certain": np.eye(num_classes),
        "uniform": np.full((1, num_classes), 1 / num_classes),
        "halves": (np.eye(num_classes) + np.eye(num_classes)[::-1]) / 2,
        "nearly certain": 1e-7 / num_classes + (1 - 1e-7) * np.eye(num_classes),
    }
    possible = kinds[draw(st.sampled_from(sorted(kinds)))]
    chosen = draw(st.lists(st.integers(0, len(possible) - 1), min_size=1, max_size=6))
    statistics = PredictionStatistics(num_classes, draw(st.sampled_from([None, 1, 3])))
    statistics.update(possible[chosen])
    num_groups = draw(st.integers(1, num_classes))
    method = draw(st.sampled_from(list(METHODS)))
    arguments = {
        "num_groups": num_groups,
        "method": method,
        "overlap": draw(st.integers(1, min(3, num_groups))),
        "capacity": draw(st.sampled_from([1.0, 1.3, None])),
        "refine": draw(st.sampled_from([None, True, False])),
    }
    if arguments["overlap"] > 1 and method != "random":
        arguments["coverage"] = draw(st.sampled_from([None, 0.5, 1.0]))
    if method == "classifier":
        arguments["classifier_rows"] = np.zeros((num_classes, 2)) + draw(st.sampled_from([0, 1]))
    return statistics, arguments


@given(degenerate())
@settings(deadline=None, max_examples=80)
def test_whatever_the_statistics_groups_are_bounded_hold_every_class_and_none_is_empty(case):
    statistics, arguments = case
    groups = group_classes(statistics, **arguments)
    memberships = memberships_of(groups)
    assert len(groups) == arguments["num_groups"] and groups.sizes.min() >= 1
    assert memberships.min() >= 1 and memberships.max() <= arguments["overlap"]
    if arguments["capacity"] is not None:
        mean = groups.num_classes * arguments["overlap"] / len(groups)
        assert groups.sizes.max() <= max(np.floor(arguments["capacity"] * mean), np.ceil(mean))


# Errors

OF_ROWS = {"method": "classifier"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_groups": 61}, "num_groups is 61; for 60 classes it must be an integer from 1 to 60"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_groups": 2.5}, "num_groups is 2.5"),
        ({"overlap": 7}, "overlap is 7; with 6 groups a class can be in 1 to 6"),
        ({"overlap": 0}, "overlap is 0"),
        ({"capacity": 0.9}, "capacity is 0.9; below 1"),
        ({"capacity": float("nan")}, "capacity is nan"),
        ({"coverage": 0.0, "overlap": 2}, "coverage is 0.0; it is a share"),
        ({"coverage": 90, "overlap": 2}, "coverage is 90"),
        ({"coverage": float("nan"), "overlap": 2}, "coverage is nan"),
        ({"coverage": 0.9}, "overlap is 1 and method 'kmeans'; give an overlap of 2 or more"),
        ({"coverage": 0.9, "overlap": 2, "method": "random"}, "method 'random'"),
        ({"method": "magic"}, "method 'magic' is not one of kmeans, minibatch, correlation, raw"),
        ({"method": "classifier"}, "classifier_rows"),
        ({"classifier_rows": np.ones((60, 2))}, 'go with method="classifier"'),
        (OF_ROWS | {"classifier_rows": np.ones((6, 2))}, r"must be finite, \[60, features\]"),
        (OF_ROWS | {"classifier_rows": np.full((60, 2), np.nan)}, "finite"),
    ],
)
def test_an_error_names_the_value(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        group_classes(small[0], **({"num_groups": 6} | arguments))


def test_statistics_without_predictions_are_refused():
    with pytest.raises(ValueError, match="hold no predictions"):
        group_classes(PredictionStatistics(4), 2)


def test_comparing_all_pairs_stops_at_the_memory_limit(small, monkeypatch):
    monkeypatch.setattr(clustering.methods, "DENSE_BYTES", 8 * 59**2)
    with pytest.raises(ValueError, match="all pairs of 60 classes, above the limit"):
        group_classes(small[0], 6, "agglomerative")


def test_no_square_array_is_built_beyond_the_limit():
    statistics = PredictionStatistics(20_000)
    rng = np.random.default_rng(0)
    indices = rng.permuted(np.tile(np.arange(20_000), (1, 1)), axis=1).reshape(-1, 5)
    statistics.update(indices, np.tile([0.6, 0.1, 0.1, 0.1, 0.1], (len(indices), 1)))
    tracemalloc.start()
    group_classes(statistics, 20, overlap=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000**2 / 4
