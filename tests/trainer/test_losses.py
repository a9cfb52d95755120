import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from networks.linear_logits import LinearLogits
from trainer.losses import (
    TopAnswers,
    classification_loss,
    distillation_loss,
    dustbin_shift,
    soften,
    specialist_loss,
    unheld_distillation_loss,
)


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dustbin_shift_is_the_log_of_the_odds_ratio():
    # f = 1/2, pi = 0.02: odds 1 against 0.02 / 0.98, log 49 (the literal log(f / pi) = log 25 is 0.67 too low).
    assert dustbin_shift(0.02, 0.5) == pytest.approx(math.log(49))
    assert dustbin_shift(0.02, 0.5) - math.log(0.5 / 0.02) == pytest.approx(0.673, abs=1e-3)


def test_dustbin_shift_is_zero_without_oversampling():
    assert dustbin_shift(0.3, 0.3) == pytest.approx(0)


@pytest.mark.parametrize("natural, training", [(0, 0.5), (1, 0.5), (0.2, 0), (0.2, 1)])
def test_dustbin_shift_refuses_a_share_that_is_none_or_all(natural, training):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        dustbin_shift(natural, training)


def test_specialist_prior_and_shift_recover_natural_frequencies_of_a_resampled_group():
    """Classes a, b of S_m and the rest: naturally .06, .02, .92; in training a quarter, a quarter and half."""
    natural, training = torch.tensor([0.06, 0.02, 0.92]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    log_prior = (torch.tensor([0.5, 0.5]) / torch.tensor([0.75, 0.25])).log().double()
    logits = natural.log().expand(3, 3)  # says nothing but the natural frequencies
    shift = dustbin_shift(0.08, 0.5)
    per_class = [float(specialist_loss(logits[:1], torch.tensor([c]), shift, log_prior=log_prior)) for c in range(3)]
    for c in range(3):  # and so its training loss is that of the training frequencies, the best there is
        assert per_class[c] == pytest.approx(-math.log(training[c]), rel=1e-5)


@given(natural=st.floats(0.01, 0.9), training=st.floats(0.05, 0.95))
def test_dustbin_shift_recovers_the_true_prior(natural, training):
    """With inputs that say nothing, the loss's minimiser at training shares answers with the natural shares
    unshifted."""
    # Classes: one in S_m, the rest in the dustbin.  The minimiser's shifted probabilities are the training shares.
    shifted = torch.tensor([math.log(training), math.log(1 - training)], dtype=torch.float64)
    unshifted = shifted + torch.tensor([0.0, dustbin_shift(natural, training)], dtype=torch.float64)
    assert float(unshifted.softmax(0)[0]) == pytest.approx(natural, rel=1e-9)


def test_specialist_loss_lowers_the_dustbin_alone():
    logits, targets = random_logits(5, 4), torch.tensor([0, 1, 2, 3, 3])
    by_hand = logits.clone()
    by_hand[:, 3] -= 1.5
    assert specialist_loss(logits, targets, 1.5) == pytest.approx(F.cross_entropy(by_hand.float(), targets).item())
    assert specialist_loss(logits, targets, 0.0) == pytest.approx(F.cross_entropy(logits.float(), targets).item())


def test_log_prior_makes_a_balanced_stream_answer_with_natural_frequencies():
    natural = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    balanced = torch.full((3,), 1 / 3, dtype=torch.float64)
    logits = natural.log().repeat(3, 1)  # a network that knows the natural shares and nothing else
    loss = classification_loss(logits, torch.arange(3), log_prior=(balanced / natural).log())
    assert float(loss) == pytest.approx(math.log(3), rel=1e-6)  # is optimal on the balanced stream


def test_softening_equals_dividing_the_logits():
    logits = random_logits(6, 9)
    for temperature in (0.5, 1.0, 4.0, 20.0):
        torch.testing.assert_close(soften(logits.softmax(1), temperature), (logits / temperature).softmax(1))


def test_distillation_loss_is_zero_when_student_equals_teacher():
    logits = random_logits(3, 4, 7)
    for temperature in (1.0, 3.0):
        loss = distillation_loss(logits, logits.softmax(-1), torch.zeros(4, dtype=torch.long), temperature, 1.0, 0.0)
        assert abs(float(loss)) < 1e-6


def test_distillation_matches_logits_in_the_limit_of_high_temperature():
    """Hinton et al. 2015, eq. 4: T^2-scaled gradient -> (z - v) / C for zero-mean logits."""
    student, teacher = random_logits(1, 2, 5, seed=1), random_logits(1, 2, 5, seed=2)
    student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    z, T = student.float().requires_grad_(), 1000.0
    distillation_loss(z, (teacher / 1.0).softmax(-1).float(), torch.zeros(2, dtype=torch.long), T, 1.0, 0.0).backward()
    torch.testing.assert_close(z.grad, ((student - teacher) / 5 / 2).float(), rtol=2e-2, atol=2e-3)


def test_hard_weight_adds_the_cross_entropy_of_every_member():
    logits, labels = random_logits(2, 4, 3), torch.tensor([0, 1, 2, 0])
    loss = distillation_loss(logits, logits.softmax(-1), labels, 2.0, 1.0, 0.25)
    hard = sum(F.cross_entropy(member.float(), labels) for member in logits) / 2
    assert float(loss) == pytest.approx(0.25 * float(hard), abs=1e-6)


def test_unlabelled_examples_have_no_hard_term():
    logits = random_logits(1, 4, 3)
    loss = distillation_loss(logits, logits.softmax(-1), torch.tensor([2, -1, -1, 0]), 1.0, 1.0, 1.0)
    by_hand = F.cross_entropy(logits[0, [0, 3]].float(), torch.tensor([2, 0]), reduction="sum") / 4
    assert float(loss) == pytest.approx(float(by_hand), abs=1e-6)


def linear_head(classes):
    """(features, weight, bias) of four examples, and the logits."""
    parts = [random_logits(*shape, seed=n).float() for n, shape in enumerate(((4, 3), (classes, 3), (classes,)))]
    return parts, F.linear(*parts)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 4.0))
