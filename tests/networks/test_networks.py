"""Networks: builders and their options, files, specialists, frozen parts and widening."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks import (
    DustbinHead,
    InputSpec,
    ModelSpec,
    build_classifier,
    fit_residual_row,
    freeze_norm,
    load_classifier,
    parameter_count,
    residual_row,
    save_classifier,
    set_trainable,
    specialise,
    widen,
)
from networks.builders import resnet, wideresnet
from networks.files import unshared

GRAY = InputSpec(shape=(1, 28, 28), mean=[0.5], std=[0.25])
SMALL = {
    "mlp": {"width": 24, "depth": 2, "dropout": 0.1},
    "convnet": {"width": 4, "depth": 3, "embedding": 16},
    "resnet": {"width": 4, "depth": 8},
    "wideresnet": {"width": 1, "depth": 10, "base": 4, "dropout": 0.1},
}


def small(builder="convnet", classes=10, seed=0, **options):
    torch.manual_seed(seed)
    return build_classifier(ModelSpec(builder, classes, GRAY, SMALL[builder] | options))


def images(n=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=draw)


def trained_a_little(classifier, steps=3):
    """The classifier after a few steps, so that its batch statistics are not the initial ones."""
    optimizer = torch.optim.Adam([p for p in classifier.parameters() if p.requires_grad], 1e-2)
    classifier.train()
    for step in range(steps):
        optimizer.zero_grad()
        labels = torch.arange(16) % classifier.spec.num_outputs
        F.cross_entropy(classifier(images(16, step)), labels).backward()
        optimizer.step()
    return classifier


def test_importing_networks_imports_no_torch():
    code = "import sys, networks, networks.spec; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"{code}; networks.Classifier"], check=True)


@pytest.mark.parametrize("builder", SMALL)
def test_forward_is_preprocess_trunk_and_head(builder):
    classifier = small(builder).eval()
    raw = images()
    features = classifier.trunk(classifier.preprocess(raw))
    assert features.dim() == 2
    assert torch.equal(classifier(raw), classifier.head(features))
    assert classifier(raw).shape == (8, 10)


def test_preprocessing_scales_and_normalises_each_channel():
    spec = InputSpec(shape=(3, 2, 2), mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 1.0])
    classifier = build_classifier(ModelSpec("mlp", 2, spec))
    raw = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    expected = torch.tensor([0.2, 0.0, -0.1])
    assert torch.allclose(classifier.preprocess(raw)[0, :, 1, 0], expected, atol=1e-6)
    assert torch.equal(classifier.preprocess(raw), classifier.preprocess(raw.float()))


def test_vectors_are_normalised_entry_by_entry():
    spec = InputSpec(shape=(2,), dtype="float32", mean=[1.0, 2.0], std=[2.0, 4.0])
    classifier = build_classifier(ModelSpec("mlp", 3, spec, {"width": 5}))
    assert classifier.preprocess(torch.tensor([[3.0, 4.0]])).tolist() == [[1.0, 0.5]]
    assert classifier(torch.randn(4, 2)).shape == (4, 3)


def test_inputs_of_another_shape_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\[2, 1, 32, 32\].*\[B, 1, 28, 28\]"):
        small()(torch.zeros(2, 1, 32, 32))


def test_the_demo_network_has_27_thousand_parameters():
    spec = ModelSpec("convnet", 1200, GRAY, {"width": 4, "depth": 3, "embedding": 16})
    # 3x3 convolutions 1-4-8-16, their norms, 28 -> 14 -> 7 -> 4, 256 -> 16, 16 -> 1200
    by_hand = 9 * (4 + 4 * 8 + 8 * 16) + 2 * (4 + 8 + 16) + 256 * 16 + 16 + 16 * 1200 + 1200
    assert parameter_count(build_classifier(spec)) == by_hand == 26044


UNEVEN = {"kernel": [5, 3], "stride": [3, 2], "padding": "valid"}


@pytest.mark.parametrize(
    "options, features",
    [
        (UNEVEN | {"channels": [8, 16], "embedding": 0}, 16 * 3 * 3),
        ({"width": 4, "downsample": "max", "embedding": 0}, 16 * 3 * 3),
        ({"width": 4, "downsample": "average", "grid": 1, "embedding": 0}, 16),
        ({"width": 4, "grid": 2, "embedding": 12, "activation": "relu"}, 12),
    ],
)
def test_convnet_options_shape_its_features(options, features):
    assert build_classifier(ModelSpec("convnet", 7, GRAY, options)).head.in_features == features


def test_wrn_28_10_has_its_published_size():
    with torch.device("meta"):
        assert round(parameter_count(wideresnet((3, 32, 32), width=10, depth=28)) / 1e6, 1) == 36.5
        assert round(parameter_count(resnet((3, 32, 32), width=16, depth=20)) / 1e6, 2) == 0.27


def test_input_dropout_drops_entries_of_the_input_and_changes_no_name():
    options = {"width": 6, "depth": 2, "input_dropout": 0.2}
    classifier = build_classifier(ModelSpec("mlp", 3, GRAY, options))
    assert classifier.state_dict().keys() == small("mlp", 3).state_dict().keys()
    linear, seen = classifier.trunk.hidden1.linear, []
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    for training in (True, False):
        classifier.train(training)(torch.zeros(50, 1, 28, 28))  # -2 after preprocessing
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    not_dropped = seen[0][seen[0] != 0]
    torch.testing.assert_close(not_dropped, torch.full_like(not_dropped, -2.5))
    assert torch.equal(seen[1], torch.full((50, 784), -2.0))
    wider = widen(classifier, ModelSpec("mlp", 3, GRAY, {"width": 9, "depth": 2}))
    torch.testing.assert_close(wider.eval()(images()), classifier(images()))


NO_FRACTION = "input_dropout = -0.1: must be a number from 0 to below 1"
NOTHING_LEFT = "nothing is left of a 28 x 28 image after stage 4"


@pytest.mark.parametrize(
    "builder, options, message",
    [
        ("mlp", {"input_dropout": -0.1}, NO_FRACTION),
        ("convnett", {}, "did you mean convnet"),
        ("convnet", {"widht": 3}, "did you mean width"),
        ("convnet", {"width": 0}, "width = 0: must be a whole number, at least 1"),
        ("convnet", {"width": "4"}, "width = '4'"),
        ("convnet", {"dropout": 1.0}, "dropout = 1.0"),
        ("convnet", {"stride": [2, 2]}, "one for each of the 3 stages"),
        ("convnet", {"depth": 4, "padding": "valid"}, NOTHING_LEFT),
        ("resnet", {"depth": 18}, "depth 18 is not 6 n \\+ 2; try 20"),
        ("wideresnet", {"depth": 3}, "try 10"),
        ("timm:hf-hub:someone/model", {}, "plain timm model name"),
        ("timm:resnet18", {"checkpoint_path": "x.pth"}, "checkpoint_path"),
        ("os:system", {}, "unknown builder"),
    ],
)
def test_a_wrong_builder_or_option_is_named(builder, options, message):
    with pytest.raises(ValueError, match=message):
        build_classifier(ModelSpec(builder, 5, GRAY, options))


def test_only_what_shares_memory_is_copied_to_be_saved():
    weight, column = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3)[:, 0]
    tied = torch.ones(4)
    saved = unshared({"weight": weight, "column": column, "a": tied, "b": tied, "half": tied[:2]})
    assert saved["weight"].data_ptr() == weight.data_ptr()
    assert saved["column"].tolist() == [0, 3] and saved["column"].is_contiguous()
    own = {saved[name].untyped_storage().data_ptr() for name in ("a", "b", "half")}
    assert len(own) == 3 and tied.untyped_storage().data_ptr() not in own


def test_a_users_builder_is_passed_and_not_loaded(tmp_path):
    def mine(shape, units):
        return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], units))

    spec = ModelSpec("mine", 5, GRAY, {"units": 6})
    classifier = build_classifier(spec, {"mine": mine})
    save_classifier(classifier, tmp_path)
    raw = images()
    assert torch.equal(load_classifier(tmp_path, builders={"mine": mine})(raw), classifier(raw))
    with pytest.raises(ValueError, match="model.json: unknown builder 'mine'"):
        load_classifier(tmp_path)
    with pytest.raises(ValueError, match=r"gives \[1, 1, 28, 28\]"):
        build_classifier(ModelSpec("same", 5, GRAY), {"same": lambda shape: nn.Identity()})


@pytest.mark.parametrize("builder", SMALL)
def test_saved_and_loaded_is_the_same_function(builder, tmp_path):
    classifier = trained_a_little(small(builder)).eval()
    save_classifier(classifier, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    state = torch.random.get_rng_state()
    loaded = load_classifier(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not loaded.training and loaded.spec == classifier.spec
    assert torch.equal(loaded(images()), classifier(images()))


@pytest.mark.parametrize("dustbin", ["preserving", "fresh"])
def test_a_saved_specialist_comes_back(dustbin, tmp_path):
    specialist = specialise(small().eval(), [7, 2, 5], dustbin)
    save_classifier(specialist, tmp_path)
    loaded = load_classifier(tmp_path)
    rows = {"preserving": "all", "fresh": "fresh"}[dustbin]
    assert loaded.spec.head == {"kind": "dustbin", "members": [2, 5, 7], "rows": rows}
    assert torch.equal(loaded(images()), specialist(images()))


def test_files_that_do_not_fit_are_refused_by_name(tmp_path):
    save_classifier(small(), tmp_path)
    good = json.loads((tmp_path / "model.json").read_text())

    def refused(message, **changes):
        (tmp_path / "model.json").write_text(json.dumps(good | changes))
        with pytest.raises(ValueError, match=message):
            load_classifier(tmp_path)

    refused("model.json: schema 2; this version reads schema 1", schema=2)
    refused("unknown key numclasses; did you mean num_classes", numclasses=3)
    refused("class_names has 10 entries for num_classes = 11", num_classes=11)
    refused(r"head.weight is \[10, 16\], not \[11, 16\]", num_classes=11, class_names=[])
    refused("lacks trunk.stage4.conv.weight", options={"width": 4, "depth": 4, "embedding": 16})
    refused("has unexpected trunk.stage3", options={"width": 4, "depth": 2, "embedding": 16})
    refused("input.std", input=good["input"] | {"std": [0]})
    refused("head.members", head={"kind": "dustbin", "members": "all"})
    head = {"kind": "dustbin", "members": [1, 10]}
    refused("member 10 is not a class; classes are 0 to 9", head=head)
    refused("unknown key input.shap; did you mean shape", input={"shap": [3]})
    without_builder = {key: value for key, value in good.items() if key != "builder"}
    (tmp_path / "model.json").write_text(json.dumps(without_builder))
    with pytest.raises(ValueError, match="the key builder is missing"):
        load_classifier(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match="model.json: not valid JSON"):
        load_classifier(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(good))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        load_classifier(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors: cannot be read: No such file"):
        load_classifier(tmp_path)


def test_model_json_survives_a_round_trip():
    head = {"kind": "dustbin", "members": [3, 1], "rows": "all"}
    names = ("A", "ß", "<b>", "\u2028")
    spec = ModelSpec("convnet", 4, GRAY, {"width": 4, "dropout": None}, names, head)
    assert spec.head["members"] == [1, 3] and spec.options == {"width": 4} and spec.num_outputs == 3
    again = ModelSpec.from_json(spec.to_json())
    assert again.to_json() == spec.to_json()
    assert again.input.scale == 1 / 255


@pytest.mark.parametrize("members", [[4], [0, 3, 9], list(range(9))])
def test_a_specialist_starts_as_the_generalist_with_the_other_classes_summed(members):
    generalist = trained_a_little(small(classes=10)).eval().double()
    specialist = specialise(generalist, torch.tensor(members))
    outside = [c for c in range(10) if c not in members]
    p = generalist(images()).softmax(1)
    expected = torch.cat([p[:, members], p[:, outside].sum(1, keepdim=True)], 1)
    assert torch.allclose(specialist(images()).softmax(1), expected, atol=1e-14, rtol=0)
    single = specialise(generalist.float(), members)(images()).softmax(1)
    assert torch.allclose(single.double(), expected, atol=1e-6, rtol=0)


def summed(generalist, members):
    """The generalist's probabilities of `members`, the rest summed."""
    p = generalist(images()).softmax(1)
    return torch.cat([p[:, members], 1 - p[:, members].sum(1, keepdim=True)], 1)


