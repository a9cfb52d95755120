"""Blocks that are computed twice learn what blocks that are computed once do."""

import copy

import pytest
import torch
from torch import nn

from networks import InputSpec, ModelSpec, build_classifier
from networks.recomputing import Recomputed, recomputing


def network(builder, **options):
    torch.manual_seed(0)
    return build_classifier(ModelSpec(builder, 5, InputSpec((1, 16, 16)), options))


class Straight(nn.Module):
    """A trunk whose forward is code, with a list of layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3))
            for _ in range(3)
        )

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return x.mean((2, 3))


def own_network():
    torch.manual_seed(0)
    spec = ModelSpec("mine", 5, InputSpec((1, 16, 16)))
    return build_classifier(spec, {"mine": lambda shape: Straight()})


NETWORKS = {
    "convnet": lambda: network("convnet", width=4, dropout=0.2),
    "resnet": lambda: network("resnet", width=4, depth=8),
    "code": own_network,
}


def step(classifier):
    """The gradients of one step, by parameter, and the buffers behind it."""
    torch.manual_seed(1)
    raw = torch.randint(256, (6, 1, 16, 16), dtype=torch.uint8)
    classifier.train()(raw).logsumexp(1).square().sum().backward()
    gradients = {name: p.grad for name, p in classifier.named_parameters()}
    return gradients, {name: b.clone() for name, b in classifier.named_buffers()}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_and_running_statistics_are_those_of_one_pass(name):
    once, twice = NETWORKS[name](), NETWORKS[name]()
    expected, statistics = step(once)
    with recomputing(twice.trunk):
        gradients, behind = step(twice)
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key], value, atol=1e-6, rtol=1e-6)
    for key, value in statistics.items():
        torch.testing.assert_close(behind[key], value, atol=0, rtol=0)


def test_blocks_are_computed_again_and_are_plain_afterwards():
    classifier, calls = network("convnet", width=4), []
    block = next(classifier.trunk.children())
    kind = type(block)
    next(m for m in block.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
        lambda *_: calls.append(1)
    )
    with recomputing(classifier.trunk):
        step(classifier)
        assert len(calls) == 2
        assert isinstance(copy.deepcopy(classifier).trunk[0], Recomputed)
        classifier.eval()(torch.zeros(1, 1, 16, 16))
        assert len(calls) == 3
    assert type(block) is kind
    step(classifier)
    assert len(calls) == 4
