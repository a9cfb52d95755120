"""Stored soft targets as they lie on the disk, and as a student reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.files import damaged
from pipeline.store import read_json

from ..core.distillation import TopKTargets
from ..data.augment import Views
from ..data.kept_arrays import kept_npy
from ..data.ragged import RaggedRows
from ..data.shards import ShardSet
from ..data.streams import Batch, Source
from ..session import Session

SCHEMA = 3
FIXED = ("indices", "log_values", "log_tail")  # files of schemas 1 and 2: k classes in every row
VALUE = np.dtype(np.float16)


def index_dtype(num_classes: int) -> np.dtype:
    """The dtype of class indices: as few bytes as hold them."""
    return np.dtype(np.uint16 if num_classes <= 2**16 else np.int32)


def entry_dtypes(num_classes: int) -> dict[str, np.dtype]:
    """What is stored of each class that a row keeps."""
    return {"indices": index_dtype(num_classes), "log_values": VALUE}


class Stored(NamedTuple):
    """Rows as they lie on the disk.

    indices, log_values: [n, K, k], behind a row's own classes padding.  log_tail, counts: [n, K].
    """

    indices: np.ndarray
    log_values: np.ndarray
    log_tail: np.ndarray
    counts: np.ndarray


def stored_targets(
    directory: Path, session: Session, sources: Sequence[Source], views: Views | None
) -> Callable[[Batch], TopKTargets]:
    """A function batch -> TopKTargets [K, b, k] of the inputs of a stream's `sources`."""
    readers = [
        open_targets(directory / source.shards.split, session, source.shards, views)
        for source in sources
    ]
    count = views.count if views else 1

    def read(batch: Batch) -> TopKTargets:
        rows = (batch.ids * count + batch.view).numpy()
        origin = batch.source.numpy()
        places = [np.flatnonzero(origin == source) for source in range(len(readers))]
        parts = [reader(rows[here]) for reader, here in zip(readers, places, strict=True)]
        return restored(interleaved(parts, places), session.num_classes, batch.labels.device)

    return read


def interleaved(parts: Sequence[Stored], places: Sequence[np.ndarray]) -> Stored:
    """The rows of several sources in the order of a batch. places: where each source's stand."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.indices.shape[2] for part in parts)
    rows, members = sum(map(len, places)), parts[0].counts.shape[1]
    whole = Stored(
        np.zeros((rows, members, width), np.int64),
        np.full((rows, members, width), -np.inf, VALUE),
        np.empty((rows, members), VALUE),
        np.empty((rows, members), np.int64),
    )
    for part, here in zip(parts, places, strict=True):
        own = part.indices.shape[2]
        whole.indices[here, :, :own] = part.indices
        whole.log_values[here, :, :own] = part.log_values
        whole.log_tail[here] = part.log_tail
        whole.counts[here] = part.counts
    return whole


def restored(stored: Stored, num_classes: int, device: torch.device | str) -> TopKTargets:
    """Stored rows [n, K, ...] -> TopKTargets [K, n, ...].

    They are normalised again: float16 rounds logarithms by 5e-4 of them.
    """
    indices, values, tail, counts = (to_device(part, device).transpose(0, 1) for part in stored)
    values, tail = values.float(), tail.float()
    total = torch.cat([values, tail[..., None]], -1).logsumexp(-1)
    values, tail = values - total[..., None], tail - total
    if bool((stored.counts == stored.indices.shape[-1]).all()):
        return TopKTargets(indices.long(), values, tail, num_classes)
    return TopKTargets(indices.long(), values, tail, num_classes, counts.long())


def to_device(part: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The array on a device, for which the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(part))
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def open_targets(
    place: Path, session: Session, shards: ShardSet, views: Views | None
) -> Callable[[np.ndarray], Stored]:
    """A function rows -> what one split stores of them, which must be of these shards and views.

    rows: int64 [n], id * views + view.
    """
    notes = read_json(place / "answers.json")
    expected = (
        shards.fingerprint,
        session.num_classes,
        views.count if views else None,
        views.seed if views else None,
    )
    stored = (notes["fingerprint"], notes["num_classes"], notes["views"], notes["views_seed"])
    assert stored == expected, f"{place}: targets of {stored}, {expected} needed"
    if notes["schema"] < SCHEMA:
        return fixed_rows(place)
    return rows_by_mass(place, session.num_classes, notes["members"], _rows_of(shards, views))


def _rows_of(shards: ShardSet, views: Views | None) -> int:
    return len(shards) * (views.count if views else 1)


def fixed_rows(place: Path) -> Callable[[np.ndarray], Stored]:
    """What versions before schema 3 stored: k classes in every row, [N * views, K, k]."""
    kinds = dict(zip(FIXED, ("iu", "f", "f"), strict=True))
    shapes = ((None, None, None), (None, None, None), (None, None))
    files = [
        kept_npy(place / f"{name}.npy", kinds[name], shape)
        for name, shape in zip(FIXED, shapes, strict=True)
    ]

    def read(rows: np.ndarray) -> Stored:
        indices, log_values, log_tail = (array[rows] for array in files)
        counts = np.full(log_tail.shape, indices.shape[-1])
        return Stored(indices.astype(np.int64), log_values, log_tail, counts)

    return read


def rows_by_mass(
    place: Path, num_classes: int, members: int, count: int
) -> Callable[[np.ndarray], Stored]:
    """What Storing wrote of `count` rows."""
    ragged = RaggedRows(place, entry_dtypes(num_classes), ("log_tail",))
    if len(ragged) != count * members:
        raise damaged(place / "starts.npy", f"{len(ragged)} rows, of {count * members}")

    def read(rows: np.ndarray) -> Stored:
        of_members = (rows[:, None] * members + np.arange(members)).reshape(-1)
        counts, padded = ragged.padded(of_members, {"indices": 0, "log_values": -np.inf})
        if padded["indices"].max(initial=0) >= num_classes:
            raise damaged(place / "indices.bin", f"a class beyond the {num_classes}")
        shape = (len(rows), members)
        return Stored(
            padded["indices"].astype(np.int64).reshape(*shape, counts.max(initial=0)),
            padded["log_values"].reshape(*shape, counts.max(initial=0)),
            ragged.numbers["log_tail"][of_members].reshape(shape),
            counts.reshape(shape).astype(np.int64),
        )

    return read
