"""Who was asked, as numbers. In which order rows are read where specialists cannot all be held."""

from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from clustering import ClassGroups
from ensemble.lazy_specialists import LazySpecialists
from trainer.report.predictions import Predictions
from trainer.stages import evaluator, joining
from trainer.stages.evaluator import active_of
from trainer.stages.joining import by_group
from trainer.stages.sizes import times_asked

ASKED = np.array([[0, 2], [-1, -1], [2, -1]], np.int32)


def test_numbers_of_the_asked_are_a_mask_and_counts(monkeypatch):
    mask = active_of(ASKED, 3)["active"]
    assert mask.tolist() == [[True, False, True], [False] * 3, [False, False, True]]
    assert times_asked(ASKED, 3).tolist() == [1, 0, 2]
    monkeypatch.setattr(evaluator, "MASK_BYTES", 8)
    assert active_of(ASKED, 3) == {}  # 9 bytes of mask are more than are kept


def test_a_report_reads_who_was_asked_from_numbers_and_from_the_mask_of_earlier_versions():
    n = len(ASKED)
    kept = (np.arange(n), np.zeros(n), np.zeros((n, 5)), np.zeros((n, 5)), np.zeros(n))
    by_number, by_mask = Predictions(*kept, asked=ASKED), Predictions(*kept, **active_of(ASKED, 3))
    for predictions in (by_number, by_mask):
        columns = [predictions.was_asked(m) for m in range(3)]
        assert [column.tolist() for column in columns if column is not None] == [
            [True, False, False],
            [False, False, False],
            [True, False, True],
        ]
    assert Predictions(*kept).was_asked(0) is None


@pytest.fixture
def ensemble():
    """Two groups and a class, 4, of none. A specialist is 40 bytes."""
    network = nn.Module()
    specialists = LazySpecialists(lambda m: network, range(2))
    groups = ClassGroups([[2, 3], [0, 1]], 5)
    return SimpleNamespace(
        specialists=specialists, groups=groups, is_sparse=True, generalist=network
    )


def test_rows_of_one_group_are_read_together_where_not_all_specialists_are_held(
    ensemble, monkeypatch
):
    ids, predicted = np.array([7, 8, 9, 10, 11]), np.array([4, 0, 2, 1, 3])
    monkeypatch.setattr(joining, "own_bytes", lambda generalist, specialist: 40)
    monkeypatch.setattr(joining, "BYTES_HELD", 80)
    assert by_group(ensemble, ids, predicted) is None  # all are held
    monkeypatch.setattr(joining, "BYTES_HELD", 79)
    # Group 0 has predictions 2 and 3, group 1 has 0 and 1. Class 4, which asks nobody, is last.
    assert by_group(ensemble, ids, predicted).tolist() == [9, 11, 8, 10, 7]
    ensemble.is_sparse = False
    assert by_group(ensemble, ids, predicted) is None
