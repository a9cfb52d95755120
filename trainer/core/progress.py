"""What a training run carries from step to step, and what its users watch: metrics.jsonl and the trackers."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.config import UserError

from ..distributed.ranks import Ranks, sum_over_ranks
from .checkpoints import newest_step

DIVERGED = 10  # times the loss of the first steps (or 1 nat, where that is less)


@dataclass
class Progress:
    """All of it is in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    first_loss: float | None = None  # of the first logged steps
    best_loss: float = math.inf
    best_step: int = 0
    val: dict | None = None  # the figures of the weights that `train` would return now
    waited: int = 0  # validations since the best
    stopped: bool = False  # early
    metrics: list[str] = field(default_factory=list)  # the lines of metrics.jsonl so far
    lost: list[tuple[int, int, str]] = field(
        default_factory=list
    )  # damaged samples so far: (source, id, reason)


class MetricsLogger:
    """metrics.jsonl: the rows up to the checkpoint first, then each new one as it comes; trackers get the same.

    Every rank keeps one, since a mean is over all of them; rank 0 writes.  batch: of all ranks.
    """

    def __init__(
        self,
        path: Path,
        progress: Progress,
        ranks: Ranks,
        steps: int,
        batch: int,
        trackers: Sequence[Callable[[dict], None]] = (),
    ):
        self.path, self.progress, self.ranks, self.trackers = path, progress, ranks, trackers
        self.steps, self.batch = steps, batch
        self.started = time.monotonic() - progress.seconds
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self.first, self.since, self.waited = progress.step, time.monotonic(), 0.0
        if ranks.is_main:
            path.write_text("".join(line + "\n" for line in progress.metrics))
            for line in progress.metrics:
                self._track(json.loads(line))

    @contextmanager
    def waiting(self):
        """For the next batch."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def add(self, loss: torch.Tensor) -> None:
        """One micro-batch's share of its step's loss."""
        self.loss_sum += loss.detach()

    def row(self, rate: float, checkpoints: Path) -> None:
        """The mean loss since the last row; collective.  Raises UserError where it is not finite, or has diverged.

        seconds: of training so far, earlier attempts included.  data_wait: rank 0's share of the time since the last
        row that went to waiting for batches.
        """
        progress, now = self.progress, time.monotonic()
        loss = (
            float(sum_over_ranks(self.loss_sum, self.ranks))
            / self.ranks.world_size
            / (progress.step - self.first)
        )
        progress.seconds = now - self.started
        progress.first_loss = loss if progress.first_loss is None else progress.first_loss
        if not loss < DIVERGED * max(1.0, progress.first_loss):  # nan is not smaller either
            raise UserError(self._diverged(loss, rate, checkpoints))
        self.write(
            {
                "step": progress.step,
                "steps": self.steps,
                "loss": loss,
                "lr": rate,
                "examples": progress.step * self.batch,
                "seconds": round(progress.seconds, 3),
                "samples_per_s": round(self.batch * progress.step / max(progress.seconds, 1e-9), 1),
                "data_wait": round(self.waited / max(now - self.since, 1e-9), 4),
                "memory_bytes": peak_memory(self.ranks),
                "time": time.time(),
            }
        )
        self.loss_sum.zero_()
        self.first, self.since, self.waited = progress.step, now, 0.0

    def write(self, row: dict) -> None:
        """`row` as it is, from rank 0."""
        if not self.ranks.is_main:
            return
        line = json.dumps(
            {
                key: round(value, 8) if isinstance(value, float) else value
                for key, value in row.items()
            }
        )
        self.progress.metrics.append(line)
        with open(self.path, "a") as file:
            file.write(line + "\n")
        self._track(row)

    def look_at_the_clock(self) -> None:
        self.progress.seconds = time.monotonic() - self.started

    def _track(self, row: dict) -> None:
        for tracker in self.trackers:
            tracker(row)

    def _diverged(self, loss: float, rate: float, checkpoints: Path) -> str:
        good = newest_step(checkpoints)
        stands = (
            f"the last good checkpoint is that of step {good} in {checkpoints}"
            if good
            else "there is none yet"
        )
        return (
            f"the loss is {loss:.4g} at step {self.progress.step}; it began at {self.progress.first_loss:.4g}. Lower "
            f"the learning rate ({rate:.3g}) or clip gradients (clip_norm); {stands}"
        )


def peak_memory(ranks: Ranks) -> int:
    """Bytes: of the GPU as torch counts them, or of this process."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
