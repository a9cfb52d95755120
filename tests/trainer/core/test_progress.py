"""What whoever watches a training reads: steps, loss, rate, pace, val top-1, time to go."""

import json
import logging

import pytest
import torch

from trainer.core.progress import MetricsLogger, Progress, cpu_seconds, in_words
from trainer.distributed.ranks import ALONE

ROW = {
    "step": 120,
    "steps": 600,
    "loss": 1.23456,
    "lr": 0.00194,
    "seconds": 30.0,
    "samples_per_s": 1930.4,
}


def test_a_training_line_says_loss_rate_pace_and_time_to_go():
    assert in_words(ROW) == (
        "loss 1.2346, learning rate 0.00194, 1,930 examples/s, 2 min 00 s to go"
    )


def test_a_validation_line_begins_with_top_1():
    row = {"step": 120, "val/loss": 0.51566, "val/top1": 0.761}
    assert in_words(row) == "val top-1 76.1 %, val loss 0.5157"


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="referral")
    return lambda: [record.getMessage() for record in caplog.records]


def logger(path, progress):
    return MetricsLogger(path, progress, ALONE, 600, 32, name="specialists/003")


def test_each_row_of_metrics_is_a_line_with_the_stage_and_the_step(tmp_path, lines):
    progress = Progress()
    metrics = logger(tmp_path / "metrics.jsonl", progress)
    progress.step = 2
    metrics.add(torch.tensor(3.0))
    metrics.add(torch.tensor(1.0))
    metrics.log(0.1, tmp_path)
    metrics.write({"step": 2, "val/top1": 0.5})
    first, second = lines()
    assert first.startswith("specialists/003: step 2/600, loss 2.0000, learning rate 0.1, ")
    assert second == "specialists/003: step 2/600, val top-1 50.0 %"


def test_a_training_that_goes_on_says_from_which_step(tmp_path, lines):
    progress = Progress(step=240, metrics=[json.dumps(ROW)])
    logger(tmp_path / "metrics.jsonl", progress)
    assert lines() == ["specialists/003: resumed at step 240 of 600"]


def test_a_fresh_training_does_not(tmp_path, lines):
    logger(tmp_path / "metrics.jsonl", Progress())
    assert lines() == []


def test_cpu_seconds_go_on_where_an_earlier_attempt_stopped(tmp_path, monkeypatch):
    clock = iter([100.0, 103.5])
    monkeypatch.setattr("time.process_time", lambda: next(clock))
    progress = Progress(cpu_seconds=20.0)
    logger(tmp_path / "metrics.jsonl", progress).update_seconds()
    assert cpu_seconds(progress, ALONE) == 23.5
