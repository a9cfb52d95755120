"""Specialists that are made as their generalist is are what built ones would be."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ensemble.lazy_specialists import load_specialist
from ensemble.sharing import own_bytes, shared_prefix
from networks import (
    InputSpec,
    ModelSpec,
    branch_off,
    build_classifier,
    load_branch,
    load_classifier,
    save_classifier,
)
from networks.choices import NETWORKS
from networks.likening import is_like
from networks.refilling import refilled, saved_tensors

C = 12
INPUTS = {
    "mlp": (InputSpec((6,), "float32"), {"width": 8, "norm": "batch", "dropout": 0.3}),
    "convnet": (InputSpec((1, 8, 8)), {"width": 4, "depth": 2, "embedding": 8}),
    "resnet": (InputSpec((1, 8, 8)), {"width": 4, "depth": 8}),
    "wideresnet": (InputSpec((1, 8, 8)), {"width": 1, "depth": 10}),
    "embedding_bag": (InputSpec((5,), "int32"), {"width": 20, "embedding": 6, "depth": 1}),
}
HEADS = {
    "all": {"kind": "dustbin", "members": [1, 4, 7], "rows": "all"},
    "kept": {"kind": "dustbin", "members": [1, 4, 7], "rows": "kept", "kept": [0, 9]},
    "fresh": {"kind": "dustbin", "members": [1, 4, 7], "rows": "fresh"},
}


def generalist_of(builder, cosine=None):
    spec_input, options = INPUTS[builder]
    torch.manual_seed(3)
    spec = ModelSpec(builder, C, spec_input, options, cosine=cosine)
    network = build_classifier(spec)
    for module in network.modules():  # statistics that are no fresh ones
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def inputs_of(network, rows=5):
    shape = (rows, *network.spec.input.shape)
    if network.spec.input.is_indices:
        return torch.randint(-1, 20, shape, dtype=torch.int32)
    return torch.randn(shape)


def test_every_builder_has_a_case():
    assert INPUTS.keys() == NETWORKS.keys()


@pytest.mark.parametrize("rows", HEADS)
@pytest.mark.parametrize("builder", INPUTS)
@pytest.mark.parametrize("cosine", [None, {"scale": 5.0, "learned": True}])
def test_a_copy_read_beside_its_generalist_is_the_one_that_is_built(
    tmp_path, builder, rows, cosine
):
    generalist = generalist_of(builder, cosine)
    copy = build_classifier(replace(generalist.spec, head=HEADS[rows], class_names=()))
    save_classifier(copy, tmp_path)
    before = {name: x.clone() for name, x in generalist.state_dict().items()}

    read = load_specialist(tmp_path, generalist, (), "cpu", None)
    built = load_classifier(tmp_path)

    assert is_like(generalist, built.spec, None)
    assert not any(module.training for module in read.modules())
    assert read.state_dict().keys() == built.state_dict().keys()
    assert all(torch.equal(x, built.state_dict()[n]) for n, x in read.state_dict().items())
    raw = inputs_of(generalist)
    with torch.no_grad():
        assert torch.equal(read(raw), built(raw))
    assert all(torch.equal(x, generalist.state_dict()[n]) for n, x in before.items())


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("builder", INPUTS)
def test_a_branch_read_beside_its_generalist_is_the_one_that_is_built(tmp_path, builder, blocks):
    generalist = generalist_of(builder)
    branch = branch_off(generalist, [1, 4, 7], embedding=9, blocks=blocks)
    torch.nn.init.normal_(branch.correction.weight)
    save_classifier(branch, tmp_path)

    read = load_specialist(tmp_path, generalist, (), "cpu", None)
    built = load_branch(tmp_path)

    assert read.state_dict().keys() == built.state_dict().keys()
    assert all(torch.equal(x, built.state_dict()[n]) for n, x in read.state_dict().items())
    assert torch.equal(read.classes, built.classes)
    h = torch.randn(4, branch.spec.head["features"])
    assert torch.equal(read._correct(h), built._correct(h))


def test_tensors_that_are_the_generalists_take_no_memory(tmp_path):
    generalist = generalist_of("mlp")
    copy = build_classifier(replace(generalist.spec, head=HEADS["kept"], class_names=()))
    copy.trunk.load_state_dict(generalist.trunk.state_dict())
    save_classifier(copy, tmp_path)
    read = load_specialist(tmp_path, generalist, (), "cpu", None)
    heads = sum(x.nbytes for x in (*read.head.parameters(), read.head.classes))
    assert own_bytes(generalist, read) == heads
    assert shared_prefix(generalist, read) == len(list(generalist.trunk.children()))


@pytest.mark.parametrize("name", ["trunk.hidden1.linear.weight", "head.weight"])
def test_tensors_of_another_shape_are_refused_by_name(tmp_path, name):
    generalist = generalist_of("mlp")
    copy = build_classifier(replace(generalist.spec, head=HEADS["kept"], class_names=()))
    save_classifier(copy, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors does not fit.*{name}"):
        load_specialist(tmp_path, generalist, (), "cpu", None)


def test_a_module_of_a_user_is_built():
    generalist = generalist_of("mlp")
    spec = replace(generalist.spec, head=HEADS["kept"], class_names=())
    assert is_like(generalist, spec, {"other": torch.nn.Linear})
    assert not is_like(generalist, spec, {"mlp": torch.nn.Linear})
    assert not is_like(generalist, replace(spec, options={"width": 9}), None)


def test_hooks_stay_with_the_module_that_has_them():
    calls = []
    layer = torch.nn.Linear(2, 3)
    layer.register_forward_hook(lambda *_: calls.append(1))
    twin = refilled(layer, saved_tensors(layer))
    twin(torch.zeros(1, 2))
    assert not calls
    layer(torch.zeros(1, 2))
    assert calls == [1]
