"""Networks of several members: heads on one body (Hydra), rank-one factors (BatchEnsemble)."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from networks import (
    InputSpec,
    ModelSpec,
    RankOne,
    batch_ensemble,
    build_classifier,
    freeze_norm,
    hydra,
    lazy_logits,
    load_classifier,
    mean_log_probabilities,
    member_log_probabilities,
    parameter_count,
    save_classifier,
    set_trainable,
    specialise,
    widen,
)

GRAY = InputSpec(shape=(1, 12, 12), mean=[0.5], std=[0.25])
SMALL = {
    "mlp": {"width": 10, "depth": 3},
    "convnet": {"width": 3, "depth": 2, "embedding": 8},
    "resnet": {"width": 2, "depth": 8},
    "wideresnet": {"width": 1, "depth": 10, "base": 2},
}
CLASSES = 7


def plain(builder="convnet", members=None, seed=0, builders=None, **options):
    torch.manual_seed(seed)
    spec = ModelSpec(builder, CLASSES, GRAY, SMALL.get(builder, {}) | options, members=members)
    return build_classifier(spec, builders)


def images(n=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 12, 12), dtype=torch.uint8, generator=draw)


def trained_a_little(network, steps=3):
    """In eval mode, after a few steps: batch statistics are not the initial ones, biases not 0."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    network.train()
    for step in range(steps):
        optimizer.zero_grad()
        log_p = mean_log_probabilities(network, images(14, step))
        loss = -log_p[torch.arange(14), torch.arange(14) % CLASSES].mean()
        loss.backward()
        optimizer.step()
    return network.eval()


def fresh(kind, builder="convnet", count=3, **more):
    return plain(builder, {"kind": kind, "count": count} | more)


KINDS = [{"kind": "heads"}, {"kind": "heads", "blocks": 2}, {"kind": "batch"}]
NAMES = ["heads", "heads with blocks", "batch"]
OF_ALL_KINDS = pytest.mark.parametrize("members", KINDS, ids=NAMES)


@OF_ALL_KINDS
@pytest.mark.parametrize("builder", SMALL)
def test_logits_of_members_have_an_axis_of_their_own(builder, members):
    assert plain(builder)(images()).shape == (6, CLASSES) and plain(builder).num_members == 1
    network = plain(builder, {"count": 4} | members)
    assert network(images()).shape == (4, 6, CLASSES) and network.num_members == 4
    assert network(images(1)).shape == (4, 1, CLASSES)


@OF_ALL_KINDS
def test_fresh_members_differ(members):
    logits = plain("mlp", {"count": 3} | members).eval()(images())
    for j, k in ((0, 1), (0, 2), (1, 2)):
        assert (logits[j] - logits[k]).abs().max() > 1e-3


def test_fresh_heads_share_no_block_and_differ_in_each():
    heads = fresh("heads", "mlp", blocks=2).head.heads
    for name, parameter in heads[0].named_parameters():
        assert not torch.equal(parameter, heads[1].get_parameter(name)), name


@pytest.mark.parametrize("builder", SMALL)
def test_a_hydra_starts_as_its_parent_wherever_it_is_cut(builder):
    parent = trained_a_little(plain(builder))
    for blocks in range(len(parent.trunk) + 1):
        grown = hydra(parent, 3, blocks)
        assert torch.equal(grown(images()), parent(images()).expand(3, -1, -1))
        assert grown.spec.members == {"kind": "heads", "count": 3, "blocks": blocks}
        assert len(grown.trunk) == len(parent.trunk) - blocks
        assert grown.state_dict().keys() == build_classifier(grown.spec).state_dict().keys()


def test_growing_leaves_the_parent_alone_and_nothing_frozen():
    parent = set_trainable(trained_a_little(plain()), "head")
    before = parent(images())
    for grown in (hydra(parent, 2, 1), batch_ensemble(parent, 2)):
        assert all(p.requires_grad and p.grad is None for p in grown.parameters())
        assert grown.training == parent.training
        trained_a_little(grown)
    assert torch.equal(parent(images()), before)
    assert not parent.trunk.stage1.conv.weight.requires_grad


