"""Exactly once, a few passes. `make soak` makes a hundred, over all numbers of workers."""

import numpy as np
import pytest
from once import times_seen, uneven_set

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    return uneven_set(tmp_path_factory.mktemp("seven"), seed=0)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_each_example_of_7_uneven_shards_is_measured_once_by_all_ranks_together(
    seven, ranks, batch_size
):
    assert np.array_equal(times_seen(seven, batch_size, ranks, workers=0), np.ones(len(seven)))


@pytest.mark.parametrize("ranks, workers", [(1, 1), (2, 2), (3, 3)])
def test_each_example_is_measured_once_by_all_workers_of_all_ranks(seven, ranks, workers):
    assert np.array_equal(times_seen(seven, 16, ranks, workers), np.ones(len(seven)))
