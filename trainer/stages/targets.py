"""Stored soft targets: per sample (and view) the teacher's k most probable classes.

A teacher that always sees an input alike predicts it once.  Kept are the k largest
log-probabilities and the mass of the rest: a few hundred bytes a sample whatever the number of
classes.  The rest's mass is taken to be even over the other classes, at any temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.store import Attempt, Stage, read_json, write_json

from ..core.distillation import TopKTargets
from ..core.probabilities import safe_log, soften
from ..data.augment import Augment, Views
from ..data.streams import Batch, Source
from ..session import Session
from .teachers import Teacher, find_teacher

KEPT = 32  # classes per stored prediction
FAR = 0.1  # nats: what is kept is no longer what the teacher predicts
SCHEMA = 2
FILES = ("indices", "log_values", "log_tail")


def targets(session: Session, stage: Stage, name: str) -> None:
    """A teacher's predictions of what is always seen alike, once for all its students."""
    readers = [
        student
        for key, student in session.config.students.items()
        if (of_student := session.run.targets_for(key)) and of_student.place == stage.place
    ]
    temperatures = {1.0, *(student.temperature for student in readers)} - {math.inf}
    student = readers[0]
    with session.attempt(stage) as attempt:
        store_targets(
            session,
            find_teacher(session, student),
            attempt,
            session.run.augment_of(student),
            views_of(session, student.views),
            sorted(temperatures),
        )


def views_of(session: Session, count: int | None) -> Views | None:
    return None if count is None else Views(count, session.seed("views", 0))


def compress(probabilities: Tensor, k: int) -> dict[str, Tensor]:
    """[K, B, C] -> int32 indices, float16 log_values [B, K, k], float16 log_tail [B, K]."""
    kept = TopKTargets.of(safe_log(probabilities).transpose(0, 1), k)
    return {
        "indices": kept.indices.int(),
        "log_values": kept.log_values.half(),
        "log_tail": kept.log_tail.half(),
    }


def decompress(
    indices: np.ndarray, log_values: np.ndarray, log_tail: np.ndarray, num_classes: int, device
) -> TopKTargets:
    """Stored rows [B, K, ...] -> TopKTargets [K, B, ...].

    They are normalised again: float16 rounds logarithms by 5e-4 of them.
    """
    stored = [np.ascontiguousarray(part) for part in (indices, log_values, log_tail)]
    tensors = [torch.from_numpy(part).to(device).transpose(0, 1) for part in stored]
    values, tail = tensors[1].float(), tensors[2].float()
    total = torch.cat([values, tail[..., None]], -1).logsumexp(-1)
    return TopKTargets(tensors[0].long(), values - total[..., None], tail - total, num_classes)


def store_targets(
    session: Session,
    teacher: Teacher,
    attempt: Attempt,
    augment: str,
    views: Views | None,
    temperatures: Sequence[float],
) -> None:
    """SPLIT/{indices,log_values,log_tail}.npy for train and transfer, [N * views, K, ...].

    Row id * views + view.  answers.json says of what: the shards' fingerprint, the views' seed,
    and what was lost by keeping k classes: the mean KL(prediction || what is kept of it), nats,
    at each of `temperatures`.
    """
    splits = ["train"]
    if session.config.data.transfer:
        splits.append("transfer")
    for source, split in enumerate(splits):
        parts = []
        for view in range(views.count if views else 1):
            see = view_of(session.augmentation(augment), views, source, view)
            measure = compressing(session, teacher, see, temperatures)
            parts.append(session.measured(session.shards(split), measure))
        if session.ranks.is_main:
            notes = write_targets(session, attempt, split, parts, temperatures)
            notes |= {
                "augment": augment,
                "views": views.count if views else None,
                "views_seed": views.seed if views else None,
            }
            write_json(attempt.path(f"{split}/answers.json"), notes)
            say_targets(session, split, notes)


def view_of(
    augmentation: Augment | None, views: Views | None, source: int, view: int
) -> Callable[[Batch], Tensor]:
    """A function batch -> its inputs as the teacher sees them in this view."""
    if augmentation is None or views is None:
        return lambda batch: batch.inputs

    def see(batch: Batch) -> Tensor:
        ids = batch.ids.cpu().numpy()
        same = np.full_like(ids, view)
        uniforms = views.uniforms(source, ids, same, augmentation.numbers)
        seen = augmentation(batch.inputs.cpu().numpy(), uniforms)
        return torch.from_numpy(seen).to(batch.inputs.device)

    return see


def compressing(
    session: Session,
    teacher: Teacher,
    see: Callable[[Batch], Tensor],
    temperatures: Sequence[float],
) -> Callable[[Batch], dict[str, Tensor]]:
    """A function batch -> what is kept of the teacher's predictions, and what that loses."""

    def measure(batch: Batch) -> dict[str, Tensor]:
        raw = see(batch)
        predicted = teacher.predict(raw)
        stored = compress(predicted, KEPT)
        indices, log_values, log_tail = (stored[name].cpu().numpy() for name in FILES)
        kept = decompress(indices, log_values, log_tail, session.num_classes, raw.device)
        lost = [mean_kl(soften(predicted, T), soften(kept.spread(), T)) for T in temperatures]
        return stored | {"lost": torch.stack(lost, 1)}

    return measure


