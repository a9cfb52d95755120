"""Tensors whose rows lie in several files are read as one, or in part."""

import json
import os
import resource

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


KINDS = {
    "bf16": torch.arange(6.0).view(3, 2).bfloat16(),  # which numpy lacks
    "flags": torch.tensor([True, False, True]),
    "half": torch.arange(6.0).view(3, 2).half(),
    "nothing": torch.zeros(0, 4),
    "numbers": torch.arange(2**40, 2**40 + 5),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tensor_is_read_as_it_was(name, tmp_path):
    value = KINDS[name]
    write_part(tmp_path, "model", 0, 1, {"t": value}, {"whole": value, "scalar": torch.tensor(7)})
    write_index(tmp_path, "model", {"t": (0, len(value))})
    files = RowFiles.open(tmp_path, "model")
    for read in (files.read("t"), files.read("whole")):
        assert read.dtype == value.dtype and torch.equal(read, value)
    assert torch.equal(files.read("t", slice(1, 3)), value[1:3])
    assert torch.equal(files.read("t", slice(1, 1)), value[1:1])
    assert files.read("scalar") == 7


def private_bytes() -> int:
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmData:")]
    return int(line.split()[1]) * 1024


def test_rows_of_a_large_file_need_no_more_memory_than_the_rows(tmp_path):
    """Of memory that a limit counts: the file is not mapped as what can be written."""
    write_part(tmp_path, "model", 0, 1, {"t": torch.zeros(2**12, 2**12)})
    write_index(tmp_path, "model", {"t": (0, 2**12)})
    files = RowFiles.open(tmp_path, "model")
    files.read("t", slice(0, 1))  # what is imported once
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (private_bytes() + 2**24, before[1]))
    try:
        assert files.read("t", slice(5, 7)).shape == (2, 2**12)
        with pytest.raises((RuntimeError, MemoryError)):
            torch.zeros(2**24)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


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


def lie(directory, change) -> None:
    """Change what the index says."""
    path = index_path(directory, "model")
    content = json.loads(path.read_text())
    change(content["metadata"]["rows"], content["weight_map"])
    path.write_text(json.dumps(content))


LIES = {
    "a part with more rows than the index says": lambda rows, files: rows.update(
        {"head.weight": [0, 1, 1, 6]}
    ),
    "a part with fewer rows": lambda rows, files: rows.update({"head.weight": [0, 2, 2, 2**60]}),
    "bounds that go back": lambda rows, files: rows.update({"head.weight": [0, 5, 2, 7]}),
    "bounds that do not begin at 0": lambda rows, files: rows.update({"head.weight": [1, 2, 2, 7]}),
    "bounds that are no numbers": lambda rows, files: rows.update({"head.weight": "0227"}),
    "bounds of nothing": lambda rows, files: rows.update({"head.weight": [0]}),
    "a part that no file has": lambda rows, files: files.pop("head.weight.rows-00002"),
    "a part in the place of another": lambda rows, files: files.update(
        {"head.weight.rows-00002": part_name("model", 0, 3)}
    ),
    "one part more": lambda rows, files: rows.update({"head.weight": [0, 2, 2, 7, 9]}),
    "a file of another directory": lambda rows, files: files.update(
        {"trunk": "../written/" + part_name("model", 0, 3)}
    ),
    "a file that is a number": lambda rows, files: files.update({"trunk": 3}),
}


@pytest.mark.parametrize("kind", LIES)
def test_an_index_that_lies_is_one_line_with_its_name_or_the_part_s(written, kind):
    lie(written, LIES[kind])
    with pytest.raises(ValueError, match=r"model.*safetensors.*(is damaged|: )") as refusal:
        files = RowFiles.open(written, "model")
        [files.read(name) for name in files.names]
    assert "\n" not in str(refusal.value)


def test_parts_of_one_tensor_that_differ_in_width_or_kind_are_damage(written):
    other = {"head.weight": torch.zeros(5, 3), "head.bias": BIAS[6:].double()}
    write_part(written, "model", 2, 3, other)
    files = RowFiles.open(written, "model")
    for name in other:
        with pytest.raises(ValueError, match="is damaged: the rows of head"):
            files.read(name)


@pytest.mark.parametrize("size", [2**62, 2**63 - 1])
def test_a_part_whose_header_says_more_than_it_holds_is_damage(written, size):
    path = written / part_name("model", 1, 3)
    entry = {"dtype": "F32", "shape": [size, 1], "data_offsets": [0, 4]}
    text = json.dumps({"head.bias.rows-00001": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors: not a whole safe"):
        RowFiles.open(written, "model").read("head.bias")


def test_a_pipe_in_the_place_of_a_part_or_of_the_index_is_not_waited_for(written):
    second = written / part_name("model", 1, 3)
    files = RowFiles.open(written, "model")
    second.unlink()
    os.mkfifo(second)
    with pytest.raises(ValueError, match="named pipe; only regular files"):
        files.read("head.bias")
    with pytest.raises(ValueError, match="is not beside it"):
        RowFiles.open(written, "model")
    index_path(written, "model").unlink()
    os.mkfifo(index_path(written, "model"))
    with pytest.raises(ValueError, match="named pipe; only regular files"):
        RowFiles.open(written, "model")
