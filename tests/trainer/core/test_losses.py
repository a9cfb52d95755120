"""Losses, against values worked by hand, torch's own, and invariants of the papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from networks.linear_logits import LinearLogits
from trainer.core.dirichlet import dirichlet_kl, entropic, prior_network_loss
from trainer.core.distillation import (
    TopKTargets,
    distillation_loss,
    gaussian_kl,
    lazy_distillation_loss,
)
from trainer.core.losses import (
    classification_loss,
    cross_entropy,
    dustbin_shift,
    full_specialist_loss,
    specialist_loss,
)
from trainer.core.probabilities import average_members, soften


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dustbin_shift_is_the_log_of_the_odds_ratio():
    # f = 1/2, pi = 0.02: odds 1 against 0.02 / 0.98, log 49.  The literal log(f / pi) = log 25 is
    # 0.67 too low.
    assert dustbin_shift(0.02, 0.5) == pytest.approx(math.log(49))
    assert dustbin_shift(0.02, 0.5) - math.log(0.5 / 0.02) == pytest.approx(0.673, abs=1e-3)


def test_dustbin_shift_is_zero_without_oversampling():
    assert dustbin_shift(0.3, 0.3) == pytest.approx(0)


@pytest.mark.parametrize("natural, training", [(0, 0.5), (1, 0.5), (0.2, 0), (0.2, 1)])
def test_dustbin_shift_refuses_a_fraction_of_nothing_or_all(natural, training):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        dustbin_shift(natural, training)


def test_specialist_prior_and_shift_recover_natural_frequencies_of_a_resampled_group():
    """Classes a, b of S_m and the rest: .06, .02, .92. In training 1/4, 1/4 and 1/2."""
    natural = torch.tensor([0.06, 0.02, 0.92]).double()
    training = torch.tensor([0.25, 0.25, 0.5]).double()
    log_prior = (torch.tensor([0.5, 0.5]) / torch.tensor([0.75, 0.25])).log().double()
    logits = natural.log().expand(1, 3)  # says nothing but the natural frequencies
    shift = dustbin_shift(0.08, 0.5)
    # So its training loss is that of the training frequencies, the best there is.
    for c in range(3):
        loss = specialist_loss(logits, torch.tensor([c]), shift, log_prior=log_prior)
        assert float(loss) == pytest.approx(-math.log(training[c]), rel=1e-5)


@given(natural=st.floats(0.01, 0.9), training=st.floats(0.05, 0.95))
def test_dustbin_shift_recovers_the_true_prior(natural, training):
    """With uninformative inputs, the minimiser at training frequencies has the natural ones."""
    # One class in S_m, the rest in the dustbin.  The minimiser's shifted probabilities are the
    # training frequencies.
    shifted = torch.tensor([math.log(training), math.log(1 - training)], dtype=torch.float64)
    unshifted = shifted + torch.tensor([0.0, dustbin_shift(natural, training)], dtype=torch.float64)
    assert float(unshifted.softmax(0)[0]) == pytest.approx(natural, rel=1e-9)


def test_specialist_loss_lowers_the_dustbin_alone():
    logits, targets = random_logits(5, 4), torch.tensor([0, 1, 2, 3, 3])
    for shift in (1.5, 0.0):
        by_hand = logits.clone()
        by_hand[:, 3] -= shift
        expected = F.cross_entropy(by_hand.float(), targets).item()
        assert specialist_loss(logits, targets, shift) == pytest.approx(expected)


def test_with_log_prior_natural_frequencies_minimise_the_loss_of_a_balanced_stream():
    natural = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    balanced = torch.full((3,), 1 / 3, dtype=torch.float64)
    logits = natural.log().repeat(3, 1)  # a network that knows these frequencies and nothing else
    loss = classification_loss(logits, torch.arange(3), log_prior=(balanced / natural).log())
    assert float(loss) == pytest.approx(math.log(3), rel=1e-6)  # is optimal on the balanced stream


def test_softening_equals_dividing_the_logits():
    logits = random_logits(6, 9)
    for temperature in (0.5, 1.0, 4.0, 20.0):
        expected = (logits / temperature).softmax(1)
        torch.testing.assert_close(soften(logits.softmax(1), temperature), expected)


def test_distillation_loss_is_zero_when_student_equals_teacher():
    logits, labels = random_logits(3, 4, 7), torch.zeros(4, dtype=torch.long)
    for temperature in (1.0, 3.0):
        loss = distillation_loss(logits, logits.softmax(-1), labels, temperature, 1.0, 0.0)
        assert abs(float(loss)) < 1e-6


def test_distillation_at_infinite_temperature_is_half_the_mean_squared_distance_of_logits():
    # v = log p of the teacher, off by a constant per row.  By hand: z - v = (1, -1, 0) and
    # (3, 0, 0) - 1 = (2, -1, -1): (2 / (2 * 3) + 6 / (2 * 3)) / 2 rows = 2 / 3.
    teacher = random_logits(1, 2, 3)
    student = teacher + torch.tensor([[1.0, -1.0, 0.0], [3.0, 0.0, 0.0]]) + 7
    loss = distillation_loss(student, teacher.softmax(-1), torch.tensor([0, 1]), math.inf, 1.0, 0.0)
    assert float(loss) == pytest.approx(2 / 3, rel=1e-12)


def test_a_high_temperature_comes_close_to_the_infinite_one():
    """In value and gradient, to order 1 / T. At T = 1000 of losses of size 1."""
    student = random_logits(2, 4, 5, seed=1).requires_grad_()
    teacher = random_logits(2, 4, 5, seed=2)
    labels = torch.tensor([0, 1, 2, 3])
    results = {}
    for temperature in (1e3, math.inf):
        loss = distillation_loss(student, teacher.softmax(-1), labels, temperature, 1.0, 0.0)
        results[temperature] = loss.detach(), *torch.autograd.grad(loss, student)
    torch.testing.assert_close(results[1e3], results[math.inf], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("temperature, rtol", [(1e3, 2e-2), (math.inf, 1e-10)])
def test_distillation_matches_logits_in_the_limit_of_high_temperature(temperature, rtol):
    """Hinton et al. 2015, eq. 4: T^2-scaled gradient -> (z - v) / C for zero-mean logits.

    The loss is a mean over K * B = 4 rows.
    """

    def zero_mean_logits(seed):
        logits = random_logits(2, 2, 5, seed=seed)
        return logits - logits.mean(-1, keepdim=True)

    z, v = zero_mean_logits(1).requires_grad_(), zero_mean_logits(2)
    labels = torch.zeros(2, dtype=torch.long)
    loss = distillation_loss(z, v.softmax(-1), labels, temperature, 1.0, 0.0)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, (z - v).detach() / 5 / 4, rtol=rtol, atol=rtol / 10)


def top_two(shape=()):
    """Of five classes 3 and 0 with .5 and .2, and .3 for the others: of batches [*shape, 1]."""
    indices = torch.tensor([3, 0]).expand(*shape, 1, 2)
    log_values = torch.tensor([0.5, 0.2]).log().expand(*shape, 1, 2)
    return TopKTargets(indices, log_values, torch.tensor([0.3]).log().expand(*shape, 1), 5)


def test_matching_the_logits_of_top_k_targets_has_an_even_tail_as_target():
    """Student logits that are the stored ones and one value for all others: no loss."""
    top = top_two(shape=(1,))
    logits = torch.tensor([0.2, 0.1, 0.1, 0.5, 0.1]).log()[None, None] + 4
    loss = distillation_loss(logits, top.spread(), torch.tensor([0]), math.inf, 1.0, 0.0)
    assert float(loss) < 1e-12


def test_lazy_logits_refuse_infinite_temperature():
    parts, _ = linear_head(7)
    lazy, teacher = LinearLogits(*parts, 7), torch.full((4, 7), 1 / 7)
    with pytest.raises(ValueError, match="finite temperature"):
        lazy_distillation_loss(lazy, teacher, torch.zeros(4), math.inf, 1.0, 0.0)


def test_member_k_learns_from_member_k_alone():
    student = random_logits(3, 4, 5, seed=1).requires_grad_()
    teacher = random_logits(3, 4, 5, seed=2).softmax(-1)
    # The second has nothing left to learn, whatever the others predict.
    teacher[1] = student[1].detach().softmax(-1)
    distillation_loss(student, teacher, torch.zeros(4, dtype=torch.long), 2.0, 1.0, 0.0).backward()
    moved = student.grad.abs().amax((1, 2))
    assert moved[1] < 1e-12 < 1e-3 < min(moved[0], moved[2])


def test_pooling_two_members_by_hand():
    p = torch.tensor([[[0.8, 0.2]], [[0.5, 0.5]]])
    torch.testing.assert_close(average_members(p), torch.tensor([[0.65, 0.35]]))
    # Geometric: sqrt(.8 * .5) to sqrt(.2 * .5) is 2 to 1.
    torch.testing.assert_close(average_members(p, "geometric"), torch.tensor([[2 / 3, 1 / 3]]))
    with pytest.raises(ValueError, match="'arithmetic' or 'geometric'"):
        average_members(p, "harmonic")


def test_geometric_pooling_averages_logits():
    logits = random_logits(4, 3, 6) * 30
    pooled = average_members(logits.softmax(-1), "geometric")
    torch.testing.assert_close(pooled, logits.mean(0).softmax(-1))


def test_geometric_pooling_of_members_that_exclude_each_other_stays_a_distribution():
    p = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    torch.testing.assert_close(average_members(p, "geometric"), torch.tensor([[0.5, 0.5, 0.0]]))


def test_hard_weight_adds_the_cross_entropy_of_every_member():
    logits, labels = random_logits(2, 4, 3), torch.tensor([0, 1, 2, 0])
    loss = distillation_loss(logits, logits.softmax(-1), labels, 2.0, 1.0, 0.25)
    hard = sum(F.cross_entropy(member.float(), labels) for member in logits) / 2
    assert float(loss) == pytest.approx(0.25 * float(hard), abs=1e-6)


def test_unlabelled_examples_have_no_hard_term():
    logits, labels = random_logits(1, 4, 3), torch.tensor([2, -1, -1, 0])
    loss = distillation_loss(logits, logits.softmax(-1), labels, 1.0, 1.0, 1.0)
    by_hand = F.cross_entropy(logits[0, [0, 3]].float(), torch.tensor([2, 0]), reduction="sum") / 4
    assert float(loss) == pytest.approx(float(by_hand), abs=1e-6)


def linear_head(classes):
    """(features, weight, bias) of four examples, and the logits."""
    shapes = ((4, 3), (classes, 3), (classes,))
    parts = [random_logits(*shape, seed=seed).float() for seed, shape in enumerate(shapes)]
    return parts, F.linear(*parts)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 4.0))
@pytest.mark.parametrize("k", (2, 5, 7))
def test_distilling_lazy_logits_equals_distilling_dense_ones(temperature, k):
    """From all of the teacher's seven classes, and from its most probable ones and their tail."""
    parts, logits = linear_head(7)
    labels, weights = torch.tensor([2, -1, 6, 0]), (temperature, 0.7, 0.3, 0.1)
    p = random_logits(4, 7, seed=5).mul(2).softmax(1).float()
    top = TopKTargets.of(p.log(), k)
    for teacher, spread in ((p, p), (top, top.spread())):
        lazy = lazy_distillation_loss(LinearLogits(*parts, 7, block=3), teacher, labels, *weights)
        dense = distillation_loss(logits[None], spread[None], labels, *weights)
        torch.testing.assert_close(lazy, dense)


