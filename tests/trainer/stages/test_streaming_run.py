"""Stages of a run whose train split is larger than the disk allows."""

import logging
import sys
from pathlib import Path

import pytest
from running import run_all
from safetensors.numpy import load_file
from toy import toy_config, write_toy

from pipeline.store import read_json
from trainer.data import fetching

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from faulty_store import store  # noqa: E402

STAGES = (
    "generalist",
    "measure",
    "cluster",
    "route",
    "specialist",
    "ensemble",
    "targets",
    "student",
    "evaluate",
)
SMALL = (
    "train.steps=90",
    "train.batch_size=24",
    "specialists.steps=20",
    "students.main.steps=10",
    "clusters.num_groups=3",
    "controls.enabled=false",
    "data.cache=none",
    "data.stream_shards=2",
    "route.mode=copy",
)


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """A store of 24 shards of train, and of two each of val and test."""
    directory = tmp_path_factory.mktemp("store")
    write_toy(directory, {"train": 40, "val": 2, "test": 2}, per_shard=40)
    with store(directory) as server:
        server.directory = directory
        yield server


def played(far, root, *overrides):
    for lease in fetching._leases.values():
        lease.close()
    fetching._leases.clear()
    far.requests.clear()
    config = toy_config(far.url, *SMALL, f'data.fetch_dir="{root}-cache"', *overrides)
    return run_all(root, config, STAGES)


@pytest.mark.slow
def test_all_stages_read_a_split_that_streams_as_they_read_one_that_is_there(
    far, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "referral")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    whole = played(far, tmp_path / "whole")
    assert {count for name, count in far.requests.items() if name.endswith(".tar")} == {1}
    small = played(far, tmp_path / "small", "data.fetch_bytes=1100000")
    said = [line for line in caplog.messages if " shards behind URLs, " in line]
    assert any("train: " in line and "stream through" in line for line in said), said
    assert any("val: " in line and "kept in" in line for line in said), said
    ours, theirs = (load_file(run.generalist.path("model.safetensors")) for run in (small, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    for name in ("generalist", "ensemble"):
        rows = [read_json(run.evaluate.path(f"{name}.json"))["row"] for run in (small, whole)]
        assert rows[0]["nll"] == rows[1]["nll"] and rows[0]["n"] == 48
