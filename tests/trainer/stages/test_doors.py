"""Runs that used to stop after the generalist end in a report."""

import errno
import json
import os

import numpy as np
import pytest
from running import run_all
from toy import encode_png, images, toy_config

from trainer.data.shards import ShardWriter, write_manifest

SHORT = (
    "train.steps=10",
    "specialists.steps=4",
    "students.main.steps=4",
    "controls.enabled=false",
)


def shards_without(directory, absent):
    """Shards of the toy's 24 classes, of which train lacks some."""
    names, splits = [f"class {c}" for c in range(24)], {}
    for seed, split in enumerate(("train", "val", "test")):
        labels = np.repeat([c for c in range(24) if split != "train" or c not in absent], 10)
        with ShardWriter(directory, split, names) as writer:
            for k, image in enumerate(images(labels, seed)):
                label = str(labels[k]).encode()
                writer.write({"__key__": f"{k:06d}", "png": encode_png(image), "cls": label})
        splits[split] = writer.facts
    write_manifest(directory, names, splits)
    return directory


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """Shards whose train has examples of classes 0 to 6 alone."""
    return shards_without(tmp_path_factory.mktemp("lacking") / "shards", absent=range(7, 24))


def test_classes_without_training_examples_make_no_group_of_their_own(lacking, tmp_path):
    run = run_all(tmp_path / "run", toy_config(lacking, *SHORT))
    groups = json.loads(run.cluster.path("groups.json").read_text())["members"]
    assert all(min(classes) < 7 for classes in groups)
    assert sorted(sum(groups, [])) == list(range(24))
    assert (run.root / "results.json").is_file()


def test_of_the_users_groups_one_without_examples_gets_no_specialist(lacking, tmp_path):
    file = tmp_path / "groups.json"
    groups = {"schema": 1, "num_classes": 24, "members": [[0, 1, 8], [20, 21], [3, 4]]}
    file.write_text(json.dumps(groups))
    run = run_all(tmp_path / "run", toy_config(lacking, *SHORT, f"clusters.groups_file={file}"))
    assert json.loads(run.cluster.path("summary.json").read_text())["skipped"] == [1]
    assert (run.root / "report.html").is_file()


def test_a_run_is_finished_without_any_links(lacking, tmp_path, monkeypatch):
    def refuse(*names, **_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(names[0]))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    run = run_all(tmp_path / "run", toy_config(lacking, *SHORT))
    assert all(stage.is_done for stage in run.stages)
    assert (run.root / "report.html").is_file()
    assert not (run.generalist.directory / "model.safetensors").is_symlink()
