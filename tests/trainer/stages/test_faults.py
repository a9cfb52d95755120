"""What stops a training run, and what is left then."""

import json
import subprocess
import sys
import types

import pytest
import torch
from altered import altered
from running import run_all
from toy import toy_config, write_toy

from networks import load_classifier, save_classifier
from pipeline.config import UserError
from pipeline.graph import RunDirectory
from trainer.core import checkpoints, loop, tracking
from trainer.core.checkpoints import newest_step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


def hang(seconds):
    """A process whose watchdog sees three signs of progress and then none."""
    program = f"""
import time
from trainer.distributed.ranks import Watchdog
dog = Watchdog({seconds})
with dog.watching():
    for _ in range(3):
        time.sleep({seconds} * 0.6)
        dog.progress()
        print("alive", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)


def test_a_hung_rank_is_ended_with_its_traceback():
    ended = hang(0.5)
    assert ended.stdout.split() == ["alive"] * 3
    assert ended.returncode == 1 and "Timeout" in ended.stderr and "line 10" in ended.stderr


def test_outside_of_training_the_watchdog_sleeps():
    program = """
import time
from trainer.distributed.ranks import Watchdog
dog = Watchdog(0.2)
with dog.watching(): pass
dog.progress()
time.sleep(0.6)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=50)
    assert ended.returncode == 0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e4])
def test_a_diverging_loss_stops_before_it_is_saved(data, tmp_path, monkeypatch, loss):
    """The loss is bad from step 33 on and seen at step 40. The last good checkpoint is of 20."""
    steps, original = iter(range(1, 100)), loop.learning_rate

    def ruinous_rate(*arguments):
        return original(*arguments) if next(steps) < 33 else loss * 1e-3

    monkeypatch.setattr(loop, "learning_rate", ruinous_rate)
    config = toy_config(data, "train.log_every=25", "train.optimizer=sgd")
    message = r"the loss is .* at step 40; .* last good checkpoint is that of step 20"
    with pytest.raises(UserError, match=message):
        run_all(tmp_path / "run", config, only={"generalist"})
    generalist = RunDirectory(tmp_path / "run", config).generalist
    assert newest_step(generalist.directory / "checkpoints") == 20


def test_a_run_directory_that_cannot_be_written_is_one_error(data, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(torch, "save", refuse)
    message = "checkpoint of step 20 cannot be written .* Read-only file system"
    with pytest.raises(UserError, match=message):
        run_all(tmp_path / "run", toy_config(data), only={"generalist"})


def test_checkpoints_written_in_the_background_are_those_of_their_step(data, tmp_path, monkeypatch):
    whole = run_all(tmp_path / "whole", toy_config(data), only={"generalist"})
    monkeypatch.setattr(checkpoints, "in_background", lambda ranks: True)
    run = run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    file = "checkpoints/step-00000040/state.pt"
    expected = torch.load(whole.generalist.directory / file, weights_only=True)
    state = torch.load(run.generalist.directory / file, weights_only=True)
    for name, value in expected["network"].items():
        assert torch.equal(value, state["network"][name])
    for name, moments in expected["optimizer"].items():
        for key in moments:
            assert torch.equal(moments[key], state["optimizer"][name][key])
    assert state["progress"]["step"] == expected["progress"]["step"] == 40


def metrics_of(stage):
    """The rows of a stage's metrics.jsonl."""
    return [json.loads(line) for line in stage.path("metrics.jsonl").read_text().splitlines()]


def test_rows_tell_the_time_waited_for_data_and_the_memory_in_use(data, tmp_path):
    run = run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    for row in metrics_of(run.generalist):
        if "loss" in row:
            assert 0 <= row["data_wait"] <= 1 and row["memory_bytes"] > 2**20


def test_tensorboard_shows_the_rows_of_metrics(data, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = toy_config(data, 'engine.track=["tensorboard"]')
    run = run_all(tmp_path / "run", config, only={"generalist"})
    logged = events.EventAccumulator(str(run.generalist.path("tensorboard"))).Reload()
    rows = metrics_of(run.generalist)
    steps = [row["step"] for row in rows if "loss" in row]
    assert [event.step for event in logged.Scalars("loss")] == steps
    assert logged.Tensors("config/text_summary")
    assert logged.Scalars("val/top1")[-1].value == pytest.approx(rows[-1]["val/top1"])


def test_wandb_is_given_one_run_per_stage(tmp_path, monkeypatch):
    logged, opened = [], []

    class Run:
        def log(self, row, step):
            logged.append((step, row))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        opened.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        trackers = tracking.trackers(["wandb"], tmp_path, tmp_path / "run", "specialists/003")
        with trackers as (track,):
            track({"step": 5, "loss": 1.0})
    assert logged == [(5, {"loss": 1.0}), "finished"] * 2
    assert opened[0] == opened[1]
    assert opened[0]["name"] == "specialists/003" and opened[0]["resume"] == "allow"


def test_a_tracker_that_is_not_installed_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed; pip install .*wandb"):
        with tracking.trackers(["wandb"], tmp_path, tmp_path, "generalist"):
            pass


def test_predictions_that_are_no_numbers_are_one_clear_error(data, tmp_path):
    run = run_all(tmp_path / "run", toy_config(data), only={"generalist"})
    network = load_classifier(run.generalist.path("model.json").parent)
    torch.nn.init.constant_(network.head.weight, float("nan"))
    save_classifier(network, run.generalist.path("model.json").parent)
    altered(run.generalist)
    message = "predictions cannot be counted: row 0 of the predictions holds NaN"
    with pytest.raises(UserError, match=message):
        run_all(tmp_path / "run", toy_config(data), only={"measure"})
