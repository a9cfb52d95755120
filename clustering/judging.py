"""What groups of classes capture, and what specialists for them could gain."""

import numpy as np
from scipy.sparse import csr_array

from .groups import ClassGroups

_BLOCK_ENTRIES = 2**22


def captured_confusion(groups: ClassGroups, confusion) -> tuple[float, float]:
    """Share of the errors whose true and predicted class share a group, and its chance level.

    confusion: [C, C] counts or masses, true class x predicted class, sparse or dense; the diagonal is not read.
    `statistics.confusion` judges with labels, `statistics.expected_confusion` without.
    Chance is the mean share over random relabellings of the classes: the same sizes, the same overlap.
    Without errors the share is nan.
    """
    confusion = _as_csr(confusion, groups).tocoo()
    rows, columns = confusion.coords
    errors = (rows != columns) & (confusion.data != 0)
    rows, columns, masses = rows[errors], columns[errors], confusion.data[errors]
    membership = groups.membership().astype(np.int32)
    captured = 0.0
    for start in range(0, len(rows), _BLOCK_ENTRIES):
        block = slice(start, start + _BLOCK_ENTRIES)
        shared = membership[rows[block]].multiply(membership[columns[block]]).sum(axis=1) > 0
        captured += float(masses[block][shared].sum())
    total = float(masses.sum())
    return (captured / total if total else float("nan")), _chance(groups)


def captured_unlabelled(groups: ClassGroups, statistics) -> tuple[float, float]:
    """captured_confusion of the errors that the predictions themselves expect; needs no labels."""
    return captured_confusion(groups, statistics.expected_confusion)


def forecast(groups: ClassGroups, statistics) -> list[dict]:
    """What a perfect specialist for each group could heal, in shares of all examples.

    Per group: "classes" |S|; "examples" with a label in S; "errors_inside", those whose most probable class is a wrong
    one of S; "gain" = errors_inside / examples with any label; "gain_unlabelled", the same as the predictions expect.
    Without labels the three that need them are None.  Gains of overlapping groups may count an error twice.
    """
    labelled, n = statistics.num_labelled, statistics.num_examples
    inside, examples = _inside(groups, statistics.confusion)
    expected, _ = _inside(groups, statistics.expected_confusion)
    return [
        {
            "classes": int(groups.sizes[g]),
            "examples": round(float(examples[g])) if labelled else None,
            "errors_inside": round(float(inside[g])) if labelled else None,
            "gain": float(inside[g]) / labelled if labelled else None,
            "gain_unlabelled": float(expected[g]) / n if n else 0.0,
        }
        for g in range(len(groups))
    ]


def forecast_table(rows: list[dict], skipped=(), most: int = 40) -> list[str]:
    """A forecast as lines of text, the group most worth a job first; beyond `most` groups the rest is one line.

    rows: what forecast returned; without labels the order is of "gain_unlabelled".  skipped: groups that get no job.
    """
    labelled = rows[0]["gain"] is not None
    order = sorted(
        range(len(rows)), key=lambda g: -rows[g]["gain" if labelled else "gain_unlabelled"]
    )
    lines = ["group  classes  examples  errors inside  gain at most  expected"]
    for g in order[:most]:
        row = rows[g]
        counts = [f"{row[key]:,}" if labelled else "-" for key in ("examples", "errors_inside")]
        gains = f"{row['gain']:.2%}" if labelled else "-", f"{row['gain_unlabelled']:.2%}"
        line = f"{g:5d}  {row['classes']:7,}  {counts[0]:>8}  {counts[1]:>13}  {gains[0]:>12}  {gains[1]:>8}"
        lines.append(line + ("  skipped" if g in skipped else ""))
    rest = order[most:]
    if rest:
        best = max(rows[g]["gain" if labelled else "gain_unlabelled"] for g in rest)
        left_out = len(set(rest) & set(skipped))
        lines.append(
            f"... and {len(rest):,} more of at most {best:.2%} each, {left_out:,} of them skipped"
        )
    return lines


def _inside(groups: ClassGroups, confusion) -> tuple[np.ndarray, np.ndarray]:
    """Per group [G]: mass of errors with both classes inside, and mass of everything whose true class is inside."""
    confusion = _as_csr(confusion, groups).astype(np.float64)
    membership = groups.membership().astype(np.float64)
    truths = membership.T @ confusion.sum(axis=1)
    errors = confusion - _diagonal(confusion)
    return np.asarray((errors @ membership).multiply(membership).sum(axis=0)).ravel(), np.asarray(
        truths
    ).ravel()


def _diagonal(matrix: csr_array) -> csr_array:
    indices = np.arange(matrix.shape[0])
    return csr_array((matrix.diagonal(), (indices, indices)), shape=matrix.shape)


def _chance(groups: ClassGroups) -> float:
    """Share of the unordered pairs of classes that have a group in common.

    Classes with the same memberships behave alike, so pairs of membership patterns are counted, not pairs of classes.
    """
    num_classes = groups.num_classes
    if num_classes < 2:
        return float("nan")
    membership = groups.membership()
    patterns, counts = _patterns(membership)
    pairs = float((counts * (counts - 1)).sum())  # ordered, inside one pattern
    block = max(1, _BLOCK_ENTRIES // max(1, int(groups.sizes.max())))
    transposed = patterns.T.tocsr()
    for start in range(0, patterns.shape[0], block):
        met = (patterns[start : start + block] @ transposed).tocoo()
        i, j = met.coords
        i = i + start
        pairs += float((counts[i] * counts[j])[i != j].sum())
    return pairs / (num_classes * (num_classes - 1))


def _patterns(membership: csr_array) -> tuple[csr_array, np.ndarray]:
    """The distinct non-empty rows of a bool csr [C, G], as int32 csr [K, G], and how often each occurs, float64 [K]."""
    membership.sort_indices()
    lengths = np.diff(membership.indptr)
    pieces, counts = [], []
    for length in np.unique(lengths[lengths > 0]):
        starts = membership.indptr[:-1][lengths == length]
        rows, count = np.unique(
            membership.indices[starts[:, None] + np.arange(length)], axis=0, return_counts=True
        )
        pieces.append(rows)
        counts.append(count)
    lengths = np.concatenate([np.full(len(rows), rows.shape[1]) for rows in pieces])
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.concatenate([rows.ravel() for rows in pieces])
    shape = (len(lengths), membership.shape[1])
    return csr_array(
        (np.ones(len(indices), np.int32), indices, pointers), shape=shape
    ), np.concatenate(counts).astype(float)


def _as_csr(confusion, groups: ClassGroups) -> csr_array:
    confusion = csr_array(confusion)
    if confusion.shape != (groups.num_classes,) * 2:
        raise ValueError(
            f"the confusion is {confusion.shape}, the groups are of {groups.num_classes} classes"
        )
    return confusion
