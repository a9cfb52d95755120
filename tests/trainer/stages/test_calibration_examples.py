"""How many val examples one fitted number is worth."""

from types import SimpleNamespace

import numpy as np
import pytest

from trainer.stages.calibrate import JOINED, LOGITS_IN_MEMORY, calibration_ids, weight_ids


def session_of(num_classes: int, val: int):
    return SimpleNamespace(num_classes=num_classes, shards=lambda split: range(val))


def test_a_small_val_is_read_whole():
    assert np.array_equal(weight_ids(session_of(1000, 50_000)), np.arange(50_000))


@pytest.mark.parametrize(
    "ids, numbers", [(calibration_ids, LOGITS_IN_MEMORY), (weight_ids, JOINED)]
)
def test_a_large_one_evenly(ids, numbers):
    chosen = ids(session_of(20_000, 1_000_000))
    assert len(chosen) == max(500, numbers // 20_000)
    assert chosen[0] == 0 and chosen[-1] == 999_999
    gaps = np.diff(chosen)
    assert gaps.max() - gaps.min() <= 1


def test_so_many_networks_share_the_memory():
    assert len(calibration_ids(session_of(1000, 100_000), 4)) == LOGITS_IN_MEMORY // 4000
