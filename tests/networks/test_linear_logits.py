"""Logits that are read in blocks give what dense ones give."""

import pytest
import torch
import torch.nn.functional as F

from networks.linear_logits import LinearLogits, Targets

ROWS, SIZE, CLASSES = 5, 4, 23
BLOCKS = (1, 7, 23, None)


def parts(dtype=torch.float64, seed=0):
    """features, weight and bias, each a leaf."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((ROWS, SIZE), (CLASSES, SIZE), (CLASSES,))
    drawn_parts = [torch.randn(*shape, generator=draw, dtype=dtype).mul_(2) for shape in shapes]
    return [part.requires_grad_() for part in drawn_parts]


def labels(seed=1):
    return torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(seed))


def distributions(dtype=torch.float64):
    draw = torch.Generator().manual_seed(2)
    return torch.randn(ROWS, CLASSES, generator=draw, dtype=dtype).mul_(3).softmax(1)


def top_and_tail(k=4):
    top = distributions().topk(k)
    return top.indices, top.values, 1 - top.values.sum(1)


def smoothed_and_dense() -> Targets:
    smoothed = Targets.of_labels(labels(), CLASSES, 0.2, 0.3)
    return smoothed._replace(dense=0.7 * distributions())


TARGETS = {
    "labels": lambda: Targets.of_labels(labels(), CLASSES),
    "smoothed labels": lambda: Targets.of_labels(labels(), CLASSES, 0.1),
    "some unlabelled": lambda: Targets.of_labels(torch.tensor([3, -1, 0, 22, -1]), CLASSES, 0.1),
    "top 4 and tail": lambda: Targets.of_top(*top_and_tail()[:2], CLASSES, top_and_tail()[2]),
    "dense": lambda: Targets(dense=distributions()),
    "all of it": smoothed_and_dense,
}


def dense_targets(targets: Targets):
    """The targets as one tensor [N, C]."""
    t = torch.zeros(ROWS, CLASSES, dtype=torch.float64)
    if targets.indices is not None:
        t.scatter_add_(1, targets.indices, targets.values.double())
    if targets.uniform is not None:
        t += targets.uniform[:, None]
    if targets.dense is not None:
        t += targets.dense
    return t


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", TARGETS)
def test_loss_and_gradients_are_those_of_dense_logits(name, block):
    ours, theirs = parts(), parts()
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)).double()
    targets = TARGETS[name]()
    loss = LinearLogits(*ours, CLASSES, block).cross_entropy(targets)
    dense = -(dense_targets(targets) * F.linear(*theirs).log_softmax(1)).sum(1)
    torch.testing.assert_close(loss, dense, atol=2e-6, rtol=0)  # targets are float32
    (loss * weights).sum().backward()
    (dense * weights).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_float32_equals_torchs_cross_entropy_to_1e_5(smoothing):
    ours, theirs = parts(torch.float32), parts(torch.float32)
    targets = Targets.of_labels(labels(), CLASSES, smoothing)
    loss = LinearLogits(*ours, CLASSES, 7).cross_entropy(targets).mean()
    dense = F.cross_entropy(F.linear(*theirs), labels(), label_smoothing=smoothing)
    torch.testing.assert_close(loss, dense, atol=1e-5, rtol=0)
    loss.backward()
    dense.backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TARGETS)
def test_gradients_agree_with_finite_differences(name):
    targets = TARGETS[name]()

    def of_parts(*parts):
        return LinearLogits(*parts, CLASSES, 6).logsumexp_and_dot(targets)

    assert torch.autograd.gradcheck(of_parts, parts())


def test_a_prior_and_a_temperature_act_on_the_logits():
    features, weight, bias = parts()
    prior = torch.randn(CLASSES, dtype=torch.float64)
    dense = F.linear(features, weight, bias)
    logits = LinearLogits(features, weight, bias, CLASSES, 5)
    with_prior, _ = logits.add_bias(prior).logsumexp_and_dot()
    torch.testing.assert_close(with_prior, (dense + prior).logsumexp(1))
    scaled, _ = logits.scale_by_temperature(3.0).logsumexp_and_dot()
    torch.testing.assert_close(scaled, (dense / 3).logsumexp(1))


def test_large_logits_do_not_overflow():
    features, weight, bias = parts(torch.float32)
    logits = LinearLogits(features * 1e4, weight, bias, CLASSES, 5)
    loss = logits.cross_entropy(Targets.of_labels(labels(), CLASSES))
    dense = F.cross_entropy(F.linear(features * 1e4, weight, bias), labels(), reduction="none")
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-2)
    loss.sum().backward()
    assert all(part.isfinite().all() for part in (weight.grad, bias.grad))


def test_probabilities_that_underflow_count_as_nothing():
    """Logits 60 to 1,000 apart, on both sides of where a float32's exp is subnormal, then 0."""
    x, weight = torch.ones(4, 1), torch.tensor([0.0, -60.0, -90.0, -104.0, -1000.0])[:, None]
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    classes = torch.tensor([0, 1, 3, 4])
    loss = LinearLogits(x, ours, None, 5, block=2).cross_entropy(Targets.of_labels(classes, 5))
    dense = F.cross_entropy(F.linear(x, theirs), classes, reduction="none")
    torch.testing.assert_close(loss, dense)
    loss.sum().backward()
    dense.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-30, rtol=1e-6)


