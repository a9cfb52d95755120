"""How pilots are measured: by hand-worked numbers, and against sklearn, scipy and brute force."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

from ensemble import fit_temperature
from ensemble.fitting import TEMPERATURES, WEIGHTS, fit_temperature_to_losses, fit_weight_to_losses
from trainer.stages.pilots.forms import evenly
from trainer.stages.pilots.measuring import (
    Join,
    form_metrics,
    joined,
    losses_at_temperatures,
    losses_at_weights,
    of_examples,
    residual_correlation,
    residual_product,
)

F64 = torch.float64
ARITHMETIC, GEOMETRIC = Join("second", 1.0), Join("second", 0.0)
SHORT = Join("second", 0.0, 3)


@pytest.fixture(scope="module")
def predictions():
    """Log-probabilities of two networks that know the truth by noises of their own, and labels."""
    rng = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(800, 7, generator=rng, dtype=F64)
    labels = torch.multinomial(truth.softmax(1), 1, generator=rng)[:, 0]

    def guess(noise, sharpness):
        noisy = truth + noise * torch.randn(truth.shape, generator=rng, dtype=F64)
        return (sharpness * noisy).log_softmax(1)

    return guess(1.0, 2.0), guess(1.5, 0.4), labels


def test_a_form_is_measured_by_hand():
    log_q = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], dtype=F64).log()
    values = of_examples(log_q, torch.tensor([0, 0]))
    assert values["correct"].tolist() == [True, False]
    assert values["log_p"].exp().tolist() == pytest.approx([0.5, 0.2])
    # .5^2 + 2 * .25^2, and .8^2 + .2^2 + .6^2
    assert values["brier"].tolist() == pytest.approx([0.375, 1.04])


def test_the_gain_is_paired():
    """4 of 5 against 2 of 5: differences 1, 1, 0, 1, -1 of mean .4 and variance .64."""
    correct = np.array([1, 1, 1, 1, 0], bool)
    reference = np.array([0, 0, 1, 0, 1], bool)
    row = form_metrics(correct, np.log([0.5] * 5), np.full(5, 0.25), reference)
    assert row["top1"] == pytest.approx(0.8)
    assert row["gain"] == pytest.approx(0.4)
    assert row["gain_se"] == pytest.approx(math.sqrt(0.64 / 5))
    assert row["nll"] == pytest.approx(math.log(2)) and row["brier"] == pytest.approx(0.25)


def test_nll_and_brier_are_those_of_sklearn(predictions):
    log_p, _, labels = predictions
    values = of_examples(log_p, labels)
    p = log_p.exp().numpy()
    assert -float(values["log_p"].mean()) == pytest.approx(log_loss(labels.numpy(), p))
    hot = np.eye(7)[labels.numpy()]
    assert float(values["brier"].mean()) == pytest.approx(((p - hot) ** 2).sum(1).mean())
    assert values["correct"].double().mean() == (p.argmax(1) == labels.numpy()).mean()


def test_temperatures_from_losses_are_those_from_logits(predictions):
    for logits in predictions[:2]:
        for sharper in (0.07, 1.0, 9.0):
            losses = losses_at_temperatures(sharper * logits, predictions[2]).numpy()
            assert losses.shape == (800, len(TEMPERATURES))
            exact = fit_temperature(sharper * logits, predictions[2])
            assert fit_temperature_to_losses(losses) == pytest.approx(exact, rel=0.01)
    assert fit_temperature_to_losses(losses[:0]) == 1


def test_the_weight_of_a_linear_pool_is_that_of_a_bisection_on_the_labels_probabilities(
    predictions,
):
    """The NLL of (p + w q) / (1 + w) needs only what the two give the label."""
    own, other, labels = predictions
    losses = losses_at_weights(ARITHMETIC, own, other, labels).numpy()
    p, q = (each.gather(1, labels[:, None])[:, 0].exp().numpy() for each in (own, other))

    def nll(x):
        w = math.exp(x)
        return -np.log((p + w * q) / (1 + w)).mean() + x * x / (2 * len(labels))

    exact = minimize_scalar(nll, bounds=(-4, 4), method="bounded").x
    assert math.log(fit_weight_to_losses(losses)) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_on_a_shortlist_the_generalists_mass_is_shared_anew_and_the_rest_stands(predictions, k):
    own, other, labels = predictions
    join = Join("second", 0.0, k)
    log_q = joined(join, own, other, 2.0)
    torch.testing.assert_close(log_q.exp().sum(1), torch.ones(800, dtype=F64))
    for row in range(20):
        listed = own[row].topk(k).indices
        p, q = own[row].exp(), other[row].exp()
        pooled = p[listed] ** (1 / 3) * q[listed] ** (2 / 3)
        expected = p.clone()
        expected[listed] = p[listed].sum() * pooled / pooled.sum()
        torch.testing.assert_close(log_q[row].exp(), expected)


@pytest.mark.parametrize("join", [ARITHMETIC, GEOMETRIC, SHORT])
def test_losses_at_weights_are_the_joined_distributions(predictions, join):
    own, other, labels = predictions
    losses = losses_at_weights(join, own, other, labels)
    for column, weight in enumerate(WEIGHTS):
        log_q = joined(join, own, other, weight)
        torch.testing.assert_close(losses[:, column], -log_q.gather(1, labels[:, None])[:, 0])


def test_a_shortlist_of_all_classes_is_the_mean_over_all(predictions):
    own, other, _ = predictions
    whole = joined(GEOMETRIC, own, other, 0.7)
    torch.testing.assert_close(joined(Join("second", 0.0, 99), own, other, 0.7), whole)


def test_residuals_by_hand():
    """y = (1, 0), p = (.6, .4), q = (.2, .8): residuals (.4, -.4) and (.8, -.8)."""
    p = torch.tensor([[0.6, 0.4]], dtype=F64).log()
    q = torch.tensor([[0.2, 0.8]], dtype=F64).log()
    label = torch.tensor([0])
    assert float(residual_product(p, q, label)) == pytest.approx(0.64)
    assert float(residual_product(q, p, label)) == pytest.approx(0.64)
    assert residual_correlation(
        np.array([0.64]), np.array([0.32]), np.array([1.28])
    ) == pytest.approx(1.0)
    # Where p is sure and wrong, and q sure and right elsewhere, examples count by their size.
    products, brier, other = np.array([0.0, 0.5]), np.array([2.0, 0.5]), np.array([0.0, 0.5])
    assert residual_correlation(products, brier, other) == pytest.approx(0.25 / math.sqrt(0.3125))
    assert residual_correlation(np.zeros(2), brier, np.zeros(2)) == 0


def test_residual_products_are_those_of_all_classes(predictions):
    own, other, labels = predictions
    hot = torch.nn.functional.one_hot(labels, 7).double()
    by_hand = ((hot - own.exp()) * (hot - other.exp())).sum(1)
    torch.testing.assert_close(residual_product(own, other, labels), by_hand)
    brier = of_examples(own, labels)["brier"]
    torch.testing.assert_close(residual_product(own, own, labels), brier)
    assert residual_correlation(brier.numpy(), brier.numpy(), brier.numpy()) == pytest.approx(1)


def test_some_ids_lie_evenly_over_all():
    assert evenly(np.arange(1, 20, 2), 4).tolist() == [1, 7, 13, 19]
    assert evenly(np.array([5, 8]), 100).tolist() == [5, 8]
    assert evenly(np.array([5, 8]), 0).tolist() == [5]
