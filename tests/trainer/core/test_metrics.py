"""Metrics, against values worked by hand, scikit-learn, scipy's integrals and invariants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta
from sklearn.metrics import roc_auc_score

from trainer.core.metrics import (
    auroc,
    by_confidence,
    deep_ensemble_equivalent,
    dirichlet_uncertainty,
    disagreement,
    expected_calibration_error,
    format_equivalent,
    model_uncertainty,
    pairwise_kl,
    reliability,
    summarise,
)


def test_metrics_of_a_hand_worked_example():
    # Three examples of two classes (0, 0, 1). predictions: right at .8, wrong at .6 (so
    # p(true) = .4), right at .9.
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
    top5 = [[5, 0, 1, 2, 3], [0, 5, 1, 2, 3]]
    row = summarise([5, 5], top5, np.full((2, 5), 0.2), [0.2, 0.2], [1, 1])
    assert row["macro_top1"] == 0.5


def random_members(*shape, seed=0):
    """Log-probabilities [K, n, C]."""
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * logits).log_softmax(-1)


def test_model_uncertainty_by_hand():
    p = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.9, 0.1]], [[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]])
    # Certain of different classes: log 2.  Both unsure alike: 0.
    # H[.7, .3] - (H[.9, .1] + log 2) / 2 = .1018.
    expected = torch.tensor([math.log(2), 0.0, 0.1018])
    torch.testing.assert_close(model_uncertainty(p), expected, rtol=1e-3, atol=0)


@given(seed=st.integers(0, 999), K=st.integers(1, 6))
def test_model_uncertainty_is_the_mean_kl_from_the_mean_and_lies_between_0_and_log_k(seed, K):
    p = random_members(K, 4, 5, seed=seed).exp()
    uncertainty = model_uncertainty(p).double()
    kl = (p * (p / p.mean(0)).log()).sum(-1).mean(0)
    torch.testing.assert_close(uncertainty, kl, rtol=1e-5, atol=1e-7)
    assert (uncertainty >= 0).all() and (uncertainty <= math.log(K) + 1e-6).all()


def test_model_uncertainty_of_1e_8_is_not_lost_in_float32_entropies():
    p = torch.tensor([[[0.5 + 1e-4, 0.5 - 1e-4]], [[0.5 - 1e-4, 0.5 + 1e-4]]])
    # log 2 - H[1/2 + d] = 2 d^2 for small d.
    assert float(model_uncertainty(p)) == pytest.approx(2e-8, rel=1e-2)


BETAS = [(1.0, 1.0), (0.2, 3.0), (40.0, 60.0), (1001.0, 1.0), (0.05, 0.05)]


@pytest.mark.parametrize("a, b", BETAS)
def test_dirichlet_uncertainty_agrees_with_an_integral_over_the_members(a, b):
    """Of two classes Dir(alpha) is a Beta: H[mean] - integral of its density times the entropy."""

    def entropy(x):
        return -sum(p * math.log(p) for p in (x, 1 - x) if p > 0)

    def integral(low, high):
        return quad(lambda x: beta.pdf(x, a, b) * entropy(x), low, high, limit=200)[0]

    splits = beta.ppf([1e-6, 0.01, 0.5, 0.99, 1 - 1e-6], a, b)
    edges = [0, *sorted({float(split) for split in splits if 0 < split < 1}), 1]
    expected = entropy(a / (a + b)) - sum(map(integral, edges, edges[1:]))
    logits = torch.tensor([[math.log(a), math.log(b)]], dtype=torch.float64)
    assert float(dirichlet_uncertainty(logits)) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_dirichlet_uncertainty_stays_finite_and_falls_with_the_evidence():
    evidence = torch.tensor([-2000.0, -5.0, 0.0, 5.0, 20.0, 2000.0])
    logits = torch.tensor([[0.0, 1.0, 2.0]]) + evidence[:, None]
    uncertainty = dirichlet_uncertainty(logits)
    assert uncertainty.isfinite().all()
    assert (uncertainty[:-1] >= uncertainty[1:]).all() and float(uncertainty[-1]) < 1e-9
    # Without evidence each draw is certain of one class: the uncertainty is the mean's entropy.
    p = logits[0].softmax(-1)
    torch.testing.assert_close(uncertainty[0], -(p * p.log()).sum())


def test_pairwise_kl_by_hand():
    p = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])
    # KL(p_0 || p_1) = log(4 / 3) / 2, KL(p_1 || p_0) = log(1 / 2) / 4 + 3 log(3 / 2) / 4.
    expected = (math.log(4 / 3) / 2 - math.log(2) / 4 + 0.75 * math.log(1.5)) / 2
    torch.testing.assert_close(pairwise_kl(p.log()), torch.tensor([expected]))


@given(seed=st.integers(0, 999), K=st.integers(2, 5))
def test_pairwise_kl_agrees_with_a_loop_over_pairs(seed, K):
    log_p = random_members(K, 3, 4, seed=seed)
    pairs = [(j, k) for j in range(K) for k in range(K) if j != k]
    looped = sum((log_p[j].exp() * (log_p[j] - log_p[k])).sum(-1) for j, k in pairs) / len(pairs)
    torch.testing.assert_close(pairwise_kl(log_p).double(), looped, rtol=1e-5, atol=1e-7)
    assert (pairwise_kl(log_p[:1].expand(K, 3, 4)) < 1e-14).all()  # members that are alike


def test_pairwise_kl_of_excluded_classes():
    """0 log 0 is 0 where all members exclude a class, and inf where one of them does not."""
    alike = torch.tensor([[[0.5, 0.5, 0.0]], [[0.5, 0.5, 0.0]]]).log()
    assert float(pairwise_kl(alike)) == 0
    apart = torch.tensor([[[0.5, 0.5, 0.0]], [[0.25, 0.25, 0.5]]]).log()
    assert float(pairwise_kl(apart)) == math.inf


def test_disagreement_is_the_fraction_of_pairs_that_vote_apart():
    votes = torch.tensor([[0, 1, 0], [0, 1, 1], [0, 0, 2]])  # three members, three examples
    p = torch.nn.functional.one_hot(votes, 3) * 0.7 + 0.1
    torch.testing.assert_close(disagreement(p), torch.tensor([0.0, 2 / 3, 1.0]))


def test_diversity_needs_two_members():
    for metric in (pairwise_kl, disagreement):
        with pytest.raises(ValueError, match="there is 1"):
            metric(random_members(1, 3, 4))


def test_values_by_confidence_by_hand():
    rows = by_confidence([0.1, 0.2, 0.9, 0.5], [1.0, 3.0, 8.0, 5.0], bins=2)
    assert rows == [
        {"lo": 0.0, "hi": 0.5, "count": 3, "confidence": pytest.approx(0.8 / 3), "value": 3.0},
        {"lo": 0.5, "hi": 1.0, "count": 1, "confidence": 0.9, "value": 8.0},
    ]


# {NLL: size}, of ensembles of 1 to 4 members with NLLs 0.8, 0.7, 0.65 and 0.63.
EQUIVALENTS = {0.9: 1.0, 0.8: 1.0, 0.75: 1.5, 0.7: 2.0, 0.68: 2.4, 0.65: 3.0, 0.64: 3.5, 0.63: 4.0}


@pytest.mark.parametrize("nll, expected", [*EQUIVALENTS.items(), (0.62, math.inf)])
def test_deep_ensemble_equivalent_by_hand(nll, expected):
    assert deep_ensemble_equivalent(nll, [0.8, 0.7, 0.65, 0.63]) == pytest.approx(expected)


def test_the_first_descent_counts_where_a_further_member_hurt():
    nlls = [1.0, 0.8, 0.9, 0.6]
    # Not 3.17, where the line crosses this NLL again.
    assert deep_ensemble_equivalent(0.85, nlls) == pytest.approx(1.75)
    assert deep_ensemble_equivalent(0.75, nlls) == pytest.approx(3.5)
    assert deep_ensemble_equivalent(0.8, [1.0, 0.8, 0.8]) == 2


@given(st.lists(st.floats(0.01, 9), min_size=1, max_size=6), st.floats(0.01, 9), st.floats(0.01, 9))
def test_a_lower_nll_is_never_worth_fewer_members(nlls, first, second):
    better, worse = min(first, second), max(first, second)
    size = deep_ensemble_equivalent(better, nlls)
    assert size >= deep_ensemble_equivalent(worse, nlls) >= 1
    assert math.isinf(size) or size <= len(nlls)
    # That many members, on the line between two sizes, are exactly as good.
    if 1 < size < math.inf:
        assert np.interp(size, range(1, len(nlls) + 1), nlls) == pytest.approx(better, rel=1e-6)


def test_equivalents_are_printed_with_two_places_or_as_more_than_the_largest():
    assert (format_equivalent(2.744, 4), format_equivalent(math.inf, 4)) == ("2.74", ">4")


def test_deep_ensemble_equivalent_refuses_what_is_not_a_number():
    for nll, nlls in ((math.nan, [1.0]), (1.0, []), (1.0, [1.0, math.nan])):
        with pytest.raises(ValueError, match="needs NLLs"):
            deep_ensemble_equivalent(nll, nlls)


def test_auroc_by_hand():
    # Pairs won: 3 beats 1 and 2. 2 beats 1 and ties 2: (2 + 1.5) / 4.
    assert auroc([3, 2], [1, 2]) == pytest.approx(3.5 / 4)
    assert auroc([5, 6], [1, 2, 3]) == 1 and auroc([0.5], [0.5, 0.5]) == 0.5


scores = st.lists(st.integers(-3, 3), min_size=1, max_size=20)


@given(scores, scores)
def test_auroc_agrees_with_scikit_learn(inside, outside):
    oracle = roc_auc_score([1] * len(inside) + [0] * len(outside), inside + outside)
    assert auroc(inside, outside) == pytest.approx(oracle)
    assert auroc(outside, inside) == pytest.approx(1 - oracle)


def test_auroc_refuses_nothing_and_what_is_not_a_number():
    for inside, outside in (([], [1.0]), ([1.0], []), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match="numbers on both sides"):
            auroc(inside, outside)


def test_hydras_brier_score_is_one_less_than_the_usual():
    p, label = np.array([0.5, 0.3, 0.2]), 1
    usual = float(((p - np.eye(3)[label]) ** 2).sum())
    row = summarise([label], [[0, 1, 2, -1, -1]], [[0.5, 0.3, 0.2, 0, 0]], [0.3], [usual])
    assert row["brier"] == pytest.approx(0.25 + 0.49 + 0.04)
    assert row["brier"] - 1 == pytest.approx((p**2).sum() - 2 * p[label])