def test_what_is_frozen_gets_no_gradient():
    features, weight, bias = parts()
    loss = LinearLogits(features.detach(), weight.detach(), bias, CLASSES, 5)
    loss.cross_entropy(Targets.of_labels(labels(), CLASSES)).sum().backward()
    assert weight.grad is None and features.grad is None and bias.grad is not None


def test_under_autocast_products_are_low_and_sums_float32():
    """As a linear layer under autocast: its logits in bfloat16, the loss of these in float32."""
    ours, theirs = parts(torch.float32), parts(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        targets = Targets.of_labels(labels(), CLASSES, 0.1)
        loss = LinearLogits(*ours, CLASSES, 7).cross_entropy(targets).mean()
        dense = F.cross_entropy(F.linear(*theirs).float(), labels(), label_smoothing=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dense, rtol=1e-2, atol=0)
    loss.backward()
    dense.backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, other.grad, rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("block", BLOCKS)
def test_summary_is_that_of_the_softmax(block):
    features, weight, bias = parts()
    p = F.linear(features, weight, bias).softmax(1)
    summary = LinearLogits(features, weight, bias, CLASSES, block).summary(5, labels())
    top = p.topk(5)
    assert torch.equal(summary.indices, top.indices)
    torch.testing.assert_close(summary.probabilities, top.values)
    torch.testing.assert_close(summary.log_label, p.gather(1, labels()[:, None])[:, 0].log())
    torch.testing.assert_close(summary.squares, p.square().sum(1))


def test_summary_of_few_classes_names_them_all():
    logits = LinearLogits(torch.ones(2, 1), torch.tensor([[0.0], [1.0], [2.0]]), None, 3)
    assert logits.summary(5).indices.tolist() == [[2, 1, 0]] * 2


def test_logits_of_some_classes_are_the_columns_of_all():
    features, weight, bias = parts()
    some = torch.tensor([22, 0, 7])
    logits = LinearLogits(features, weight, bias, CLASSES)
    torch.testing.assert_close(logits.of_classes(some), F.linear(features, weight, bias)[:, some])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_with_all_other_classes_sampling_changes_nothing():
    logits = LinearLogits(*parts(), CLASSES)
    some, among = logits.sampled(labels(), CLASSES, seeded(0))
    assert some.num_classes == CLASSES and torch.equal(among, labels())
    torch.testing.assert_close(some.logsumexp_and_dot()[0], logits.logsumexp_and_dot()[0])


def test_the_sum_of_exponentials_over_sampled_classes_is_unbiased():
    """And its logarithm is not: it lies below, by less the more are drawn."""
    logits, draws = LinearLogits(*parts(), CLASSES), 4000
    true, shortfalls = logits.logsumexp_and_dot()[0].detach(), []
    for negatives in (4, 10):
        sampled = (logits.sampled(labels(), negatives, seeded(n))[0] for n in range(draws))
        log_sums = torch.stack([some.logsumexp_and_dot()[0].detach() for some in sampled])
        sums = (log_sums - true).exp()
        error = sums.std(0) / draws**0.5
        assert ((sums.mean(0) - 1).abs() < 4 * error).all()
        shortfalls.append((true - log_sums.mean(0)).mean())
    assert shortfalls[0] > shortfalls[1] > 0


def test_what_is_drawn_is_distinct_other_classes_and_each_as_often():
    """In a huge label set the draw costs what it gives: no permutation of all classes."""
    features, counts = torch.zeros(2, 1), torch.zeros(7)
    logits = LinearLogits(features, torch.arange(7.0)[:, None], None, 7)
    own = torch.tensor([5, 2])
    for seed in range(600):
        some, _ = logits.sampled(own, 2, seeded(seed))
        classes = some.weight[:, 0].long()
        assert len(classes) == 4 and torch.equal(classes, classes.unique())
        assert {2, 5} < set(classes.tolist())
        counts[classes] += 1
    assert counts[[2, 5]].tolist() == [600, 600]
    drawn = counts[[0, 1, 3, 4, 6]]  # 240 each on average, with a deviation of 12
    assert (drawn - 240).abs().max() < 48
    huge = LinearLogits(torch.zeros(1, 1), torch.zeros(1, 1).expand(2**40, 1), None, 2**40)
    assert huge.sampled(torch.tensor([2**39]), 5, seeded(0))[0].num_classes == 6


def test_sampled_labels_name_the_same_classes():
    features, weight, bias = parts()
    some, among = LinearLogits(features, weight, bias, CLASSES).sampled(labels(), 3, seeded(0))
    assert some.num_classes == len(labels().unique()) + 3
    assert torch.equal(some.weight[among], weight[labels()])
    assert torch.equal(some.bias[among], bias[labels()])  # only the drawn ones are raised
