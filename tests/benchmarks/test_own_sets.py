"""benchmarks.advice on sets of a user's own, given by their paths."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import userdata
from toy import write_toy

from benchmarks.advice import own_sets, sets, truth
from benchmarks.advice.own_sets import add_set, name_and_path
from pipeline.config import UserError, load_config
from pipeline.store import read_json

KINDS = {
    "folder": lambda root: userdata.picture_folder(root / "photos", 3),  # as Tiny ImageNet's train
    "idx": lambda root: userdata.idx_files(root / "fashion"),  # as Fashion-MNIST's files
    "npz": lambda root: userdata.vectors(root / "vectors.npz"),
    "csv": lambda root: userdata.text_table(root / "texts.csv"),
    "shards": lambda root: write_toy(root / "toy"),
}


@pytest.fixture
def registry(monkeypatch):
    """SETS as it is, whatever a test enters there."""
    copied = {**sets.SETS}
    for module in (sets, truth, own_sets):
        monkeypatch.setattr(module, "SETS", copied)
    return copied


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_by_path_is_one_that_the_product_takes(kind, registry, tmp_path):
    path = Path(KINDS[kind](tmp_path))
    add_set("mine", path, tmp_path / "to")
    one = registry["mine"]
    for form, specialists in (("copy", one.copies), ("branch", one.branches)):
        tables = {"clusters": one.clusters, "specialists": specialists | {"kind": form}}
        assert load_config(None, [], one.config | tables).specialists.kind == form
    assert one.is_new and one.config["train"]["steps"] > 0
    shards = sets.shards_of("mine", tmp_path / "to")
    assert sets.complete(shards)
    before = read_json(shards / "manifest.json")
    add_set("mine", path, tmp_path / "to")  # again: the same shards and settings
    assert read_json(shards / "manifest.json") == before
    assert replace(registry["mine"], make=one.make) == one


def test_the_generalist_of_a_set_by_path_is_trained_and_measured(registry, tmp_path):
    path = userdata.vectors(tmp_path / "vectors.npz")
    add_set("mine", path, tmp_path / "to")
    short = registry["mine"].config | {"train": registry["mine"].config["train"] | {"steps": 4}}
    registry["mine"] = replace(registry["mine"], config=short)
    with truth.opened("mine", 0, tmp_path / "to") as (work, session):
        made = truth.make_generalist(work, session)
    assert made.steps == 4
    assert (work.to / "networks" / "G" / "test.npy").exists()


def test_what_is_no_set_is_refused_in_one_line(registry, tmp_path):
    file = userdata.text_table(tmp_path / "texts.csv")
    for words in (str(file), f"naics={file}", f"mine={tmp_path / 'nothing'}", f"a b={file}"):
        with pytest.raises(argparse.ArgumentTypeError):
            name_and_path(words)
    assert name_and_path(f"mine={file}") == ("mine", file)
    two = tmp_path / "two.csv"
    two.write_text("text,label\n" + "".join(f"word {n},{n % 2}\n" for n in range(60)))
    with pytest.raises(UserError, match="2 classes do not make two groups"):
        add_set("two", two, tmp_path / "to")