def test_a_row_for_one_class_is_that_classs_row(tmp_path):
    """Then nothing is lost, whatever the examples, and the saved specialist predicts the same."""
    generalist, kept = trained_a_little(small(classes=10)).eval(), [0, 1, 2, 3, 5, 7, 8]
    with torch.no_grad():
        rest = fit_residual_row(generalist.head, torch.randn(200, 16), [4, 6], kept)
    row = generalist.head.weight[9].detach()
    torch.testing.assert_close(rest.weight, row, atol=1e-2, rtol=1e-2)
    assert rest.kl < 1e-6 and rest.rms < 1e-2
    specialist = specialise(generalist, [4, 6], kept=kept, rest=rest).eval()
    p = specialist(images()).softmax(1)
    torch.testing.assert_close(p, summed(generalist, [4, 6]), atol=1e-3, rtol=0)
    assert specialist.head.row_classes.tolist() == [4, 6, 0, 1, 2, 3, 5, 7, 8, -1]
    save_classifier(specialist, tmp_path)
    assert torch.equal(load_classifier(tmp_path)(images()), specialist(images()))


def test_the_error_of_a_fitted_row_is_the_specialists_divergence_from_the_generalist():
    """Its error on the half that it was not fitted to is the specialist's on fresh examples."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 40)
    torch.nn.init.normal_(head.weight, std=0.5)
    x, fresh, members = torch.randn(20000, 6), torch.randn(20000, 6), [0, 1, 2, 3]
    errors = []
    for kept in ([], list(range(4, 14)), list(range(4, 39))):
        with torch.no_grad():
            rest = fit_residual_row(head, x, members, kept)
            z, rows = head(fresh), [*members, *kept]
            whole = torch.cat([z[:, :4], z[:, 4:].logsumexp(1, keepdim=True)], 1).log_softmax(1)
            fitted = (fresh @ rest.weight + rest.bias)[:, None]
            others = torch.cat([z[:, rows[4:]], fitted], 1).logsumexp(1, keepdim=True)
            ours = torch.cat([z[:, :4], others], 1).log_softmax(1)
        kl = (whole.exp() * (whole - ours)).sum(1).mean()
        assert rest.kl == pytest.approx(float(kl), rel=0.2, abs=1e-7)
        errors.append(rest.kl)
    assert 0.1 > errors[0] > errors[1] > errors[2]


def test_a_row_fitted_in_blocks_of_examples_is_that_of_all_at_once(monkeypatch):
    torch.manual_seed(0)
    head, x = torch.nn.Linear(6, 40), torch.randn(1000, 6)
    with torch.no_grad():
        whole = fit_residual_row(head, x, [0, 1], [2, 3])
        monkeypatch.setattr(residual_row, "BLOCK", 64)
        blocks = fit_residual_row(head, x, [0, 1], [2, 3])
    torch.testing.assert_close(blocks.weight, whole.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(blocks.bias, whole.bias, rtol=1e-6, atol=1e-7)
    assert blocks.kl == pytest.approx(whole.kl, rel=1e-6)
    assert blocks.rms == pytest.approx(whole.rms, rel=1e-6)


def test_no_class_has_two_rows_in_a_dustbin():
    head = {"kind": "dustbin", "members": [1, 4], "rows": "kept", "kept": [4]}
    with pytest.raises(ValueError, match="member 4 is listed twice"):
        ModelSpec("mlp", 5, GRAY, head=head)


def test_rows_that_are_not_kept_need_one_for_the_rest():
    with pytest.raises(ValueError, match="kept needs rest"):
        specialise(small(), [1, 4], kept=[3])


def test_the_dustbin_of_every_class_has_probability_zero_and_finite_gradients():
    specialist = specialise(small(classes=3), [0, 1, 2])
    logits = specialist(images())
    assert torch.equal(logits.softmax(1)[:, 3], torch.zeros(8))
    F.cross_entropy(logits, torch.arange(8) % 3).backward()
    assert all(p.grad.isfinite().all() for p in specialist.parameters())


def test_training_a_specialist_leaves_the_generalist_alone():
    generalist = small().eval()
    before = generalist(images())
    trained_a_little(specialise(generalist, [1, 2]))
    assert torch.equal(generalist(images()), before)


def test_a_fresh_dustbin_keeps_the_members_rows():
    generalist = small()
    head = specialise(generalist, [8, 3], "fresh").head
    assert torch.equal(head.weight[:2], generalist.head.weight[[3, 8]])
    assert head.weight.shape == (3, 16)


def test_row_classes_say_what_each_stored_row_stands_for():
    generalist = small()
    head = specialise(generalist, [6, 4]).head
    assert isinstance(head, DustbinHead)
    assert head.row_classes.tolist() == [4, 6, 0, 1, 2, 3, 5, 7, 8, 9]
    assert torch.equal(head.weight, generalist.head.weight[head.row_classes])


@pytest.mark.parametrize(
    "members, message",
    [([], "at least one"), ([1, 1], "listed twice"), ([-1], "-1 is not a class")],
)
def test_members_must_be_distinct_classes(members, message):
    with pytest.raises(ValueError, match=message):
        specialise(small(), members)


def test_a_specialist_is_not_specialised_again():
    with pytest.raises(ValueError, match="specialist already"):
        specialise(specialise(small(), [1]), [1])


def trainable_names(classifier):
    names = [name for name, p in classifier.named_parameters() if p.requires_grad]
    return {name.removeprefix("trunk.").split(".")[0] for name in names}


def test_trainable_parts_count_from_the_end():
    classifier = small()
    assert trainable_names(set_trainable(classifier, "head")) == {"head"}
    assert trainable_names(set_trainable(classifier, "last-1-blocks")) == {"embedding", "head"}
    last_two, others = {"stage3", "embedding", "head"}, {"stage1", "stage2"}
    assert trainable_names(set_trainable(classifier, "last-2-blocks")) == last_two
    assert trainable_names(set_trainable(classifier, "all")) == last_two | others
    with pytest.raises(ValueError, match="the trunk has 4 blocks"):
        set_trainable(classifier, "last-5-blocks")
    with pytest.raises(ValueError, match="must be all, head or last-N-blocks"):
        set_trainable(classifier, "tail")


@pytest.mark.parametrize("builder", SMALL)
def test_every_block_has_parameters(builder):
    assert all(parameter_count(block) for block in small(builder).trunk.children())


@pytest.mark.parametrize("builder", ["convnet", "resnet", "wideresnet"])
def test_frozen_blocks_do_not_change_not_even_their_batch_statistics(builder):
    classifier = set_trainable(trained_a_little(small(builder)), "last-2-blocks")
    frozen = list(classifier.trunk.children())[:-2]
    before = [copy.deepcopy(block.state_dict()) for block in frozen]
    whole = copy.deepcopy(classifier.state_dict())
    trained_a_little(classifier)
    for block, state in zip(frozen, before, strict=True):
        assert all(map(torch.equal, block.state_dict().values(), state.values()))
    assert not all(map(torch.equal, whole.values(), classifier.state_dict().values()))


def test_freezing_survives_a_copy_and_a_wrapper():
    classifier = copy.deepcopy(set_trainable(small(), "head"))
    nn.ModuleList([classifier]).train()
    assert not classifier.trunk.stage1.norm.training and classifier.head.training
    set_trainable(classifier, "all")
    assert classifier.trunk.stage1.norm.training


def test_fixed_norms_keep_their_statistics_and_learn_their_scale():
    classifier = freeze_norm(small().train())
    norm = classifier.trunk.stage1.norm
    statistics, scale = norm.running_mean.clone(), norm.weight.detach().clone()
    trained_a_little(set_trainable(classifier, "all"))
    assert torch.equal(norm.running_mean, statistics) and not torch.equal(norm.weight, scale)
    assert freeze_norm(classifier, False).train().trunk.stage1.norm.training


@pytest.mark.parametrize(
    "builder, options",
    [
        ("convnet", {}),
        ("convnet", {"downsample": "max", "grid": 2, "activation": "relu"}),
        ("convnet", {"embedding": 0, "channels": [3, 5]}),
        ("mlp", {"norm": "batch"}),
        ("mlp", {"embedding": 7}),
    ],
)
@pytest.mark.parametrize("factor", [1, 1.5, 2])
def test_widening_keeps_the_function(builder, options, factor):
    classifier = trained_a_little(small(builder, **options)).eval().double()
    wider = widen(classifier, factor)
    assert torch.allclose(wider(images()), classifier(images()), atol=1e-9)
    assert factor == 1 or parameter_count(wider) > parameter_count(classifier)
    assert build_classifier(wider.spec).state_dict().keys() == wider.state_dict().keys()


def test_twice_as_wide_is_the_network_of_twice_the_width():
    options = UNEVEN | {"width": 8, "depth": 2, "embedding": 16}
    wider = widen(build_classifier(ModelSpec("convnet", 10, GRAY, options)), 2)
    spec = ModelSpec("convnet", 10, GRAY, options | {"width": 16, "embedding": 32})
    twice = build_classifier(spec)
    assert [p.shape for p in wider.parameters()] == [p.shape for p in twice.parameters()]


def test_widening_to_a_spec_may_widen_some_layers_only():
    classifier = trained_a_little(small()).eval().double()
    for options in ({"width": 9}, {"embedding": 20}, {"channels": [4, 8, 30], "dropout": 0.1}):
        target = ModelSpec("convnet", 10, GRAY, SMALL["convnet"] | options)
        wider = widen(classifier, target)
        assert wider.spec == target
        assert torch.allclose(wider(images()), classifier(images()), atol=1e-9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 3}, "4 units cannot be widened to 3"),
        ({"depth": 2}, "must agree"),
        ({"embedding": 0}, "add or remove"),
    ],
)
def test_a_spec_that_is_not_wider_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        widen(small(), ModelSpec("convnet", 10, GRAY, SMALL["convnet"] | options))
    with pytest.raises(ValueError, match="only mlp and convnet"):
        widen(small("resnet"), 2)


def test_copied_units_do_not_stay_twins():
    wider = trained_a_little(widen(trained_a_little(small("mlp", dropout=0.0)), 2), steps=5)
    rows = wider.trunk.hidden1.linear.weight
    assert len(torch.unique(rows.detach(), dim=0)) == len(rows)


def test_a_specialist_can_be_widened_too():
    specialist = specialise(trained_a_little(small()).eval().double(), [1, 4])
    assert torch.allclose(widen(specialist, 2)(images()), specialist(images()), atol=1e-9)


def test_timm_models_are_built_by_name(tmp_path):
    pytest.importorskip("timm")
    spec = ModelSpec("timm:resnet10t", 5, InputSpec(shape=(3, 32, 32)))
    classifier = build_classifier(spec).eval()
    save_classifier(classifier, tmp_path)
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(load_classifier(tmp_path)(raw), classifier(raw))


def private_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what is mapped")
def test_a_huge_head_is_the_files_memory_until_it_learns(tmp_path):
    spec = ModelSpec("mlp", 200_000, InputSpec((4,), "float32"), {"width": 64, "depth": 1})
    network = build_classifier(spec)
    save_classifier(network, tmp_path)
    before = private_bytes()
    read = load_classifier(tmp_path)
    assert torch.equal(read.head.weight, network.head.weight)
    # The names of the classes take half as much. A head that is drawn, or copied, takes it whole.
    assert private_bytes() - before < read.head.weight.nbytes

    with torch.no_grad():
        read.head.weight.add_(1)
    assert torch.equal(load_classifier(tmp_path).head.weight, network.head.weight)


def test_a_head_of_another_shape_is_still_refused_for_a_users_trunk(tmp_path):
    def mine(shape, width=3):
        return nn.Sequential(nn.Flatten(), nn.Linear(shape[0], width))

    spec = ModelSpec("mine", 5, InputSpec((4,), "float32"), {"width": 3})
    save_classifier(build_classifier(spec, {"mine": mine}), tmp_path)
    wider = {"mine": lambda shape, width=3: mine(shape, width + 1)}
    with pytest.raises(ValueError, match="does not fit the network"):
        load_classifier(tmp_path, builders=wider)