def test_the_tail_of_top_k_targets_is_spread_evenly():
    expected = torch.tensor([[0.2, 0.1, 0.1, 0.5, 0.1]])
    torch.testing.assert_close(top_two().spread(), expected)


def test_top_k_targets_of_log_probabilities_by_hand():
    top = TopKTargets.of(torch.tensor([[0.2, 0.06, 0.04, 0.7]]).log(), 2)
    assert top.indices.tolist() == [[3, 0]] and top.num_classes == 4
    torch.testing.assert_close(top.log_values.exp(), torch.tensor([[0.7, 0.2]]))
    torch.testing.assert_close(top.log_tail.exp(), torch.tensor([0.1]))


@pytest.mark.parametrize("temperature", (1.0, 4.0, 20.0))
def test_a_tail_far_below_the_rounding_of_one_counts_at_high_temperature(temperature):
    """Three classes share e^-30. 1 - sum of values would be 0, and p at T = 20 another one."""
    logits = torch.tensor([[0.0, -30.0, -30.0, -30.0]])
    top = TopKTargets.of(logits.log_softmax(1), 1)
    torch.testing.assert_close(soften(top.spread(), temperature), (logits / temperature).softmax(1))
    targets, negative_entropy = top.softened(temperature)
    expected = (logits / temperature).softmax(1)
    torch.testing.assert_close(targets.uniform, expected[:, 1])
    torch.testing.assert_close(negative_entropy, (expected * expected.log()).sum(1))


