"""Schedules of the learning rate, groups of parameters, and averaged weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from networks import InputSpec, ModelSpec, build_classifier, specialise
from pipeline.config import DEFAULT_SCHEDULE
from trainer.core.optim import (
    AveragedWeights,
    build_optimizer,
    learning_rate,
    plain_step,
    set_rate,
)


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


def classifier():
    torch.manual_seed(0)
    spec = ModelSpec("mlp", 7, InputSpec((5,), "float32"), {"width": 6, "depth": 1})
    return build_classifier(spec)


@pytest.mark.parametrize("name, trunk", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_rows_learn_by_plain_sgd_at_a_rate_of_their_own_and_keep_nothing(name, trunk):
    """Beside two optimizers of torch's, one of the trunk and one of the head."""
    rates = schedule(optimizer=name, learning_rate=0.1, row_rate=0.5, weight_decay=0.2)
    network, other = classifier(), classifier()
    optimizer = build_optimizer(network, rates)
    more = {"betas": (0.9, 0.999)} if name == "adamw" else {"momentum": 0.9}
    of_trunk = [
        trunk([other.trunk[0].linear.weight], lr=0.1, weight_decay=0.2, **more),
        trunk([other.trunk[0].linear.bias], lr=0.1, weight_decay=0.0, **more),
        torch.optim.SGD([other.head.weight], lr=0.5, weight_decay=0.2),
        torch.optim.SGD([other.head.bias], lr=0.5),
    ]
    x, labels = torch.randn(9, 5), torch.arange(9) % 7
    for _ in range(5):
        for each in (network, other):
            each.zero_grad()
            nn.functional.cross_entropy(each(x), labels).backward()
        set_rate(optimizer, 0.1)
        optimizer.step()
        for each in of_trunk:
            each.step()
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    kept = {key for p in network.head.parameters() for key in optimizer.state[p]}
    assert not {key for key in kept if name == "adamw" or key != "momentum_buffer"}
    assert all("exp_avg" in optimizer.state[p] for p in network.trunk.parameters()) == (
        name == "adamw"
    )


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.floats(0.05, 1.9), st.floats(0, 0.5))
def test_plain_steps_go_to_the_minimum_of_a_quadratic(target, rate, decay):
    """|p - t|^2 / 2 + decay |p|^2 / 2 has its minimum at t / (1 + decay)."""
    target = torch.tensor(target, dtype=torch.float64)
    p, rate = torch.full_like(target, 5.0), rate / (1 + decay)
    for _ in range(800):
        plain_step(p, p - target, rate, decay)
    torch.testing.assert_close(p, target / (1 + decay), atol=1e-9, rtol=0)


def test_few_rows_and_members_learn_as_the_trunk_does():
    rates = schedule(row_rate=0.5)
    few = specialise(classifier(), [1, 2], "fresh")
    for network in (few, batch_ensemble()):
        groups = build_optimizer(network, rates).param_groups
        assert not any(group.get("without_averages") for group in groups)


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
