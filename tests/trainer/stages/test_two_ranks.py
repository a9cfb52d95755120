"""What is distributed, with two real gloo processes under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
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


def torchrun(run, ranks, *arguments, wait=True):
    command = [
        sys.executable,
        "-m",
        "trainer.distributed.torchrun",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "--",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        [*command, *arguments, "--run", str(run.root)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if wait:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    return process


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The generalist trained and measured by one rank and by two."""
    found = {}
    for ranks in (1, 2):
        run = prepare(tmp_path_factory.mktemp("runs") / str(ranks), data)
        torchrun(run, ranks, "generalist")
        torchrun(run, ranks, "measure")
        found[ranks] = run
    return found


def losses(run):
    rows = map(json.loads, run.generalist.path("metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_two_ranks_log_the_losses_of_one(runs):
    assert len(losses(runs[1])) == 6
    np.testing.assert_allclose(losses(runs[1]), losses(runs[2]), atol=1e-5)


def test_each_val_example_is_measured_once_with_two_ranks(runs):
    statistics = [
        PredictionStatistics.load(run.measure.path("statistics.npz")) for run in runs.values()
    ]
    predictions = [np.load(run.measure.path("predictions.npz")) for run in runs.values()]
    assert len(predictions[1]["ids"]) == 24 * 12
    np.testing.assert_array_equal(predictions[0]["ids"], predictions[1]["ids"])
    np.testing.assert_array_equal(predictions[0]["labels"], predictions[1]["labels"])
    np.testing.assert_allclose(statistics[0].frequency, statistics[1].frequency, atol=1e-4)


def test_every_rank_writes_a_log_of_its_own(runs):
    assert (
        runs[2].generalist.path("log-0.txt").exists()
        and runs[2].generalist.path("log-1.txt").exists()
    )


def test_kill_9_of_everything_then_the_same_command_ends_with_the_same_weights(data, tmp_path):
    overrides = ("train.steps=1500", "train.log_every=10", "train.checkpoint_every=50")
    undisturbed, killed = (
        prepare(tmp_path / name, data, *overrides) for name in ("undisturbed", "killed")
    )
    torchrun(undisturbed, 2, "generalist")
    process = torchrun(killed, 2, "generalist", wait=False)
    deadline = time.monotonic() + 100
    checkpoints = killed.generalist.directory / "checkpoints"
    while not list(checkpoints.glob("step-*/COMPLETE")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not killed.generalist.is_done, "the run was over before it could be killed"
    torchrun(killed, 2, "generalist")
    assert len(list((killed.generalist.directory / "attempts").iterdir())) == 2
    weights = [
        run.generalist.path("model.safetensors").read_bytes() for run in (undisturbed, killed)
    ]
    assert weights[0] == weights[1]
    assert losses(undisturbed) == losses(killed)


def test_a_users_mistake_is_one_line_and_exit_code_2(data, tmp_path):
    run = prepare(tmp_path / "run", data, "train.batch_size=95")
    process = torchrun(run, 2, "generalist", wait=False)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert (
        "error: batch 95 is not divisible by 2 ranks x 1 accumulation steps; try 94 or 96" in output
    )
    assert "Traceback" not in output


def test_summary_of_two_ranks_counts_global_examples(runs):
    for run in runs.values():
        assert read_json(run.generalist.path("summary.json"))["examples_seen"] == 60 * 96