@given(
    seed=st.integers(0, 99),
    k=st.integers(1, 9),
    members=st.sampled_from(((), (3,))),
    temperature=st.sampled_from((0.5, 1.0, 5.0)),
)
def test_top_k_targets_in_half_precision_are_a_distribution_close_to_the_exact_one(
    seed, k, members, temperature
):
    """Nine classes of which all but `k` are alike: nothing is lost but the rounding of logs."""
    log_p = random_logits(*members, 4, 9, seed=seed).float() * 3
    log_p = log_p.sort(descending=True).values
    log_p[..., k:] = log_p[..., k - 1 :].mean(-1, keepdim=True)
    log_p = log_p.log_softmax(-1)
    whole = TopKTargets.of(log_p, k)
    torch.testing.assert_close(whole.spread(), log_p.exp())
    log_values, log_tail = whole.log_values.half().float(), whole.log_tail.half().float()
    half = TopKTargets(whole.indices, log_values, log_tail, 9)
    torch.testing.assert_close(half.spread().sum(-1), torch.ones(*members, 4))
    torch.testing.assert_close(half.spread(), log_p.exp(), rtol=2e-2, atol=1e-6)
    if not members:
        targets, negative_entropy = half.softened(temperature)
        torch.testing.assert_close(targets.mass(9), torch.ones(4))
        p = soften(half.spread(), temperature)
        expected = torch.special.xlogy(p, p).sum(-1)
        torch.testing.assert_close(negative_entropy, expected, rtol=1e-4, atol=1e-5)


