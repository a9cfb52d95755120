"""Rows of different lengths in memory-mapped files, written block by block.

    R   rows, numbered 0 .. R - 1. Each is written once or not at all
    n   entries of a row, of one or several fields: its classes, and their
        log-probabilities

A directory holds

    FIELD.bin       the entries of all rows, in the order in which the rows were written
    starts.npy      int64 [R], where a row's entries begin
    counts.npy      int32 [R], how many they are. 0 for a row that was not written
    FIELD.npy       [R], fields of which a row has one number

A block counts once progress.json says so.  What lies behind it is written again, at the same place:
two copies of one job, which write the same blocks, do not harm each other.

Of several ranks each writes the entries of the rows that it has made, `write_entries`, where these
belong. One of them, which has a RaggedWriter, then says that the block is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipeline.failures import cannot_write, writing
from pipeline.files import damaged, read_json, sync, write_json

from .kept_arrays import kept_npy
from .mapped import create_mapped

PROGRESS = "progress.json"


class RaggedWriter:
    """Writes blocks of rows, from where an earlier attempt stopped.

    Parameters
    ----------
    directory : Path
    rows : int
        R.
    entries, numbers : mapping of str to dtype
        The fields with entries, and those with one number a row.

    Attributes
    ----------
    progress : dict
        "blocks" and "entries" written, and the caller's own notes of the last block.

    Raises
    ------
    UserError
        Where a file cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        rows: int,
        entries: Mapping[str, np.dtype],
        numbers: Mapping[str, np.dtype],
    ):
        self.directory = directory
        self.entries = dict(entries)
        names = [f"{name}.bin" for name in entries]
        names += [f"{name}.npy" for name in ("starts", "counts", *numbers)]
        begun = all((directory / name).exists() for name in (*names, PROGRESS))
        if not begun:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        self.progress = {"blocks": 0, "entries": 0}
        if begun:
            self.progress = read_json(directory / PROGRESS)
        of_rows = {"starts": np.dtype(np.int64), "counts": np.dtype(np.int32), **numbers}
        try:
            self.arrays = {
                name: _mapped(directory / f"{name}.npy", rows, dtype, begun)
                for name, dtype in of_rows.items()
            }
            for name in self.entries:
                self._bin(name).touch()
            sync(directory)
        except OSError as error:
            raise cannot_write(directory, error) from None

    def append(
        self, rows: np.ndarray, counts: np.ndarray, numbers: Mapping[str, np.ndarray], **notes
    ) -> None:
        """Say that a block is there, whose entries `write_entries` has written.

        rows: int64 [n], distinct. Their entries lie in this order.  counts: [n].  numbers: each
        [n].  notes: kept in `progress`.
        """
        starts = starts_of(self.progress["entries"], counts)
        ends = starts + counts
        self.arrays["starts"][rows] = starts
        self.arrays["counts"][rows] = counts
        for name, values in numbers.items():
            self.arrays[name][rows] = values
        for array in self.arrays.values():
            array.flush()
        self.progress |= {"blocks": self.progress["blocks"] + 1, **notes}
        self.progress["entries"] = int(ends[-1]) if len(ends) else self.progress["entries"]
        write_json(self.directory / PROGRESS, self.progress)

    def finish(self) -> None:
        """Cut off what lies behind the last block."""
        for name, dtype in self.entries.items():
            with open(self._bin(name), "r+b") as file:
                file.truncate(self.progress["entries"] * dtype.itemsize)

    def _bin(self, name: str) -> Path:
        return bin_file(self.directory, name)


def bin_file(directory: Path, field: str) -> Path:
    return directory / f"{field}.bin"


def starts_of(first: int, counts: np.ndarray) -> np.ndarray:
    """Where the entries of each row of a block begin, int64 [n]. first: those of the block."""
    return first + np.cumsum(counts, dtype=np.int64) - counts


def write_entries(
    directory: Path,
    dtypes: Mapping[str, np.dtype],
    starts: np.ndarray,
    counts: np.ndarray,
    entries: Mapping[str, np.ndarray],
) -> None:
    """Write the entries of some rows of a block, so that they are on the disk when this returns.

    starts, counts: of these rows, starts ascending.  entries: each [sum of counts], row after row.
    Raises OSError, with the file's name, where that cannot be written.
    """
    if not len(starts):
        return
    last = np.flatnonzero(np.append(starts[1:] != (starts + counts)[:-1], True))
    ends = np.cumsum(counts, dtype=np.int64)[last]  # of each run of rows that lie side by side
    begins = np.append(0, ends[:-1])
    places = starts[np.append(0, last[:-1] + 1)]
    for name, dtype in dtypes.items():
        path, values = bin_file(directory, name), np.ascontiguousarray(entries[name], dtype)
        # With O_DSYNC nothing but these bytes is written, where two nodes write one page over NFS.
        with writing(path), _opened(path, os.O_WRONLY | os.O_DSYNC) as file:
            for place, begin, end in zip(places, begins, ends, strict=True):
                _write_all(file, values[begin:end].data.cast("B"), int(place) * dtype.itemsize)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags)
    try:
        yield file
    finally:
        os.close(file)


def _write_all(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


class RaggedRows:
    """What a RaggedWriter wrote, memory-mapped.

    entries: the fields with entries and their dtypes.  numbers: those with one number a row.
    """

    def __init__(self, directory: Path, entries: Mapping[str, np.dtype], numbers: tuple[str, ...]):
        self.starts = kept_npy(directory / "starts.npy", "iu", (None,))
        rows = len(self.starts)
        self.counts = kept_npy(directory / "counts.npy", "iu", (rows,))
        self.numbers = {name: kept_npy(directory / f"{name}.npy", "f", (rows,)) for name in numbers}
        self.entries = {
            name: np.memmap(directory / f"{name}.bin", dtype, "r")
            for name, dtype in entries.items()
        }
        self._check_places(directory)

    def _check_places(self, directory: Path) -> None:
        """DamagedFile for a row whose entries lie beyond those that there are."""
        there = min(map(len, self.entries.values()))
        least = min(int(self.starts.min(initial=0)), int(self.counts.min(initial=0)))
        if least < 0 or int((self.starts + self.counts).max(initial=0)) > there:
            raise damaged(directory / "starts.npy", f"rows lie beyond the {there} entries")

    def padded(
        self, rows: np.ndarray, padding: Mapping[str, float]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(counts [n], entries by field, each [n, largest count]). rows: int64 [n].

        padding: per field, what stands behind a row's own entries.
        """
        counts, starts = self.counts[rows], self.starts[rows]
        width = int(counts.max(initial=0))
        parts = {}
        for name, values in self.entries.items():
            part = np.full((len(rows), width), padding[name], values.dtype)
            for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
                part[row, :count] = values[start : start + count]
            parts[name] = part
        return counts, parts

    def __len__(self) -> int:
        return len(self.starts)


def flattened(padded: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The first counts[i] of each row i of [n, width], row after row."""
    return padded[np.arange(padded.shape[1]) < counts[:, None]]


def _mapped(path: Path, rows: int, dtype: np.dtype, begun: bool) -> np.memmap:
    if begun:
        return np.lib.format.open_memmap(path, "r+")
    return create_mapped(path, dtype, (rows,))
