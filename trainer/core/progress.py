"""What a training run carries from step to step, and what its users watch: metrics.jsonl."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.config import UserError
from pipeline.files import json_text
from pipeline.results import duration, percent

from ..distributed.ranks import Ranks, sum_over_ranks
from .checkpoints import newest_step
from .tracking import Row, Tracker

log = logging.getLogger("referral")
# A training that has waited for data for so much of its time, after so many seconds, says so once.
WAITING, WAITING_S = 0.3, 30.0
DIVERGED = 10  # times the loss of the first steps (or 1 nat, where that is less)


@dataclass
class Progress:
    """The state of one training run. Every field is written to its checkpoints."""

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this rank's process. From a checkpoint, of rank 0's until then
    first_loss: float | None = None  # mean over the first logged steps
    best_loss: float = math.inf
    best_step: int = 0
    val: dict[str, float] | None = None  # metrics of the weights that training would return now
    waited: int = 0  # validations since the best
    stopped: bool = False  # early
    metrics: list[str] = field(default_factory=list)  # lines of metrics.jsonl so far
    # Corrupt samples so far: (source, id, reason).
    lost: list[tuple[int, int, str]] = field(default_factory=list)

    def record_validation(self, metrics: dict[str, float], patience: int) -> None:
        """Remember the best step. Stop after `patience` validations without a better loss."""
        self.waited += 1
        if metrics["loss"] < self.best_loss:
            self.best_loss = metrics["loss"]
            self.best_step = self.step
            self.waited = 0
        if not patience or self.best_step == self.step:
            self.val = metrics
        self.stopped = bool(patience) and self.waited >= patience


class MetricsLogger:
    """Writes metrics.jsonl: first the rows up to the checkpoint, then each new one. Trackers too.

    Every rank has one, since a mean is over all ranks. Rank 0 writes.

    steps: planned for the whole run.  batch_size: examples per step, over all ranks.
    """

    def __init__(
        self,
        path: Path,
        progress: Progress,
        ranks: Ranks,
        steps: int,
        batch_size: int,
        trackers: Sequence[Tracker] = (),
        name: str = "training",
    ):
        self.path = path
        self.progress = progress
        self.ranks = ranks
        self.steps = steps
        self.batch_size = batch_size
        self.trackers = trackers
        self.name = name
        self.started = time.monotonic() - progress.seconds
        self.cpu_started = time.process_time() - progress.cpu_seconds
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.began = time.monotonic()
        self.waited = 0.0  # seconds for batches, since it began
        self.has_warned = False
        self._start_interval(self.began)
        if ranks.is_main:
            path.write_text("".join(line + "\n" for line in progress.metrics))
            for line in progress.metrics:
                self._track(json.loads(line))
            if progress.step:
                log.info("%s: resumed at step %d of %d", name, progress.step, steps)

    def _start_interval(self, now: float) -> None:
        """Begin the steps that the next row is about."""
        self.interval_step = self.progress.step
        self.interval_began = now
        self.data_wait = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for the next batch."""
        began = time.monotonic()
        yield
        self.data_wait += time.monotonic() - began

    def add(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's part of its step's loss."""
        self.loss_sum += loss.detach()

    def log(self, rate: float, checkpoints: Path) -> None:
        """Write a row with the mean loss since the last one. Collective.

        The row's `seconds` are of training so far, earlier attempts included.  Its `data_wait` is
        the fraction of the time since the last row that rank 0 waited for batches.
        Raises UserError where the loss is not finite, or has diverged.
        """
        progress = self.progress
        now = time.monotonic()
        total = float(sum_over_ranks(self.loss_sum, self.ranks))
        loss = total / self.ranks.world_size / (progress.step - self.interval_step)
        self.update_seconds()
        if progress.first_loss is None:
            progress.first_loss = loss
        if not loss < DIVERGED * max(1.0, progress.first_loss):  # nan is not smaller either
            raise UserError(self._diverged(loss, progress.first_loss, rate, checkpoints))
        examples = progress.step * self.batch_size
        self.write(
            {
                "step": progress.step,
                "steps": self.steps,
                "loss": loss,
                "lr": rate,
                "examples": examples,
                "seconds": round(progress.seconds, 3),
                "samples_per_s": round(examples / max(progress.seconds, 1e-9), 1),
                "data_wait": round(self.data_wait / max(now - self.interval_began, 1e-9), 4),
                "memory_bytes": peak_memory(self.ranks),
                "time": time.time(),
            }
        )
        self.loss_sum.zero_()
        self._warn_of_waiting(now)
        self._start_interval(now)

    def _warn_of_waiting(self, now: float) -> None:
        self.waited += self.data_wait
        elapsed = now - self.began
        if self.has_warned or elapsed < WAITING_S or self.waited < WAITING * elapsed:
            return
        self.has_warned = True
        if self.ranks.is_main:
            log.warning(
                "%s: %s of the time goes by waiting for data; raise data.workers, or let "
                "data.cache keep decoded inputs",
                self.name,
                percent(self.waited / elapsed),
            )

    def write(self, row: Row) -> None:
        """Write `row` as it is, on rank 0."""
        if not self.ranks.is_main:
            return
        line = json_text({key: _rounded(value) for key, value in row.items()}, self.path.name)
        self.progress.metrics.append(line)
        with open(self.path, "a") as file:
            file.write(line + "\n")
        log.info("%s: step %d/%d, %s", self.name, row["step"], self.steps, in_words(row))
        self._track(row)

    def update_seconds(self) -> None:
        """Bring progress.seconds and progress.cpu_seconds up to now."""
        self.progress.seconds = time.monotonic() - self.started
        self.progress.cpu_seconds = time.process_time() - self.cpu_started

    def _track(self, row: Row) -> None:
        for track in self.trackers:
            track(row)

    def _diverged(self, loss: float, first_loss: float, rate: float, checkpoints: Path) -> str:
        last_good = "there is none yet"
        if step := newest_step(checkpoints):
            last_good = f"the last good checkpoint is that of step {step} in {checkpoints}"
        return (
            f"the loss is {loss:.4g} at step {self.progress.step}; it began at {first_loss:.4g}. "
            f"Lower the learning rate ({rate:.3g}) or clip gradients (clip_norm); {last_good}"
        )


def in_words(row: Row) -> str:
    """A row of metrics.jsonl as a line of the log."""
    if "loss" not in row:
        named = {key.removeprefix("val/"): value for key, value in row.items() if key != "step"}
        top1 = named.pop("top1", None)
        words = [] if top1 is None else [f"val top-1 {percent(top1, 1)}"]
        return ", ".join([*words, *(f"val {key} {value:.4g}" for key, value in named.items())])
    left_s = (row["steps"] - row["step"]) * row["seconds"] / row["step"]
    return (
        f"loss {row['loss']:.4f}, learning rate {row['lr']:.3g}, "
        f"{row['samples_per_s']:,.0f} examples/s, {duration(left_s)} to go"
    )


def _rounded(value: float) -> float:
    return round(value, 8) if isinstance(value, float) else value


def cpu_seconds(progress: Progress, ranks: Ranks) -> float | None:
    """CPU seconds of all ranks' processes. None on GPUs, where they say little. Collective."""
    if ranks.device.type != "cpu":
        return None
    own = torch.tensor(progress.cpu_seconds, dtype=torch.float64)
    return round(float(sum_over_ranks(own, ranks)), 3)


def peak_memory(ranks: Ranks) -> int:
    """The peak in bytes: of the GPU as torch counts it, or of this process."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return peak * 1024
