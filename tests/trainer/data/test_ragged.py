"""Rows of different lengths on the disk."""

import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.ragged import (
    RaggedRows,
    RaggedWriter,
    flattened,
    starts_of,
    write_entries,
)

ENTRIES = {"indices": np.dtype(np.uint16), "values": np.dtype(np.float16)}
NUMBERS = {"tail": np.dtype(np.float32)}
PADDING = {"indices": 7, "values": -np.inf}


def append(writer, rows, ranks=1, **notes):
    """Row r has r entries r, r, ..., and the number r / 2. Each rank writes every so-many-th."""
    rows = np.array(rows)
    starts = starts_of(writer.progress["entries"], rows)
    for rank in reversed(range(ranks)):
        own = rows[rank::ranks]
        entries = {name: np.repeat(own, own).astype(dtype) for name, dtype in ENTRIES.items()}
        write_entries(writer.directory, ENTRIES, starts[rank::ranks], own, entries)
    writer.append(rows, rows, {"tail": rows / 2}, **notes)


def read(directory, rows):
    return RaggedRows(directory, ENTRIES, ("tail",)).padded(np.array(rows), PADDING)


def test_rows_come_back_in_any_order_and_padded_to_the_longest(tmp_path):
    writer = RaggedWriter(tmp_path / "rows", 6, ENTRIES, NUMBERS)
    append(writer, [4, 1])
    append(writer, [3])
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
    append(whole, [4, 1])
    append(whole, [3], note=5)
    begun = RaggedWriter(tmp_path / "begun", 6, ENTRIES, NUMBERS)
    append(begun, [4, 1])
    with open(tmp_path / "begun" / "values.bin", "ab") as file:
        file.write(b"half a block")  # as a job leaves it that was killed while it wrote
    again = RaggedWriter(tmp_path / "begun", 6, ENTRIES, NUMBERS)
    assert again.progress == {"blocks": 1, "entries": 5}
    append(again, [3], note=5)
    again.finish()
    assert again.progress == whole.progress == {"blocks": 2, "entries": 8, "note": 5}
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "begun" / path.name).read_bytes() == path.read_bytes()


@settings(max_examples=15, deadline=None)  # files are synced
@given(st.lists(st.integers(0, 9), min_size=1, unique=True), st.integers(1, 4))
def test_any_number_of_ranks_writes_what_one_does(tmp_path_factory, rows, ranks):
    places = [tmp_path_factory.mktemp("rows") for _ in range(2)]
    for place, count in zip(places, (1, ranks), strict=True):
        writer = RaggedWriter(place / "rows", 10, ENTRIES, NUMBERS)
        append(writer, rows, count)
        append(writer, [5, 2], count)
        writer.finish()
    for path in sorted((places[0] / "rows").iterdir()):
        assert (places[1] / "rows" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_rank_writes_rows_that_lie_side_by_side_at_once(tmp_path, monkeypatch):
    writer = RaggedWriter(tmp_path / "rows", 6, ENTRIES, NUMBERS)
    written = []
    pwrite = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda f, part, at: written.append((len(part), at)) or pwrite(f, part, at)
    )
    counts = np.array([2, 3, 1])
    values = {name: np.arange(6).astype(dtype) for name, dtype in ENTRIES.items()}
    write_entries(writer.directory, ENTRIES, np.array([4, 6, 20]), counts, values)
    assert written == [(10, 8), (2, 40)] * 2  # entries 4 to 8 and 20, of 2 bytes each
    monkeypatch.setattr(os, "pwrite", lambda f, part, at: pwrite(f, part[:3], at))  # a part each
    write_entries(writer.directory, ENTRIES, np.array([4, 6, 20]), counts, values)
    found = np.fromfile(writer.directory / "indices.bin", np.uint16)
    assert found[4:9].tolist() == [0, 1, 2, 3, 4] and found[20] == 5


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    writer = RaggedWriter(tmp_path / "rows", 6, ENTRIES, NUMBERS)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        append(writer, [3])
    assert caught.value.filename == str(writer.directory / "indices.bin")
    assert writer.progress["blocks"] == 0


def test_what_was_begun_and_is_not_whole_is_begun_again(tmp_path):
    append(RaggedWriter(tmp_path, 6, ENTRIES, NUMBERS), [4, 1])
    (tmp_path / "tail.npy").unlink()
    assert RaggedWriter(tmp_path, 6, ENTRIES, NUMBERS).progress["blocks"] == 0


def test_padding_is_cut_off_row_by_row():
    padded = np.array([[1, 2, 9], [3, 9, 9], [4, 5, 6]])
    assert flattened(padded, np.array([2, 1, 3])).tolist() == [1, 2, 3, 4, 5, 6]
