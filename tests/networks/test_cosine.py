"""Logits of cosines, with margins, and the plain network that they leave behind."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from networks import (
    InputSpec,
    ModelSpec,
    branch_off,
    build_classifier,
    hydra,
    lazy_logits,
    load_classifier,
    save_classifier,
    specialise,
    widen,
)
from networks.branches import BranchedClassifier
from networks.cosine import Unit, UnitRows, arcface, cosface, default_scale, with_margin
from networks.cutting import cut_at
from networks.freezing import set_trainable, trunk_blocks
from networks.linear_logits import LinearLogits, Targets
from networks.members import MemberHeads
from networks.residual_row import fit_residual_row
from networks.sphere import close_rows, open_rows

CLASSES, SIZE, ROWS = 11, 6, 5
COSINE = {"scale": 9.0, "learned": True, "margin": 0.3, "margin_kind": "cosface"}
BLOCKS = (1, 4, None)


def classifier(seed=0, **cosine):
    torch.manual_seed(seed)
    spec = ModelSpec(
        "mlp",
        CLASSES,
        InputSpec((7,), dtype="float32"),
        {"width": 8, "depth": 2, "embedding": SIZE},
        cosine=COSINE | cosine,
    )
    return build_classifier(spec).eval()


def raw(seed=1):
    return torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(seed))


def sphere(dtype=torch.float64, scale=9.0):
    """Features of norm `scale` and unit rows, as functions of two leaves."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, SIZE, generator=draw, dtype=dtype).requires_grad_()
    w = torch.randn(CLASSES, SIZE, generator=draw, dtype=dtype).requires_grad_()
    return x, w, F.normalize(x) * scale, F.normalize(w)


def labels():
    return torch.tensor([3, 10, 0, 3, 7])


def test_a_unit_layer_gives_hand_worked_numbers():
    out = Unit(10.0, learned=False)(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    torch.testing.assert_close(out, torch.tensor([[6.0, 8.0], [0.0, -10.0]]))


@pytest.mark.parametrize(
    "function, cosine, expected",
    [
        (cosface, 0.5, 4 * (0.5 - 0.3)),
        (arcface, 0.5, 4 * math.cos(math.pi / 3 + 0.3)),
        # Beyond pi - m the line: cos - m sin m.
        (arcface, -0.99, 4 * (-0.99 - 0.3 * math.sin(0.3))),
    ],
)
def test_margins_move_a_logit_as_their_papers_say(function, cosine, expected):
    z = torch.tensor([4 * cosine], dtype=torch.float64)
    moved = function(z, torch.tensor([4.0], dtype=torch.float64), 0.3)
    assert moved.item() == pytest.approx(expected, abs=1e-9)


def test_the_default_scale_is_adacos_and_at_least_1():
    assert default_scale(3755) == pytest.approx(math.sqrt(2) * math.log(3754))
    assert default_scale(1) == default_scale(2) == 1


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("kind", (cosface, arcface))
def test_loss_and_gradients_with_a_margin_are_those_of_dense_logits(kind, smoothing, block):
    x, w, features, rows = sphere()
    logits = LinearLogits(features, rows, None, CLASSES, block)
    targets = Targets.of_labels(labels(), CLASSES, smoothing)
    loss = with_margin(logits, labels(), 0.3, kind).cross_entropy(targets)
    ours = torch.autograd.grad(loss.sum(), (x, w))
    x, w, features, rows = sphere()
    z = features @ rows.T
    at = labels()[:, None]
    moved = kind(z.gather(1, at), features.norm(dim=1, keepdim=True), 0.3)
    dense = F.cross_entropy(
        z.scatter(1, at, moved), labels(), reduction="none", label_smoothing=smoothing
    )
    theirs = torch.autograd.grad(dense.sum(), (x, w))
    torch.testing.assert_close(loss, dense, atol=3e-6, rtol=0)  # targets are float32
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=3e-6, rtol=1e-6)


def test_what_moves_logits_has_the_gradient_that_finite_differences_have():
    _, _, features, rows = sphere()
    features, rows = features.detach(), rows.detach()
    indices = torch.tensor([[0, 5], [1, 2], [10, 0], [4, 3], [9, 8]])
    values = torch.linspace(-2, 1, 10, dtype=torch.float64).view(5, 2).requires_grad_()
    at_label, elsewhere = torch.full((ROWS, 1), 0.9), torch.full((ROWS,), 0.01)
    targets = Targets(labels()[:, None], at_label.double(), elsewhere.double())

    def loss(values):
        logits = LinearLogits(features, rows, None, CLASSES, 4).move(indices, values)
        return logits.cross_entropy(targets)

    assert gradcheck(loss, values)


def test_a_margin_of_an_unknown_label_moves_nothing():
    _, _, features, rows = sphere()
    logits = LinearLogits(features, rows, None, CLASSES)
    moved = with_margin(logits, torch.tensor([3, -1, 0, -1, 7]), 0.3, cosface).moved
    torch.testing.assert_close(
        moved.values[:, 0], torch.tensor([-2.7, 0, -2.7, 0, -2.7]).double(), check_dtype=False
    )


