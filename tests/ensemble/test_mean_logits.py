"""The mean of several networks' logits, as one product where heads are linear."""

import pytest
import torch

from ensemble import MeanLogits, generalised_mean
from networks import InputSpec, ModelSpec, build_classifier, hydra
from networks.members import member_log_probabilities

INPUT = InputSpec((1, 8, 8))


def network(seed, width=8, classes=11, **more):
    torch.manual_seed(seed)
    return build_classifier(ModelSpec("mlp", classes, INPUT, {"width": width, "depth": 1}, **more))


def raw():
    return torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)


@torch.no_grad()
def test_it_is_the_mean_of_the_logits_of_networks_of_any_width():
    networks = [network(0), network(1, width=16), network(2)]
    for each in networks:  # as training leaves them
        torch.nn.init.normal_(each.linear_head.bias)
    x = raw()
    expected = torch.stack([each.eval()(x) for each in networks]).mean(0)
    mean = MeanLogits(networks)
    assert mean.joint_head is not None and mean.joint_head[0].shape == (11, 8 + 16 + 8)
    torch.testing.assert_close(mean(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_its_softmax_is_the_geometric_mean_of_the_distributions():
    networks = [network(seed) for seed in range(3)]
    x = raw()
    log_p = torch.cat([member_log_probabilities(each.eval(), x) for each in networks])
    expected = generalised_mean(log_p, 0.0)
    torch.testing.assert_close(MeanLogits(networks)(x).log_softmax(1), expected)


@torch.no_grad()
def test_every_member_of_a_network_with_several_counts_alike():
    plain, several = network(0), hydra(network(1), 2, 0)
    x = raw()
    mean = MeanLogits([plain, several])
    assert mean.joint_head is None
    log_p = torch.cat([member_log_probabilities(each.eval(), x) for each in (plain, several)])
    assert len(log_p) == 3
    torch.testing.assert_close(mean(x).log_softmax(1), generalised_mean(log_p, 0.0))


@pytest.mark.parametrize("count", [1, 4])
@torch.no_grad()
def test_under_autocast_the_logits_stay_in_float32(count):
    mean, x = MeanLogits([network(seed) for seed in range(count)]), raw()
    with torch.autocast("cpu", torch.bfloat16):
        logits = mean(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, mean(x), atol=0.05, rtol=0.05)
