"""The specialists' weight in eq. 5: found between the weights that are tried, and beyond them."""

import math

import numpy as np
import pytest
import torch

from clustering.groups import ClassGroups
from ensemble import combine_kl, fit_weights
from ensemble.fitting import WEIGHTS, fit_log_weight, fit_weight_to_losses

F64 = torch.float64


def test_the_minimum_lies_between_the_weights_that_are_tried():
    for target in (-3.3, 0.2, 1.9, 5.0):
        x = fit_log_weight(lambda x, target=target: math.cosh(x - target), 10**9)
        assert x == pytest.approx(target, abs=2e-4)


def test_it_is_the_lowest_of_several_minima():
    # Two wells, at -2 and at 3. The second is deeper.
    def wells(x):
        return -math.exp(-((x + 2) ** 2)) - 1.2 * math.exp(-((x - 3) ** 2))

    assert fit_log_weight(wells, 10**9) == pytest.approx(3, abs=0.01)


def test_one_example_draws_it_to_1():
    # nll + x^2 / (2 n): with nll = (x - a)^2 / 2 the minimum is a n / (n + 1).
    for examples in (1, 4, 1000):
        x = fit_log_weight(lambda x: (x - 2) ** 2 / 2, examples)
        assert x == pytest.approx(2 * examples / (examples + 1), abs=2e-4)
    assert fit_log_weight(lambda x: 0.7, 50) == pytest.approx(0, abs=1e-4)


def test_a_slope_that_never_ends_stops_where_a_single_example_outweighs_it():
    # Specialists that are always right: log(1 + 1 / w) falls for ever.
    w = math.exp(fit_log_weight(lambda x: math.log1p(math.exp(-x)), 100))
    assert 20 < w < 100  # 1 / (1 + w) = log(w) / 100
    assert 1 / (1 + w) == pytest.approx(math.log(w) / 100, rel=1e-2)


def problem():
    """Specialists that know more than a generalist, by a noise of their own."""
    rng = torch.Generator().manual_seed(0)
    groups = ClassGroups([range(0, 8), range(6, 14), range(12, 20)], 20)
    truth = 2.5 * torch.randn(600, 20, generator=rng, dtype=F64)
    labels = torch.multinomial(truth.softmax(1), 1, generator=rng)[:, 0]

    def guess(noise):
        return (truth + noise * torch.randn(truth.shape, generator=rng, dtype=F64)).softmax(1)

    special = []
    for classes in groups.members:
        own = guess(0.8)[:, torch.tensor(classes)]
        special.append(torch.cat([own, 1 - own.sum(1, keepdim=True)], 1))
    return guess(1.6), special, groups, labels


def test_losses_at_a_few_weights_are_enough():
    """The spline's minimum is that of the NLL itself."""
    g, special, groups, labels = problem()
    losses = []
    for weight in WEIGHTS:
        q = combine_kl(g, special, groups, weights=[1.0, *[weight] * 3])
        losses.append(-q.gather(1, labels[:, None])[:, 0].log())
    weight = fit_weight_to_losses(torch.stack(losses, 1).numpy())
    exact = fit_weights(g, special, groups, labels)
    assert exact[0] == 1 and exact[1] == exact[2] == exact[3]
    assert weight not in WEIGHTS and 1 < weight < 64
    assert weight == pytest.approx(exact[1], rel=0.02)

    def loss(w):
        q = combine_kl(g, special, groups, weights=[1.0, *[w] * 3])
        nll = -float(q.gather(1, labels[:, None]).log().mean())
        return nll + math.log(w) ** 2 / (2 * len(labels))

    assert all(loss(weight) < loss(w) for w in (weight / 1.2, weight * 1.2, *WEIGHTS))


def test_specialists_that_are_never_heard_weigh_1():
    losses = np.tile(np.random.default_rng(0).random((40, 1)), (1, len(WEIGHTS)))
    assert fit_weight_to_losses(losses) == pytest.approx(1, abs=1e-3)
