"""The columns that are clustered: of the covariance, and of the confusion beyond chance."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from clustering import PredictionStatistics
from clustering.embedding import (
    affinity,
    confusion_columns,
    covariance_columns,
    mutual_confusion,
    unit_rows,
)


def gather(p, top_k=None):
    statistics = PredictionStatistics(p.shape[1], top_k)
    statistics.update(p)
    return statistics


@pytest.fixture
def p():
    return np.random.default_rng(0).dirichlet(np.full(12, 0.2), size=200)


@pytest.mark.parametrize("top_k", [None, 12], ids=["exact", "sparse"])
def test_full_rank_columns_have_the_inner_products_of_the_covariances_columns(p, top_k):
    covariance = np.cov(p.T, bias=True)
    columns = covariance_columns(gather(p, top_k), scaled=False, rank=12)
    np.testing.assert_allclose(columns @ columns.T, covariance @ covariance, atol=1e-6)


@pytest.mark.parametrize("top_k", [None, 12], ids=["exact", "sparse"])
def test_scaled_columns_have_the_cosines_of_the_correlations_columns(p, top_k):
    correlation = np.corrcoef(p.T)
    gram = correlation @ correlation
    lengths = np.sqrt(np.diag(gram))
    columns = covariance_columns(gather(p, top_k), rank=12)
    np.testing.assert_allclose(columns @ columns.T, gram / np.outer(lengths, lengths), atol=1e-4)


def test_top_k_columns_are_those_of_the_truncated_predictions(p):
    truncated = np.where(p >= np.sort(p, axis=1)[:, [-3]], p, 0)
    covariance = np.cov(truncated.T, bias=True)
    columns = covariance_columns(gather(p, 3), scaled=False, rank=12)
    np.testing.assert_allclose(columns @ columns.T, covariance @ covariance, atol=1e-6)


def test_low_rank_keeps_the_leading_eigenvectors():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.eye(4), 10, axis=1)
    p = rng.dirichlet(np.ones(4), size=300) @ groups / 10
    covariance = np.cov(p.T, bias=True)
    columns = covariance_columns(gather(p), scaled=False, rank=3)
    assert columns.shape == (40, 3)
    np.testing.assert_allclose(columns @ columns.T, covariance @ covariance, atol=1e-9)


def test_a_class_that_never_varies_is_a_row_of_zeros():
    p = np.array([[0.5, 0.3, 0.2, 0], [0.1, 0.7, 0.2, 0]])
    columns = covariance_columns(gather(p))
    np.testing.assert_allclose(np.linalg.norm(columns, axis=1), [1, 1, 0, 0], atol=1e-5)


def test_unit_rows_of_zero_stay_zero():
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0, 0]])), [[0.6, 0.8], [0, 0]])
    assert not unit_rows(np.zeros((2, 3))).any()


def test_affinity_is_the_fourth_root_of_the_expected_confusion_both_ways_beyond_chance():
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.6, 0.0]])
    # Row 0 predicts 0: pairs (0, 1) += .3, (0, 2) += .2.  Row 1 predicts 1: pair (0, 1) += .4.
    mutual = mutual_confusion(gather(p))
    by_hand = [[0, 0.7, 0.2], [0.7, 0, 0], [0.2, 0, 0]]
    np.testing.assert_allclose(mutual.toarray(), by_hand, atol=1e-6)
    # The totals are .9, .7, .2, together 1.8: chance is .9 x .7 / 1.8 = .35 and .9 x .2 / 1.8 = .1.
    beyond = [[0, 0.35, 0.1], [0.35, 0, 0], [0.1, 0, 0]]
    np.testing.assert_allclose(affinity(mutual).toarray() ** 4, beyond, atol=1e-6)


def test_a_pair_confused_no_more_than_chance_has_no_affinity():
    # 0 and 1, 2 and 3 are pairs. 1 and 2 are rarely confused.
    masses = np.array([[0, 8, 0, 0], [8, 0, 1, 0], [0, 1, 0, 8], [0, 0, 8, 0]], dtype=np.float32)
    confused = affinity(csr_array(masses)).toarray()
    assert confused[1, 2] == 0 and confused[0, 1] > 0 and confused[2, 3] > 0


def test_confusion_columns_are_those_of_the_affinity_scaled_both_ways(p):
    confused = affinity(mutual_confusion(gather(p)))
    dense = confused.toarray().astype(float)
    totals = np.sqrt(dense.sum(axis=1))
    scaled = dense / np.outer(totals, totals)
    gram = scaled @ scaled
    lengths = np.sqrt(np.diag(gram))
    columns = confusion_columns(confused, rank=12)
    np.testing.assert_allclose(columns @ columns.T, gram / np.outer(lengths, lengths), atol=1e-4)


def test_a_class_without_confusion_is_a_row_of_zeros():
    statistics = gather(np.array([[0.6, 0.4, 0, 0], [0, 0, 1.0, 0]]))
    columns = confusion_columns(affinity(mutual_confusion(statistics)))
    np.testing.assert_allclose(np.linalg.norm(columns, axis=1), [1, 1, 0, 0], atol=1e-5)