def test_classifying_lazy_logits_equals_classifying_dense_ones():
    parts, logits = linear_head(7)
    labels, prior = torch.tensor([2, 5, 6, 0]), torch.randn(7)
    lazy = classification_loss(LinearLogits(*parts, 7, block=2), labels, 0.1, prior)
    torch.testing.assert_close(lazy, classification_loss(logits, labels, 0.1, prior))


def squared_error(logits, labels, label_smoothing=0.0):
    """A loss that a user may bring."""
    targets = F.one_hot(labels, logits.shape[1]) * (1 - label_smoothing)
    return (logits.softmax(1) - targets).square().sum(1).mean()


def test_a_loss_is_given_the_logits_after_prior_and_shift():
    logits, labels = random_logits(4, 3), torch.tensor([0, 1, 2, 2])
    prior = torch.tensor([0.1, -0.2, 0.4])
    loss = classification_loss(logits, labels, 0.1, prior, squared_error)
    torch.testing.assert_close(loss, squared_error(logits + prior, labels, 0.1))
    shift = torch.tensor([0.1, -0.2, -0.7])
    loss = specialist_loss(logits, labels, 0.7, 0.1, prior[:2], squared_error)
    torch.testing.assert_close(loss, squared_error(logits + shift, labels, 0.1))


