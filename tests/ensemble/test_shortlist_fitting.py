"""What is fitted on val for a shortlist: weights, temperatures, order and length."""

import numpy as np
import pytest
import torch

from ensemble import shortlist_fitting as fitting
from ensemble.shortlist import join_on_shortlist
from ensemble.shortlist_fitting import (
    Joining,
    ShortlistPredictions,
    choose_shortlist,
    fit_joining,
    fit_order,
    nll_of_each,
)

CLASSES = 30


def predictions(true_logits, noises, scales=None, k=10, seed=0):
    """Networks that see the true logits through noise, each times its scale."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(true_logits.softmax(1), 1, generator=draw)[:, 0]
    seen = [true_logits + s * torch.randn(true_logits.shape, generator=draw) for s in noises]
    scales = scales or [1.0] * len(noises)
    logits = [scale * each for scale, each in zip(scales, seen, strict=True)]
    general = logits[0].log_softmax(1)
    indices = general.topk(k).indices
    on_list = torch.stack([general, *logits[1:]]).gather(2, indices.expand(len(noises), -1, -1))
    hits = indices == labels[:, None]
    column = torch.where(hits.any(1), hits.int().argmax(1), k)
    log_label = general.gather(1, labels[:, None])[:, 0]
    return ShortlistPredictions(on_list, column, log_label), (logits, labels)


@pytest.fixture(scope="module")
def truth():
    return 2 * torch.randn(3000, CLASSES, generator=torch.Generator().manual_seed(5))


def test_the_nll_of_each_example_is_that_of_the_joined_distribution(truth):
    seen, (logits, labels) = predictions(truth, [1.0, 1.0, 2.0])
    general = logits[0].log_softmax(1)
    indices = general.topk(4).indices
    members = torch.stack([logits[1] / 2, logits[2] / 0.5]).gather(2, indices.expand(2, -1, -1))
    q = join_on_shortlist(general, indices, members, 0.5, [1, 2, 3])
    expected = -q.gather(1, labels[:, None])[:, 0]
    losses = nll_of_each(seen, Joining(4, 0.5, [1, 2, 3], [1, 2, 0.5]))
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, expected.numpy(), atol=1e-5)


def test_a_network_whose_logits_are_scaled_gets_its_temperature(truth):
    seen, _ = predictions(truth, [1.0, 1.0], scales=[1.0, 4.0])
    plain, _ = predictions(truth, [1.0, 1.0])
    fitted, unscaled = fit_joining(seen, 10), fit_joining(plain, 10)
    assert fitted.temperatures[0] == fitted.weights[0] == 1
    # At order 0 weight / temperature is what counts.
    share = [each.weights[1] / each.temperatures[1] for each in (fitted, unscaled)]
    assert share[0] == pytest.approx(share[1] / 4, rel=0.05)
    assert (
        nll_of_each(seen, fitted).mean() < nll_of_each(seen, Joining(10, 0, [1, 1], [1, 1])).mean()
    )


def test_a_better_network_gets_more_weight_and_one_that_knows_nothing_little(truth):
    seen, _ = predictions(truth, [1.0, 0.3, 30.0])
    weights = fit_joining(seen, 10, 1.0, temperatures=False).weights
    assert weights[1] > 1.5 and weights[2] < 0.2


def test_what_is_not_to_be_fitted_is_1(truth):
    seen, _ = predictions(truth, [1.0, 0.3])
    assert fit_joining(seen, 10, weights=False).weights == [1, 1]
    assert fit_joining(seen, 10, temperatures=False).temperatures == [1, 1]
    assert fit_joining(seen.of(1), 10) == Joining(10, 0.0, [1.0], [1.0])


def test_the_fit_is_at_a_minimum(truth):
    seen, _ = predictions(truth, [1.0, 0.5, 2.0], scales=[1, 2, 0.5])
    best = fit_joining(seen, 5)
    lowest = nll_of_each(seen, best).mean()
    for factor in (0.9, 1.1):
        for place in (1, 2):
            for name in ("weights", "temperatures"):
                moved = list(getattr(best, name))
                moved[place] *= factor
                assert nll_of_each(seen, best._replace(**{name: moved})).mean() > lowest - 1e-4


def test_examples_whose_label_is_on_no_shortlist_leave_all_at_1():
    seen = ShortlistPredictions(torch.zeros(2, 3, 5), torch.full((3,), 5), torch.zeros(3))
    assert fit_joining(seen, 5) == Joining(5, 0.0, [1.0, 1.0], [1.0, 1.0])


def test_the_order_is_the_one_of_the_lowest_nll(truth):
    seen, _ = predictions(truth, [1.0, 1.0])
    losses = {
        order: nll_of_each(seen, fit_joining(seen, 10, order)).mean() for order in fitting.ORDERS
    }
    assert fit_order(seen, 10) == min(losses, key=losses.__getitem__)


def test_the_shortlist_is_the_shortest_within_one_standard_error_of_the_best():
    draw = np.random.default_rng(0)
    base = draw.gamma(2.0, size=10_000)
    noise = draw.normal(0, 1, len(base))
    noise -= noise.mean()  # its standard error is 0.01
    losses = {5: base + 0.02 + noise, 20: base + 0.005 + noise, 100: base}
    assert choose_shortlist(losses) == 20
    assert choose_shortlist({5: base, 20: base, 100: base}) == 5
    assert choose_shortlist({5: base + 1, 100: base}) == 100


def test_shortlists_are_not_longer_than_the_label_set():
    assert fitting.sizes_up_to(26_386) == [5, 20, 100]
    assert fitting.sizes_up_to(24) == [5, 20, 24]
    assert fitting.sizes_up_to(3) == [3]
