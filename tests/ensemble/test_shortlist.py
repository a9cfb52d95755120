"""Generalised means, over all classes and on shortlists."""

import math

import pytest
import torch

from ensemble.shortlist import generalised_mean, join_on_shortlist, join_within

K, B, C = 3, 4, 7


def log_p(seed=0, scale=2.0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(K, B, C, generator=draw, dtype=dtype)).log_softmax(-1)


def test_order_1_is_the_arithmetic_and_order_0_the_normalised_geometric_mean():
    p = log_p().exp()
    torch.testing.assert_close(generalised_mean(p.log(), 1.0).exp(), p.mean(0))
    product = p.prod(0) ** (1 / K)
    geometric = product / product.sum(1, keepdim=True)
    torch.testing.assert_close(generalised_mean(p.log(), 0.0).exp(), geometric)


def test_two_distributions_joined_by_hand_with_order_a_half_and_weights_3_to_1():
    p = torch.tensor([[[0.81, 0.19]], [[0.01, 0.99]]], dtype=torch.float64)
    first = (0.75 * 0.9 + 0.25 * 0.1) ** 2
    second = (0.75 * math.sqrt(0.19) + 0.25 * math.sqrt(0.99)) ** 2
    q = generalised_mean(p.log(), 0.5, [3, 1]).exp()
    assert q[0].tolist() == pytest.approx([first / (first + second), second / (first + second)])


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("order", [1e-8, 1e-7])
def test_the_limit_of_order_to_0_is_continuous_even_with_great_differences(order, dtype, atol):
    p = log_p(scale=6.0, dtype=dtype)
    weights = [0.2, 0.5, 0.3]
    near, limit = generalised_mean(p, order, weights), generalised_mean(p, 0.0, weights)
    torch.testing.assert_close(near.exp(), limit.exp(), atol=atol, rtol=0)


@pytest.mark.parametrize("order", [0.0, 0.3, 1.0])
def test_every_order_gives_distributions_and_keeps_what_all_agree_on(order):
    p = log_p()
    q = generalised_mean(p, order, [1, 2, 3])
    torch.testing.assert_close(q.exp().sum(1), torch.ones(B, dtype=torch.float64))
    same = p[:1].expand(K, -1, -1)
    torch.testing.assert_close(generalised_mean(same, order, [1, 2, 3]), p[0])


def test_the_geometric_mean_obeys_a_veto_and_the_arithmetic_does_not():
    p = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    assert generalised_mean(p.log(), 0.0).exp().tolist() == [[1.0, 0.0]]
    for order, expected in ((0.5, (0.5 * math.sqrt(0.5)) ** 2), (1.0, 0.25)):
        q = generalised_mean(p.log(), order).exp()
        first = ((1 + math.sqrt(0.5)) / 2) ** 2 if order == 0.5 else 0.75
        assert q[0, 1].item() == pytest.approx(expected / (expected + first))


@pytest.mark.parametrize("order", [0.0, 1e-7, 0.4, 1.0])
def test_gradients_by_logits_and_weights_are_those_of_finite_differences(order):
    z = log_p().requires_grad_()
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, w: generalised_mean(z, order, w), (z, weights))


@pytest.mark.parametrize("order", [0.0, 0.4, 1.0])
def test_with_all_classes_on_the_shortlist_it_is_the_mean_over_all_classes(order):
    p, weights = log_p(dtype=torch.float32), [0.5, 0.2, 0.3]
    order_of_classes = torch.stack([torch.randperm(C) for _ in range(B)])
    members = p[1:].gather(2, order_of_classes.expand(K - 1, -1, -1)) + 3.0  # up to a constant
    q = join_on_shortlist(p[0], order_of_classes, members, order, weights)
    expected = generalised_mean(p, order, weights)
    torch.testing.assert_close(q.exp(), expected.exp(), atol=1e-6, rtol=0)


def test_the_generalist_keeps_its_mass_on_the_shortlist_and_stands_outside():
    p = log_p()
    indices = p[0].topk(3).indices
    members = p[1:].gather(2, indices.expand(K - 1, -1, -1))
    q = join_on_shortlist(p[0], indices, members)
    outside = torch.ones(B, C, dtype=torch.bool).scatter(1, indices, False)
    assert torch.equal(q[outside], p[0][outside])
    torch.testing.assert_close(q.exp().sum(1), torch.ones(B, dtype=torch.float64))
    own = p[0].gather(1, indices)
    joined = join_within(torch.cat([own[None], members]), own.logsumexp(1))
    assert torch.equal(q.gather(1, indices), joined)


@pytest.mark.parametrize("order", [-0.1, 1.5, float("nan")])
def test_an_order_outside_0_to_1_is_named(order):
    with pytest.raises(ValueError, match="order = .*0 .geometric. to 1 .arithmetic."):
        generalised_mean(log_p(), order)


@pytest.mark.parametrize("weights", [[1, 2], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1]])
def test_weights_that_are_not_one_positive_number_a_network_are_named(weights):
    with pytest.raises(ValueError, match="weights = .*; 3 positive numbers are needed"):
        generalised_mean(log_p(), 0.0, weights)