def test_lazy_logits_know_cross_entropy_alone():
    parts, logits = linear_head(7)
    labels = torch.tensor([2, 5, 6, 0])
    with pytest.raises(ValueError, match="'squared_error' needs dense logits"):
        classification_loss(LinearLogits(*parts, 7), labels, loss=squared_error)
    lazy = classification_loss(LinearLogits(*parts, 7), labels, loss=cross_entropy)
    torch.testing.assert_close(lazy, cross_entropy(logits, labels))


def test_distillation_refuses_shapes_that_disagree():
    student, teacher = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and teacher \(1, 2, 4\)"):
        distillation_loss(student, teacher, torch.zeros(2, dtype=torch.long), 1, 1, 0)


# Which of a small world's four classes are a specialist's, and natural frequencies: pi = 0.1.
INSIDE = torch.tensor([True, False, True, False])
WORLD = torch.tensor([0.04, 0.5, 0.06, 0.4]).double()


def small_world(fraction=0.5, seed=0, out_ratio=(1.0, 1.0)):
    """Five inputs x: (p(c | x) naturally [5, 4], p(x, c) in training [5, 4], log_prior [4])."""
    given_class = random_logits(5, 4, seed=seed).mul(2).softmax(0)  # p(x | c)
    natural = WORLD * given_class
    posterior = natural / natural.sum(1, keepdim=True)
    in_training = torch.where(INSIDE, fraction / 0.1 * WORLD, (1 - fraction) / 0.9 * WORLD)
    resampled = in_training * torch.tensor([1.0, out_ratio[0], 1.0, out_ratio[1]])
    resampled[~INSIDE] *= (1 - fraction) / resampled[~INSIDE].sum()
    return posterior, resampled * given_class, (resampled / WORLD).log()


def expected_loss(logits, training, loss):
    """Mean of loss(logits [1, 4], label [1], input) over 20 pairs, by their p(x, c) in training."""
    total = 0.0
    for x in range(5):
        for c in range(4):
            total = total + training[x, c] * loss(logits[x : x + 1], torch.tensor([c]), x)
    return total


@given(
    seed=st.integers(0, 50),
    fraction=st.sampled_from((0.1, 0.5, 0.8)),
    soft_weight=st.sampled_from((0.0, 0.3, 1.0, 4.0)),
    out_ratio=st.sampled_from(((1.0, 1.0), (3.0, 0.2))),
)
def test_full_specialist_is_unbiased_where_the_generalist_knows_its_own_classes(
    seed, fraction, soft_weight, out_ratio
):
    """The natural posterior is stationary, however S_m is oversampled or the rest resampled.

    Nor does the weight of the soft targets matter, or what the generalist predicts inside S_m.
    """
    posterior, training, log_prior = small_world(fraction, seed, out_ratio)
    general = posterior * torch.where(INSIDE, torch.tensor([9.0, 1.0, 0.1, 1.0]).double(), 1.0)
    general = general / general.sum(1, keepdim=True)
    logits = posterior.log().requires_grad_()

    def loss(z, label, x):
        return full_specialist_loss(z, label, INSIDE, general[x : x + 1], log_prior, soft_weight)

    total = expected_loss(logits, training, loss)
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, torch.zeros(5, 4).double(), rtol=0, atol=1e-12)


def test_soft_targets_of_an_exact_generalist_stand_for_hard_ones():
    """Averaged over the labels they give the adjusted cross-entropy's gradient, at any network."""
    posterior, training, log_prior = small_world()
    logits = random_logits(5, 4, seed=7).requires_grad_()

    def soft_loss(z, label, x):
        return full_specialist_loss(z, label, INSIDE, posterior[x : x + 1], log_prior)

    def hard_loss(z, label, x):
        return classification_loss(z, label, log_prior=log_prior)

    soft = torch.autograd.grad(expected_loss(logits, training, soft_loss), logits)
    hard = torch.autograd.grad(expected_loss(logits, training, hard_loss), logits)
    torch.testing.assert_close(soft, hard)


