"""Latency: medians of calls on one thread, at batches that are cheap to measure."""

import time

import torch

from trainer.core.latency import batches_to_measure, latencies_ms, median_ms, one_thread


def work(seconds):
    """Keep this thread busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


RAW = torch.arange(512.0)[:, None]


def test_a_call_that_works_takes_as_long():
    def answer(raw):
        work(0.002 + 0.0001 * len(raw))

    times = latencies_ms(answer, RAW, [1, 50])
    assert set(times) == {"1", "50"}
    assert 2.1 <= times["1"] < 6
    assert 7 / 50 <= times["50"] < 20 / 50


def test_every_call_takes_other_inputs_and_the_first_is_not_counted():
    seen, slow = [], [0.05]

    def answer(raw):
        seen.append(raw[0].item())
        work(slow.pop() if slow else 0)

    assert median_ms(answer, RAW[:4], 1) < 20
    assert seen[0] == 0 and set(seen) == {0, 1, 2, 3}


def test_a_slow_network_is_asked_about_fewer_at_once():
    assert batches_to_measure(lambda raw: None, RAW) == [1, 256]
    assert batches_to_measure(lambda raw: None, RAW[:100]) == [1, 64]
    assert batches_to_measure(lambda raw: None, RAW[:1]) == [1]
    slow = batches_to_measure(lambda raw: work(0.02), RAW)
    assert slow in ([1, 16], [1, 8])


def test_it_is_one_thread_and_the_others_come_back():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_waiting_for_other_processes_counts_nothing():
    assert median_ms(lambda raw: time.sleep(0.01), RAW[:1], 1) < 5
