"""The softmax of few classes of each row: whom it counts, and what it is on average."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from networks.candidates import (
    candidate_cross_entropy,
    candidates_of,
    cross_entropy_among,
)
from networks.drawing import draw_classes
from networks.linear_logits import LinearLogits

ROWS, CLASSES, FEATURES = 5, 7, 3


def logits_of(seed=0, rows=ROWS, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    x, weight, bias = normal(rows, FEATURES), normal(classes, FEATURES), normal(classes)
    labels = torch.randint(classes, (rows,), generator=generator)
    return LinearLogits(x, weight, bias, classes), labels, generator


def lists(generator, k, rows=ROWS, classes=CLASSES):
    return torch.stack([torch.randperm(classes, generator=generator)[:k] for _ in range(rows)])


def test_numbers_worked_by_hand():
    """Label 2 with logit log 3. 0 of log 2 and the label on the list. 1 of 4 drawn stands for 4."""
    z = torch.tensor([[2.0, 5.0, 3.0, 7.0]]).log()
    asked = candidates_of(torch.tensor([2]), torch.tensor([[0, 2]]), torch.tensor([1]))
    own, drawn = z.gather(1, asked.own), z[:, asked.drawn]
    loss = candidate_cross_entropy(own, asked.counted, drawn, asked.apart, 4)
    assert loss.tolist() == pytest.approx([math.log((3 + 2 + 4 * 5) / 3)])


def test_of_what_is_drawn_the_rows_own_classes_do_not_count_again():
    labels, listed = torch.tensor([2, 3]), torch.tensor([[0, 2], [0, 2]])
    asked = candidates_of(labels, listed, torch.tensor([3, 0, 1]))
    assert asked.own.tolist() == [[2, 0, 2], [3, 0, 2]]
    assert asked.counted.tolist() == [[True, True, False], [True, True, True]]
    assert asked.drawn.tolist() == [0, 1, 3]
    assert asked.apart.tolist() == [[False, True, True], [False, True, False]]
    classes, again = asked.numbered()
    assert classes.tolist() == [0, 1, 2, 3]
    assert classes[again.own].equal(asked.own) and classes[again.drawn].equal(asked.drawn)


@pytest.mark.parametrize("seed", range(20))
def test_the_label_always_counts_and_no_class_twice(seed):
    _, labels, generator = logits_of(seed)
    listed = lists(generator, seed % CLASSES)
    drawn = draw_classes(CLASSES, seed % 4, seed)
    asked = candidates_of(labels, listed, drawn)
    for row, label in enumerate(labels.tolist()):
        own = asked.own[row][asked.counted[row]].tolist()
        others = asked.drawn[asked.apart[row]].tolist()
        assert own[0] == label
        assert sorted(own) == sorted({label, *listed[row].tolist()})
        assert sorted(others) == sorted(set(drawn.tolist()) - set(own))


def test_with_every_class_on_the_list_it_is_the_whole_softmax():
    logits, labels, generator = logits_of()
    asked = candidates_of(labels, lists(generator, CLASSES))
    loss = cross_entropy_among(logits, asked, CLASSES)
    expected = F.cross_entropy(logits.materialize().double(), labels, reduction="none")
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("k", [0, 3])
def test_with_every_class_drawn_it_is_the_whole_softmax(k):
    logits, labels, generator = logits_of()
    asked = candidates_of(labels, lists(generator, k), draw_classes(CLASSES, 100, 0))
    loss = cross_entropy_among(logits, asked, CLASSES)
    expected = F.cross_entropy(logits.materialize().double(), labels, reduction="none")
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("k, count", [(0, 2), (2, 1), (3, 3)])
def test_over_all_draws_the_partition_is_the_whole_ones_on_average(k, count):
    logits, labels, generator = logits_of()
    z = F.linear(logits.features, logits.weight, logits.bias).detach()
    listed, partitions = lists(generator, k), []
    for drawn in combinations(range(CLASSES), count):
        asked = candidates_of(labels, listed, torch.tensor(drawn))
        loss = cross_entropy_among(logits, asked, CLASSES).detach()
        partitions.append((loss + z.gather(1, labels[:, None])[:, 0]).exp())
    whole = z.exp().sum(1)
    torch.testing.assert_close(torch.stack(partitions).mean(0), whole)
    losses = torch.stack(partitions).log().mean(0)
    assert (losses <= whole.log() + 1e-12).all()  # Jensen: biased downwards


def test_its_gradients_are_those_of_finite_differences():
    logits, labels, generator = logits_of()
    asked = candidates_of(labels, lists(generator, 3), torch.tensor([1, 4]))
    prior = torch.randn(CLASSES, dtype=torch.float64, generator=generator)

    def loss(x, weight, bias):
        return cross_entropy_among(LinearLogits(x, weight, bias, CLASSES), asked, CLASSES, prior)

    assert logits.bias is not None
    assert torch.autograd.gradcheck(loss, (logits.features, logits.weight, logits.bias))


def test_a_prior_moves_every_candidates_logit():
    logits, labels, generator = logits_of()
    asked = candidates_of(labels, lists(generator, 3), torch.tensor([1, 4]))
    prior = torch.randn(CLASSES, dtype=torch.float64, generator=generator)
    moved = LinearLogits(logits.features, logits.weight, logits.bias + prior, CLASSES)
    torch.testing.assert_close(
        cross_entropy_among(logits, asked, CLASSES, prior),
        cross_entropy_among(moved, asked, CLASSES),
    )


def test_numbered_among_the_classes_that_are_read_it_is_the_same():
    logits, labels, generator = logits_of(classes=40)
    asked = candidates_of(labels, lists(generator, 4, classes=40), draw_classes(40, 6, 0))
    classes, again = asked.numbered()
    few = LinearLogits(logits.features, logits.weight[classes], logits.bias[classes], len(classes))
    torch.testing.assert_close(
        cross_entropy_among(few, again, 40),
        cross_entropy_among(logits, asked, 40),
    )


def test_draws_are_distinct_and_every_class_is_as_likely():
    counts = torch.zeros(20)
    for seed in range(2000):
        drawn = draw_classes(20, 5, seed)
        assert len(drawn.unique()) == 5 and drawn.equal(drawn.sort().values)
        counts[drawn] += 1
    deviation = math.sqrt(2000 * 0.25 * 0.75)
    assert (counts - 500).abs().max() < 4 * deviation
    assert draw_classes(20, 5, 1).equal(draw_classes(20, 5, 1))
    assert draw_classes(4, 9, 0).tolist() == [0, 1, 2, 3]
