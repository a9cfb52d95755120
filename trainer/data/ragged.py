"""Rows of different lengths in memory-mapped files, written block by block.

    R   rows, numbered 0 .. R - 1; each is written once or not at all
    n   entries of a row, of one or several fields: its classes, and their
        log-probabilities

A directory holds

    FIELD.bin       the entries of all rows, in the order in which the rows were written
    starts.npy      int64 [R], where a row's entries begin
    counts.npy      int32 [R], how many they are; 0 for a row that was not written
    FIELD.npy       [R], fields of which a row has one number

A block counts once progress.json says so.  What lies behind it is written again, at the same place:
two copies of one job, which write the same blocks, do not harm each other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.failures import cannot_write, writing
from pipeline.files import read_json, sync, write_json

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
            directory.mkdir(parents=True)
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
        self,
        rows: np.ndarray,
        counts: np.ndarray,
        entries: Mapping[str, np.ndarray],
        numbers: Mapping[str, np.ndarray],
        **notes,
    ) -> None:
        """Write a block.

        rows: int64 [n], distinct.  counts: [n].  entries: each [sum of counts], row after row.
        numbers: each [n].  notes: kept in `progress`.
        """
        ends = self.progress["entries"] + np.cumsum(counts, dtype=np.int64)
        for name, dtype in self.entries.items():
            with writing(self._bin(name)), open(self._bin(name), "r+b") as file:
                file.seek(self.progress["entries"] * dtype.itemsize)
                file.write(np.ascontiguousarray(entries[name], dtype).data)
                file.flush()
                os.fsync(file.fileno())  # before progress.json says that it is there
        self.arrays["starts"][rows] = ends - counts
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
        return self.directory / f"{name}.bin"


class RaggedRows:
    """What a RaggedWriter wrote, memory-mapped.

    entries: the fields with entries and their dtypes.  numbers: those with one number a row.
    """

    def __init__(self, directory: Path, entries: Mapping[str, np.dtype], numbers: tuple[str, ...]):
        self.starts, self.counts, *of_rows = (
            np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("starts", "counts", *numbers)
        )
        self.numbers = dict(zip(numbers, of_rows, strict=True))
        self.entries = {
            name: np.memmap(directory / f"{name}.bin", dtype, "r")
            for name, dtype in entries.items()
        }

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


def flattened(padded: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The first counts[i] of each row i of [n, width], row after row."""
    return padded[np.arange(padded.shape[1]) < counts[:, None]]


def _mapped(path: Path, rows: int, dtype: np.dtype, begun: bool) -> np.memmap:
    if begun:
        return np.lib.format.open_memmap(path, "r+")
    return create_mapped(path, dtype, (rows,))
