"""What scipy's sparse arrays lack here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from scipy.sparse import csr_array

from .array_files import check_form

_COMPACT_ENTRIES = 2**22


class Entries(NamedTuple):
    """The stored entries of a matrix, in its own order. [nnz] each."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


def entries(matrix: csr_array) -> Entries:
    """Row, column and value of each stored entry.

    Columns and values are the matrix's own arrays, so that writing to them changes it.
    """
    assert matrix.indptr is not None and matrix.indices is not None
    rows = np.repeat(np.arange(len(matrix.indptr) - 1), np.diff(matrix.indptr))
    return Entries(rows, matrix.indices, matrix.data)


class CountMatrix:
    """A sparse C x C sum that grows by (row, column, weight) triples."""

    def __init__(self, num_classes: int, dtype: DTypeLike):
        self._dtype = np.dtype(dtype)
        self._sum = csr_array((num_classes, num_classes), dtype=dtype)
        self._pending: list[Entries] = []
        self._num_pending = 0

    def add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Add weights [n] at rows [n] and columns [n]."""
        self._pending.append(
            Entries(rows.astype(np.int32), columns.astype(np.int32), weights.astype(self._dtype))
        )
        self._num_pending += len(rows)
        if self._num_pending > max(_COMPACT_ENTRIES, self._sum.nnz):
            self.matrix()

    def add_matrix(self, matrix: csr_array) -> None:
        self._sum = (self.matrix() + matrix).tocsr()

    def matrix(self) -> csr_array:
        """The sum so far, csr [C, C]."""
        if self._pending:
            rows, columns, weights = map(np.concatenate, zip(*self._pending, strict=True))
            pending = csr_array((weights, (rows, columns)), shape=self._sum.shape)
            self._sum = (self._sum + pending).tocsr()
            self._pending, self._num_pending = [], 0
        return self._sum

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The matrix as arrays for a file. `from_arrays` reads them back."""
        matrix = self.matrix()
        return {
            f"{name}_data": matrix.data,
            f"{name}_indices": matrix.indices,
            f"{name}_indptr": matrix.indptr,
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], name: str, num_classes: int, dtype: DTypeLike
    ) -> CountMatrix:
        counts = cls(num_classes, dtype)
        parts = tuple(arrays[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
        for part, kinds in zip(parts, ("iuf", "iu", "iu"), strict=True):
            check_form(part, kinds, (None,))
        counts._sum = csr_array(parts, shape=(num_classes, num_classes))
        # Without it an index beyond the matrix is read and written past its memory.
        counts._sum.check_format(full_check=True)
        return counts
