"""Classes without training examples never make a group of their own."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from clustering import PredictionStatistics, group_classes, group_trained_classes
from clustering.absent import join_nearest


def predictions(num_classes, seed=0, examples=600):
    """Pairs of classes 2 k and 2 k + 1 are confused. (probabilities, labels)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=examples)
    p = rng.uniform(0.01, 0.02, (examples, num_classes))
    p[np.arange(examples), labels] += rng.uniform(0.5, 1, examples)
    p[np.arange(examples), labels ^ 1] += rng.uniform(0.2, 1, examples)
    return p / p.sum(1, keepdims=True), labels


def statistics_of(p, labels, top_k=None):
    statistics = PredictionStatistics(p.shape[1], top_k=top_k)
    if top_k is None:
        statistics.update(p, labels)
        return statistics
    order = np.argsort(-p, 1)[:, :top_k]
    statistics.update(order, np.take_along_axis(p, order, 1), labels)
    return statistics


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("method", ["kmeans", "graph", "agglomerative", "random", "classifier"])
def test_every_group_has_a_class_with_examples(method, top_k):
    p, labels = predictions(40)
    trained = np.zeros(40, bool)
    trained[[3, 8, 9, 30, 31]] = True
    rows = np.random.default_rng(1).normal(size=(40, 6)) if method == "classifier" else None
    groups = group_trained_classes(
        statistics_of(p, labels, top_k), trained, 3, method=method, classifier_rows=rows
    )
    assert len(groups) == 3 and all(trained[classes].any() for classes in groups.members)
    assert np.array_equal(np.sort(np.concatenate(groups.members)), np.arange(40))


def test_with_examples_of_all_classes_the_groups_are_as_ever():
    statistics = statistics_of(*predictions(12))
    assert group_trained_classes(statistics, np.ones(12, bool), 4) == group_classes(statistics, 4)


def test_a_class_without_examples_joins_those_that_it_is_confused_with():
    statistics = statistics_of(*predictions(12))
    trained = np.arange(12) != 5  # its twin is 4
    groups = group_trained_classes(statistics, trained, 4)
    assert next(set(g.tolist()) for g in groups.members if 5 in g) >= {4, 5}


def test_a_class_that_is_confused_with_nobody_joins_the_smallest_group():
    confusion = csr_array(np.zeros((5, 5)))
    members = [np.array([0, 1]), np.array([2])]
    joined = join_nearest(members, np.array([3, 4]), confusion)
    assert [group.tolist() for group in joined] == [[0, 1, 4], [2, 3]]


@pytest.mark.parametrize("top_k", [None, 6])
def test_restricted_statistics_are_those_of_the_columns_that_are_left(top_k):
    p, labels = predictions(8)
    own = np.array([1, 4, 5])
    kept = statistics_of(p, labels, top_k).restricted(own)
    whole = statistics_of(p, labels, top_k)
    assert kept.num_classes == 3 and kept.num_examples == whole.num_examples
    np.testing.assert_allclose(kept.frequency, whole.frequency[own])
    np.testing.assert_allclose(
        kept.expected_confusion.toarray(), whole.expected_confusion.toarray()[np.ix_(own, own)]
    )
    if top_k is None:
        np.testing.assert_allclose(kept.covariance, whole.covariance[np.ix_(own, own)])
    else:
        np.testing.assert_allclose(
            kept.predictions.toarray(), whole.predictions.toarray()[:, own], rtol=1e-6
        )


def test_more_groups_than_classes_with_examples_is_an_error():
    statistics = statistics_of(*predictions(6))
    with pytest.raises(ValueError, match="num_groups is 3; for 2 classes"):
        group_trained_classes(statistics, np.arange(6) < 2, 3)


def test_weights_bound_the_groups_of_the_classes_with_examples():
    """Training examples: none of those that join the others' groups."""
    p, labels = predictions(40)
    examples = np.where(np.arange(40) < 8, 90, 30)
    examples[[5, 20, 21]] = 0
    trained = examples > 0
    groups = group_trained_classes(statistics_of(p, labels), trained, 4, weights=examples)
    loads = np.array([examples[classes].sum() for classes in groups.members])
    assert loads.sum() == examples.sum() and loads.max() <= 1.3 * loads.mean()
    assert len(np.unique(np.concatenate(groups.members))) == 40
