"""Which layers of a network learn, and how fast each: blocks, freezing, layer-wise decay."""

import pytest
import torch
from torch import nn

from networks import InputSpec, ModelSpec, build_classifier, set_layer_decay, set_trainable
from networks.cutting import cut_at
from networks.freezing import layer_scales, parts_from, trunk_blocks
from pipeline.config import DEFAULT_SCHEDULE
from trainer.core.optim import build_optimizer, set_rate


class Transformer(nn.Module):
    """The names of timm's vision transformers: what is no block, blocks, and a norm at the end."""

    def __init__(self, depth=3, width=4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Linear(2, width)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.fc_norm = nn.Identity()

    def forward(self, x):
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)], dim=1)
        return self.fc_norm(self.norm(self.blocks(tokens))[:, 0])


def transformer():
    spec = ModelSpec("their:vit", 5, InputSpec((3, 2), "float32"))
    return build_classifier(spec, {"their:vit": lambda shape: Transformer()})


def learning(network):
    return {name for name, p in network.named_parameters() if p.requires_grad}


def test_the_blocks_of_a_transformer_are_its_blocks_and_the_last_norm_is_part_of_the_last():
    trunk = transformer().trunk
    assert list(trunk_blocks(trunk)) == ["patch_embed", "blocks.0", "blocks.1", "blocks.2"]
    assert parts_from(trunk, 1) == [trunk.blocks[2], trunk.norm]
    assert parts_from(trunk, 4)[0] is trunk.patch_embed and parts_from(trunk, 0) == []


def test_last_blocks_of_a_transformer_learn_with_the_last_norm():
    network = set_trainable(transformer(), "last-2-blocks")
    tops = {name.rpartition(".")[0] for name in learning(network)}
    inner = {f"trunk.blocks.{block}.{layer}" for block in (1, 2) for layer in (0, 1)}
    assert tops == {"head", "trunk.norm"} | inner
    with pytest.raises(ValueError, match=r"has 4 blocks \(patch_embed, blocks.0, blocks.1, blocks"):
        set_trainable(network, "last-5-blocks")
    assert learning(set_trainable(network, "all")) == dict(network.named_parameters()).keys()


def test_modules_by_name_learn_with_the_head():
    network = set_trainable(transformer(), "trunk.norm, trunk.blocks.1.1")
    tops = {name.rpartition(".")[0] for name in learning(network)}
    assert tops == {"head", "trunk.norm", "trunk.blocks.1.1"}
    before = learning(network)
    with pytest.raises(ValueError, match="no module 'trunk.nrom'; did you mean trunk.norm"):
        set_trainable(network, "trunk.nrom")
    assert learning(network) == before


def test_branches_of_a_transformer_part_before_its_last_blocks():
    trunk = transformer().trunk.eval()
    nn.init.normal_(trunk.cls_token)
    x = torch.randn(6, 3, 2)
    for blocks, parameters in ((1, 2 * 4 + 20 + 8), (2, 2 * (2 * 4 + 20) + 8)):
        cut = cut_at(trunk, blocks)
        torch.testing.assert_close(cut.end(cut.body(x)), trunk(x))
        assert sum(p.numel() for p in cut.own.parameters()) == parameters


def test_the_rate_of_the_ith_block_from_the_top_is_decayed_i_times():
    """Four blocks: head 1, last block and its norm 1/2, ..., embedding and class token 1/16."""
    scales = layer_scales(transformer(), 0.5)
    assert scales == {
        "head.weight": 1.0,
        "head.bias": 1.0,
        "trunk.norm.weight": 0.5,
        "trunk.norm.bias": 0.5,
        **{
            f"trunk.blocks.{block}.{layer}.{leaf}": 0.5 ** (3 - block)
            for block in range(3)
            for layer in (0, 1)
            for leaf in ("weight", "bias")
        },
        "trunk.patch_embed.weight": 0.0625,
        "trunk.patch_embed.bias": 0.0625,
        "trunk.cls_token": 0.0625,
    }


@pytest.mark.parametrize("head", [None, {"scale": 4.0, "learned": True, "margin": 0.0}])
def test_of_a_built_in_network_each_named_block_counts(head):
    inputs, options = InputSpec((1, 8, 8)), {"width": 4, "depth": 2, "embedding": 6}
    cosine = None if head is None else {**head, "margin_kind": "cosface"}
    network = build_classifier(ModelSpec("convnet", 5, inputs, options, cosine=cosine))
    scales = layer_scales(network, 0.1)
    net = "trunk." if head is None else "trunk.net."
    expected = {f"{net}embedding": 0.1, f"{net}stage2": 0.01, f"{net}stage1": 0.001, "head": 1.0}
    if head is not None:
        expected["trunk.unit"] = 1.0  # behind the trunk's blocks, as the head is
    for name, scale in scales.items():
        (top,) = [top for top in expected if name.startswith(top)]
        assert scale == pytest.approx(expected[top]), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_optimizer_has_a_group_for_each_depth_and_kind(optimizer):
    network = set_layer_decay(set_trainable(transformer(), "last-1-blocks"), 0.5)
    keys = {"optimizer": optimizer, "weight_decay": 0.3, "learning_rate": 1.0}
    made = build_optimizer(network, DEFAULT_SCHEDULE.model_copy(update=keys))
    set_rate(made, 0.2)
    names = {id(p): name for name, p in network.named_parameters()}
    groups = [
        ({names[id(p)] for p in group["params"]}, group["weight_decay"], group["lr"])
        for group in made.param_groups
    ]
    last = "trunk.blocks.2"
    vectors = {f"{last}.0.weight", f"{last}.0.bias", f"{last}.1.bias"}
    assert groups == [
        ({"head.weight"}, 0.3, 0.2),
        ({"head.bias"}, 0.0, 0.2),
        ({f"{last}.1.weight"}, 0.3, 0.1),
        (vectors | {"trunk.norm.weight", "trunk.norm.bias"}, 0.0, 0.1),
    ]


def test_without_decay_the_groups_are_as_ever():
    network = set_layer_decay(transformer(), 1.0)
    optimizer = build_optimizer(network, DEFAULT_SCHEDULE)
    assert [group["rate_scale"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_a_step_of_sgd_moves_each_layer_by_its_own_rate():
    """Gradients of 1 everywhere: at the rate .8 the head moves by .8, the last block by .4, ..."""
    network = set_layer_decay(transformer(), 0.5)
    keys = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    optimizer = build_optimizer(network, DEFAULT_SCHEDULE.model_copy(update=keys))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_rate(optimizer, 0.8)
    optimizer.step()
    moved = {name: (before[name] - p).max().item() for name, p in network.named_parameters()}
    assert moved["head.weight"] == pytest.approx(0.8)
    for rate, names in ((0.4, ("norm.bias", "blocks.2.1.weight")), (0.05, ("cls_token",))):
        assert all(moved[f"trunk.{name}"] == pytest.approx(rate) for name in names)
