"""Rows of different lengths on the disk."""

import numpy as np

from trainer.data.ragged import RaggedRows, RaggedWriter, flattened

ENTRIES = {"indices": np.dtype(np.uint16), "values": np.dtype(np.float16)}
NUMBERS = {"tail": np.dtype(np.float32)}
PADDING = {"indices": 7, "values": -np.inf}


def block(rows):
    """Row r has r entries r, r, ..., and the number r / 2."""
    rows = np.array(rows)
    entries = {name: np.repeat(rows, rows).astype(dtype) for name, dtype in ENTRIES.items()}
    return rows, rows, entries, {"tail": rows / 2}


def read(directory, rows):
    return RaggedRows(directory, ENTRIES, ("tail",)).padded(np.array(rows), PADDING)


def test_rows_come_back_in_any_order_and_padded_to_the_longest(tmp_path):
    writer = RaggedWriter(tmp_path / "rows", 6, ENTRIES, NUMBERS)
    writer.append(*block([4, 1]))
    writer.append(*block([3]))
    counts, parts = read(tmp_path / "rows", [1, 3, 4, 1, 5])
    assert counts.tolist() == [1, 3, 4, 1, 0]  # row 5 was not written
    assert parts["indices"][:4].tolist() == [
        [1, 7, 7, 7],
        [3, 3, 3, 7],
        [4, 4, 4, 4],
        [1, 7, 7, 7],
    ]
    assert np.isneginf(parts["values"][0, 1:]).all() and parts["values"].dtype == np.float16
    assert RaggedRows(tmp_path / "rows", ENTRIES, ("tail",)).numbers["tail"][4] == 2.0


def test_writing_goes_on_behind_the_last_whole_block(tmp_path):
    whole = RaggedWriter(tmp_path / "whole", 6, ENTRIES, NUMBERS)
    whole.append(*block([4, 1]))
    whole.append(*block([3]), note=5)
    begun = RaggedWriter(tmp_path / "begun", 6, ENTRIES, NUMBERS)
    begun.append(*block([4, 1]))
    with open(tmp_path / "begun" / "values.bin", "ab") as file:
        file.write(b"half a block")  # as a job leaves it that was killed while it wrote
    again = RaggedWriter(tmp_path / "begun", 6, ENTRIES, NUMBERS)
    assert again.progress == {"blocks": 1, "entries": 5}
    again.append(*block([3]), note=5)
    again.finish()
    assert again.progress == whole.progress == {"blocks": 2, "entries": 8, "note": 5}
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "begun" / path.name).read_bytes() == path.read_bytes()


def test_what_was_begun_and_is_not_whole_is_begun_again(tmp_path):
    RaggedWriter(tmp_path, 6, ENTRIES, NUMBERS).append(*block([4, 1]))
    (tmp_path / "tail.npy").unlink()
    assert RaggedWriter(tmp_path, 6, ENTRIES, NUMBERS).progress["blocks"] == 0


def test_padding_is_cut_off_row_by_row():
    padded = np.array([[1, 2, 9], [3, 9, 9], [4, 5, 6]])
    assert flattened(padded, np.array([2, 1, 3])).tolist() == [1, 2, 3, 4, 5, 6]