def test_full_specialist_without_soft_targets_is_the_one_with_a_dustbin():
    logits, labels = random_logits(4, 4), torch.tensor([0, 1, 2, 3])
    shift = dustbin_shift(0.1, 0.5)
    log_prior = torch.where(INSIDE, 0.0, -shift).double()
    general = torch.full((4, 4), 0.25)
    loss = full_specialist_loss(logits, labels, INSIDE, general, log_prior, soft_weight=0.0)
    dustbin = torch.cat([logits[:, INSIDE], logits[:, ~INSIDE].logsumexp(1, keepdim=True)], 1)
    expected = specialist_loss(dustbin, torch.tensor([0, 2, 1, 2]), shift)
    torch.testing.assert_close(loss, expected)


def test_soft_term_is_zero_when_the_specialist_agrees_with_the_generalist_on_other_classes():
    logits = random_logits(3, 4)
    general = (logits + 2 * INSIDE).softmax(1)  # it disagrees on S_m only
    labels, log_prior = torch.tensor([1, 3, 3]), torch.zeros(4).double()

    def loss(soft_weight):
        return full_specialist_loss(logits, labels, INSIDE, general, log_prior, soft_weight)

    torch.testing.assert_close(loss(5.0), loss(0.0))


def test_the_loss_is_finite_for_a_generalist_that_is_certain_of_a_class_in_the_group():
    general, labels = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([1])
    loss = full_specialist_loss(torch.zeros(1, 4), labels, INSIDE, general, torch.zeros(4))
    # Outside: 2 of 4 classes. The generalist does not tell which of the two.
    assert float(loss) == pytest.approx(math.log(2))


