"""What a classifier's predictions say about its classes, as sums that merge: B batch, C classes, k kept predictions."""

import os
import uuid
import zipfile
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

SCHEMA = 1
DENSE_BYTES = 2**30  # the one C x C array, float64: C up to 11,585
EXPECTED_TOP_K = (
    32  # predictions per example that the expected confusion keeps where the covariance is exact
)
TOP_K = 10  # kept per example, where C is beyond the limit and the caller names no number
_COMPACT_ENTRIES = 2**22


class PredictionStatistics:
    """Streaming, mergeable statistics of predicted distributions over num_classes classes.

    top_k None: while C x C float64 fits DENSE_BYTES the second moment sum p p^T is exact; beyond it top_k becomes 10.
    top_k k: each example's k largest predictions are kept as they are (8 k bytes an example), their tail mass beside.
    Both: the mean, the confusion counts of the examples with labels, and the expected confusion, which needs no labels.
    Sums in another order or split are the same to rounding.
    """

    def __init__(self, num_classes: int, top_k: int | None = None):
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        if top_k is not None and top_k < 1:
            raise ValueError(
                f"top_k is {top_k}; keep at least 1 prediction per example, or None for the exact covariance"
            )
        self.num_classes = int(num_classes)
        if top_k is None and 8 * self.num_classes**2 > DENSE_BYTES:
            top_k = TOP_K
        self.top_k = None if top_k is None else min(int(top_k), self.num_classes)
        self.num_examples = 0
        self.num_labelled = 0
        self._probability_sum = np.zeros(self.num_classes)
        self._tail_sum = 0.0
        self._second_moment = np.zeros((self.num_classes,) * 2) if self.top_k is None else None
        self._rows: list[
            tuple
        ] = []  # (lengths [B], indices [nnz], values [nnz]), the sparse predictions
        self._expected = _CountMatrix(self.num_classes, np.float64)
        self._confusion = _CountMatrix(self.num_classes, np.int64)

    @property
    def exact(self) -> bool:
        """Whether the second moment is held as one exact C x C array."""
        return self.top_k is None

    def update(self, predictions, values=None, labels=None) -> None:
        """Add a batch: update(probabilities [B, C], labels=None) or update(indices [B, k], values [B, k], labels=None).

        Tensors or arrays; labels [B] may also come second, after probabilities.  An index below 0 pads a short row.
        Raises ValueError for what is no distribution (NaN, negative, rows that sum to something else), for shapes that
        disagree and for a label or index out of range; the statistics are then unchanged.
        """
        predictions = _as_array(predictions)
        values = None if values is None else _as_array(values)
        if values is not None and values.ndim == 1 and labels is None:
            values, labels = None, values
        if predictions.ndim != 2:
            raise ValueError(
                f"predictions have shape {predictions.shape}; they must be [batch, classes] or [batch, k]"
            )
        labels = (
            None if labels is None else self._checked_labels(_as_array(labels), len(predictions))
        )
        if values is None:
            self._add_dense(self._checked_probabilities(predictions), labels)
        else:
            self._add_sparse(*self._checked_sparse(predictions, values), labels)

    def merge(self, other: "PredictionStatistics") -> "PredictionStatistics":
        """Add another's sums to these, leave it as it is, and return self."""
        if (self.num_classes, self.top_k) != (other.num_classes, other.top_k):
            raise ValueError(
                f"statistics of {other.num_classes} classes with top_k {other.top_k} do not merge into "
                f"{self.num_classes} classes with top_k {self.top_k}; gather both with the same arguments"
            )
        self.num_examples += other.num_examples
        self.num_labelled += other.num_labelled
        self._probability_sum = self._probability_sum + other._probability_sum
        self._tail_sum += other._tail_sum
        if self.exact:
            self._second_moment = self._second_moment + other._second_moment
        self._rows = self._rows + other._rows
        self._expected.add_matrix(other._expected.matrix())
        self._confusion.add_matrix(other._confusion.matrix())
        return self

    @property
    def frequency(self) -> np.ndarray:
        """Mean predicted probability of each class, [C], sums to 1; the tail of a top-k row is spread evenly."""
        return self._probability_sum / max(self.num_examples, 1)

    @property
    def tail(self) -> float:
        """Mean probability mass outside the kept top k; 0 where the covariance is exact."""
        return self._tail_sum / max(self.num_examples, 1)

    @property
    def confusion(self) -> csr_array:
        """Examples with labels, counted by true class (rows) and most probable class (columns); int64 csr [C, C]."""
        return self._confusion.matrix()

    @property
    def expected_confusion(self) -> csr_array:
        """What `confusion` would be if the predictions were right about themselves; float64 csr [C, C].

        Row i, column j: the mass given to class i, summed over the examples whose most probable class is j.
        Only each example's largest predictions count: top_k of them, or 32 where the covariance is exact.
        """
        return self._expected.matrix()

    @property
    def predictions(self) -> csr_array:
        """The kept predictions, float32 csr [examples, C], as they came; ValueError where they are not kept."""
        if self.exact:
            raise ValueError(
                "these statistics hold the exact covariance and no predictions; gather them with top_k=10"
            )
        lengths, indices, values = _concatenated(self._rows)
        pointers = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return csr_array((values, indices, pointers), shape=(self.num_examples, self.num_classes))

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of the predictions (of those kept), float64 [C, C]; ValueError beyond the memory limit."""
        if 8 * self.num_classes**2 > DENSE_BYTES:
            raise ValueError(
                f"a covariance of {self.num_classes} classes is above the limit of {DENSE_BYTES >> 20} MiB; "
                "use .predictions and their mean instead"
            )
        n = max(self.num_examples, 1)
        if self.exact:
            mean, second = self.frequency, self._second_moment
        else:
            predictions = self.predictions.astype(np.float64)
            mean, second = predictions.sum(axis=0) / n, (predictions.T @ predictions).toarray()
        covariance = second / n
        covariance -= np.outer(mean, mean)
        return covariance

    def save(self, path) -> None:
        """Write one .npz without pickles, at `path` as it is, no suffix added; the file appears whole or never."""
        path = Path(path)
        arrays = {
            "schema": SCHEMA,
            "num_classes": self.num_classes,
            "top_k": -1 if self.exact else self.top_k,
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
            arrays |= dict(
                zip(
                    ("row_lengths", "row_indices", "row_values"),
                    _concatenated(self._rows),
                    strict=True,
                )
            )
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path) -> "PredictionStatistics":
        """Read what save wrote.  Raises ValueError if it is no such file or another version's."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except (zipfile.BadZipFile, ValueError, EOFError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path} is no statistics file ({error}); gather the statistics again"
            ) from None
        if "schema" not in arrays or int(arrays["schema"]) != SCHEMA:
            found = int(arrays["schema"]) if "schema" in arrays else "none"
            raise ValueError(
                f"{path} has schema {found}, this version reads {SCHEMA}; gather the statistics again"
            )
        try:
            return cls._from_arrays(arrays)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{path} is a damaged statistics file ({error}); gather the statistics again"
            ) from None

    @classmethod
    def _from_arrays(cls, arrays: dict) -> "PredictionStatistics":
        top_k = int(arrays["top_k"])
        statistics = cls.__new__(cls)
        statistics.num_classes = int(arrays["num_classes"])
        statistics.top_k = None if top_k < 0 else top_k
        statistics.num_examples = int(arrays["num_examples"])
        statistics.num_labelled = int(arrays["num_labelled"])
        statistics._probability_sum = arrays["probability_sum"]
        statistics._tail_sum = float(arrays["tail_sum"])
        statistics._second_moment = arrays["second_moment"] if top_k < 0 else None
        statistics._rows = []
        if top_k >= 0 and len(arrays["row_lengths"]):
            statistics._rows = [
                (arrays["row_lengths"], arrays["row_indices"], arrays["row_values"])
            ]
        statistics._expected = _CountMatrix.from_arrays(
            arrays, "expected", statistics.num_classes, np.float64
        )
        statistics._confusion = _CountMatrix.from_arrays(
            arrays, "confusion", statistics.num_classes, np.int64
        )
        return statistics

    def _add_dense(self, p_BC: np.ndarray, labels) -> None:
        kept = self.top_k or min(EXPECTED_TOP_K, self.num_classes)
        indices, values = _top(p_BC, kept)
        if not self.exact:
            return self._add_sparse(indices, values, labels)
        self._probability_sum += p_BC.sum(axis=0)
        self._second_moment += p_BC.T @ p_BC
        self._count(indices, values, labels)

    def _add_sparse(self, indices: np.ndarray, values: np.ndarray, labels) -> None:
        if self.exact:
            raise ValueError(
                f"top-k predictions were given to statistics of the exact covariance; "
                f"gather them with PredictionStatistics({self.num_classes}, top_k={indices.shape[1]})"
            )
        if indices.shape[1] > self.top_k:
            largest = np.argpartition(-values, self.top_k - 1, axis=1)[:, : self.top_k]
            indices, values = (
                np.take_along_axis(indices, largest, 1),
                np.take_along_axis(values, largest, 1),
            )
        present = (indices >= 0) & (values > 0)
        lengths = present.sum(axis=1)
        flat_indices, flat_values = (
            indices[present].astype(np.int32),
            values[present].astype(np.float32),
        )
        tails = np.clip(1 - values.sum(axis=1), 0, None)
        others = self.num_classes - lengths
        spread = np.where(others > 0, tails / np.maximum(others, 1), 0)
        tail_taken = np.bincount(
            flat_indices, np.repeat(spread, lengths), minlength=self.num_classes
        )
        masses = np.bincount(flat_indices, flat_values, minlength=self.num_classes)
        self._probability_sum += masses + spread.sum() - tail_taken
        self._tail_sum += float(tails.sum())
        self._rows.append((lengths.astype(np.int32), flat_indices, flat_values))
        self._count(indices, values, labels)

    def _count(self, indices: np.ndarray, values: np.ndarray, labels) -> None:
        """Add a batch to both confusions; indices, values [B, k], padded with -1 and 0."""
        self.num_examples += len(indices)
        if not len(indices):
            return
        # Of classes that tie for the first place the lowest, as argmax has it: the order of the k must not matter.
        first = values == values.max(axis=1, keepdims=True)
        predicted = np.where(first, indices, self.num_classes).min(axis=1, keepdims=True)
        present = (indices >= 0) & (values > 0)
        columns = np.broadcast_to(predicted, indices.shape)[present]
        self._expected.add(indices[present], columns, values[present])
        if labels is not None:
            self.num_labelled += len(labels)
            self._confusion.add(labels, predicted[:, 0], np.ones(len(labels), dtype=np.int64))

    def _checked_labels(self, labels: np.ndarray, batch: int) -> np.ndarray:
        if labels.shape != (batch,) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels are {labels.dtype} {labels.shape}; for {batch} predictions they must be integers [{batch}]"
            )
        labels = labels.astype(np.int64)
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if outside.size:
            raise ValueError(
                f"label {outside[0]} is not in 0 ... {self.num_classes - 1}; num_classes or the labels are wrong"
            )
        return labels

    def _checked_probabilities(self, p_BC: np.ndarray) -> np.ndarray:
        if p_BC.shape[1] != self.num_classes:
            raise ValueError(
                f"probabilities have {p_BC.shape[1]} columns, the statistics {self.num_classes} classes"
            )
        p_BC = p_BC.astype(np.float64)
        _check_distributions(p_BC, lowest_sum=0.98)
        return p_BC

    def _checked_sparse(
        self, indices: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if indices.shape != values.shape or indices.dtype.kind not in "iu":
            raise ValueError(
                f"indices are {indices.dtype} {indices.shape}, values {values.dtype} {values.shape}; "
                "both must be [batch, k], indices integers"
            )
        indices, values = indices.astype(np.int64), values.astype(np.float64)
        if indices.size and indices.max() >= self.num_classes:
            raise ValueError(
                f"index {indices.max()} is not below {self.num_classes}; num_classes or the indices are wrong"
            )
        values = np.where(indices < 0, 0.0, values)
        _check_distributions(values, lowest_sum=0.0)
        if len(values) and not (values > 0).any(axis=1).all():
            raise ValueError(
                f"row {np.argmin((values > 0).any(axis=1))} of the predictions names no class with any mass"
            )
        ordered = np.sort(indices, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if twice.any():
            row, column = np.argwhere(twice)[0]
            raise ValueError(
                f"row {row} names class {ordered[row, column]} twice; each of its k indices must differ"
            )
        return indices, values


class _CountMatrix:
    """A sparse C x C sum that grows by (row, column, weight) triples."""

    def __init__(self, num_classes: int, dtype):
        self._sum = csr_array((num_classes, num_classes), dtype=dtype)
        self._pending: list[tuple] = []
        self._num_pending = 0

    def add(self, rows, columns, weights) -> None:
        self._pending.append(
            (rows.astype(np.int32), columns.astype(np.int32), weights.astype(self._sum.dtype))
        )
        self._num_pending += len(rows)
        if self._num_pending > max(_COMPACT_ENTRIES, self._sum.nnz):
            self.matrix()

    def add_matrix(self, matrix: csr_array) -> None:
        self._sum = (self.matrix() + matrix).tocsr()

    def matrix(self) -> csr_array:
        if self._pending:
            rows, columns, weights = _concatenated(self._pending)
            pending = csr_array((weights, (rows, columns)), shape=self._sum.shape)
            self._sum = (self._sum + pending).tocsr()
            self._pending, self._num_pending = [], 0
        return self._sum

    def arrays(self, name: str) -> dict:
        matrix = self.matrix()
        return {
            f"{name}_data": matrix.data,
            f"{name}_indices": matrix.indices,
            f"{name}_indptr": matrix.indptr,
        }

    @classmethod
    def from_arrays(cls, arrays: dict, name: str, num_classes: int, dtype) -> "_CountMatrix":
        counts = cls(num_classes, dtype)
        parts = tuple(arrays[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
        counts._sum = csr_array(parts, shape=(num_classes, num_classes))
        return counts


def _as_array(tensor) -> np.ndarray:
    """A tensor on any device, or anything array-like, as a numpy array."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) in ("torch.bfloat16", "torch.float16"):
            tensor = tensor.float()
        return tensor.numpy()
    return np.asarray(tensor)


def _check_distributions(p_Bk: np.ndarray, lowest_sum: float) -> None:
    """ValueError unless each row is finite, not negative and sums to lowest_sum ... 1, with room for half precision."""
    sums = p_Bk.sum(axis=1)
    if not np.isfinite(sums).all():
        raise ValueError(
            f"row {np.flatnonzero(~np.isfinite(sums))[0]} of the predictions holds NaN or infinity; look upstream"
        )
    if p_Bk.size and p_Bk.min() < -1e-6:
        raise ValueError(
            f"the predictions hold {p_Bk.min():.4g}; probabilities are not negative, so apply softmax first"
        )
    wrong = np.flatnonzero((sums > 1.02) | (sums < lowest_sum))
    if wrong.size:
        raise ValueError(
            f"row {wrong[0]} of the predictions sums to {sums[wrong[0]]:.4g}; it should be 1: apply softmax first"
        )


def _top(p_BC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, in no order: indices and values [B, k]."""
    if k < p_BC.shape[1]:
        indices = np.argpartition(p_BC, p_BC.shape[1] - k, axis=1)[:, -k:]
    else:
        indices = np.broadcast_to(np.arange(p_BC.shape[1]), p_BC.shape)
    return indices, np.take_along_axis(p_BC, indices, 1)


def _concatenated(pieces: list[tuple]) -> tuple:
    if not pieces:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    return tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))
