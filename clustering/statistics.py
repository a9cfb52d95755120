"""What a classifier's predictions say about its classes, as sums that merge.

B batch, C classes, k kept predictions of an example.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from .array_files import check_form, read_npz
from .checks import checked_labels, checked_probabilities, checked_sparse
from .choices import READ_COVARIANCE
from .sparse import CountMatrix

SCHEMA = 1
DENSE_BYTES = 2**30  # the one C x C array, float64: C up to 11,585
# Up to so many classes the exact covariance is gathered for those who do not read it as well. There
# it takes at most 6 times as long as to keep the largest predictions. Of 5,200 classes 14 times.
EXACT_CLASSES = 2048
# Predictions of an example that the expected confusion keeps where the covariance is exact.
EXPECTED_TOP_K = 32
TOP_K = 10  # kept per example, where C is beyond the limit and the caller names no number


def covariance_fits(num_classes: int) -> bool:
    """Whether the exact covariance of so many classes is within the memory limit, 1 GiB."""
    return 8 * num_classes**2 <= DENSE_BYTES


def predictions_to_keep(num_classes: int, method: str = "kmeans") -> int | None:
    """top_k of the statistics for a grouping method. None: as `PredictionStatistics` decides.

    The expected confusion is the same, bit for bit, as beside an exact covariance.

    Parameters
    ----------
    num_classes : int
        C.
    method : str
        A name of `clustering.METHODS`.
    """
    exact = num_classes <= EXACT_CLASSES or method in READ_COVARIANCE
    if exact or not covariance_fits(num_classes):
        return None
    return EXPECTED_TOP_K


class PredictionStatistics:
    """Streaming, mergeable statistics of predicted distributions.

    It holds the mean, the confusion counts of the examples with labels, and the expected
    confusion, which needs no labels. Beside them it has the second moment sum p p^T, or each
    example's largest predictions. Sums in another order or split are the same to rounding.

    Parameters
    ----------
    num_classes : int
        C.
    top_k : int or None
        k: each example's k largest predictions are kept as they are (8 k bytes an example), and
        the sum of their tail mass. None: the second moment is exact while C x C float64 fits
        1 GiB. Beyond it top_k becomes 10.

    Attributes
    ----------
    num_classes : int
    top_k : int or None
        None where the second moment is exact.
    num_examples : int
    num_labelled : int
        Examples that came with a label.

    Raises
    ------
    ValueError
        If num_classes or top_k is below 1.

    Examples
    --------
    >>> statistics = PredictionStatistics(3)
    >>> statistics.update([[0.7, 0.3, 0.0], [0.2, 0.8, 0.0]], labels=[1, 1])
    >>> statistics.confusion.toarray().tolist()
    [[0, 0, 0], [1, 1, 0], [0, 0, 0]]
    """

    num_classes: int
    top_k: int | None
    num_examples: int
    num_labelled: int

    def __init__(self, num_classes: int, top_k: int | None = None):
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        if top_k is not None and top_k < 1:
            raise ValueError(
                f"top_k is {top_k}; keep at least 1 prediction per example, "
                "or None for the exact covariance"
            )
        self.num_classes = int(num_classes)
        if top_k is None and not covariance_fits(self.num_classes):
            top_k = TOP_K
        if top_k is not None:
            top_k = min(int(top_k), self.num_classes)
        self.top_k = top_k
        self.num_examples = 0
        self.num_labelled = 0
        self._probability_sum: NDArray[np.float64] = np.zeros(self.num_classes)
        self._tail_sum = 0.0
        self._second_moment: NDArray[np.float64] | None = None
        if self.exact:
            self._second_moment = np.zeros((self.num_classes, self.num_classes))
        self._kept: list[_SparseRows] = []
        self._expected = CountMatrix(self.num_classes, np.float64)
        self._confusion = CountMatrix(self.num_classes, np.int64)

    @property
    def exact(self) -> bool:
        """Whether the second moment is held as one exact C x C array."""
        return self.top_k is None

    def update(
        self,
        predictions: ArrayLike,
        values: ArrayLike | None = None,
        labels: ArrayLike | None = None,
    ) -> None:
        """Add a batch of predictions: dense, or the k largest of each example.

        `update(probabilities, labels)` and `update(indices, values, labels)` are both understood.

        Parameters
        ----------
        predictions : array or tensor, float [B, C] or int [B, k]
            Probabilities of all classes, or the classes that `values` are of. An index below 0
            pads a short row.
        values : array or tensor, float [B, k], or None
            The probabilities of those classes.
        labels : array or tensor, int [B], or None

        Raises
        ------
        ValueError
            For what is no distribution (NaN, negative, rows that sum to something else), for
            shapes that disagree and for a label or index out of range. The statistics are then
            unchanged.
        """
        predictions = as_array(predictions)
        if values is not None:
            values = as_array(values)
            if values.ndim == 1 and labels is None:
                values, labels = None, values
        if predictions.ndim != 2:
            raise ValueError(
                f"predictions have shape {predictions.shape}; "
                "they must be [batch, classes] or [batch, k]"
            )
        if labels is not None:
            labels = checked_labels(as_array(labels), len(predictions), self.num_classes)
        if values is None:
            self._add_dense(checked_probabilities(predictions, self.num_classes), labels)
        else:
            indices, values = checked_sparse(predictions, values, self.num_classes)
            self._add_sparse(indices, values, labels)

    def merge(self, other: PredictionStatistics) -> PredictionStatistics:
        """Add another's sums to these, and leave it as it is.

        Parameters
        ----------
        other : PredictionStatistics
            Of the same num_classes and top_k.

        Returns
        -------
        PredictionStatistics
            self

        Raises
        ------
        ValueError
            If num_classes or top_k differ.
        """
        if (self.num_classes, self.top_k) != (other.num_classes, other.top_k):
            raise ValueError(
                f"statistics of {other.num_classes} classes with top_k {other.top_k} do not merge "
                f"into {self.num_classes} classes with top_k {self.top_k}; "
                "gather both with the same arguments"
            )
        self.num_examples += other.num_examples
        self.num_labelled += other.num_labelled
        self._probability_sum = self._probability_sum + other._probability_sum
        self._tail_sum += other._tail_sum
        if self._second_moment is not None and other._second_moment is not None:
            self._second_moment = self._second_moment + other._second_moment
        self._kept = self._kept + other._kept
        self._expected.add_matrix(other._expected.matrix())
        self._confusion.add_matrix(other._confusion.matrix())
        return self

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Mean predicted probability of each class, [C], sums to 1.

        The tail of a top-k row is spread evenly over the classes that it does not name.
        """
        return self._probability_sum / max(self.num_examples, 1)

    @property
    def tail(self) -> float:
        """Mean probability mass outside the kept top k. 0 where the covariance is exact."""
        return self._tail_sum / max(self.num_examples, 1)

    @property
    def confusion(self) -> csr_array:
        """Examples with labels by true class (rows) and most probable class, int64 csr [C, C]."""
        return self._confusion.matrix()

    @property
    def expected_confusion(self) -> csr_array:
        """What `confusion` would be if the predictions were right about themselves.

        float64 csr [C, C]. Row i, column j: the mass given to class i, summed over the examples
        whose most probable class is j. Only each example's largest predictions count: top_k of
        them, or 32 where the covariance is exact.
        """
        return self._expected.matrix()

    @property
    def predictions(self) -> csr_array:
        """The kept predictions, float32 csr [examples, C], as they came.

        Raises ValueError where none are kept, because the covariance is exact.
        """
        if self.exact:
            raise ValueError(
                "these statistics hold the exact covariance and no predictions; "
                "gather them with top_k=10"
            )
        kept = _concatenated(self._kept)
        pointers = np.concatenate([[0], np.cumsum(kept.lengths, dtype=np.int64)])
        shape = (self.num_examples, self.num_classes)
        return csr_array((kept.values, kept.indices, pointers), shape=shape)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Covariance of the predictions (of those kept), float64 [C, C].

        Raises ValueError where it would be above the memory limit.
        """
        if not covariance_fits(self.num_classes):
            raise ValueError(
                f"a covariance of {self.num_classes} classes is above the limit of "
                f"{DENSE_BYTES >> 20} MiB; use .predictions and their mean instead"
            )
        n = max(self.num_examples, 1)
        if self._second_moment is not None:
            mean, second_moment = self.frequency, self._second_moment
        else:
            predictions = csr_array(self.predictions, dtype=np.float64)
            mean = predictions.sum(axis=0) / n
            second_moment = (predictions.T @ predictions).toarray()
        covariance = second_moment / n
        covariance -= np.outer(mean, mean)
        return covariance

    def restricted(self, classes: NDArray[np.int64]) -> PredictionStatistics:
        """Statistics of the same examples' predictions of `classes` alone, numbered in their order.

        Masses stay as they were: what went to the other classes is left out.
        """
        kept = PredictionStatistics(len(classes), self.top_k)
        kept.top_k = self.top_k and min(self.top_k, len(classes))
        kept.num_examples = self.num_examples
        kept._probability_sum = self._probability_sum[classes]
        kept._second_moment = None
        if self._second_moment is not None:
            kept._second_moment = self._second_moment[np.ix_(classes, classes)]
        elif self._kept:
            kept._kept = [_concatenated(self._kept).restricted(classes, self.num_classes)]
        kept._tail_sum = self._tail_sum
        kept._expected.add_matrix(self.expected_confusion[classes][:, classes])
        kept._confusion.add_matrix(self.confusion[classes][:, classes])
        kept.num_labelled = int(kept.confusion.sum())
        return kept

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz without pickles. The file appears whole or never.

        Parameters
        ----------
        path : path of the file
            Taken as it is, no suffix is added.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                self.write(file)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()

    def write(self, file: IO[bytes]) -> None:
        """What `save` writes, to an open file."""
        arrays: dict[str, Any] = {
            "schema": SCHEMA,
            "num_classes": self.num_classes,
            "top_k": self.top_k or -1,
            "num_examples": self.num_examples,
            "num_labelled": self.num_labelled,
            "probability_sum": self._probability_sum,
            "tail_sum": self._tail_sum,
            **self._expected.arrays("expected"),
            **self._confusion.arrays("confusion"),
        }
        if self.exact:
            arrays["second_moment"] = self._second_moment
        else:
            kept = _concatenated(self._kept)
            arrays["row_lengths"] = kept.lengths
            arrays["row_indices"] = kept.indices
            arrays["row_values"] = kept.values
        np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PredictionStatistics:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path of the file

        Returns
        -------
        PredictionStatistics

        Raises
        ------
        ValueError
            If it is no such file, or another version's.
        FileNotFoundError
            If there is no file.
        """
        try:
            arrays = read_npz(path)
        except ValueError as error:
            raise ValueError(
                f"{path} is no statistics file ({error}); gather the statistics again"
            ) from None
        schema = arrays.get("schema", np.array("none"))
        if schema.shape:
            schema = np.array("none")
        if schema != SCHEMA:
            raise ValueError(
                f"{path} has schema {schema}, this version reads {SCHEMA}; "
                "gather the statistics again"
            )
        try:
            return cls._from_arrays(arrays)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{path} is a corrupt statistics file ({error}); gather the statistics again"
            ) from None

    @classmethod
    def _from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PredictionStatistics:
        top_k = int(arrays["top_k"])
        num_classes = int(arrays["num_classes"])
        check_form(arrays["probability_sum"], "f", (num_classes,))
        statistics = cls.__new__(cls)
        statistics.num_classes = num_classes
        statistics.num_examples = int(arrays["num_examples"])
        statistics.num_labelled = int(arrays["num_labelled"])
        statistics._probability_sum = arrays["probability_sum"]
        statistics._tail_sum = float(arrays["tail_sum"])
        statistics._kept = []
        if top_k < 0:
            check_form(arrays["second_moment"], "f", (num_classes, num_classes))
            statistics.top_k = None
            statistics._second_moment = arrays["second_moment"]
        else:
            statistics.top_k = top_k
            statistics._second_moment = None
            kept = _SparseRows(arrays["row_lengths"], arrays["row_indices"], arrays["row_values"])
            _check_rows(kept, num_classes)
            if len(kept.lengths):
                statistics._kept = [kept]
        statistics._expected = CountMatrix.from_arrays(arrays, "expected", num_classes, np.float64)
        statistics._confusion = CountMatrix.from_arrays(arrays, "confusion", num_classes, np.int64)
        return statistics

    def _add_dense(self, p_BC: np.ndarray, labels: np.ndarray | None) -> None:
        kept = self.top_k or min(EXPECTED_TOP_K, self.num_classes)
        indices, values = _largest(p_BC, kept)
        if self._second_moment is None:
            self._add_sparse(indices, values, labels)
            return
        self._probability_sum += p_BC.sum(axis=0)
        self._second_moment += p_BC.T @ p_BC
        self._count(indices, values, labels)

    def _add_sparse(
        self, indices: np.ndarray, values: np.ndarray, labels: np.ndarray | None
    ) -> None:
        if self.top_k is None:
            raise ValueError(
                "top-k predictions were given to statistics of the exact covariance; gather them "
                f"with PredictionStatistics({self.num_classes}, top_k={indices.shape[1]})"
            )
        if indices.shape[1] > self.top_k:
            largest = np.argpartition(-values, self.top_k - 1, axis=1)[:, : self.top_k]
            indices = np.take_along_axis(indices, largest, 1)
            values = np.take_along_axis(values, largest, 1)
        present = (indices >= 0) & (values > 0)
        lengths = present.sum(axis=1)
        kept = _SparseRows(
            lengths.astype(np.int32),
            indices[present].astype(np.int32),
            values[present].astype(np.float32),
        )
        # Each row's tail is spread evenly over the classes that it does not name.
        tails = np.clip(1 - values.sum(axis=1), 0, None)
        others = self.num_classes - lengths
        spread = np.where(others > 0, tails / np.maximum(others, 1), 0)
        not_spread = np.repeat(spread, lengths)
        tail_taken = np.bincount(kept.indices, not_spread, minlength=self.num_classes)
        masses = np.bincount(kept.indices, kept.values, minlength=self.num_classes)
        self._probability_sum += masses + spread.sum() - tail_taken
        self._tail_sum += float(tails.sum())
        self._kept.append(kept)
        self._count(indices, values, labels)

    def _count(self, indices: np.ndarray, values: np.ndarray, labels: np.ndarray | None) -> None:
        """Add a batch to both confusions. Indices, values [B, k], padded with -1 and 0."""
        self.num_examples += len(indices)
        if not len(indices):
            return
        # Of classes that tie for the first place the lowest, as argmax has it: the order of the k
        # must not matter.
        first = values == values.max(axis=1, keepdims=True)
        predicted = np.where(first, indices, self.num_classes).min(axis=1, keepdims=True)
        present = (indices >= 0) & (values > 0)
        columns = np.broadcast_to(predicted, indices.shape)[present]
        self._expected.add(indices[present], columns, values[present])
        if labels is not None:
            self.num_labelled += len(labels)
            self._confusion.add(labels, predicted[:, 0], np.ones(len(labels), dtype=np.int64))


