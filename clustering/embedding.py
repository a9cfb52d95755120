"""Columns of who is confused with whom, in few dimensions.

C classes, N examples, r dimensions.
"""

import numpy as np
from scipy.sparse import csr_array

RANK = 128
RANK_OF_MANY = 64  # beyond MANY classes, where the sparse products would cost more than k-means
MANY = 10_000


def confusion_columns(confused: csr_array, rank: int | None = None, seed: int = 0) -> np.ndarray:
    """Unit columns of the affinity scaled by each class's own total, D^-1/2 A D^-1/2: float32 [C, r].

    r = min(rank, C), rank None is 128, or 64 beyond 10,000 classes.
    What correlation is to covariance, but a class's own variance is not among the entries, which decides.
    On the diagonal of a correlation matrix the ones drown what little is off it, and take up the leading dimensions.
    A class without any confusion is a row of zeros.  Projected as in covariance_columns; see Ng, Jordan, Weiss 2002.
    """
    totals = np.asarray(confused.sum(axis=1)).ravel().astype(np.float32)
    scale = np.divide(1, np.sqrt(totals), out=np.zeros_like(totals), where=totals > 0)[:, None]
    return unit_rows(
        _projected_columns(lambda x: scale * (confused @ (scale * x)), len(totals), rank, seed)
    )


def covariance_columns(
    statistics, scaled: bool = True, rank: int | None = None, seed: int = 0
) -> np.ndarray:
    """The covariance's columns projected on its leading eigenvectors, float32 [C, r], r as above.

    scaled: of the correlation matrix, each row then of unit length; a class that never varies is a zero row.
    Else the raw columns of Hinton et al. 2015, section 5.1.  Distances between rows are those between columns, up to
    the dropped eigenvalues.  Beyond the exact limit no C x C array is built: P^T P x is P^T (P x), the mean rank one.
    """
    multiply, variance = _covariance(statistics)
    if not scaled:
        return _projected_columns(multiply, statistics.num_classes, rank, seed)
    # A variance at the level of rounding is none: scaled up, it would be noise of unit length.
    deviation = np.sqrt(
        np.where(variance > 1e-12 * max(variance.max(), 1e-300), variance, 0)
    ).astype(np.float32)
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)[:, None]
    return unit_rows(
        _projected_columns(
            lambda x: scale * multiply(scale * x), statistics.num_classes, rank, seed
        )
    )


def _projected_columns(multiply, num_classes: int, rank: int | None, seed: int) -> np.ndarray:
    """Columns of a symmetric matrix, given as x -> matrix @ x, in the basis of its eigenvectors of largest modulus.

    Randomised subspace iteration: Halko, Martinsson, Tropp 2011.
    """
    rank = min(rank or (RANK if num_classes <= MANY else RANK_OF_MANY), num_classes)
    width = min(rank + 10, num_classes)
    basis = np.random.default_rng(seed).standard_normal((num_classes, width), dtype=np.float32)
    for _ in range(4):
        basis, _ = np.linalg.qr(multiply(basis))
    eigenvalues, rotation = np.linalg.eigh(basis.T @ multiply(basis))
    largest = np.argsort(-np.abs(eigenvalues))[:rank]
    return (basis @ rotation[:, largest]) * eigenvalues[largest].astype(np.float32)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their length, float32; rows of (nearly) no length become zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    usable = lengths > 1e-6 * max(float(lengths.max(initial=0)), 1e-30)
    return np.divide(rows, lengths, out=np.zeros_like(rows, dtype=np.float32), where=usable)


def mutual_confusion(statistics) -> csr_array:
    """The expected confusion both ways, symmetric csr float32 [C, C] with no diagonal; needs no labels.

    An example adds p_i to the pair of class i and its most probable class: the mass that its top-1 error would be,
    where the covariance's p_i p_j also counts pairs that no top-1 error joins.
    """
    expected = statistics.expected_confusion
    both = (expected + expected.T).tocoo()
    rows, columns = both.coords
    apart = rows != columns
    return csr_array(
        (both.data[apart].astype(np.float32), (rows[apart], columns[apart])), shape=both.shape
    )


def affinity(mutual: csr_array) -> csr_array:
    """How likely two classes are to be confused by examples not seen yet: (mass - its chance level) ** 1/4, or 0.

    The chance level is what the totals of both classes would give without any preference, as in Newman's modularity.
    The root, because a sample shows most pairs of thousands of classes once or never, and a few of its examples make up
    most of the mass: groups of the mass itself are groups of those examples.  Many small masses foretell as well.
    """
    totals = np.asarray(mutual.sum(axis=1)).ravel()
    rows = np.repeat(np.arange(mutual.shape[0]), np.diff(mutual.indptr))
    chance = totals[rows] * (totals[mutual.indices] / max(float(totals.sum()), 1e-30))
    evened = np.sqrt(np.sqrt(np.maximum(mutual.data - chance, 0)))
    return csr_array((evened, mutual.indices, mutual.indptr), shape=mutual.shape)


def _covariance(statistics):
    """x -> covariance @ x for x [C, r], and the covariance's diagonal [C]."""
    if statistics.exact:
        covariance = statistics.covariance.astype(np.float32)
        return (lambda x: covariance @ x), np.diagonal(covariance).astype(np.float64)
    predictions, n = statistics.predictions, statistics.num_examples
    mean = np.asarray(predictions.sum(axis=0, dtype=np.float64)).ravel() / n
    squares = np.bincount(
        predictions.indices, predictions.data.astype(np.float64) ** 2, minlength=len(mean)
    )
    transposed = predictions.T.tocsr()
    mean32 = mean.astype(np.float32)[:, None]

    def multiply(x):
        return (transposed @ (predictions @ x)) / np.float32(n) - mean32 * (mean32.T @ x)

    return multiply, squares / n - mean**2
