"""Steps of some rows: torch's where every row has a gradient, and nothing where a row has none."""

import copy

import pytest
import torch
from torch import nn

from networks.row_head import RowGradients, RowHead
from pipeline.config import DEFAULT_SCHEDULE
from trainer.core.optim import build_optimizer, set_rate
from trainer.core.row_optim import RULES, RowOptimizer

CLASSES, FEATURES = 2500, 3  # more rows than are changed at a time
RATES = (0.1, 0.05, 0.2)


def schedule_of(optimizer):
    keys = {"optimizer": optimizer, "weight_decay": 0.3, "beta2": 0.9}
    return DEFAULT_SCHEDULE.model_copy(update=keys)


def all_rows(linear):
    return RowGradients(torch.arange(CLASSES), linear.weight.grad, linear.bias.grad)


@pytest.mark.parametrize("optimizer", RULES)
def test_with_every_row_in_every_step_it_is_torchs(optimizer):
    torch.manual_seed(0)
    linear, schedule = nn.Linear(FEATURES, CLASSES), schedule_of(optimizer)
    head = RowHead(copy.deepcopy(linear))
    theirs, ours = build_optimizer(linear, schedule), RowOptimizer(head, schedule)
    for rate in RATES:
        linear.weight.grad = torch.randn(CLASSES, FEATURES)
        linear.bias.grad = torch.randn(CLASSES)
        set_rate(theirs, rate)
        theirs.step()
        ours.step(all_rows(linear), rate)
    torch.testing.assert_close(head.weight, linear.weight.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head.bias, linear.bias.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", RULES)
def test_a_row_without_a_gradient_stays_and_begins_when_it_has_one(optimizer):
    torch.manual_seed(0)
    head = RowHead(nn.Linear(FEATURES, CLASSES))
    head.weight[1], head.bias[1] = head.weight[2], head.bias[2]
    before = head.weight.clone()
    ours = RowOptimizer(head, schedule_of(optimizer))
    gradient = RowGradients(torch.tensor([2]), torch.ones(1, FEATURES), torch.ones(1))
    ours.step(gradient, 0.1)
    assert head.weight[:2].equal(before[:2]) and head.weight[3:].equal(before[3:])
    for _ in range(3):
        ours.step(gradient._replace(classes=torch.tensor([5])), 0.1)
    ours.step(gradient._replace(classes=torch.tensor([1])), 0.1)
    assert head.weight[1].equal(head.weight[2]) and head.bias[1] == head.bias[2]
    assert ours.states["weight"]["step"][:6].tolist() == [0, 1, 1, 0, 0, 3]


def test_it_goes_on_from_a_checkpoints_states():
    torch.manual_seed(0)
    head, schedule = RowHead(nn.Linear(FEATURES, CLASSES)), schedule_of("adamw")
    rows = torch.tensor([3, 9])
    first = RowOptimizer(head, schedule)
    first.step(RowGradients(rows, torch.randn(2, FEATURES), torch.randn(2)), 0.1)
    again = copy.deepcopy(head)
    second = RowOptimizer(again, schedule, copy.deepcopy(first.states))
    gradient = RowGradients(rows, torch.randn(2, FEATURES), torch.randn(2))
    for optimizer in (first, second):
        optimizer.step(gradient, 0.05)
    assert head.weight.equal(again.weight) and head.bias.equal(again.bias)
