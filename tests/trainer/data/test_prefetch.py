"""What is on the device of a batch, who reads it ahead, and who says so where nobody does."""

import logging
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from toy import toy_config, write_toy

from pipeline.config import UserError
from trainer.core.objectives import Constant
from trainer.core.progress import MetricsLogger, Progress
from trainer.data.prefetch import on_device
from trainer.data.shards import open_shards
from trainer.data.streams import Batch, MeasuringStream, reading_processes
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


class PretendedStream:
    """A queue of a GPU that does at once what it is asked for."""

    def __init__(self, *_):
        self.waited = []

    def wait_event(self, event):
        self.waited.append(event)


class PretendedEvent:
    def record(self, stream):
        self.stream = stream


def test_all_that_a_gpu_reads_of_a_batch_belongs_to_the_stream_that_reads_it(monkeypatch):
    """Memory of the copying stream that the step's does not hold may be given to the next batch."""
    recorded, computing = [], PretendedStream()
    monkeypatch.setattr(torch.cuda, "Stream", PretendedStream)
    monkeypatch.setattr(torch.cuda, "Event", PretendedEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)
    monkeypatch.setattr(Batch, "to", lambda self, _: self)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: recorded.append((id(self), stream))
    )
    mixed = replace(batch(0), partner_labels=torch.arange(3), own_share=torch.ones(3))
    for read in (batch(0), mixed):
        recorded.clear()
        computing.waited.clear()
        (moved,) = on_device(iter([read]), torch.device("cuda", 0))
        on_gpu = [getattr(moved, name) for name in moved.on_devices]
        assert recorded == [(id(tensor), computing) for tensor in on_gpu]
        assert len(computing.waited) == 1
    assert len(recorded) == 4  # inputs and labels, and both of what is mixed


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("asked", [None, True, False])
def test_memory_is_pinned_only_in_a_process_that_computes_on_a_gpu(
    on_gpu, asked, tmp_path, monkeypatch
):
    """A machine may have a GPU that this run does not use."""
    config = toy_config(write_toy(tmp_path / "data", {"train": 4, "val": 2, "test": 2}))
    data = config.data.model_copy(update={"pin_memory": asked})
    stream = MeasuringStream(open_shards(data.val, data, "val"), 8)
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)

    def loader(*_, pin_memory, **__):
        made.append(pin_memory)
        return []

    monkeypatch.setattr("trainer.data.streams.DataLoader", loader)
    with pytest.raises(UserError, match="0 seen"):  # this loader reads nothing
        list(stream.loader(0, 1, 0))
    assert made == [on_gpu and asked is not False]


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
