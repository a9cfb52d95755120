"""What every stage needs: the run, its ranks, its data, attempts, measuring, and seeds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import ResolvedStudent, UserError
from pipeline.graph import RunDirectory
from pipeline.identity import digest
from pipeline.results import duration
from pipeline.results.training import val_text
from pipeline.store import Attempt, Stage, new_attempt_id, write_bytes, write_json

from .data.augment import Augment, find_augment
from .data.cache import cached
from .data.sample_accounting import LostSamples
from .data.shards import ShardSet, open_shards
from .data.streams import Batch, MeasuringStream
from .distributed.ranks import Ranks, broadcast, gather

MEASURING_BATCH = 512
# Probabilities of a batch in memory while measuring, at most: an ensemble's are of all classes.
PROBABILITIES_IN_MEMORY = 2**26
log = logging.getLogger("referral")


class Session:
    """One process's view of one run."""

    def __init__(self, run: RunDirectory, ranks: Ranks):
        self.run = run
        self.ranks = ranks
        self.config = run.config
        self.losses = LostSamples()
        self._shards: dict[str, ShardSet] = {}
        self._kept: dict[tuple, np.ndarray] = {}

    def shards(self, split: str) -> ShardSet:
        """The train, val, test, transfer or ood split.

        It is decoded once for all stages where [data] cache allows.
        """
        if split not in self._shards:
            data = self.config.data
            if split in ("transfer", "ood"):
                data = data.model_copy(update={"label": "", "classes": None})
            opened = open_shards(getattr(data, split), data, split)
            self.losses.add(opened, {})
            if opened.arrival:
                self.say("%s", opened.arrival)
            self._shards[split] = cached(opened, self.run.root / "cache" / split, data)
        return self._shards[split]

    @property
    def class_names(self) -> list[str]:
        return self.shards("train").class_names

    @property
    def num_classes(self) -> int:
        return self.shards("train").num_classes

    @contextmanager
    def attempt(self, stage: Stage) -> Iterator[Attempt]:
        """One attempt, shared by all ranks.

        Rank 0 declares it finished when the block ends without an error.
        """
        identity = broadcast(new_attempt_id() if self.ranks.is_main else None, self.ranks)
        attempt = stage.begin(identity)
        handler = LogFile(attempt.path(f"log-{self.ranks.rank}.txt"))
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        if self.ranks.is_main:
            attempt.publish("metrics.jsonl")
            attempt.publish("log-0.txt")
        log.info(
            "%s: attempt %s on %s, %d ranks",
            stage.place,
            identity,
            self.ranks.device,
            self.ranks.world_size,
        )
        try:
            yield attempt
            dist.barrier()
            if self.ranks.is_main:
                write_json(attempt.path("damage.json"), self.losses.splits)
                attempt.finish()
                words = [f"done in {duration(time.time() - attempt.started)}"]
                words += filter(None, [val_text(attempt.directory)])
                log.info("%s: %s", stage.place, ", ".join(words))
            dist.barrier()
        finally:
            log.removeHandler(handler)
            handler.close()

    def measured(
        self,
        shards: ShardSet,
        measure: Callable[[Batch], dict[str, Tensor]],
        ids: np.ndarray | None = None,
        rows: int | None = None,
    ) -> dict[str, np.ndarray]:
        """`measure` of every example once, over all ranks: arrays in the order of the shards.

        ids: only these examples, in this order.  rows: of a batch, at most; by default as many as
        have PROBABILITIES_IN_MEMORY.  Every rank returns the whole, "ids" among it;
        corrupt examples are absent where data.damage = skip allows it.
        """
        stream = MeasuringStream(shards, rows or measuring_batch(self.num_classes), ids=ids)
        collected, lost = CollectedRows(len(shards) if ids is None else len(ids)), {}
        with torch.inference_mode():
            loader = stream.loader(self.ranks.rank, self.ranks.world_size, self.config.data.workers)
            for batch in loader:
                lost |= {sample: reason for _, sample, reason in batch.lost}
                self.ranks.progress()
                batch = batch.to(self.ranks.device)
                values = {key: value.cpu().numpy() for key, value in measure(batch).items()}
                collected.add({"ids": batch.ids.cpu().numpy(), **values})
        gathered = gather((collected.arrays(), lost), self.ranks)
        parts = [arrays for arrays, _ in gathered if arrays]
        if not parts:
            raise UserError(f"{shards.split}: nothing to measure")
        for _, lost in gathered:
            self.losses.add(shards, lost)
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        order = np.argsort(joined["ids"], kind="stable")
        return {key: value[order] for key, value in joined.items()}

    def kept(self, key: tuple, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` gives, made once for all stages of this process that have the same key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def augmentation(self, student: ResolvedStudent | None = None) -> Augment | None:
        """How training inputs are augmented, as [data] says, or a student for itself."""
        data = self.config.data
        if student is None:
            return find_augment(data.augment, data.augment_share)
        return find_augment(self.run.augment_of(student), self.run.augment_share_of(student))

    def seed(self, purpose: str, index: int) -> int:
        """A seed of its own for each purpose, from the run's."""
        return int(digest([self.config.seed, purpose, index])[:8], 16) >> 1

    def say(self, message: str, *values) -> None:
        """One line for whoever watches, from rank 0."""
        if self.ranks.is_main:
            log.info(message, *values)

    def say_each(self, lines: list[str]) -> None:
        for line in lines:
            self.say("%s", line)

    def write_json(self, path: Path, value) -> None:
        if self.ranks.is_main:
            write_json(path, value)

    def publish(self, stage: Stage, *files: str) -> None:
        """Copy a finished stage's files to RUN itself."""
        if self.ranks.is_main:
            for file in files:
                write_bytes(self.run.root / file, stage.path(file).read_bytes())

    def barrier(self) -> None:
        dist.barrier()


class Console(logging.StreamHandler):
    """What cannot be written ends the stage in one line; logging would print its traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # logging calls this while it handles the error


class CollectedRows:
    """Rows of several arrays, batch after batch, at most `most` of them.

    Each array is made once.  Batches kept one by one would lie between the large buffers that come
    and go, and what these leave is then too small for the next: of 16,000 examples and 20,902
    classes the heap grew to 4.6 GB, for 17 MB that were kept.
    """

    def __init__(self, most: int):
        self.most = most
        self.count = 0
        self._arrays: dict[str, np.ndarray] = {}

    def add(self, values: dict[str, np.ndarray]) -> None:
        """values: [b, ...] each, of the same names, types and shapes of a row every time."""
        if not self._arrays:
            for name, value in values.items():
                self._arrays[name] = np.empty((self.most, *value.shape[1:]), value.dtype)
        end = self.count + len(values["ids"])
        for name, value in values.items():
            self._arrays[name][self.count : end] = value
        self.count = end

    def arrays(self) -> dict[str, np.ndarray]:
        """What was added; empty before the first batch."""
        return {name: array[: self.count] for name, array in self._arrays.items()}


class LogFile(Console, logging.FileHandler):
    """A log whose disk may be full."""


def measuring_batch(num_classes: int) -> int:
    """Examples that are measured at a time: fewer of a huge label set, to fit in memory."""
    return max(1, min(MEASURING_BATCH, PROBABILITIES_IN_MEMORY // num_classes))


def start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Console(sys.stdout)])
