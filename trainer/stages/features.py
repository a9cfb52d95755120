"""What branches learn from, computed once: the generalist at the cut, for every input and view.

    N, V, D   samples of a split, views of each, numbers at the cut
    A, C      numbers that the generalist's head reads, classes
    z, L      the generalist's logits [C], and log sum exp z

Kept are, in row id * V + view of SPLIT/NAME.npy,

    at_cut    float32 [N V, ...]   what a branch reads
    general   float32 [N V, A]     what the head reads, for z of any classes. Absent
                                   where at_cut is the same
    total     float64 [N V]        L: the other classes' share follows by subtraction

Written block by block into memory-mapped files, which a second attempt goes on with.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from networks import Classifier
from networks.branches import log_sum
from networks.cutting import Cut, cut_at
from pipeline.config import ResolvedSpecialists, UserError
from pipeline.failures import cannot_write
from pipeline.files import read_json, sync, write_json
from pipeline.store import Attempt, Stage

from ..core.progress import peak_memory
from ..data.augment import Views
from ..data.kept_arrays import kept_npy
from ..data.mapped import create_mapped
from ..data.shards import ShardSet
from ..data.streams import Batch
from ..session import Session
from .networks import load_network
from .targets import view_of

BLOCK_BYTES, BLOCK_ROWS = 2**26, 2**16  # written at a time, at most
MEMORISED = 0.05  # train accuracy above val's that deserves a word
PROGRESS = "progress.json"
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


@dataclass(frozen=True)
class KeptFeatures:
    """A split's kept features, memory-mapped, or those of some samples alone, in memory.

    at_cut, general: [N V, ...].  total: [N V].  views: V.  readable: bool [N], whether a sample
    is there.
    places: int64 [N], of some samples alone, where each is among them. None of all.
    natural: bool [N], of some samples alone, those that stand for all the others. None of all.
    """

    at_cut: np.ndarray
    general: np.ndarray
    total: np.ndarray
    views: int
    readable: np.ndarray
    places: np.ndarray | None = None
    natural: np.ndarray | None = None

    @property
    def for_others(self) -> np.ndarray:
        """Bool [N], the samples that a group's other examples are drawn from."""
        return self.readable if self.natural is None else self.natural & self.readable

    def rows_of(self, rows: np.ndarray) -> np.ndarray:
        """Where rows id * V + view are in the arrays."""
        if self.places is None:
            return rows
        ids, view = np.divmod(rows, self.views)
        return self.places[ids] * self.views + view


def features(session: Session, stage: Stage) -> None:
    """The generalist's features at the cut, of train in several views and of val."""
    with session.attempt(stage) as attempt:
        generalist = load_network(session, session.run.generalist)
        cut = cut_features(session, generalist)
        count = session.config.specialists.views_of(session.config.data.augment)
        writers = {
            "train": FeatureWriter(session, generalist, cut, "train", count),
            "val": FeatureWriter(session, generalist, cut, "val", 1),
        }
        needed = sum(writer.bytes for writer in writers.values())
        session.say("features of the generalist: %.1f MiB to keep", needed / 2**20)
        check_size(session.config.specialists, needed)
        keep(session, attempt, writers, say_features)


def cut_features(session: Session, generalist: Classifier) -> Cut:
    """Where the run's branches part from the generalist."""
    try:
        return cut_at(generalist.trunk, session.config.specialists.blocks)
    except ValueError as error:
        raise UserError(f"specialists.{error}") from None


@torch.no_grad()
def row_shapes(generalist: Classifier, cut: Cut) -> Shapes:
    """The shape of each array's rows, from one input of zeros."""
    raw = generalist.zero_input()
    at_cut = cut.body(generalist.eval().preprocess(raw))
    general = cut.end(at_cut)
    single, double = np.dtype(np.float32), np.dtype(np.float64)
    shapes: Shapes = {"at_cut": (tuple(at_cut.shape[1:]), single), "total": ((), double)}
    if general is not at_cut:
        shapes["general"] = (tuple(general.shape[1:]), single)
    return shapes


