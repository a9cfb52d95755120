"""What is on the device of a batch, who reads it ahead, and who says so where nobody does."""

import logging
import time

import pytest
import torch

from trainer.core.objectives import Constant
from trainer.core.progress import MetricsLogger, Progress
from trainer.data.prefetch import on_device
from trainer.data.streams import Batch, reading_processes
from trainer.distributed.ranks import ALONE, Ranks

META = torch.device("meta")


def batch(first: int) -> Batch:
    numbers = torch.arange(first, first + 3)
    return Batch(torch.zeros(3, 2), numbers, numbers + 10, torch.zeros_like(numbers))


def test_inputs_and_labels_go_to_the_device_and_ids_stay():
    moved = batch(0).to(META)
    assert moved.inputs.device == moved.labels.device == META
    assert moved.ids.tolist() == [10, 11, 12]
    assert moved.source.device == moved.view.device == torch.device("cpu")


def test_batches_come_in_order_and_none_is_read_before_it_is_asked_for_on_a_cpu():
    asked = []

    def read():
        for number in range(3):
            asked.append(number)
            yield batch(number)

    batches = on_device(read(), torch.device("cpu"))
    assert int(next(batches).labels[0]) == 0 and asked == [0]
    assert [int(each.labels[0]) for each in batches] == [1, 2]


def test_a_gpu_gets_processes_that_read_ahead_and_a_number_that_is_given_wins(monkeypatch):
    gpu = Ranks(0, 1, torch.device("cuda", 0))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert reading_processes(None, gpu) == 4
    assert reading_processes(0, gpu) == 0
    assert reading_processes(None, ALONE) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert reading_processes(None, gpu) == 1


def test_a_constant_is_moved_once():
    constant, on_meta = Constant(torch.ones(3)), batch(0).to(META)
    assert constant.beside(on_meta) is constant.beside(on_meta)
    assert Constant(None).beside(on_meta) is None


@pytest.mark.parametrize("waits, expected", [(0.5, 1), (0.1, 0)])
def test_a_training_that_waits_for_data_says_so_once(
    waits, expected, tmp_path, monkeypatch, caplog
):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    caplog.set_level(logging.WARNING, logger="referral")
    progress = Progress()
    logger = MetricsLogger(tmp_path / "metrics.jsonl", progress, ALONE, 100, 8, name="generalist")
    for _ in range(10):
        with logger.waiting():
            now[0] += 10 * waits
        now[0] += 10 * (1 - waits)
        progress.step += 1
        logger.add(torch.ones(()))
        logger.log(0.1, tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == expected
    assert not lines or lines[0].startswith("generalist: 50.00 % of the time goes by waiting")
