"""What is distributed, with two real gloo processes under torchrun."""

import json
import os

import numpy as np
import pytest
from ranks import kill_after_a_checkpoint, stage_on_ranks, start_stage
from toy import toy_config, write_toy

from clustering import PredictionStatistics
from pipeline.config import save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


def prepare(root, data, *overrides):
    config = toy_config(data, "train.optimizer=sgd", "train.learning_rate=0.1", *overrides)
    root.mkdir(parents=True)
    save_config(config, root / "config.toml")
    return RunDirectory(root, config)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The generalist trained and measured by one rank and by two."""
    by_ranks = {}
    for ranks in (1, 2):
        run = prepare(tmp_path_factory.mktemp("runs") / str(ranks), data)
        stage_on_ranks(ranks, "generalist", run.root)
        stage_on_ranks(ranks, "measure", run.root)
        by_ranks[ranks] = run
    return by_ranks


def losses(run):
    rows = map(json.loads, run.generalist.path("metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_two_ranks_log_the_losses_of_one(runs):
    assert len(losses(runs[1])) == 6
    np.testing.assert_allclose(losses(runs[1]), losses(runs[2]), atol=1e-5)


def test_each_val_example_is_measured_once_with_two_ranks(runs):
    measured = [runs[ranks].measure for ranks in (1, 2)]
    statistics = [PredictionStatistics.load(stage.path("statistics.npz")) for stage in measured]
    predictions = [np.load(stage.path("predictions.npz")) for stage in measured]
    assert len(predictions[1]["ids"]) == 24 * 12
    np.testing.assert_array_equal(predictions[0]["ids"], predictions[1]["ids"])
    np.testing.assert_array_equal(predictions[0]["labels"], predictions[1]["labels"])
    np.testing.assert_allclose(statistics[0].frequency, statistics[1].frequency, atol=1e-4)


def test_every_rank_writes_a_log_of_its_own(runs):
    for rank in (0, 1):
        assert runs[2].generalist.path(f"log-{rank}.txt").exists()


def test_kill_9_of_everything_then_the_same_command_ends_with_the_same_weights(data, tmp_path):
    overrides = ("train.steps=1500", "train.log_every=10", "train.checkpoint_every=50")
    undisturbed = prepare(tmp_path / "undisturbed", data, *overrides)
    killed = prepare(tmp_path / "killed", data, *overrides)
    stage_on_ranks(2, "generalist", undisturbed.root)
    kill_after_a_checkpoint(2, killed)
    stage_on_ranks(2, "generalist", killed.root)
    assert len(list((killed.generalist.directory / "attempts").iterdir())) == 2
    weights = [run.generalist.path("model.safetensors") for run in (undisturbed, killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert losses(undisturbed) == losses(killed)


def test_a_users_mistake_is_one_line_and_exit_code_2(data, tmp_path):
    run = prepare(tmp_path / "run", data, "train.batch_size=95")
    process = start_stage(2, "generalist", run.root)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    message = "error: batch 95 is not divisible by 2 ranks x 1 accumulation steps; try 94 or 96"
    assert message in output
    assert "Traceback" not in output


DECODER = """
import os

import numpy as np


def decode(content):
    if os.environ["RANK"] == "1":
        raise ValueError("a byte is wrong")
    return np.zeros((1, 8, 8), np.uint8)
"""


@pytest.mark.slow
def test_an_error_of_another_rank_is_one_line_and_its_exit_code(data, tmp_path, monkeypatch):
    """Rank 0 waits in an exchange of gradients, and then loses its peer."""
    (tmp_path / "of_rank_0.py").write_text(DECODER)
    paths = filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RANK", "0")  # of the config's own look at the decoder
    decoders = 'data.decoders={png="of_rank_0:decode"}'
    run = prepare(tmp_path / "run", data, decoders, "data.cache=none")
    process = start_stage(2, "generalist", run.root, "--trust")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "cannot be decoded: a byte is wrong" in lines[0]
    assert "Traceback" not in output and "closed by peer" not in output


def test_summary_of_two_ranks_counts_global_examples(runs):
    for run in runs.values():
        assert read_json(run.generalist.path("summary.json"))["examples_seen"] == 60 * 96