@pytest.mark.parametrize("kept", (2, 5, 7))
def test_distilling_without_holding_the_logits_is_the_same(temperature, kept):
    """From all of the teacher's seven classes, and from its two, five or seven most probable ones and their tail."""
    parts, logits = linear_head(7)
    labels, weights = torch.tensor([2, -1, 6, 0]), (temperature, 0.7, 0.3, 0.1)
    p = random_logits(4, 7, seed=5).mul(2).softmax(1).float()
    top = TopAnswers(p.topk(kept).indices, p.topk(kept).values, 7)
    for teacher, spread in ((p, p), (top, top.spread())):
        found = unheld_distillation_loss(LinearLogits(*parts, 7, block=3), teacher, labels, *weights)
        torch.testing.assert_close(found, distillation_loss(logits[None], spread[None], labels, *weights))


def test_what_is_kept_of_a_teacher_is_spread_evenly():
    spread = TopAnswers(torch.tensor([[3, 0]]), torch.tensor([[0.5, 0.2]]), 5).spread()
    torch.testing.assert_close(spread, torch.tensor([[0.2, 0.1, 0.1, 0.5, 0.1]]))


def test_classifying_without_holding_the_logits_is_the_same():
    parts, logits = linear_head(7)
    labels, prior = torch.tensor([2, 5, 6, 0]), torch.randn(7)
    found = classification_loss(LinearLogits(*parts, 7, block=2), labels, 0.1, prior)
    torch.testing.assert_close(found, classification_loss(logits, labels, 0.1, prior))


def test_distillation_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and teacher \(1, 2, 4\)"):
        distillation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(2, dtype=torch.long), 1, 1, 0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: classification_loss_64(z),
        lambda z: specialist_loss_64(z),
        lambda z: distillation_loss_64(z),
    ],
)
def test_gradients_agree_with_finite_differences(loss):
    # The losses compute in float32; gradcheck in float64 needs their float() to keep float64.
    assert torch.autograd.gradcheck(loss, (random_logits(3, 4).requires_grad_(),))


def classification_loss_64(z):
    with keep_float64():
        return classification_loss(z, torch.tensor([0, 1, 3]), 0.1, torch.tensor([0.1, -0.2, 0.3, 0.0]).double())


def specialist_loss_64(z):
    with keep_float64():
        return specialist_loss(z, torch.tensor([0, 1, 3]), 0.7, 0.1)


def distillation_loss_64(z):
    with keep_float64():
        return distillation_loss(
            z[None], random_logits(1, 3, 4, seed=5).softmax(-1), torch.tensor([0, 1, 3]), 2.0, 0.9, 0.1
        )


class keep_float64:
    """Tensor.float() as the identity, so that the same code runs in float64."""

    def __enter__(self):
        self.original = torch.Tensor.float
        torch.Tensor.float = lambda tensor: tensor

    def __exit__(self, *_):
        torch.Tensor.float = self.original
