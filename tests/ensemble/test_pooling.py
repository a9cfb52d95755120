"""The combiners beside eq. 5, and what is fitted on val."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from clustering.groups import ClassGroups
from ensemble import COMBINERS, combine_kl, combiner, fit_temperatures, fit_weights
from ensemble.fitting import fit_temperature, fit_temperature_by_slopes
from ensemble.listed import logits_slopes
from ensemble.pooling import arithmetic_mean, log_ratio_product, mixture_gating, reverse_kl

F64 = torch.float64


def predictions(seed, rows=8, classes=10, specialists=3, size=4, scale=1.5):
    rng = torch.Generator().manual_seed(seed)

    def random_probabilities(width):
        return torch.softmax(scale * torch.randn(rows, width, generator=rng, dtype=F64), 1)

    shuffled = [torch.randperm(classes, generator=rng) for _ in range(specialists)]
    groups = ClassGroups([order[:size].tolist() for order in shuffled], classes)
    g = random_probabilities(classes)
    return groups, g, [random_probabilities(size + 1) for _ in range(specialists)]


HAND = (
    ClassGroups([[0, 1]], 4),
    torch.tensor([[0.4, 0.2, 0.3, 0.1]], dtype=F64),
    [torch.tensor([[0.5, 0.3, 0.2]], dtype=F64)],  # extended: .5, .3, .15, .05
)


def test_arithmetic_mean_by_hand():
    expected = torch.tensor([[0.45, 0.25, 0.225, 0.075]], dtype=F64)
    torch.testing.assert_close(arithmetic_mean(HAND[1], HAND[2], HAND[0]), expected)


def test_log_ratio_product_by_hand():
    # g p / g = p: the prediction of one specialist is the result.
    expected = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=F64)
    torch.testing.assert_close(log_ratio_product(HAND[1], HAND[2], HAND[0]), expected)


def test_mixture_gating_by_hand():
    # The generalist has .6 in S_0 and .4 outside.
    expected = 0.6 * torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=F64) + 0.4 * HAND[1]
    torch.testing.assert_close(mixture_gating(HAND[1], HAND[2], HAND[0]), expected)


def test_reverse_kl_of_one_specialist_is_the_geometric_mean_of_its_extension():
    product = (HAND[1] * torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=F64)).sqrt()
    expected = product / product.sum()
    torch.testing.assert_close(reverse_kl(HAND[1], HAND[2], HAND[0]), expected)


def reverse_objective(q, g, p, groups):
    def kl(a, b):
        return a * ((a + 1e-300).log() - b.log())

    total = kl(q, g).sum(1)
    for part, classes in zip(p, groups.members, strict=True):
        outside = torch.ones(q.shape[1], dtype=torch.bool)
        outside[torch.tensor(classes)] = False
        total = total + kl(q[:, torch.tensor(classes)], part[:, :-1]).sum(1)
        total = total + kl(q[:, outside].sum(1), part[:, -1])
    return total


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_reverse_kl_reaches_the_minimum_that_gradient_descent_finds(scale):
    groups, g, p = predictions(1, scale=scale)
    q = reverse_kl(g, p, groups)
    logits = g.log().clone().requires_grad_()
    options = {"max_iter": 500, "tolerance_grad": 1e-12, "line_search_fn": "strong_wolfe"}
    optimiser = torch.optim.LBFGS([logits], **options)

    def closure():
        optimiser.zero_grad()
        loss = reverse_objective(torch.softmax(logits, 1), g, p, groups).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    other = torch.softmax(logits.detach(), 1)
    reached = reverse_objective(other, g, p, groups)
    assert (reverse_objective(q, g, p, groups) <= reached + 1e-9).all()
    torch.testing.assert_close(q, other, rtol=0, atol=1e-4)


def test_with_all_classes_in_every_group_the_means_are_the_usual_ones():
    rng = torch.Generator().manual_seed(0)
    groups = ClassGroups([range(5), range(5)], 5)
    g, a, b = (torch.softmax(torch.randn(3, 5, generator=rng, dtype=F64), 1) for _ in range(3))
    p = [torch.nn.functional.pad(x, (0, 1)) for x in (a, b)]
    torch.testing.assert_close(arithmetic_mean(g, p, groups), (g + a + b) / 3)
    torch.testing.assert_close(combine_kl(g, p, groups), (g + a + b) / 3)
    product = (g * a * b) ** (1 / 3)
    torch.testing.assert_close(reverse_kl(g, p, groups), product / product.sum(1, keepdim=True))
    ratio = a * b / g
    torch.testing.assert_close(log_ratio_product(g, p, groups), ratio / ratio.sum(1, keepdim=True))


@pytest.mark.parametrize("name", COMBINERS)
def test_every_combiner_keeps_the_contract(name):
    groups, g, p = predictions(2, rows=40)
    active = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    q = combiner(name)(g, p, groups, active=active, weights=[1.0, 0.5, 2.0, 1.0])
    assert (q >= 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones(40, dtype=F64))
    alone = ~active.any(1)
    torch.testing.assert_close(q[alone], g[alone])
    # Agreement with the generalist changes nothing.
    agree = []
    for classes in groups.members:
        inside = g[:, torch.tensor(classes)]
        agree.append(torch.cat([inside, 1 - inside.sum(1, keepdim=True)], 1))
    torch.testing.assert_close(combiner(name)(g, agree, groups, active=active), g)
    wrong = [x.clone() for x in p]
    wrong[0][3] *= 2
    with pytest.raises(ValueError, match="row 3 of p_special"):
        combiner(name)(g, wrong, groups)
    # Certain and contradictory.
    sure = torch.zeros(1, 10, dtype=F64)
    sure[0, 0] = 1
    no = torch.zeros(1, 5, dtype=F64)
    no[0, -1] = 1
    yes = no.flip(1)
    q = combiner(name)(sure, [yes, no, yes], groups)
    assert torch.isfinite(q).all() and float(q.sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", COMBINERS)
def test_every_combiner_has_the_derivative_that_differences_show(name):
    groups, g, p = predictions(3, rows=2, classes=6, specialists=2, size=3, scale=1)

    def combined(g, *p):
        return combiner(name)(torch.softmax(g, 1), [torch.softmax(x, 1) for x in p], groups)

    assert torch.autograd.gradcheck(combined, [x.log().detach().requires_grad_() for x in (g, *p)])


# ---- fitted on val


def test_temperature_undoes_a_known_scaling():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 10, generator=rng, dtype=F64)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=rng)[:, 0]
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.03)
    assert fit_temperature(logits[:0], labels[:0]) == 1.0


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("right", ["drawn", "always", "never"])
def test_a_temperature_fitted_in_passes_is_that_of_all_logits_at_once(scale, right):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 12, generator=rng)
    labels = {
        "drawn": torch.multinomial(torch.softmax(logits, 1), 1, generator=rng)[:, 0],
        "always": logits.argmax(1),
        "never": logits.argmin(1),
    }[right]
    passes = []

    def slopes(beta):
        passes.append(beta)
        slope, curvature = logits_slopes(scale * logits, labels, beta)
        return float(slope.mean()), float(curvature.mean())

    fitted = fit_temperature_by_slopes(slopes)
    assert fitted == pytest.approx(fit_temperature(scale * logits, labels), rel=5e-6)
    assert len(passes) <= 26
    if right == "drawn" and 0.1 < scale < 10:
        assert len(passes) <= 9


def test_a_temperature_fitted_by_parts_is_that_of_the_whole():
    """Three parts, one without examples, as ranks have them: each mean is over all."""
    rng = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(300, 12, generator=rng)
    labels = torch.multinomial(torch.softmax(logits / 4, 1), 1, generator=rng)[:, 0]
    meeting, given = threading.Barrier(3), {}

    def fit(part):
        rows = slice(*part)

        def mean(values):
            given[part] = values
            meeting.wait(10)
            everything = torch.cat([given[each] for each in sorted(given)])
            meeting.wait(10)
            return float(everything.mean())

        return fit_temperature(logits[rows], labels[rows], mean)

    with ThreadPoolExecutor(3) as pool:
        fitted = list(pool.map(fit, [(0, 100), (100, 300), (300, 300)]))
    assert fitted == [pytest.approx(fit_temperature(logits, labels), rel=1e-6)] * 3


def test_specialists_temperatures_take_other_classes_for_the_dustbin():
    rng = torch.Generator().manual_seed(1)
    groups = ClassGroups([[2, 5], [0]], 6)
    logits = torch.randn(20_000, 3, generator=rng, dtype=F64)
    column = torch.multinomial(torch.softmax(logits, 1), 1, generator=rng)[:, 0]
    labels = torch.tensor([2, 5, 1])[column]
    rows = torch.arange(0, 20_000, 2)
    of_specialists = [(rows, 2 * logits[rows]), None]
    temperatures = fit_temperatures(torch.zeros(20_000, 6), of_specialists, groups, labels)
    assert temperatures[1] == pytest.approx(2, rel=0.05) and temperatures[2] == 1.0


@pytest.mark.parametrize("shared", [True, False])
def test_a_specialist_that_knows_gets_more_weight_than_one_that_guesses(shared):
    rng = torch.Generator().manual_seed(2)
    groups = ClassGroups([[0, 1, 2], [3, 4, 5]], 8)
    labels = torch.randint(0, 8, (400,), generator=rng)
    g = torch.full((400, 8), 1 / 8, dtype=F64)
    column = torch.tensor([0, 1, 2, 3, 3, 3, 3, 3])[labels]
    knows = torch.full((400, 4), 0.02, dtype=F64).scatter(1, column[:, None], 0.94)
    guesses = torch.softmax(2 * torch.randn(400, 4, generator=rng, dtype=F64), 1)
    weights = fit_weights(g, [knows, guesses], groups, labels, shared=shared)
    before = combine_kl(g, [knows, guesses], groups).gather(1, labels[:, None]).log().mean()
    weighted = combine_kl(g, [knows, guesses], groups, weights=weights)
    after = weighted.gather(1, labels[:, None]).log().mean()
    assert weights[0] == 1 and float(after) >= float(before)
    if shared:
        assert weights[1] == weights[2]
    else:
        assert weights[1] > 10 * weights[2] and all(math.isfinite(w) for w in weights)