def mean_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of [K, B, C] twice, mean over K: [B], nats."""
    tiny = torch.finfo(q.dtype).tiny
    return (torch.special.xlogy(p, p) - p * q.clamp_min(tiny).log()).sum(-1).mean(0)


def write_targets(
    session: Session,
    attempt: Attempt,
    split: str,
    parts: list[dict[str, np.ndarray]],
    temperatures: Sequence[float],
) -> dict:
    """Write a split's arrays, one part for each view; returns what answers.json says."""
    shards, views = session.shards(split), len(parts)
    size = 0
    for name in FILES:
        first = parts[0][name]
        shape = first.shape[1:]
        # Corrupt samples stay 0: no stream has them.
        rows = np.zeros(
            (len(shards), views, *shape), stored_dtype(name, first, session.num_classes)
        )
        for view, part in enumerate(parts):
            rows[part["ids"], view] = part[name]
        size += rows.nbytes
        path = attempt.path(f"{split}/{name}.npy")
        np.save(path, rows.reshape(-1, *shape), allow_pickle=False)
    tails = np.exp(np.concatenate([part["log_tail"] for part in parts]).astype(np.float64))
    lost = np.concatenate([part["lost"] for part in parts]).mean(0, dtype=np.float64)
    return {
        "schema": SCHEMA,
        "num_classes": session.num_classes,
        "members": parts[0]["indices"].shape[1],
        "k": parts[0]["indices"].shape[2],
        "samples": len(parts[0]["ids"]),
        "fingerprint": shards.fingerprint,
        "mean_tail": float(tails.mean()),
        "max_tail": float(tails.max()),
        "bytes_per_sample": size / len(shards),
        "truncation_kl": {
            f"{T:g}": float(value) for T, value in zip(temperatures, lost, strict=True)
        },
    }


def stored_dtype(name: str, values: np.ndarray, num_classes: int) -> np.dtype:
    """Class indices in as few bytes as hold them; other values as they are."""
    if name != "indices":
        return values.dtype
    return np.dtype(np.uint16 if num_classes <= 2**16 else np.int32)


def say_targets(session: Session, split: str, notes: dict) -> None:
    kl = ", ".join(f"{value:.2g} at T = {T}" for T, value in notes["truncation_kl"].items())
    session.say(
        "stored targets on %s: top %d of %d classes, %.0f bytes a sample, mean mass left out %.2g; "
        "KL from the whole prediction %s",
        split,
        notes["k"],
        session.num_classes,
        notes["bytes_per_sample"],
        notes["mean_tail"],
        kl,
    )
    for line in warnings(notes):
        session.say("%s", line)


def warnings(notes: dict) -> list[str]:
    """A line for each temperature at which what is kept is FAR from the whole prediction.

    notes: of answers.json.  A temperature raises what is rare: an even tail of 1e-3 over 3,000
    classes holds .63 of all at T = 2.
    """
    return [
        f"warning: at T = {T} what is kept of the {notes['num_classes']:,} classes is "
        f"{lost:.2g} nats from what the teacher predicts; let students learn at temperature 1, "
        "where the tail keeps its mass"
        for T, lost in notes["truncation_kl"].items()
        if lost > FAR and T != "1"
    ]


def stored_targets(
    directory: Path, session: Session, sources: Sequence[Source], views: Views | None
) -> Callable[[Batch], TopKTargets]:
    """A function batch -> TopKTargets [K, b, k] of the inputs of a stream's `sources`."""
    files = [open_targets(directory, session, source, views) for source in sources]
    count = views.count if views else 1

    def read(batch: Batch) -> TopKTargets:
        rows = (batch.ids * count + batch.view).cpu().numpy()
        origin = batch.source.cpu().numpy()
        parts = [np.empty((len(rows), *array.shape[1:]), array.dtype) for array in files[0]]
        for source, arrays in enumerate(files):
            here = np.flatnonzero(origin == source)
            for part, array in zip(parts, arrays, strict=True):
                part[here] = array[rows[here]]
        indices, log_values, log_tail = parts
        device = batch.labels.device
        wide = indices.astype(np.int64)
        return decompress(wide, log_values, log_tail, session.num_classes, device)

    return read


def open_targets(
    directory: Path, session: Session, source: Source, views: Views | None
) -> list[np.ndarray]:
    """The memory-mapped arrays of one split, which must be of these shards and views."""
    place = directory / source.shards.split
    notes = read_json(place / "answers.json")
    expected = (
        source.shards.fingerprint,
        session.num_classes,
        views.count if views else None,
        views.seed if views else None,
    )
    stored = (notes["fingerprint"], notes["num_classes"], notes["views"], notes["views_seed"])
    assert stored == expected, f"{place}: targets of {stored}, {expected} needed"
    return [np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES]
