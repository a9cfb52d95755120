"""A teacher's answers: how much of them is kept, and what a student loses by it or by errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.listed import Listed
from networks.linear_logits import LinearLogits
from trainer.core.distillation import (
    LogitTargets,
    TopKTargets,
    distillation_loss,
    kl_of_logits,
    lazy_distillation_loss,
)

P = torch.tensor([[0.3, 0.05, 0.5, 0.15]])


def dense(targets, num_classes):
    """Targets of LinearLogits as [n, C]."""
    whole = torch.zeros(len(targets.indices), num_classes)
    whole.scatter_add_(1, targets.indices, targets.values)
    if targets.uniform is not None:
        whole += targets.uniform[:, None]
    return whole


def random_rows(seed, rows=6, num_classes=40, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, num_classes, generator=generator) * scale).log_softmax(-1)


@pytest.mark.parametrize(
    "mass, temperature, bounds, expected",
    [
        (0.79, 1.0, {}, 2),  # .5 + .3
        (0.81, 1.0, {}, 3),
        (0.94, 1.0, {}, 3),
        (0.96, 1.0, {}, 4),
        (1.0, 1.0, {}, 4),
        (0.0, 1.0, {}, 1),
        # at T = 2 the roots .707, .548, .387, .224 of 1.866 in all: .379, .672, .880, 1
        (0.66, 2.0, {}, 2),
        (0.79, 2.0, {}, 3),
        (0.89, 2.0, {}, 4),
        (0.5, math.inf, {}, 2),  # every class is worth a quarter
        (0.51, math.inf, {}, 3),
        (0.1, 1.0, {"least": 3}, 3),
        (0.99, 1.0, {"most": 2}, 2),
        (0.99, 1.0, {"least": 3, "most": 2}, 2),
    ],
)
def test_a_row_keeps_as_many_classes_as_hold_the_mass(mass, temperature, bounds, expected):
    kept = TopKTargets.holding(P.log(), mass, temperature, **bounds)
    assert kept.indices.tolist() == [[2, 0, 3, 1][:expected]]
    torch.testing.assert_close(kept.log_values.exp(), P.gather(1, kept.indices))
    left = 1 - float(P.gather(1, kept.indices).sum())
    assert float(kept.log_tail.exp()) == pytest.approx(left, abs=1e-6)


def test_the_tail_of_each_row_is_even_over_its_own_other_classes():
    """Two rows of 4 classes keep 1 and 3: tails of .3 over three and of .05 over one."""
    p = torch.tensor([[0.7, 0.1, 0.2, 0.0], [0.3, 0.05, 0.5, 0.15]])
    kept = TopKTargets.holding(p.clamp_min(1e-30).log(), 0.65)
    assert kept.counts.tolist() == [1, 2]
    kept = TopKTargets.holding(p.clamp_min(1e-30).log(), 0.69, least=1)
    assert kept.counts.tolist() == [1, 2]
    expected = [[0.7, 0.1, 0.1, 0.1], [0.3, 0.1, 0.5, 0.1]]
    torch.testing.assert_close(kept.spread(), torch.tensor(expected))


@given(
    st.integers(0, 10**6),
    st.floats(0.05, 0.9999),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    st.sampled_from([0.3, 3.0, 8.0]),
)
@settings(max_examples=40, deadline=None)
def test_what_is_kept_holds_the_mass_and_with_a_class_less_would_not(seed, mass, T, scale):
    log_p = random_rows(seed, scale=scale).double()
    kept = TopKTargets.holding(log_p, mass, T)
    softened = (log_p / T).softmax(-1)
    for row, (indices, p) in enumerate(zip(kept.indices, softened, strict=True)):
        count = indices.shape[0] if kept.counts is None else int(kept.counts[row])
        held = p[indices[:count]]
        assert float(held.sum()) >= mass - 1e-9
        assert count == 1 or float(held[:-1].sum()) < mass + 1e-9
        assert len(set(indices[:count].tolist())) == count


@given(st.integers(0, 10**6), st.floats(0.2, 0.99), st.sampled_from([1.0, 2.0, 5.0]))
@settings(max_examples=40, deadline=None)
def test_rows_of_different_lengths_are_what_each_is_by_itself(seed, mass, T):
    log_p = random_rows(seed)
    kept = TopKTargets.holding(log_p, mass)
    counts = kept.counts
    if counts is None:
        counts = torch.full((len(log_p),), kept.indices.shape[1])
    alone = [TopKTargets.of(log_p[row : row + 1], int(counts[row])) for row in range(len(log_p))]
    torch.testing.assert_close(kept.spread(), torch.cat([each.spread() for each in alone]))
    targets, entropy = kept.softened(T)
    each = [one.softened(T) for one in alone]
    expected = torch.cat([dense(one, 40) for one, _ in each])
    torch.testing.assert_close(dense(targets, 40), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.cat([own for _, own in each]), atol=1e-5, rtol=1e-5)
    # Targets, softened, are the spread distribution softened.
    softened = (kept.spread().log() / T).softmax(-1)
    torch.testing.assert_close(dense(targets, 40), softened, atol=1e-6, rtol=1e-4)


def test_where_all_rows_keep_alike_there_is_no_padding():
    kept = TopKTargets.holding(random_rows(0), 0.5, least=40)
    assert kept.counts is None and kept.padding is None
    of = TopKTargets.of(random_rows(0), 40)
    assert torch.equal(kept.log_values, of.log_values) and torch.equal(kept.indices, of.indices)


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_a_sharded_head_learns_from_rows_of_different_lengths_what_a_plain_one_does(T):
    torch.manual_seed(0)
    kept = TopKTargets.holding(random_rows(1), 0.8)
    assert kept.counts is not None
    features, weight = torch.randn(6, 5), torch.randn(40, 5)
    labels = torch.tensor([0, 1, 2, 3, -1, 5])
    lazy = lazy_distillation_loss(
        LinearLogits(features, weight, None, 40, block=7), kept, labels, T, 1.0, 0.3
    )
    logits = (features @ weight.T)[None]
    plain = distillation_loss(logits, kept.spread()[None], labels, T, 1.0, 0.3)
    torch.testing.assert_close(lazy, plain, rtol=1e-5, atol=1e-5)


# Logits as targets


@pytest.mark.parametrize("T", [1.0, 0.5, 4.0, math.inf])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_logits_teach_what_their_probabilities_do(T, hard_weight):
    torch.manual_seed(0)
    student, v = torch.randn(2, 6, 9, requires_grad=True), torch.randn(2, 6, 9) * 2
    labels = torch.tensor([0, 1, 2, 3, -1, 8])
    weights = (labels, T, 0.7, hard_weight, 0.1)
    of_logits = distillation_loss(student, LogitTargets(v + torch.randn(2, 6, 1)), *weights)
    (g,) = torch.autograd.grad(of_logits, student)
    of_probabilities = distillation_loss(student, v.softmax(-1), *weights)
    (h,) = torch.autograd.grad(of_probabilities, student)
    torch.testing.assert_close(of_logits, of_probabilities, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-6)


def test_kl_of_logits_is_the_kl_and_its_gradient_is_right():
    torch.manual_seed(0)
    v, z = torch.randn(5, 7).double(), torch.randn(5, 7, requires_grad=True, dtype=torch.float64)
    expected = F.kl_div(z.log_softmax(-1), v.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(kl_of_logits(v, z), expected)
    assert torch.autograd.gradcheck(lambda logits: kl_of_logits(v, logits), z)
    assert float(kl_of_logits(v, v + 3).abs().max()) < 1e-12


def test_logits_made_in_inference_mode_can_teach():
    student = torch.randn(1, 3, 4, requires_grad=True)
    with torch.inference_mode():
        v = torch.randn(1, 3, 4) + 1
    distillation_loss(student, LogitTargets(v), torch.zeros(3).long(), 2.0, 1.0, 0.1).backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()


# Teachers that are wrong


def test_where_the_teacher_is_wrong_the_label_takes_its_weight():
    """Rows: right, wrong, unlabelled.  KLs k0 k1 k2, cross-entropies c0 c1."""
    torch.manual_seed(0)
    z = torch.randn(1, 3, 4)
    p = torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]]])
    labels = torch.tensor([0, 2, -1])
    k = (p * (p.log() - z.log_softmax(-1))).sum(-1)[0]
    c = -z.log_softmax(-1)[0, [0, 1], [0, 2]]
    for wrong, expected in (
        (0.0, k.sum()),
        (1.0, k[0] + c[1] + k[2]),
        (0.25, k[0] + 0.75 * k[1] + 0.25 * c[1] + k[2]),
    ):
        for teacher in (p, LogitTargets(p.log())):
            loss = distillation_loss(z, teacher, labels, 1.0, 1.0, 0.0, wrong_weight=wrong)
            torch.testing.assert_close(loss, expected / 3)
    both = distillation_loss(z, p, labels, 1.0, 0.5, 0.1, wrong_weight=1.0)
    torch.testing.assert_close(both, (0.5 * (k[0] + c[1] + k[2]) + 0.1 * (c[0] + c[1])) / 3)


@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("form", ["probabilities", "logits", "kept"])
def test_a_sharded_head_gives_the_label_the_same_weight(T, form):
    torch.manual_seed(0)
    features, weight = torch.randn(6, 5), torch.randn(40, 5)
    log_p = random_rows(2)
    labels = log_p.argmax(1)
    labels[2:5] = torch.tensor([0, 1, -1])
    kept = TopKTargets.holding(log_p, 0.999999)
    teacher = {"probabilities": log_p.exp(), "logits": LogitTargets(log_p), "kept": kept}[form]
    lazy = lazy_distillation_loss(
        LinearLogits(features, weight, None, 40), teacher, labels, T, 0.8, 0.1, 0.0, 0.5
    )
    whole = kept.spread() if form == "kept" else log_p.exp()
    logits = (features @ weight.T)[None]
    plain = distillation_loss(logits, whole[None], labels, T, 0.8, 0.1, 0.0, 0.5)
    torch.testing.assert_close(lazy, plain, rtol=1e-5, atol=1e-5)
    without = distillation_loss(logits, whole[None], labels, T, 0.8, 0.1, 0.0, 0.0)
    assert abs(float(plain - without)) > 1e-3


@pytest.mark.parametrize("mass", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0, math.inf])
def test_rows_that_list_some_classes_keep_what_whole_rows_keep(mass, temperature):
    log_p = random_rows(3)
    most = 25
    whole = TopKTargets.holding(log_p, mass, temperature, 2, most)
    listed = torch.cat([log_p.topk(most, dim=1).indices, log_p.topk(2, largest=False).indices], 1)
    shuffled = listed[:, torch.randperm(27, generator=torch.Generator().manual_seed(0))]
    q = Listed.of(log_p.exp(), shuffled, tuple({1.0, 1 / temperature}))
    kept = TopKTargets.holding_listed(q, mass, temperature, 2, most)
    assert torch.equal(kept.indices, whole.indices) and kept.num_classes == 40
    torch.testing.assert_close(kept.log_values, whole.log_values)
    torch.testing.assert_close(kept.log_tail, whole.log_tail, rtol=1e-5, atol=1e-6)
    assert (kept.counts is None) == (whole.counts is None)
    if whole.counts is not None:
        assert torch.equal(kept.counts, whole.counts)