@pytest.mark.parametrize("blocks", [0, 2, 3])
def test_a_head_learns_from_its_own_targets_alone(blocks):
    network = hydra(plain("mlp"), 3, blocks)
    F.cross_entropy(network(images())[1], torch.arange(6)).backward()
    for k, head in enumerate(network.head.heads):
        learns = {p.grad is not None and bool(p.grad.any()) for p in head.parameters()}
        assert learns == {k == 1}
    # The body learns from every member.
    assert all(p.grad.any() for p in network.trunk.parameters())


def test_factors_learn_from_their_own_members_targets_alone_and_shared_weights_from_all():
    network = fresh("batch", "mlp")
    F.cross_entropy(network(images())[2], torch.arange(6)).backward()
    for layer in (module for module in network.modules() if isinstance(module, RankOne)):
        for name in ("r", "s", "bias"):
            assert getattr(layer, name).grad.abs().sum(1).gt(0).tolist() == [False, False, True]
        assert layer.shared.weight.grad.any()


def odd(shape):
    """Strided, dilated, grouped and circular convolutions and a linear layer, some without bias."""
    last = nn.Linear(8 * 4, 5, bias=False)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(shape[0], 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Conv2d(6, 4, (3, 1), padding="same", groups=2, bias=False, padding_mode="circular"),
        nn.Sequential(nn.Conv2d(4, 8, 3, dilation=2, groups=4), nn.Flatten(), last),
    )


