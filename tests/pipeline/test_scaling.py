"""Formulas of docs/scaling.md: numbers worked by hand, and the constants of their code."""

import pytest

from pipeline import scaling
from pipeline.config import DEFAULT_SCHEDULE, Engine
from pipeline.scaling import (
    STATE,
    Network,
    checkpoint_bytes,
    held_by_training,
    kept_checkpoints,
    sent_per_step,
    steps_of,
    targets_bytes,
)

# The page's million classes on 64 GPUs, without the biases of the head.
MILLION = Network(25_000_000 + 513 * 10**6, 10**6, 512, 10**6)
BATCH = DEFAULT_SCHEDULE.model_copy(update={"batch_size": 65_536})
SHARDED = Engine(shard_head=True)


def test_a_million_classes_on_64_gpus_hold_what_the_page_says():
    replicated = held_by_training(MILLION, BATCH, Engine(), 64, "cuda")
    sharded = held_by_training(MILLION, BATCH, SHARDED, 64, "cuda")
    trunk = 16 * 25e6
    assert trunk == 0.4e9
    assert replicated.states == trunk + 16 * 513 * 10**6  # 8.2 GB of head
    assert replicated.logits == 8 * 1024 * 10**6  # 8.2 GB
    assert sharded.states == trunk + 16 * 513 * 10**6 / 64  # .13 GB
    assert sharded.logits == 2**28 and sharded.features == 8 * 65_536 * 512  # .27 GB
    assert sharded.whole_head == 0
    again = held_by_training(MILLION, BATCH, SHARDED, 64, "cuda", starts_whole=True)
    assert again.whole_head == 4 * 513 * 10**6


def test_a_sharded_head_sends_features_and_a_replicated_one_its_gradients():
    share = 63 / 64
    assert sent_per_step(MILLION, BATCH, Engine(), 64) == 8 * MILLION.weights * share
    features = 8 * 65_536 * 512 * share + 24 * 65_536
    assert sent_per_step(MILLION, BATCH, SHARDED, 64) == 8 * 25e6 * share + features
    assert sent_per_step(MILLION, BATCH, SHARDED, 1) == 0


@pytest.mark.parametrize(
    "name, two, three",
    [("ddp", 16, 16), ("zero1", 14, 12), ("zero2", 12, 28 / 3), ("zero3", 10, 20 / 3)],
)
def test_bytes_a_weight_are_those_of_the_table(name, two, three):
    assert STATE[name](2, 2) == pytest.approx(two) and STATE[name](3, 2) == pytest.approx(three)
    assert STATE[name](2, 1) == two - 4 / (1 if name == "ddp" else 2)  # SGD has a number less


def test_a_checkpoint_has_weights_states_and_averages():
    network = Network(100, 0, 9, 10, frozen=40)
    assert checkpoint_bytes(network, DEFAULT_SCHEDULE) == 4 * (100 + 2 * 60)
    more = DEFAULT_SCHEDULE.model_copy(update={"ema": 0.9, "patience": 3, "optimizer": "sgd"})
    assert checkpoint_bytes(network, more) == 4 * (300 + 60)
    assert kept_checkpoints(DEFAULT_SCHEDULE, 10_000) == 3
    assert kept_checkpoints(DEFAULT_SCHEDULE, 700) == 2
    assert kept_checkpoints(more, 10_000) == 4


def test_an_epoch_ends_with_a_part_of_a_batch():
    epochs = DEFAULT_SCHEDULE.model_copy(update={"epochs": 2.0, "batch_size": 100})
    assert steps_of(epochs, 120) == 3
    assert steps_of(epochs.model_copy(update={"epochs": None, "steps": 7}), 120) == 7


def test_stored_targets_take_two_bytes_more_a_class_where_indices_need_four():
    assert targets_bytes(1000, 32, 65_536) == 1000 * (14 + 4 * 32)
    assert targets_bytes(1000, 32, 65_537) == 1000 * (14 + 6 * 32)


def test_the_constants_are_those_of_the_code():
    from ensemble.fitting import WEIGHTS
    from ensemble.lazy_specialists import BYTES_HELD
    from ensemble.listed_ensemble import SPARSE_FROM, general_rows
    from networks.linear_logits import BLOCK_ENTRIES
    from trainer.session import MEASURING_BATCH, PROBABILITIES_IN_MEMORY, measuring_batch
    from trainer.stages.stored_targets import entry_dtypes
    from trainer.stages.targets import LEAST

    assert scaling.HEAD_BLOCK == {device: 4 * n for device, n in BLOCK_ENTRIES.items()}
    assert scaling.SPECIALISTS_HELD == BYTES_HELD and scaling.SPARSE_FROM == SPARSE_FROM
    assert scaling.TARGET_LEAST == LEAST
    assert scaling.WEIGHTS_TRIED == len(WEIGHTS)
    measured = (scaling.MEASURED_ROWS, scaling.MEASURED_NUMBERS)
    assert measured == (MEASURING_BATCH, PROBABILITIES_IN_MEMORY)
    for classes in (10, 2**18, 10**6, 10**9):
        assert scaling.measuring_rows(classes) == measuring_batch(classes)
        assert scaling.general_rows(classes) == general_rows(classes)
        of_class = sum(dtype.itemsize for dtype in entry_dtypes(min(classes, 2**24)).values())
        one = targets_bytes(1, 1, classes) - targets_bytes(1, 0, classes)
        assert one == of_class
