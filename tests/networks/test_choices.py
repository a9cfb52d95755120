"""The built-in networks are rows of a dict, and get only the options that they declare."""

import inspect
import json
import subprocess
import sys

import pytest
import torch

from networks import (
    InputSpec,
    ModelSpec,
    build_classifier,
    builtin_options,
    declared_options,
    load_classifier,
    save_classifier,
)
from networks.choices import NETWORKS

GRAY = InputSpec(shape=(1, 6, 6))
UNSET = {"width": None, "depth": None, "embedding": None, "dropout": 0.0}

PLAIN = """
from torch import nn

def plain(shape, width=4):
    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(shape[-1] ** 2, width), nn.ReLU()))

def whole(shape):
    return nn.Identity()
"""


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A built-in of another module, with a width and no dropout: one row."""
    (tmp_path / "plain_networks.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(NETWORKS, "plain", "plain_networks:plain")
    monkeypatch.setitem(NETWORKS, "whole", "plain_networks:whole")
    yield "plain"
    sys.modules.pop("plain_networks", None)


def build(name, generic, explicit=None):
    options = declared_options(name, generic, explicit or {})
    return build_classifier(ModelSpec(name, 3, GRAY, options))


def test_the_choices_import_nothing_heavy():
    code = "import sys, networks.choices; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_option_of_a_built_in_has_a_default(name):
    assert inspect.Parameter.empty not in builtin_options(name).values()


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "wideresnet"])
def test_the_file_of_a_built_in_keeps_its_generic_options(name, tmp_path):
    options = declared_options(name, UNSET | {"width": 2}, {"embedding": 5})
    assert options == {"width": 2, "depth": None, "embedding": 5, "dropout": 0.0}
    ModelSpec(name, 3, GRAY, options).save(tmp_path / "model.json")
    written = json.loads((tmp_path / "model.json").read_text())
    assert written["options"] == {"width": 2, "embedding": 5, "dropout": 0.0}


def test_a_new_built_in_is_one_row_and_one_function(plain, tmp_path):
    network = build(plain, UNSET | {"width": 7})
    assert network.head.in_features == 7 and network.spec.options == {"width": 7}
    save_classifier(network, tmp_path)
    raw = torch.randint(0, 256, (2, 1, 6, 6), dtype=torch.uint8)
    assert torch.equal(load_classifier(tmp_path)(raw), network(raw))
    assert build(plain, UNSET).head.in_features == 4


@pytest.mark.parametrize(
    "generic, explicit",
    [({"dropout": 0.1}, {}), ({"depth": 2}, {}), ({}, {"dropout": 0.0}), ({}, {"widht": 3})],
)
def test_an_option_that_is_set_and_not_declared_is_refused_by_name(plain, generic, explicit):
    (option,) = {**generic, **explicit}
    with pytest.raises(ValueError, match=f"plain has no option '{option}'; .*width"):
        build(plain, UNSET | generic, explicit)


def test_generic_options_are_for_built_ins_only():
    generic = UNSET | {"width": 3}
    assert declared_options("timm:resnet18", generic, {"a": 1}) == {"a": 1}
    assert declared_options("mine:mlp", generic, {"a": 1}) == {"a": 1}
    own = {"mlp": lambda shape: torch.nn.Flatten()}
    assert declared_options("mlp", generic, {}, own) == {}


def test_a_built_in_that_gives_no_features_is_refused(plain):
    with pytest.raises(ValueError, match=r"'whole' gives \[1, 1, 6, 6\] for one input"):
        build("whole", UNSET)