def member(ensemble, parent, j):
    """Member j as a plain network: every weight multiplied by hand, output by input."""
    network, state = copy.deepcopy(parent), ensemble.state_dict()
    modules = network.named_modules()
    layers = {name for name, layer in modules if isinstance(layer, (nn.Linear, nn.Conv2d))}
    # Of the rest, norms, the members share everything.
    shared = [name for name in network.state_dict() if name.rpartition(".")[0] not in layers]
    network.load_state_dict({name: state[name] for name in shared}, strict=False)
    for name in layers:
        layer, factors = network.get_submodule(name), ensemble.get_submodule(name)
        weight = factors.shared.weight.detach().clone()
        outputs, inputs = weight.shape[:2]
        per_group = outputs // getattr(layer, "groups", 1)
        for o in range(outputs):
            for i in range(inputs):
                weight[o, i] *= factors.s[j, o] * factors.r[j, o // per_group * inputs + i]
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_(factors.bias[j])
    return network.eval()


@pytest.mark.parametrize("builder", ["mlp", "convnet", "resnet", "wideresnet", "odd"])
def test_member_j_is_the_plain_network_of_weights_w_times_r_s(builder):
    builders = {"odd": odd}
    parent, draw = plain(builder, builders=builders), torch.Generator().manual_seed(5)
    ensemble = trained_a_little(batch_ensemble(parent, 3, generator=draw)).double()
    by_hand = torch.stack([member(ensemble, parent.double(), j)(images()) for j in range(3)])
    assert (by_hand[0] - by_hand[1]).abs().max() > 1e-2
    torch.testing.assert_close(ensemble(images()), by_hand, atol=1e-10, rtol=0)


def test_two_members_of_one_linear_layer_by_hand():
    layer = RankOne(nn.Linear(2, 1), 2, std=0.0)
    with torch.no_grad():
        layer.shared.weight.copy_(torch.tensor([[3.0, 5.0]]))
        layer.r.copy_(torch.tensor([[1.0, 2.0], [-1.0, 1.0]]))
        layer.s.copy_(torch.tensor([[10.0], [2.0]]))
        layer.bias.copy_(torch.tensor([[0.5], [-1.0]]))
    x = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    # 10 (3 + 10) + 0.5, 10 * 10 + 0.5. 2 (-3 + 5) - 1, 2 * 5 - 1
    assert layer(torch.cat([x, x]))[:, 0].tolist() == [130.5, 100.5, 3.0, 9.0]


def test_factors_reach_the_tokens_of_a_sequence():
    torch.manual_seed(0)
    layer = RankOne(nn.Linear(4, 3), 2, std=0.5)
    x = torch.randn(2 * 5, 7, 4)
    one_by_one = torch.stack([layer(x[:, t]) for t in range(7)], dim=1)
    torch.testing.assert_close(layer(x), one_by_one)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(2, 4),
    batch=st.integers(1, 4),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_convolution_of_rank_one_members_is_k_convolutions(
    count, batch, groups, stride, bias, seed
):
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 2, 3, stride=stride, padding=1, groups=groups, bias=bias)
    layer = RankOne(conv.double(), count, 0.5)
    x = torch.randn(batch, 4, 5, 6, dtype=torch.float64)
    y = layer(x.repeat(count, 1, 1, 1)).unflatten(0, (count, batch))
    for j in range(count):
        r = layer.r[j].view(groups, 4 // groups).repeat_interleave(2 // groups, 0)
        weight = layer.shared.weight * (layer.s[j][:, None] * r)[:, :, None, None]
        expected = F.conv2d(x, weight, None, stride, 1, groups=groups)
        if bias:
            expected = expected + layer.bias[j][:, None, None]
        torch.testing.assert_close(y[j], expected)


@OF_ALL_KINDS
def test_under_autocast_members_compute_in_bfloat16_and_predict_nearly_the_same(members):
    network = plain("convnet", {"count": 3} | members).eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = network(images())
        log_p = member_log_probabilities(network, images())
    assert low.dtype == torch.bfloat16 and log_p.dtype == torch.float32
    expected = member_log_probabilities(network, images())
    torch.testing.assert_close(log_p, expected, atol=0.05, rtol=0)


def test_without_spread_every_member_starts_as_the_classifier():
    parent = trained_a_little(plain()).double()
    logits = batch_ensemble(parent, 3, std=0.0)(images())
    torch.testing.assert_close(logits, parent(images()).expand(3, -1, -1))


def test_factors_are_drawn_around_one_from_the_generator():
    def factors(seed):
        draw = torch.Generator().manual_seed(seed)
        ensemble = batch_ensemble(plain("mlp", width=400), 4, generator=draw)
        named = ensemble.named_parameters()
        return torch.cat([p.flatten() for name, p in named if name.endswith((".r", ".s"))])

    drawn = factors(3)
    assert torch.equal(drawn, factors(3)) and not torch.equal(drawn, factors(4))
    assert drawn.mean().item() == pytest.approx(1, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.02)


def test_batch_norm_of_a_batch_ensemble_sees_the_examples_of_all_members():
    network = fresh("batch").train()
    norm, seen = network.trunk.stage1.norm, []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    network(images(5))
    assert seen[0].shape[0] == 3 * 5
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0].mean((0, 2, 3)))


def test_parameters_are_counted_by_formula():
    # 144-10-10-10-7 with biases
    hidden1, hidden, last = 144 * 10 + 10, 10 * 10 + 10, 10 * 7 + 7
    assert parameter_count(plain("mlp")) == hidden1 + 2 * hidden + last
    heads = [last, last + hidden, last + 2 * hidden, last + 2 * hidden + hidden1]
    for blocks, head in enumerate(heads):
        whole = parameter_count(plain("mlp"))
        assert parameter_count(fresh("heads", "mlp", 5, blocks=blocks)) == whole + 4 * head
    weights, inputs, outputs = 144 * 10 + 2 * 10 * 10 + 10 * 7, 144 + 3 * 10, 3 * 10 + 7
    assert parameter_count(fresh("batch", "mlp", 5)) == weights + 5 * (inputs + 2 * outputs)
    # convolutions 1-3-6 without bias, two vectors for each of their norms, 6 * 3 * 3 -> 8 -> 7
    weights, norms = 9 * (3 + 3 * 6) + 54 * 8 + 8 * 7, 2 * (3 + 6)
    factors = (1 + 3) + (3 + 6) + (54 + 8) + (8 + 7)
    assert parameter_count(fresh("batch", "convnet", 5)) == weights + norms + 5 * (factors + 8 + 7)


