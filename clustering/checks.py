"""What a batch of predictions must be: B batch, C classes, k predictions of an example."""

import numpy as np


def checked_labels(labels: np.ndarray, batch: int, num_classes: int) -> np.ndarray:
    """labels [B] as int64. ValueError for another shape or type, or a label out of range."""
    if labels.shape != (batch,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}; "
            f"for {batch} predictions they must be integers [{batch}]"
        )
    labels = labels.astype(np.int64)
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        raise ValueError(
            f"label {outside[0]} is not in 0 ... {num_classes - 1}; "
            "num_classes or the labels are wrong"
        )
    return labels


def checked_probabilities(p_BC: np.ndarray, num_classes: int) -> np.ndarray:
    """p_BC as float64. ValueError unless its rows are distributions over num_classes classes."""
    if p_BC.shape[1] != num_classes:
        raise ValueError(
            f"probabilities have {p_BC.shape[1]} columns, the statistics {num_classes} classes"
        )
    p_BC = p_BC.astype(np.float64)
    _check_distributions(p_BC, lowest_sum=0.98)
    return p_BC


def checked_sparse(
    indices: np.ndarray, values: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices [B, k] as int64, values [B, k] as float64, 0 where the index is below 0.

    ValueError for shapes or types that disagree, an index out of range or twice in a row, and rows
    that are no part of a distribution.
    """
    if indices.shape != values.shape or indices.dtype.kind not in "iu":
        raise ValueError(
            f"indices are {indices.dtype} {indices.shape}, values {values.dtype} {values.shape}; "
            "both must be [batch, k], indices integers"
        )
    indices = indices.astype(np.int64)
    values = values.astype(np.float64)
    if indices.size and indices.max() >= num_classes:
        raise ValueError(
            f"index {indices.max()} is not below {num_classes}; "
            "num_classes or the indices are wrong"
        )
    values = np.where(indices < 0, 0.0, values)
    _check_distributions(values, lowest_sum=0.0)
    empty = ~(values > 0).any(axis=1)
    if empty.any():
        raise ValueError(f"row {np.argmax(empty)} of the predictions names no class with any mass")
    ordered = np.sort(indices, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        row, column = np.argwhere(repeated)[0]
        raise ValueError(
            f"row {row} names class {ordered[row, column]} twice; each of its k indices must differ"
        )
    return indices, values


def _check_distributions(p_Bk: np.ndarray, lowest_sum: float) -> None:
    """ValueError unless each row is finite, not negative and sums to lowest_sum ... 1.

    There is room for half precision.
    """
    sums = p_Bk.sum(axis=1)
    if not np.isfinite(sums).all():
        row = np.flatnonzero(~np.isfinite(sums))[0]
        raise ValueError(f"row {row} of the predictions holds NaN or infinity; look upstream")
    if p_Bk.size and p_Bk.min() < -1e-6:
        raise ValueError(
            f"the predictions hold {p_Bk.min():.4g}; "
            "probabilities are not negative, so apply softmax first"
        )
    wrong = np.flatnonzero((sums > 1.02) | (sums < lowest_sum))
    if wrong.size:
        raise ValueError(
            f"row {wrong[0]} of the predictions sums to {sums[wrong[0]]:.4g}; "
            "it should be 1: apply softmax first"
        )
