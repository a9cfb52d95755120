"""What every stage needs: the run, its ranks, its data, attempts, measuring, and seeds."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ensemble.listed_ensemble import cached_rows
from pipeline.config import ResolvedStudent, UserError
from pipeline.graph import RunDirectory
from pipeline.identity import digest
from pipeline.redaction import shown
from pipeline.results import duration
from pipeline.results.training import val_text
from pipeline.store import Attempt, Stage, new_attempt_id, write_json

from .data.augment import Augment, find_augment
from .data.cache import cached
from .data.prefetch import on_device
from .data.sample_accounting import LostSamples
from .data.shards import ShardSet, open_shards
from .data.streams import Batch, MeasuringStream, reading_processes
from .distributed.ranks import Ranks, autocast, broadcast, gather, sum_over_ranks

MEASURING_BATCH = 512
SEEN_S = 90  # in which what rank 0 has written is seen on every node: NFS caches for a minute
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
        self.in_step = False  # whether a network is measured whose weights ranks have split
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

    @property
    def workers(self) -> int:
        """Processes that read this rank's batches ahead."""
        return reading_processes(self.config.data.workers, self.ranks)

    @contextmanager
    def attempt(self, stage: Stage, published: Sequence[str] = ()) -> Iterator[Attempt]:
        """One attempt, shared by all ranks.

        Rank 0 declares it finished when the block ends without an error.
        published: the files that it then copies to RUN.
        """
        start = ("", "")
        if self.ranks.is_main:
            start = (new_attempt_id(), stage.lacks)
        identity, lacks = broadcast(start, self.ranks)
        if lacks:
            self.say("%s is done again, for its files are not whole: %s", stage.place, lacks)
        attempt = stage.begin(identity)
        handler = LogFile(attempt.path(f"log-{self.ranks.rank}.txt"))
        handler.setFormatter(ShownFormatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        if self.ranks.is_main:
            attempt.publish("metrics.jsonl")  # there is none yet: no link is left to an earlier one
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
            self.barrier()
            if self.ranks.is_main:
                write_json(attempt.path("damage.json"), self.losses.splits)
                attempt.finish(published)
                words = [f"done in {duration(attempt.seconds)}"]
                words += filter(None, [val_text(attempt.directory)])
                log.info("%s: %s", stage.place, ", ".join(words))
            self.barrier()
            wait_until_seen(stage)
        finally:
            log.removeHandler(handler)
            handler.close()

    def measured(
        self,
        shards: ShardSet,
        measure: Callable[[Batch], dict[str, Tensor]],
        ids: np.ndarray | None = None,
        rows: int | None = None,
        together: bool = False,
    ) -> dict[str, np.ndarray]:
        """`measure` of every example once, over all ranks: arrays in the order of the shards.

        ids: only these examples, in this order.  rows: of a batch, at most. By default as many as
        have PROBABILITIES_IN_MEMORY.  together: `measure` is collective, so every rank calls it as
        often as the others.  Every rank returns the whole, "ids" among it.
        Corrupt examples are absent where data.damage = skip allows it.
        """
        part = self.measured_here(shards, measure, ids, rows, together)
        parts = [arrays for arrays in gather(part, self.ranks) if arrays]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        order = np.argsort(joined["ids"], kind="stable")
        return {key: value[order] for key, value in joined.items()}

    def measured_here(
        self,
        shards: ShardSet,
        measure: Callable[[Batch], dict[str, Tensor]],
        ids: np.ndarray | None = None,
        rows: int | None = None,
        together: bool = False,
    ) -> dict[str, np.ndarray]:
        """The part of `measured` that is this rank's, in the order of its batches. Collective.

        Empty where there are fewer examples than ranks.
        """
        count = len(shards) if ids is None else len(ids)
        share = -(-count // self.ranks.world_size)  # of few examples, too, each rank has some
        rows = max(1, min(rows or measuring_batch(self.num_classes), share))
        stream = MeasuringStream(shards, rows, ids=ids)
        collected, lost = CollectedRows(count), {}
        together = together or self.in_step
        # Weights that are gathered layer by layer cannot be tensors of inference mode.
        unlearning = torch.no_grad() if self.in_step else torch.inference_mode()
        with unlearning, autocast(self.config.engine, self.ranks.device):
            loader = stream.loader(self.ranks.rank, self.ranks.world_size, self.workers)
            for batch in on_device(loader, self.ranks.device):
                lost |= {sample: reason for _, sample, reason in batch.lost}
                self.ranks.progress()
                values = {key: as_array(value) for key, value in measure(batch).items()}
                collected.add({"ids": batch.ids.numpy(), **values})
            if together:
                for _ in range(stream.missing_batches(self.ranks.rank, self.ranks.world_size)):
                    measure(stream.blank().to(self.ranks.device))
        gathered = gather((collected.count, lost), self.ranks)
        if not any(number for number, _ in gathered):
            raise UserError(f"{shards.split}: nothing to measure")
        for _, lost in gathered:
            self.losses.add(shards, lost)
        return collected.arrays()

    def mean(self, values: Tensor) -> float:
        """The mean of every rank's numbers [n] together, in float64. Collective."""
        values = values.double()
        total = torch.stack([values.sum(), values.new_tensor(float(len(values)))])
        sums, count = sum_over_ranks(total, self.ranks).tolist()
        return sums / count

    def kept(self, key: tuple, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` gives, made once for all stages of this process that have the same key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def augmentation(self, student: ResolvedStudent | None = None) -> Augment | None:
        """How training inputs are augmented, as [data] says, or a student for itself."""
        data = self.config.data
        if student is None:
            return find_augment(data.augment, data.augment_share, data.augment_options)
        share = self.run.augment_share_of(student)
        return find_augment(self.run.augment_of(student), share, data.augment_options)

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

    def barrier(self) -> None:
        """Wait for all ranks, however long rank 0 works alone."""
        self.ranks.barrier()


def wait_until_seen(stage: Stage) -> None:
    """Wait until this rank's node sees that a stage is done, as rank 0 has written it.

    Raises UserError where it does not.
    """
    deadline = time.monotonic() + SEEN_S
    while stage.done() is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"{stage.directory}: rank 0 has finished this stage, and another rank does not see "
                "its DONE; --run must lie on a file system that all nodes of a job share"
            )
        os.listdir(stage.directory)  # a network file system looks again
        time.sleep(0.2)


class Console(logging.StreamHandler):
    """What cannot be written ends the stage in one line. Logging would print its traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # logging calls this while it handles the error


class ShownFormatter(logging.Formatter):
    """Lines of a log: without secrets of URLs, and control sequences as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


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
        """What was added. Empty before the first batch."""
        return {name: array[: self.count] for name, array in self._arrays.items()}


class LogFile(Console, logging.FileHandler):
    """A log whose disk may be full."""


def as_array(values: Tensor) -> np.ndarray:
    """The values as an array on the host. bfloat16, which numpy lacks, becomes float32."""
    if values.dtype == torch.bfloat16:
        values = values.float()
    return values.cpu().numpy()


def measuring_batch(num_classes: int) -> int:
    """Examples that are measured at a time: fewer of a huge label set, to fit in memory."""
    return max(1, min(MEASURING_BATCH, PROBABILITIES_IN_MEMORY // num_classes))


def rows_in_cache(num_classes: int, device: torch.device) -> int:
    """Examples at a time where each operation writes all their probabilities, [rows, C].

    On a CPU these stay in its cache: at 26,386 classes half the time of MEASURING_BATCH.
    """
    most = measuring_batch(num_classes)
    if device.type != "cpu":
        return most
    return min(most, cached_rows(num_classes))


def start_logging() -> None:
    console = Console(sys.stdout)
    console.setFormatter(ShownFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[console])
