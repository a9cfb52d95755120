"""Schedules of the learning rate, groups of parameters, and averaged weights."""

import pytest
import torch
from torch import nn

from networks import InputSpec, ModelSpec, build_classifier
from pipeline.config import DEFAULT_SCHEDULE
from trainer.core.optim import AveragedWeights, build_optimizer, learning_rate, set_rate


def schedule(**values):
    return DEFAULT_SCHEDULE.model_copy(update={"learning_rate": 1.0, **values})


def test_cosine_rises_to_the_peak_and_falls_to_zero():
    rates = [learning_rate(step, 100, schedule(warmup=0.1)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0 and rates.index(1.0) == 9
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] < 1e-3


def test_onecycle_starts_near_a_twentyfifth_of_the_peak():
    onecycle = schedule(warmup=0.3, schedule="onecycle")
    rates = [learning_rate(step, 1000, onecycle) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 25, abs=1e-3)
    assert rates[299] == pytest.approx(1.0)
    assert rates[-1] < 1e-3


def test_constant_stays_at_the_peak():
    constant = schedule(warmup=0.0, schedule="constant")
    assert {learning_rate(step, 50, constant) for step in range(50)} == {1.0}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_vectors_are_not_decayed(name):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = build_optimizer(network, schedule(optimizer=name, weight_decay=0.5))
    decayed, plain = optimizer.param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.5
    assert {p.ndim for p in plain["params"]} == {1} and plain["weight_decay"] == 0.0


def test_frozen_parameters_reach_no_optimizer():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    network[0].requires_grad_(False)
    optimized = set()
    for group in build_optimizer(network, schedule()).param_groups:
        optimized |= {id(p) for p in group["params"]}
    assert optimized == {id(p) for p in network[1].parameters()}


def batch_ensemble(count=3):
    inputs, options = InputSpec(shape=(1, 8, 8)), {"width": 4, "depth": 2, "embedding": 6}
    members = {"kind": "batch", "count": count}
    return build_classifier(ModelSpec("convnet", 5, inputs, options, members=members))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_of_a_batch_ensemble_only_shared_weights_decay_and_its_factors_learn_at_half_the_rate(name):
    network = batch_ensemble()
    optimizer = build_optimizer(network, schedule(optimizer=name, weight_decay=0.5))
    set_rate(optimizer, 0.2)
    names = {id(p): name for name, p in network.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        of_group = {names[id(p)] for p in group["params"]}
        groups.append((of_group, group["weight_decay"], group["lr"]))
    layers = {"trunk.stage1.conv", "trunk.stage2.conv", "trunk.embedding.linear", "head"}
    norms = {f"trunk.stage{i}.norm.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")}
    assert groups == [
        ({f"{layer}.shared.weight" for layer in layers}, 0.5, 0.2),
        ({"trunk.embedding.linear.bias", "head.bias"} | norms, 0.0, 0.2),
        ({f"{layer}.{factor}" for layer in layers for factor in "rs"}, 0.0, 0.1),
    ]


def test_frozen_factors_reach_no_optimizer():
    network = batch_ensemble()
    network.requires_grad_(False)
    network.head.bias.requires_grad_(True)
    (group,) = build_optimizer(network, schedule()).param_groups
    assert [id(p) for p in group["params"]] == [id(network.head.bias)]


def test_averaged_weights_follow_the_network_by_their_decay():
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 0.0)
    average = AveragedWeights(network, 0.9)
    nn.init.constant_(network.weight, 1.0)
    average.update(network, step=10_000)
    assert average.average["weight"].item() == pytest.approx(0.1)
    average.update(network, step=0)  # early steps average over few: decay (1 + 0) / (10 + 0)
    assert average.average["weight"].item() == pytest.approx(0.1 * 0.1 + 0.9)


def test_swapping_averaged_weights_twice_changes_nothing():
    network = nn.Linear(3, 2)
    average = AveragedWeights(network, 0.5)
    with torch.no_grad():
        network.weight.add_(1)
    before = network.weight.clone()
    average.swap(network)
    assert not torch.equal(network.weight, before)
    average.swap(network)
    assert torch.equal(network.weight, before)