def test_dirichlet_kl_by_hand():
    # Dir(2, 1) has density 2 x, Dir(1, 1) density 1: E log 2x = log 2 + E log x = log 2 - 1/2,
    # of x ~ Beta(2, 1).
    kl = dirichlet_kl(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(kl, torch.tensor([math.log(2) - 0.5]).double())


positive = st.lists(st.floats(-4, 9).map(math.exp), min_size=5, max_size=5)


@given(positive, positive)
def test_dirichlet_kl_agrees_with_torch_distributions(alpha, beta):
    alpha, beta = torch.tensor([alpha]).double(), torch.tensor([beta]).double()
    oracle = torch.distributions.kl_divergence(*map(torch.distributions.Dirichlet, (alpha, beta)))
    kl = dirichlet_kl(alpha, beta)
    torch.testing.assert_close(kl, oracle, rtol=1e-9, atol=1e-9)
    assert float(kl) > -1e-10
    of_itself = dirichlet_kl(alpha, alpha)
    torch.testing.assert_close(of_itself, torch.zeros(1).double(), rtol=0, atol=1e-10)


def test_dirichlet_kl_of_huge_parameters_keeps_its_digits():
    """Alike and huge, Dir(n m_1, n m_2) against Dir(1, 1).

    It is the log of a Beta's density at its peak, by Stirling log sqrt(n / (2 pi m_1 m_2)) - 1/2.
    The definition in float64 has lost all digits at n = 1e200.
    """
    for n in (1e8, 1e30, 1e200):
        alpha = torch.tensor([[0.3 * n, 0.7 * n]], dtype=torch.float64)
        kl = dirichlet_kl(alpha, torch.ones(1, 2))
        assert float(kl) == pytest.approx(math.log(n / (2 * math.pi * 0.21)) / 2 - 0.5, rel=1e-7)


def test_entropic_is_the_difference_it_stands_for_on_both_sides_of_its_seam():
    import mpmath  # sympy needs it, and torch sympy

    x = torch.tensor([1e-9, 0.3, 1.0, 17.0, 63.999, 64.0, 64.001, 300.0, 1e6], dtype=torch.float64)
    with mpmath.workdps(50):
        values = map(mpmath.mpf, x.tolist())
        exact = [float(mpmath.loggamma(v) - v * mpmath.digamma(v) + v) for v in values]
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(entropic(x), expected, rtol=1e-12, atol=2e-13)


def test_a_prior_network_that_predicts_the_target_has_no_loss():
    evidence = math.log(1001)
    logits = torch.tensor([[evidence, 0.0, 0.0], [0.0, 0.0, evidence]], dtype=torch.float64)
    assert abs(float(prior_network_loss(logits, torch.tensor([0, 2])))) < 1e-9
    assert float(prior_network_loss(logits, torch.tensor([1, 1]))) > 1


def test_the_prior_network_loss_is_finite_over_the_range_it_states():
    for z in (-345.0, -40.0, 0.0, 40.0, 690.0):
        logits = torch.tensor([[z, 0.0, 1.0]], dtype=torch.float64).requires_grad_()
        loss = prior_network_loss(logits, torch.tensor([0]))
        (slope,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and slope.isfinite().all(), z
    logits = torch.tensor([[-60.0, 60.0]], requires_grad=True)  # float32, as networks give them
    prior_network_loss(logits, torch.tensor([0])).backward()
    assert logits.grad.isfinite().all()


six_values = st.lists(st.floats(-3, 3), min_size=6, max_size=6)
gaussians = six_values.map(lambda values: torch.tensor(values).double().view(1, 2, 3))


@given(gaussians, gaussians, gaussians, gaussians)
def test_gaussian_kl_agrees_with_torch_distributions(m_t, v_t, m_s, v_s):
    teacher = torch.distributions.Normal(m_t, (v_t / 2).exp())
    student = torch.distributions.Normal(m_s, (v_s / 2).exp())
    oracle = torch.distributions.kl_divergence(teacher, student).sum(-1).mean()
    torch.testing.assert_close(gaussian_kl(m_t, v_t, m_s, v_s), oracle, rtol=1e-9, atol=1e-12)
    assert float(gaussian_kl(m_t, v_t, m_t, v_t)) == 0


def test_gaussian_kl_by_hand():
    # One wide by 1, off by 2, of unit variances: 2^2 / 2 = 2. A second output alike: 0. A second
    # example alike: halved.
    m_t, zeros = torch.tensor([[[2.0, 0.0], [1.0, 1.0]]]), torch.zeros(1, 2, 2)
    m_s = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    assert float(gaussian_kl(m_t, zeros, m_s, zeros)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"\[K, B, D\]"):
        gaussian_kl(m_t[0], zeros[0], m_s[0], zeros[0])


LABELS = torch.tensor([0, 1, 3])
TEACHER = random_logits(2, 3, 4, seed=5)
P = TEACHER.softmax(-1)
PRIOR = torch.tensor([0.1, -0.2, 0.3, 0.0]).double()
GROUP_PRIOR = torch.tensor([0.4, -0.1, 0.4, -0.1]).double()
LOSSES = {
    "classification": lambda z: classification_loss(z[0], LABELS, 0.1, PRIOR),
    "specialist": lambda z: specialist_loss(z[0], LABELS, 0.7, 0.1),
    "full specialist": lambda z: full_specialist_loss(z[0], LABELS, INSIDE, P[0], GROUP_PRIOR, 0.7),
    "distillation": lambda z: distillation_loss(z, P, LABELS, 2.0, 0.9, 0.1),
    "matching logits": lambda z: distillation_loss(z, P, LABELS, math.inf, 0.9, 0.1),
    "prior network": lambda z: prior_network_loss(3 * z[0], LABELS, 50.0),
    # On both sides of 64.
    "Dirichlet KL": lambda z: dirichlet_kl((2 * z[0]).exp() * 30, (TEACHER[0]).exp()),
    "Gaussian KL": lambda z: gaussian_kl(TEACHER, TEACHER.flip(0), z, z.flip(1)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_gradients_agree_with_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, (random_logits(2, 3, 4).requires_grad_(),))


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits = random_logits(1, 3, 4).bfloat16()
    teacher = random_logits(1, 3, 4, seed=5).softmax(-1).float()
    for temperature in (3.0, math.inf):
        loss = distillation_loss(logits, teacher, LABELS, temperature, 1.0, 0.5)
        assert loss.dtype == torch.float32
        in_float32 = distillation_loss(logits.float(), teacher, LABELS, temperature, 1.0, 0.5)
        torch.testing.assert_close(loss, in_float32)
