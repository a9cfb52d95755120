"""One loop trains everything: generalist, specialists, controls and students."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.config import ResolvedSchedule, UserError, check_batch_size

from ..data.prefetch import on_device
from ..data.sample_accounting import EpochAccounting
from ..data.streams import Batch, TrainingStream
from ..distributed.ranks import Ranks, StopSignal, broadcast, gather
from ..engines import Engine
from .checkpoints import Saver, State, load_checkpoint, whole_step
from .objectives import Objective
from .optim import AveragedWeights, learning_rate
from .progress import MetricsLogger, Progress, cpu_seconds, peak_memory
from .split_state import Part
from .tracking import Tracker

T = TypeVar("T")
Kept = TypeVar("Kept", Tensor, Part)
# network -> {"loss": ..., "top1": ...}, equal on every rank
Validate = Callable[[nn.Module], dict[str, float]]
REQUEUE = 75  # EX_TEMPFAIL: start this job again, and it resumes


class Interrupted(SystemExit):
    """SIGTERM or SIGUSR2 arrived. A checkpoint is written."""

    def __init__(self):
        super().__init__(REQUEUE)


@dataclass(frozen=True)
class TrainingTask:
    """What one network learns, from which examples, how and how long.

    dense: whether the objective reads [B, C] logits, for which no rank's head is split.
    """

    network: nn.Module
    objective: Objective
    stream: TrainingStream
    schedule: ResolvedSchedule
    steps: int
    validate: Validate | None = None
    workers: int = 0  # processes that read batches ahead
    dense: bool = False


@dataclass(frozen=True)
class TrainingFiles:
    """Where a training run keeps its state and reports its metrics."""

    checkpoints: Path  # a directory, whose newest complete checkpoint is resumed
    metrics: Path  # metrics.jsonl
    trackers: Sequence[Tracker] = ()  # each is given the rows of metrics.jsonl
    name: str = "training"  # what its lines in the log begin with


@dataclass(frozen=True)
class TrainingSummary:
    """What a training run cost, earlier attempts included, and how it ended."""

    seconds: float
    cpu_seconds: float | None  # of all ranks. None on GPUs
    examples_seen: int
    peak_memory_bytes: int
    steps: int
    best_step: int
    stopped_early: bool
    val: dict[str, float] | None  # metrics of the returned weights
    lost: list[tuple[int, int, str]]  # corrupt samples: (source, id, reason)

    def to_json(self) -> dict:
        """What summary.json says of the training: all but `lost`."""
        return {key: value for key, value in asdict(self).items() if key != "lost"}


class Trainer:
    """One training run by an engine on these ranks. It resumes the newest checkpoint.

    Parameters
    ----------
    task : TrainingTask
    engine : Engine
        A fresh one. Whoever made it closes it.
    ranks : Ranks
    files : TrainingFiles

    Raises
    ------
    UserError
        Where the batch size cannot be divided by ranks and accumulation steps.
    """

    def __init__(self, task: TrainingTask, engine: Engine, ranks: Ranks, files: TrainingFiles):
        schedule, stream = task.schedule, task.stream
        check_batch_size(stream.batch_size, ranks.world_size, schedule.accumulation)
        self.task = task
        self.engine = engine
        self.ranks = ranks
        self.files = files
        self.progress, state = resume(files.checkpoints, ranks, engine.own_rows(task.network))
        self.network = task.network.to(ranks.device)
        self.module = engine.prepare(self.network, schedule, state)
        # What goes on of a checkpoint is on the device now, as copies: nothing keeps its file.
        saved = state or {}
        self.best: Mapping[str, Tensor | Part] | None = None  # weights, with patience
        if saved.get("best") is not None:
            self.best = {name: _copied(v, ranks) for name, v in saved["best"].items()}
        self.average: AveragedWeights | None = None
        if schedule.ema:
            average = {name: _copied(v, ranks) for name, v in (saved.get("average") or {}).items()}
            self.average = AveragedWeights(self.network, schedule.ema, average)
        del state, saved
        self.logger = MetricsLogger(
            files.metrics,
            self.progress,
            ranks,
            task.steps,
            stream.batch_size,
            files.trackers,
            files.name,
        )
        self.saver = Saver(files.checkpoints, schedule.keep, ranks)
        self.stop_signal = StopSignal()
        self.accounting = EpochAccounting(
            stream, self.progress.step, ranks.rank, ranks.world_size, self.progress.lost
        )

    def train(self) -> tuple[nn.Module, TrainingSummary]:
        """Train until the task's steps are done, or until validation stops it early.

        Returns
        -------
        network : nn.Module
            In eval mode.  With the best validated weights where schedule.patience is set, the last
            ones otherwise. Averaged weights where schedule.ema is set.
        summary : TrainingSummary

        Raises
        ------
        Interrupted
            After SIGTERM or SIGUSR2. A checkpoint is written.
        UserError
            Where the loss is not finite or diverges, or a checkpoint cannot be written.
        """
        progress, schedule = self.progress, self.task.schedule
        if progress.step == 0 and schedule.patience:
            # The start is a candidate too: a specialist that only gets worse stays the generalist.
            self.validate()
        self.module.train()
        batches = self.batches()
        while progress.step < self.task.steps and not progress.stopped:
            with self.logger.waiting():
                batch = next(batches)
            rate = learning_rate(progress.step, self.task.steps, schedule)
            self.train_step(batch, rate)
            self.accounting.close_ended(self._gather)
            is_last = progress.step == self.task.steps
            interrupted = self.stop_signal.agreed(self.ranks)
            saving = is_last or interrupted or self._is_due(schedule.checkpoint_every)
            # Nothing is saved whose loss nobody has looked at.
            if saving or self._is_due(schedule.log_every):
                self.logger.log(rate, self.files.checkpoints)
            if is_last or self._is_due(schedule.validate_every):
                self.validate()
            if saving or progress.stopped:
                self.save_checkpoint()
            if interrupted and not is_last:
                self.stop_signal.close()
                self.saver.close()
                raise Interrupted()
        self.stop_signal.close()
        self.saver.close()
        return self.export(), self.summary()

    def batches(self) -> Iterator[Batch]:
        """This rank's batches from the current step on, on its device and in the accounting."""
        task, ranks = self.task, self.ranks
        loader = task.stream.loader(
            self.progress.step, task.steps, ranks.rank, ranks.world_size, task.workers
        )
        return self.accounting.watch(on_device(loader, ranks.device))

    def train_step(self, batch: Batch, rate: float) -> None:
        """One optimizer step on this rank's share of the global batch."""
        parts = micro_batches(batch, self.task.schedule.accumulation)
        for index, part in enumerate(parts):
            with self.engine.accumulating(last=index == len(parts) - 1):
                with self.engine.autocast():
                    loss = self.task.objective(self.module, part) / len(parts)
                self.engine.backward(loss)
            self.logger.add(loss)
        self.engine.step(rate)
        if self.average is not None:
            self.average.update(self.network, self.progress.step)
        self.progress.step += 1
        self.ranks.progress()

    def validate(self) -> None:
        """Measure the weights that would be exported now, and remember the best ones.

        Does nothing where the task has no validation.
        """
        if self.task.validate is None:
            return
        progress, patience = self.progress, self.task.schedule.patience
        with self.engine.eval_model(self.average) as network:
            metrics = self.task.validate(network)
            if patience and metrics["loss"] < progress.best_loss:
                self.best = self.engine.remember(network)
        self.module.train()
        row = {f"val/{name}": value for name, value in metrics.items()}
        self.logger.write({"step": progress.step, **row})
        progress.record_validation(metrics, patience)

    def save_checkpoint(self) -> None:
        """Save all that a later attempt needs. Collective."""
        self.logger.update_seconds()
        self.progress.lost = self.accounting.all_lost(self._gather)
        state = {
            **self.engine.state(),
            "progress": vars(self.progress),
            "best": self.best,
            "average": self.average.average if self.average else None,
            "rng": self._gather(random_state(self.ranks)),
        }
        self.saver.save(self.progress.step, state, self.progress.best_step)

    def export(self) -> nn.Module:
        """The plain network with the weights that the run is for, in eval mode. Collective."""
        weights = None
        if self.task.schedule.patience and self.best is not None:
            weights = self.best
        elif self.average is not None:
            weights = self.average.average
        return self.engine.export(weights).eval()

    def summary(self) -> TrainingSummary:
        progress = self.progress
        return TrainingSummary(
            seconds=round(progress.seconds, 3),
            cpu_seconds=cpu_seconds(progress, self.ranks),
            examples_seen=progress.step * self.task.stream.batch_size,
            peak_memory_bytes=peak_memory(self.ranks),
            steps=progress.step,
            best_step=progress.best_step,
            stopped_early=progress.stopped,
            val=progress.val,
            lost=progress.lost,
        )

    def _is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps happens now. 0 is never."""
        return interval > 0 and self.progress.step % interval == 0

    def _gather(self, value: T) -> list[T]:
        return gather(value, self.ranks)


def micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """Equal parts of one rank's batch (check_batch_size made sure that they are equal)."""
    if parts == 1:
        return [batch]
    chunks = {name: getattr(batch, name).chunk(parts) for name in ("inputs", *batch.numbers)}
    return [
        Batch(**{name: tensors[part] for name, tensors in chunks.items()}) for part in range(parts)
    ]