@OF_ALL_KINDS
@pytest.mark.parametrize("builder", SMALL)
def test_saved_and_loaded_is_the_same_function(builder, members, tmp_path):
    network = trained_a_little(plain(builder, {"count": 3} | members))
    save_classifier(network, tmp_path)
    loaded = load_classifier(tmp_path)
    assert loaded.spec == network.spec and not loaded.training
    assert torch.equal(loaded(images()), network(images()))


def test_the_file_of_a_plain_network_has_no_members_and_null_is_none(tmp_path):
    save_classifier(plain(), tmp_path)
    written = json.loads((tmp_path / "model.json").read_text())
    assert written["schema"] == 1 and "members" not in written
    (tmp_path / "model.json").write_text(json.dumps(written | {"members": None}))
    assert load_classifier(tmp_path).spec.members is None


NEGATIVE_BLOCKS = "members.blocks = -1: must be a whole number, at least 0"
TOO_MANY_BLOCKS = r"the trunk has 3 blocks \(stage1, stage2, embedding\)"


@pytest.mark.parametrize(
    "members, message",
    [
        ({"kind": "head", "count": 3}, "members = .*: their kind must be one of heads, batch"),
        ([3], "their kind must be one of heads, batch"),
        ({"kind": "heads", "cuont": 3}, "unknown key members.cuont; did you mean count"),
        ({"kind": "batch", "count": 3, "blocks": 1}, "unknown key members.blocks"),
        ({"kind": "batch"}, "members.count = None: must be a whole number, at least 2"),
        ({"kind": "heads", "count": 1}, "members.count = 1: must be a whole number, at least 2"),
        ({"kind": "heads", "count": True}, "members.count = True"),
        ({"kind": "heads", "count": 2, "blocks": -1}, NEGATIVE_BLOCKS),
        ({"kind": "heads", "count": 2, "blocks": 4}, TOO_MANY_BLOCKS),
    ],
)
def test_wrong_members_are_named(tmp_path, members, message):
    save_classifier(plain(), tmp_path)
    written = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(written | {"members": members}))
    with pytest.raises(ValueError, match=f"model.json: .*{message}"):
        load_classifier(tmp_path)


def test_members_and_dustbins_exclude_each_other():
    head = {"kind": "dustbin", "members": [0, 1]}
    with pytest.raises(ValueError, match="a specialist has no members"):
        ModelSpec("mlp", CLASSES, GRAY, head=head, members={"kind": "batch", "count": 2})
    specialist = specialise(plain(), [0, 1])
    for grow in (hydra, batch_ensemble):
        with pytest.raises(ValueError, match="a specialist has no members"):
            grow(specialist, 2)


@OF_ALL_KINDS
def test_functions_of_plain_networks_refuse_members(members):
    network = plain("mlp", {"count": 2} | members)
    with pytest.raises(ValueError, match="members cannot be specialised"):
        specialise(network, [1, 2])
    with pytest.raises(ValueError, match="members cannot be widened"):
        widen(network, 2)
    with pytest.raises(ValueError, match="logits of a network with members are held"):
        lazy_logits(network, images())
    for grow in (hydra, batch_ensemble):
        with pytest.raises(ValueError, match="has members already"):
            grow(network, 2)
    with pytest.raises(ValueError, match="the rest of the two models must agree"):
        widen(plain("mlp"), network.spec)


class Whole(nn.Module):
    """A trunk that is no Sequential."""

    def __init__(self, shape):
        super().__init__()
        self.linear = nn.Linear(shape[1] * shape[2], 5)

    def forward(self, x):
        return self.linear(x.flatten(1)).relu()