def row_bytes(shapes: Shapes) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())


def check_size(section: ResolvedSpecialists, needed: int) -> None:
    """Raises UserError where all features take more than they may."""
    if needed > section.features_bytes:
        raise UserError(
            f"the features that branches learn from take {needed:,} bytes, "
            f"specialists.features_bytes = {section.features_bytes:,} allows less: raise it, or "
            "lower specialists.views"
        )


class KeptWriter:
    """What the generalist says of every sample of one split and every view, block by block.

    shapes: of each array's rows.  A subclass measures them.
    """

    def __init__(
        self, session: Session, generalist: Classifier, split: str, views: Views, shapes: Shapes
    ):
        self.session = session
        self.generalist = generalist
        self.shards: ShardSet = session.shards(split)
        self.views = views
        self.shapes = shapes
        self.row_bytes = row_bytes(shapes)
        self.bytes = len(self.shards) * views.count * self.row_bytes

    def measure_view(self, view: int) -> Callable[[Batch], dict[str, Tensor]]:
        """A function batch -> the arrays' rows, and "correct": whether the generalist is."""
        raise NotImplementedError

    def write(self, directory: Path) -> dict:
        """All views of the split into DIRECTORY, from where an earlier attempt stopped.

        Returns {"samples", "views", "top1", "seconds"}. top1: the generalist's, over all rows.
        """
        main, started = self.session.ranks.is_main, time.monotonic()
        arrays = self._open(directory) if main else {}
        progress = self._progress(directory)
        for view, ids in self._blocks(progress["blocks"]):
            values = self.session.measured(self.shards, self.measure_view(view), ids=ids)
            progress["blocks"] += 1
            progress["samples"] += len(values["ids"])
            progress["correct"] += int(values.pop("correct").sum())
            if not main:
                continue
            rows = values.pop("ids") * self.views.count + view
            for name in self.shapes:
                arrays[name][rows] = values[name]
            arrays["readable"][rows // self.views.count] = True
            for array in arrays.values():
                array.flush()
            progress["seconds"] += time.monotonic() - started
            started = time.monotonic()
            write_json(directory / PROGRESS, progress)
        top1 = progress["correct"] / max(1, progress["samples"])
        return {
            "samples": len(self.shards),
            "views": self.views.count,
            "top1": top1,
            "seconds": progress["seconds"],
        }

    def _blocks(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """(view, ids) of each block that is not written yet."""
        size = max(1, min(BLOCK_ROWS, BLOCK_BYTES // self.row_bytes))
        starts = range(0, len(self.shards), size)
        blocks = [(view, start) for view in range(self.views.count) for start in starts]
        for view, start in blocks[first:]:
            yield view, np.arange(start, min(start + size, len(self.shards)))

    def _progress(self, directory: Path) -> dict:
        path = directory / PROGRESS
        progress = read_json(path) if path.exists() else None
        self.session.barrier()  # before rank 0 writes it
        return progress or {"blocks": 0, "samples": 0, "correct": 0, "seconds": 0.0}

    def _open(self, directory: Path) -> dict[str, np.memmap]:
        """The arrays, new or begun. What was begun and is not whole is begun again."""
        names = [*self.shapes, "readable"]
        files = [directory / PROGRESS, *(directory / f"{name}.npy" for name in names)]
        begun = all(path.exists() for path in files)
        if not begun:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        rows = len(self.shards) * self.views.count
        arrays = {}
        for name, (shape, dtype) in self.shapes.items():
            arrays[name] = _mapped(directory / f"{name}.npy", dtype, (rows, *shape), begun)
        path = directory / "readable.npy"
        arrays["readable"] = _mapped(path, np.dtype(bool), (len(self.shards),), begun)
        sync(directory)
        return arrays


class FeatureWriter(KeptWriter):
    """The features of one split."""

    def __init__(self, session: Session, generalist: Classifier, cut: Cut, split: str, views: int):
        fixed = Views(views, session.seed("branch views", 0))
        super().__init__(session, generalist, split, fixed, row_shapes(generalist, cut))
        self.cut = cut
        # One view as the training stream augments it, or the input as it is.
        self.augment = session.augmentation() if split == "train" else None

    def measure_view(self, view: int) -> Callable[[Batch], dict[str, Tensor]]:
        see = view_of(self.augment, self.views, 0, view)

        def measure(batch: Batch) -> dict[str, Tensor]:
            at_cut = self.cut.body(self.generalist.preprocess(see(batch)))
            general = self.cut.end(at_cut)
            logits = self.generalist.logits_of(general)
            values = {"at_cut": at_cut.float(), "total": log_sum(logits)}
            if "general" in self.shapes:
                values["general"] = general.float()
            return values | {"correct": logits.argmax(1) == batch.labels}

        return measure


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], begun: bool) -> np.memmap:
    """A memory-mapped .npy file, of zeros where it is new."""
    try:
        if begun:
            return np.lib.format.open_memmap(path, "r+")
        return create_mapped(path, dtype, shape)
    except OSError as error:
        raise cannot_write(path, error) from None


def keep(
    session: Session,
    attempt: Attempt,
    writers: Mapping[str, KeptWriter],
    say: Callable[[Session, dict[str, dict]], None],
) -> None:
    """Write every split, and hand them and a summary to the attempt.

    say(session, notes): what whoever watches is told, by split what `KeptWriter.write` returns.
    """
    unfinished = attempt.unfinished(attempt.stage.place)
    if session.ranks.is_main:
        attempt.take_over(attempt.stage.place)
    session.barrier()
    notes = {split: writer.write(unfinished / split) for split, writer in writers.items()}
    say(session, notes)
    if not session.ranks.is_main:
        return
    for split in writers:
        publish(unfinished / split, attempt.directory / split)
    attempt.drop_unfinished(attempt.stage.place)
    summary = {
        "splits": notes,
        "seconds": round(sum(each["seconds"] for each in notes.values()), 3),
        "examples_seen": 0,  # nothing is learnt from them here
        "peak_memory_bytes": peak_memory(session.ranks),
    }
    session.write_json(attempt.path("summary.json"), summary)


def publish(source: Path, target: Path) -> None:
    """Move a split's finished files into the attempt's directory."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.npy")):
        os.replace(path, target / path.name)
    shutil.rmtree(source)


def say_features(session: Session, notes: dict[str, dict]) -> None:
    """A warning where the generalist has memorised train: features say little about its errors."""
    train, val = notes["train"]["top1"], notes["val"]["top1"]
    session.say(
        "kept features: %d samples of train in %d views, generalist %.1f %% right; %d of val, "
        "%.1f %%",
        notes["train"]["samples"],
        notes["train"]["views"],
        100 * train,
        notes["val"]["samples"],
        100 * val,
    )
    if train - val > MEMORISED:
        session.say(
            "warning: the generalist is right on %.1f %% of train and %.1f %% of val: it "
            "has memorised its training data, and branches learn little from what it already "
            "knows; augment (data.augment), or expect a small gain",
            100 * train,
            100 * val,
        )


def kept_features(session: Session, split: str) -> KeptFeatures:
    """What the finished stage kept of a split."""
    directory = session.run.features.path(split)
    notes = read_json(session.run.features.path("summary.json"))["splits"][split]

    def mapped(name: str) -> np.ndarray:
        return kept_npy(directory / f"{name}.npy", "fiub", (None, ...))

    at_cut = mapped("at_cut")
    general = mapped("general") if (directory / "general.npy").exists() else at_cut
    return KeptFeatures(at_cut, general, mapped("total"), notes["views"], mapped("readable"))
