"""Tensors whose rows lie in several files are read as one, or in part."""

import json

import pytest
import torch
from safetensors.torch import load_file

from networks.row_files import RowFiles, index_path, part_name, write_index, write_part

WEIGHT = torch.arange(14.0).view(7, 2)
BIAS = torch.arange(7.0)
TRUNK = torch.tensor([5.0, 6.0])
BOUNDS = {"head.weight": (0, 2, 2, 7), "head.bias": (0, 3, 6, 7)}


@pytest.fixture
def written(tmp_path):
    for part in range(3):
        rows = {
            name: whole[BOUNDS[name][part] : BOUNDS[name][part + 1]]
            for name, whole in (("head.weight", WEIGHT), ("head.bias", BIAS))
        }
        write_part(tmp_path, "model", part, 3, rows, {"trunk": TRUNK} if part == 0 else None)
    write_index(tmp_path, "model", BOUNDS)
    return tmp_path


def test_a_tensor_is_read_whole_and_in_any_part(written):
    files = RowFiles.open(written, "model")
    assert sorted(files.names) == ["head.bias", "head.weight", "trunk"]
    assert torch.equal(files.read("head.weight"), WEIGHT)
    assert torch.equal(files.read("trunk"), TRUNK)
    for first in range(8):
        for end in range(first, 8):
            rows = slice(first, end)
            assert torch.equal(files.read("head.weight", rows), WEIGHT[rows])
            assert torch.equal(files.read("head.bias", rows), BIAS[rows])


def test_the_index_maps_every_tensor_of_every_file_as_its_readers_expect(written):
    index = json.loads(index_path(written, "model").read_text())
    found = {}
    for part in range(3):
        name = part_name("model", part, 3)
        assert name == f"model-{part + 1:05d}-of-00003.safetensors"
        found |= dict.fromkeys(load_file(written / name), name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == (14 + 7 + 2) * 4
    assert not list(written.glob(".*"))


def test_a_file_that_is_gone_or_cut_short_is_named(written):
    second = written / part_name("model", 1, 3)
    second.write_bytes(second.read_bytes()[:20])
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors: not a whole safe"):
        RowFiles.open(written, "model").read("head.bias")
    second.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is not beside it"):
        RowFiles.open(written, "model")
    index_path(written, "model").write_text("{}")
    with pytest.raises(ValueError, match="no index of safetensors files"):
        RowFiles.open(written, "model")
