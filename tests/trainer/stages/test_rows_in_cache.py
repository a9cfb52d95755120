"""How many examples are measured at a time where all their probabilities are written."""

import torch

from trainer.session import MEASURING_BATCH, measuring_batch, rows_in_cache

CPU = torch.device("cpu")


def test_of_few_classes_a_batch_is_as_large_as_any():
    assert rows_in_cache(1000, CPU) == MEASURING_BATCH


def test_of_many_classes_a_cpu_measures_what_its_cache_holds():
    assert rows_in_cache(26_386, CPU) == 2**21 // 26_386 == 79


def test_a_network_is_not_run_for_a_handful_of_rows_and_memory_still_bounds_them():
    assert rows_in_cache(1_000_000, CPU) == 32
    assert rows_in_cache(10_000_000, CPU) == measuring_batch(10_000_000) == 6


def test_a_gpu_keeps_its_large_batches():
    assert rows_in_cache(26_386, torch.device("cuda")) == measuring_batch(26_386)