def test_a_network_of_no_cosine_has_the_file_that_it_had():
    spec = ModelSpec("mlp", 3, InputSpec((2,)))
    assert "cosine" not in spec.to_json()
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"scale": 0}, "cosine.scale = 0: must be a number greater than 0"),
        ({"margin": 1.5}, "cosine.margin = 1.5: must be a number from 0 to below 1"),
        ({"margin_kind": "sphere"}, "cosine.margin_kind = 'sphere': must be one of"),
        ({"learned": 1}, "cosine.learned = 1: must be true or false"),
        ({"margins": 1}, "unknown key cosine.margins; did you mean margin?"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        ModelSpec("mlp", 3, InputSpec((2,)), cosine=COSINE | wrong)


def test_its_logits_are_scaled_cosines_also_after_it_was_saved(tmp_path):
    network = classifier()
    with torch.no_grad():
        features = network.trunk.net(raw())
        expected = 9 * F.cosine_similarity(
            features[:, None], network.linear_head.weight[None], dim=2
        )
        torch.testing.assert_close(network(raw()), expected)
        save_classifier(network, tmp_path)
        loaded = load_classifier(tmp_path)
        assert loaded.spec == network.spec
        assert torch.equal(loaded(raw()), network(raw()))


def test_open_rows_answer_as_before_and_close_to_rows_of_norm_1():
    network = classifier()
    before = network(raw())
    open_rows(network)
    assert isinstance(network.head, UnitRows)
    torch.testing.assert_close(network(raw()), before)
    torch.testing.assert_close(lazy_logits(network, raw()).materialize(), before)
    with torch.no_grad():
        network.head.direction.mul_(torch.linspace(0.1, 5, CLASSES)[:, None])
    torch.testing.assert_close(network(raw()), before)  # norms do not count
    close_rows(network)
    assert type(network.head) is torch.nn.Linear
    torch.testing.assert_close(network.head.weight.norm(dim=1), torch.ones(CLASSES))
    torch.testing.assert_close(network(raw()), before)


def test_rows_and_scale_learn():
    network = classifier()
    open_rows(network)
    F.cross_entropy(network(raw()), labels()).backward()
    gradient = network.head.direction.grad
    assert gradient.abs().sum() > 0
    # Along a row nothing changes, so there the gradient is 0.
    along = (gradient * network.head.direction).sum(1)
    torch.testing.assert_close(along, torch.zeros(CLASSES), atol=1e-6, rtol=0)
    assert network.trunk.unit.scale.grad.abs() > 0
    assert not isinstance(classifier(learned=False).trunk.unit.scale, torch.nn.Parameter)


def test_a_specialist_starts_as_its_cosine_generalist_with_the_others_summed():
    network = classifier()
    own = [1, 4, 5]
    z = network(raw())
    others = [c for c in range(CLASSES) if c not in own]
    expected = torch.cat([z[:, own], z[:, others].logsumexp(1, keepdim=True)], 1)
    torch.testing.assert_close(specialise(network, own)(raw()), expected)
    assert specialise(network, own, "fresh")(raw()).shape == (ROWS, 4)


def test_a_row_for_the_rest_is_fitted_to_features_on_the_sphere():
    network = classifier(scale=3.0)
    examples = torch.randn(400, 7, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = network.trunk(examples)
        rest = fit_residual_row(network.linear_head, features, [1, 4], [0, 7])
        kept = specialise(network, [1, 4], kept=[0, 7], rest=rest)
        full = specialise(network, [1, 4])
        torch.testing.assert_close(kept(examples)[:, :2], full(examples)[:, :2])
        difference = kept(examples).log_softmax(1) - full(examples).log_softmax(1)
    assert difference.abs().mean() < 0.05


@pytest.mark.parametrize("blocks", (0, 1))
def test_a_branch_of_a_cosine_generalist_starts_as_it_is(blocks):
    network = classifier()
    branch = branch_off(network, [2, 3], blocks=blocks)
    z = network(raw())
    others = [c for c in range(CLASSES) if c not in (2, 3)]
    expected = torch.cat([z[:, [2, 3]], z[:, others].logsumexp(1, keepdim=True)], 1)
    torch.testing.assert_close(BranchedClassifier(network, branch)(raw()), expected)


def test_blocks_are_counted_as_without_it():
    network = classifier()
    assert list(trunk_blocks(network.trunk)) == ["hidden1", "hidden2", "embedding"]
    set_trainable(network, "last-1-blocks")
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all(name.startswith(("head.", "trunk.net.embedding.")) for name in learning)
    cut = cut_at(network.trunk, 1)
    torch.testing.assert_close(cut.end(cut.body(raw())), network.trunk(raw()))


@pytest.mark.parametrize("blocks", (0, 1))
def test_each_head_of_a_hydra_has_rows_of_norm_1_that_learn(blocks, tmp_path):
    network = classifier()
    grown = hydra(network, 3, blocks)
    torch.testing.assert_close(grown(raw())[2], network(raw()))
    open_rows(grown)
    assert isinstance(grown.head, MemberHeads)
    assert all(isinstance(head.linear, UnitRows) for head in grown.head.heads)
    torch.testing.assert_close(grown(raw())[1], network(raw()))
    close_rows(grown)
    save_classifier(grown, tmp_path)
    torch.testing.assert_close(load_classifier(tmp_path)(raw())[0], network(raw()))


def test_it_is_widened_before_its_embedding_alone():
    network = classifier()
    wider = ModelSpec(
        "mlp", CLASSES, network.spec.input, network.spec.options | {"width": 16}, cosine=COSINE
    )
    torch.testing.assert_close(widen(network, wider)(raw()), network(raw()))
    with pytest.raises(ValueError, match="6 features of a cosine head cannot be widened to 12"):
        widen(network, 2.0)