def _copied(value: Kept, ranks: Ranks) -> Kept:
    return value.to(ranks.device, copy=True)


def resume(
    checkpoints: Path, ranks: Ranks, own_rows: Mapping[str, slice] | None = None
) -> tuple[Progress, State | None]:
    """The newest whole checkpoint's progress and state. Its random generators are set.

    The state's tensors lie in the file, of which the operating system reads what is copied.

    own_rows: rows of this rank alone that are read of some tensors, by name.

    The checkpoint may be another engine's, or of another number of ranks.  Where there is none, a
    fresh progress and None.
    """
    step, problem = None, ""
    if ranks.is_main:
        try:
            step = whole_step([checkpoints])
        except UserError as error:
            problem = str(error)
    step, problem = broadcast((step, problem), ranks)
    if problem:
        raise UserError(problem)
    if step is None:
        return Progress(), None
    state = load_checkpoint(checkpoints, step, own_rows=own_rows)
    if len(state["rng"]) == ranks.world_size:
        set_random_state(state["rng"][ranks.rank], ranks)
    return Progress(**state["progress"]), state


def random_state(ranks: Ranks) -> dict[str, Tensor]:
    """torch's generators on this rank. The order of data is a function of seed and step alone."""
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def set_random_state(state: dict[str, Tensor], ranks: Ranks) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if ranks.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), ranks.device)