def test_a_trunk_that_cannot_be_cut_takes_heads_without_blocks():
    network = plain("whole", builders={"whole": Whole})
    assert hydra(network, 2)(images()).shape == (2, 6, CLASSES)
    with pytest.raises(ValueError, match="an nn.Sequential can be cut, not Whole; take blocks = 0"):
        hydra(network, 2, 1)


def test_a_linear_layer_that_cannot_have_factors_is_named():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def mine(shape):
        return nn.Sequential(nn.Flatten(), Scaled(144, 5))

    network = plain("mine", builders={"mine": mine})
    with pytest.raises(ValueError, match="trunk.1 is a Scaled; take members.kind = 'heads'"):
        batch_ensemble(network, 2)


def test_a_layer_that_is_used_twice_stays_one():
    def twice(shape):
        layer = nn.Linear(144, 144)
        return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)

    parent = plain("twice", builders={"twice": twice}).eval().double()
    ensemble = batch_ensemble(parent, 2, std=0.0)
    assert ensemble.trunk[1] is ensemble.trunk[3]
    torch.testing.assert_close(ensemble(images()), parent(images()).expand(2, -1, -1))


def test_heads_do_not_change_the_features_that_the_others_read():
    def in_place(shape):
        body = nn.Sequential(nn.Flatten(), nn.Linear(144, 5))
        return nn.Sequential(body, nn.Sequential(nn.Dropout(0.5, inplace=True)))

    parent = plain("mine", builders={"mine": in_place})
    network = hydra(parent, 2, 1).train()
    features = network.trunk(network.preprocess(images()))
    before = features.clone()
    network.head(features).sum().backward()
    assert torch.equal(features, before)


@OF_ALL_KINDS
def test_parts_of_a_network_with_members_are_frozen_and_opened(members):
    network = set_trainable(plain("convnet", {"count": 2} | members), "head")
    assert not any(p.requires_grad for p in network.trunk.parameters())
    assert all(p.requires_grad for p in network.head.parameters())
    before = [value.clone() for value in network.trunk.state_dict().values()]
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    network.train()(images()).square().sum().backward()
    optimizer.step()
    assert all(map(torch.equal, before, network.trunk.state_dict().values()))
    set_trainable(network, "last-1-block")
    opened = {name for name, p in network.named_parameters() if p.requires_grad}
    last = list(network.trunk.named_children())[-1][0]
    assert all(name.startswith((f"trunk.{last}.", "head.")) for name in opened)
    assert any(name.startswith("trunk.") for name in opened)
    set_trainable(network, "all")
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("members", [{"kind": "heads", "blocks": 3}, {"kind": "batch"}])
def test_fixed_norms_stay_fixed_in_every_member(members):
    network = freeze_norm(plain("convnet", {"count": 2} | members).train())
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == {"heads": 4, "batch": 2}[members["kind"]]
    network.train()(images())
    assert all(not norm.running_mean.any() for norm in norms)


@OF_ALL_KINDS
def test_log_probabilities_are_those_of_the_members_and_of_their_arithmetic_mean(members):
    network = plain("mlp", {"count": 3} | members).eval().double()
    p = torch.stack([logits.softmax(1) for logits in network(images())])
    torch.testing.assert_close(member_log_probabilities(network, images()).exp(), p)
    mean = mean_log_probabilities(network, images()).exp()
    torch.testing.assert_close(mean, (p[0] + p[1] + p[2]) / 3)


def test_a_plain_network_is_one_member():
    network = plain("mlp").eval()
    one = member_log_probabilities(network, images())
    assert one.shape == (1, 6, CLASSES)
    assert torch.equal(mean_log_probabilities(network, images()), network(images()).log_softmax(1))


def test_the_mean_of_two_members_by_hand():
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, 200.0]]])  # (1/2, 1/2) and (0, 1)
    log_p = mean_log_probabilities(lambda raw: logits, torch.zeros(1))
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.25, 0.75]]))
    low = member_log_probabilities(lambda raw: logits.to(torch.bfloat16), torch.zeros(1))
    assert low.dtype == torch.float32
