"""What a re-ranker learns from a batch: the whole softmax's loss where nothing is left out."""

import copy

import pytest
import torch

from networks import InputSpec, ModelSpec, build_classifier, lazy_logits
from networks.linear_logits import LocalComm
from networks.row_head import RowHead
from trainer.core.objectives import classify, rerank
from trainer.data.streams import Batch

CLASSES, BATCH, LISTED = 9, 6, 3


@pytest.fixture
def network():
    torch.manual_seed(0)
    options = {"width": 8, "depth": 1}
    return build_classifier(ModelSpec("mlp", CLASSES, InputSpec((4,), "float32"), options))


def batch_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(100, generator=generator)[:BATCH]
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    inputs = torch.randn(BATCH, 4, generator=generator)
    return Batch(inputs, labels, ids, torch.zeros_like(ids))


def objective_of(listed, random, **keys):
    lists = torch.stack(
        [(torch.arange(listed) + row) % CLASSES for row in range(BATCH)]  # another's for each
    )
    return rerank(lambda batch: lists, random, CLASSES, comm=lambda batch: LocalComm(), **keys)


def lazily(network):
    return lambda raw: lazy_logits(network, raw)


@pytest.mark.parametrize("prior", [None, torch.linspace(-1, 1, CLASSES)])
@pytest.mark.parametrize("listed, random", [(CLASSES, 0), (LISTED, CLASSES)])
def test_with_every_class_listed_or_drawn_it_is_the_generalists_loss(
    network, listed, random, prior
):
    batch = batch_of()
    loss = objective_of(listed, random, log_prior=prior)(lazily(network), batch)
    expected = classify(log_prior=prior)(network, batch)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


def test_by_rows_it_is_the_loss_and_the_gradients_of_the_whole_head(network):
    batch, prior = batch_of(), torch.linspace(-1, 1, CLASSES)
    by_rows = copy.deepcopy(network)
    by_rows.head = RowHead(by_rows.linear_head)
    whole = objective_of(LISTED, 2, log_prior=prior)(lazily(network), batch)
    rows = objective_of(LISTED, 2, log_prior=prior, head=by_rows.head)(by_rows, batch)
    torch.testing.assert_close(rows, whole)
    whole.backward()
    rows.backward()
    gradients = by_rows.head.take_gradients()
    weight = network.linear_head.weight.grad
    torch.testing.assert_close(gradients.weight, weight[gradients.classes])
    for ours, theirs in zip(by_rows.trunk.parameters(), network.trunk.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    unread = torch.ones(CLASSES, dtype=torch.bool)
    unread[gradients.classes] = False
    assert not weight[unread].any()


def test_draws_belong_to_the_examples_of_the_batch(network):
    loss = objective_of(LISTED, 2)
    first, second = batch_of(), batch_of()
    second.ids = second.ids + 1
    same = [loss(lazily(network), first).item() for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != loss(lazily(network), second).item()
