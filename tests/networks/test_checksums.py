"""A manifest says what its files held. Whoever reads one has it compared."""

import json
import os
import shutil

import pytest
import torch

from networks import (
    InputSpec,
    ModelSpec,
    build_classifier,
    checksums,
    load_classifier,
    save_classifier,
)
from networks.checksums import ChangedFile, check, entries_of, recorded
from networks.integrity import read_content


def manifest(directory, name=checksums.DONE, **more):
    files = entries_of(directory, lambda file: file != name)
    (directory / name).write_text(json.dumps({"files": files, **more}))


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def network(tmp_path):
    """A saved one below an attempt, as DONE has it, and the stage's link to it."""
    place = tmp_path / "generalist" / "attempts" / "first"
    torch.manual_seed(0)
    save_classifier(build_classifier(ModelSpec("mlp", 3, InputSpec((4,)), {"width": 4})), place)
    manifest(place)
    shutil.copy(place / "DONE", tmp_path / "generalist" / "DONE")
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "generalist" / name).symlink_to(f"attempts/first/{name}")
    return tmp_path / "generalist"


@pytest.mark.parametrize("name, place", [("model.safetensors", -1), ("model.json", 40)])
def test_a_flipped_bit_of_a_network_is_one_line_with_its_remedy(network, name, place):
    load_classifier(network)
    flip(network / name, place)
    with pytest.raises(ValueError) as error:
        load_classifier(network)
    said = str(error.value)
    assert "\n" not in said and str(network / name) in said
    if name == "model.safetensors":
        assert f"remove {network / 'DONE'}, then `referral run` makes it again" in said


def test_a_copy_without_a_manifest_is_read_as_it_is(network, tmp_path):
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for name in ("model.json", "model.safetensors"):
        shutil.copy(network / name, copied / name)
    flip(copied / "model.safetensors")
    load_classifier(copied)
    assert recorded(copied / "model.json") is None


def test_what_a_stage_published_is_in_its_manifest(tmp_path):
    (tmp_path / "ensemble").mkdir()
    for directory in (tmp_path, tmp_path / "ensemble"):
        (directory / "ensemble.json").write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    manifest(tmp_path / "ensemble", published=["ensemble.json"])
    check(tmp_path / "ensemble.json", tmp_path / "other.json")
    (tmp_path / "ensemble.json").write_text("[]")
    with pytest.raises(ChangedFile, match="ensemble.json is damaged: its checksum is another"):
        check(tmp_path / "ensemble.json")


def test_a_file_called_done_that_is_no_manifest_says_nothing(tmp_path):
    (tmp_path / "weights").write_text("1")
    for content in ("", "done", "[]", "{}"):
        (tmp_path / "DONE").write_text(content)
        assert recorded(tmp_path / "weights") is None


def test_what_is_hashed_while_it_is_written_is_the_files_entry(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        hashing = checksums.Hashing(file)
        for part in (b"a" * 1_500_000, memoryview(b"bc"), bytearray(b"")):
            hashing.write(part)
    assert hashing.entry == checksums.entry_of(tmp_path / "file")
    assert hashing.entry["bytes"] == 1_500_002


def test_a_file_that_changes_after_it_was_compared_is_found(tmp_path):
    path = tmp_path / "model.json"
    path.write_bytes(b"first")
    files = checksums.entries_of(tmp_path, lambda name: True)
    (tmp_path / "DONE").write_text(json.dumps({"files": files}))
    assert read_content(path) == b"first"
    checksums.check(path)
    path.write_bytes(b"other")
    os.utime(path, ns=(1, 1))
    with pytest.raises(checksums.ChangedFile, match="its checksum is another"):
        read_content(path)


def test_a_manifest_that_changes_after_a_file_was_compared_is_asked_again(tmp_path):
    path = tmp_path / "model.json"
    path.write_bytes(b"first")
    entry = checksums.entry_of(path)
    (tmp_path / "DONE").write_text(json.dumps({"files": {"model.json": entry}}))
    checksums.check(path)
    other = {"model.json": entry | {"xxh3_128": "0" * 32}}
    (tmp_path / "DONE").write_text(json.dumps({"files": other, "more": 1}))
    with pytest.raises(checksums.ChangedFile, match="its checksum is another"):
        checksums.check(path)
