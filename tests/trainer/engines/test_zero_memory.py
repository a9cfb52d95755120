"""ZeRO's ranks never hold the whole network or optimizer, to save or to validate either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import ENGINES, gloo_environment
from toy import write_toy

from pipeline.scaling import bucket_weights
from trainer.core.checkpoints import load_checkpoint, save_checkpoint
from trainer.core.split_state import Part, is_split, take_own
from trainer.distributed.ranks import ALONE

SUPPORT = Path(__file__).parents[2] / "support"
ROOT = Path(__file__).parents[3]


def test_parts_of_tensors_are_read_whole_by_any_engine(tmp_path):
    weight = torch.arange(12.0).view(3, 4)
    average = torch.arange(12.0).view(3, 4) + 100
    part = Part(weight.flatten(), (0, 12), (3, 4))
    state = {
        "network": {"w": part, "running": torch.tensor([5.0])},
        "optimizer": {"w": {"exp_avg": part._replace(own=average.flatten()), "step": 7.0}},
        "best": {"w": part.clone(), "running": torch.tensor([6.0])},
        "average": None,
    }
    assert is_split(state)
    save_checkpoint(tmp_path, 3, state, keep=1, ranks=ALONE)
    read = load_checkpoint(tmp_path, 3)
    assert read["network"]["w"].equal(weight) and read["network"]["running"].item() == 5
    assert read["optimizer"]["w"]["exp_avg"].equal(average)
    assert read["optimizer"]["w"]["step"] == 7 and read["best"]["w"].equal(weight)
    assert read["network"]["w"] is not read["network"]["w"]  # no tensor stays in memory
    some = load_checkpoint(tmp_path, 3, own_rows={"w": slice(1, 2)})
    assert some["network"]["w"].equal(weight[1:2])


def test_what_is_written_of_a_part_is_this_ranks_alone():
    own = torch.tensor([3.0, 4.0])
    part = Part(own, (0, 2, 4, 5), (5,))
    entries, bounds, rest = take_own({"network": {"w": part}, "optimizer": {"w": {"m": part}}})
    assert set(entries) == {"network/w", "optimizer/w/m"}
    assert all(value.data_ptr() == own.data_ptr() for value in entries.values())  # no copy
    assert bounds["network/w"] == (0, 2, 4, 5) and rest["shapes"]["optimizer/w/m"] == (5,)
    assert rest["network"] == {} and rest["optimizer"] == {"w": {}}


@pytest.mark.engines
@pytest.mark.slow
def test_a_checkpoint_and_a_validation_hold_one_layer_more_than_a_step():
    """Of 2 ranks, with `benchmarks.scaling`. A bucket is held between steps too."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--width", "700"]
    command += ["--engines", "zero2", "zero3"]
    ended = subprocess.run(
        command, cwd=ROOT, env=gloo_environment(), capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = json.loads(ended.stdout.splitlines()[-1])["rows"]
    assert [row["engine"] for row in rows] == ["zero2", "zero3"]
    for row, buckets in zip(rows, (0, 1), strict=True):
        between = row["held_bytes_per_weight"][0]
        bucket = 4 * bucket_weights(row["weights"]) / row["weights"]
        assert between <= row["formula"] + buckets * bucket + 0.05
        for held in (row["at_checkpoint"], row["at_validation"]):
            assert held <= between + row["largest_layer"] + 0.1  # and activations
        assert row["largest_layer"] < 2.5  # so that the whole network, 4, would be seen


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_network_beyond_one_ranks_memory_is_trained_saved_resumed_and_exported_on_two():
    """The operating system refuses more, to DDP and to ZeRO 3 on one rank. By a program."""
    command = [sys.executable, "-m", "benchmarks.limited"]
    ended = subprocess.run(
        command, cwd=ROOT, env=gloo_environment(), capture_output=True, text=True, timeout=880
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    *alone, free, split = json.loads(ended.stdout.splitlines()[-1])["rows"]
    assert [row["ended"] for row in alone] == ["out of memory", "out of memory"]
    assert split["ended"] == "done" and split["ranks"] == 2
    assert split["held"] <= split["limit"] < 16 <= free["held"]  # weights, gradients, Adam
    assert abs(split["loss"] - free["loss"]) <= 1e-4


@pytest.mark.engines
@pytest.mark.slow
def test_attention_is_validated_under_zero_3_as_under_ddp(tmp_path):
    """It reads the weights of modules that are never called: validated before the first step."""
    data = write_toy(tmp_path / "data", {"train": 8, "val": 4, "test": 4})
    words = ["model.name=attention:tiny", "train.validate_every=3", "train.patience=9"]
    paths = filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH"), str(Path.cwd())])
    environment = gloo_environment() | {"PYTHONPATH": os.pathsep.join(paths)}
    script = str(ENGINES / "train_all.py")
    command = [sys.executable, script, str(data), str(tmp_path / "runs"), "ddp", "zero3", *words]
    ended = subprocess.run(
        [*command, "train.steps=6"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    losses = []
    for engine in ("ddp", "zero3"):
        lines = (tmp_path / "runs" / engine / "generalist" / "metrics.jsonl").read_text()
        rows = map(json.loads, lines.splitlines())
        losses.append([row["val/loss"] for row in rows if "val/loss" in row])
    assert len(losses[0]) == 3  # before the first step, and after the third and sixth
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-6)
