"""Low-dimensional columns that say which classes are confused with which.

C classes, N examples, r dimensions.
"""

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array

from .sparse import entries
from .statistics import PredictionStatistics

RANK = 128
RANK_OF_MANY = 64  # beyond MANY classes, where the sparse products would cost more than k-means
MANY = 10_000

Multiply = Callable[[np.ndarray], np.ndarray]  # x -> matrix @ x, for x [C, r]


def confusion_columns(confused: csr_array, rank: int | None = None, seed: int = 0) -> np.ndarray:
    """Unit columns of the affinity scaled by each class's own total, D^-1/2 A D^-1/2.

    Returns float32 [C, r], r = min(rank, C). Rank None is 128, or 64 beyond 10,000 classes. A class
    without any confusion is a row of zeros. Projected as in `covariance_columns`. See Ng, Jordan,
    Weiss 2002.

    This relates to the affinity as correlation does to covariance, but leaves a class's own
    variance out. That matters: the ones on the diagonal of a correlation matrix drown the small
    entries off it, and take up the leading dimensions.
    """
    totals = np.asarray(confused.sum(axis=1)).ravel().astype(np.float32)
    scale = _reciprocal(np.sqrt(totals))[:, None]

    def multiply(x: np.ndarray) -> np.ndarray:
        return scale * (confused @ (scale * x))

    return unit_rows(_projected_columns(multiply, len(totals), rank, seed))


def covariance_columns(
    statistics: PredictionStatistics, scaled: bool = True, rank: int | None = None, seed: int = 0
) -> np.ndarray:
    """The covariance's columns projected on its leading eigenvectors, float32 [C, r].

    r is as in `confusion_columns`. Distances between rows are those between columns, up to the
    dropped eigenvalues. scaled: columns of the correlation matrix, each row then of unit length. A
    class that never varies is a row of zeros. Otherwise the raw columns of Hinton et al. 2015,
    section 5.1. Beyond the exact limit no C x C array is built: P^T P x is P^T (P x), and the mean
    is a rank-one correction.
    """
    multiply, variance = _covariance(statistics)
    if not scaled:
        return _projected_columns(multiply, statistics.num_classes, rank, seed)
    # A variance at the level of rounding is none: scaled up, it would be noise of unit length.
    varies = variance > 1e-12 * max(variance.max(), 1e-300)
    deviation = np.sqrt(np.where(varies, variance, 0)).astype(np.float32)
    scale = _reciprocal(deviation)[:, None]

    def multiply_scaled(x: np.ndarray) -> np.ndarray:
        return scale * multiply(scale * x)

    return unit_rows(_projected_columns(multiply_scaled, statistics.num_classes, rank, seed))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their length, float32. Rows of (nearly) no length become zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    usable = lengths > 1e-6 * max(float(lengths.max(initial=0)), 1e-30)
    return np.divide(rows, lengths, out=np.zeros_like(rows, dtype=np.float32), where=usable)


def mutual_confusion(statistics: PredictionStatistics) -> csr_array:
    """The expected confusion both ways, symmetric float32 csr [C, C] with no diagonal.

    It needs no labels. An example adds p_i to the pair of class i and its most probable class: the
    mass that its top-1 error would be. The covariance's p_i p_j would also count pairs that no
    top-1 error joins.
    """
    expected = statistics.expected_confusion
    both = (expected + expected.T).tocoo()
    rows, columns = both.coords
    apart = rows != columns
    masses = both.data[apart].astype(np.float32)
    return csr_array((masses, (rows[apart], columns[apart])), shape=both.shape)


def affinity(mutual: csr_array) -> csr_array:
    """How likely unseen examples are to confuse two classes: (mass - its chance level) ** 1/4.

    It is 0 where the mass is below its chance level: what the totals of both classes would give
    without any preference, as in Newman's modularity. The root, because a sample shows most pairs
    of thousands of classes once or never, and a few of its examples make up most of the mass:
    groups of the mass itself are groups of those examples. Many small masses foretell the errors to
    come as well as a few large ones.
    """
    totals = np.asarray(mutual.sum(axis=1)).ravel()
    rows, columns, masses = entries(mutual)
    chance = totals[rows] * (totals[columns] / max(float(totals.sum()), 1e-30))
    fourth_roots = np.sqrt(np.sqrt(np.maximum(masses - chance, 0)))
    return csr_array((fourth_roots, columns, mutual.indptr), shape=mutual.shape)


def _projected_columns(
    multiply: Multiply, num_classes: int, rank: int | None, seed: int
) -> np.ndarray:
    """Columns of a symmetric matrix in the basis of its eigenvectors of largest modulus.

    Randomised subspace iteration: Halko, Martinsson, Tropp 2011.
    """
    if not rank:
        rank = RANK if num_classes <= MANY else RANK_OF_MANY
    rank = min(rank, num_classes)
    width = min(rank + 10, num_classes)
    basis = np.random.default_rng(seed).standard_normal((num_classes, width), dtype=np.float32)
    for _ in range(4):
        basis, _ = np.linalg.qr(multiply(basis))
    eigenvalues, rotation = np.linalg.eigh(basis.T @ multiply(basis))
    largest = np.argsort(-np.abs(eigenvalues))[:rank]
    return (basis @ rotation[:, largest]) * eigenvalues[largest].astype(np.float32)


def _covariance(statistics: PredictionStatistics) -> tuple[Multiply, np.ndarray]:
    """x -> covariance @ x for x [C, r], and the covariance's diagonal [C]."""
    if statistics.exact:
        covariance = statistics.covariance.astype(np.float32)
        return covariance.__matmul__, np.diagonal(covariance).astype(np.float64)
    predictions, n = statistics.predictions, statistics.num_examples
    mean = np.asarray(predictions.sum(axis=0, dtype=np.float64)).ravel() / n
    squared = predictions.data.astype(np.float64) ** 2
    squares = np.bincount(predictions.indices, squared, minlength=len(mean))
    transposed = predictions.T.tocsr()
    mean32 = mean.astype(np.float32)[:, None]

    def multiply(x: np.ndarray) -> np.ndarray:
        return (transposed @ (predictions @ x)) / np.float32(n) - mean32 * (mean32.T @ x)

    return multiply, squares / n - mean**2


def _reciprocal(values: np.ndarray) -> np.ndarray:
    """1 / values, and 0 where a value is 0."""
    return np.divide(1, values, out=np.zeros_like(values), where=values > 0)
