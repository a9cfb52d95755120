"""Rows that are measured batch after batch."""

import numpy as np

from trainer.session import CollectedRows


def batch(*ids: int) -> dict[str, np.ndarray]:
    values = np.array(ids, np.int64)
    return {"ids": values, "double": 2.0 * values[:, None], "odd": values % 2 == 1}


def test_rows_are_those_of_all_batches_in_their_order():
    rows = CollectedRows(5)
    for ids in ([3, 1], [4], [0, 2]):
        rows.add(batch(*ids))
    arrays = rows.arrays()
    assert arrays["ids"].tolist() == [3, 1, 4, 0, 2]
    assert arrays["double"].tolist() == [[6.0], [2.0], [8.0], [0.0], [4.0]]
    assert arrays["odd"].dtype == bool and arrays["odd"].tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_rows_that_were_lost_leave_no_gap():
    rows = CollectedRows(100)
    rows.add(batch(7))
    rows.add(batch())
    rows.add(batch(9))
    assert {name: len(array) for name, array in rows.arrays().items()} == {
        "ids": 2, "double": 2, "odd": 2
    }  # fmt: skip


def test_a_batch_may_be_changed_once_it_was_added():
    rows, values = CollectedRows(2), batch(5)
    rows.add(values)
    values["ids"][0] = 6
    assert rows.arrays()["ids"].tolist() == [5]


def test_nothing_was_added():
    assert CollectedRows(3).arrays() == {}