def as_array(values: ArrayLike) -> np.ndarray:
    """A tensor on any device, or anything array-like, as a numpy array."""
    if not hasattr(values, "detach"):
        return np.asarray(values)
    tensor = cast(Any, values).detach().cpu()
    if str(tensor.dtype) in ("torch.bfloat16", "torch.float16"):
        tensor = tensor.float()
    return tensor.numpy()


def _check_rows(kept: _SparseRows, num_classes: int) -> None:
    """ValueError for rows of a file that do not fit each other or the classes."""
    check_form(kept.lengths, "iu", (None,))
    check_form(kept.indices, "iu", (int(kept.lengths.sum()),))
    check_form(kept.values, "f", kept.indices.shape)
    lowest, highest = kept.indices.min(initial=0), kept.indices.max(initial=0)
    if min(lowest, kept.lengths.min(initial=0)) < 0 or highest >= num_classes:
        raise ValueError(f"a class beyond the {num_classes}, or a negative number")


class _SparseRows(NamedTuple):
    """Kept predictions of some examples: lengths [B], indices [nnz], values [nnz]."""

    lengths: NDArray[np.int32]
    indices: NDArray[np.int32]
    values: NDArray[np.float32]

    def restricted(self, classes: NDArray[np.int64], num_classes: int) -> _SparseRows:
        """The same rows without the other classes, whose indices become places in `classes`."""
        place = np.full(num_classes, -1, np.int32)
        place[classes] = np.arange(len(classes))
        inside = place[self.indices] >= 0
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)[inside]
        lengths = np.bincount(rows, minlength=len(self.lengths)).astype(np.int32)
        return _SparseRows(lengths, place[self.indices[inside]], self.values[inside])


def _concatenated(pieces: Sequence[_SparseRows]) -> _SparseRows:
    empty = _SparseRows(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    if not pieces:
        return empty
    return _SparseRows(*map(np.concatenate, zip(*pieces, strict=True)))


def _largest(p_BC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, in no order: indices and values [B, k]."""
    if k < p_BC.shape[1]:
        indices = np.argpartition(p_BC, p_BC.shape[1] - k, axis=1)[:, -k:]
    else:
        indices = np.broadcast_to(np.arange(p_BC.shape[1]), p_BC.shape)
    return indices, np.take_along_axis(p_BC, indices, 1)
