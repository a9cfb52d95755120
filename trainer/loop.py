"""One loop trains everything: generalist, specialists, controls and students."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .checkpoints import BackgroundSaver, load_checkpoint, newest_step, save_checkpoint
from .config import Schedule, UserError
from .data.accounts import Passes
from .data.streams import Batch, TrainingStream
from .distributed import Ranks, StopSignal, broadcast, gather, sum_over_ranks
from .objectives import Objective
from .optimisation import AveragedWeights, learning_rate

Validate = Callable[[nn.Module], dict[str, float]]  # -> {"loss": ..., "top1": ...}, equal on every rank
DIVERGED = 10  # times the loss of the first steps (or 1 nat, where that is less)
REQUEUE = 75  # EX_TEMPFAIL: "run me again, I shall go on"


class Interrupted(SystemExit):
    """SIGTERM or SIGUSR2 arrived; a checkpoint is written."""

    def __init__(self):
        super().__init__(REQUEUE)


@dataclass
class Progress:
    """What a training run carries from step to step; all of it is in a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    first_loss: float | None = None  # of the first logged steps
    best_loss: float = math.inf
    best_step: int = 0
    val: dict | None = None  # the figures of the weights that `train` would return now
    waited: int = 0  # validations since the best
    stopped: bool = False  # early
    metrics: list[str] = field(default_factory=list)  # the lines of metrics.jsonl so far
    lost: list[tuple[int, int, str]] = field(default_factory=list)  # damaged samples so far: (source, id, reason)


def train(
    driver, network: nn.Module, objective: Objective, stream: TrainingStream, schedule: Schedule, steps: int, *,
    ranks: Ranks, checkpoints: Path, metrics: Path, validate: Validate | None = None, workers: int = 0,
    trackers: Sequence[Callable[[dict], None]] = (),
) -> tuple[nn.Module, dict]:  # fmt: skip
    """Train `network` for `steps` steps by an engine (trainer.engines), going on from the newest checkpoint.

    Returns the network (the best validated weights where schedule.patience is set, the last ones otherwise; averaged
    weights where schedule.ema is set) and its summary {seconds, examples_seen, peak_memory_bytes, steps, best_step,
    val}.
    Raises Interrupted after SIGTERM or SIGUSR2 (with a checkpoint), UserError where the loss is not finite.
    """
    check_batch_size(stream.batch_size, ranks.world_size, schedule.accumulation)
    progress, state = resume(checkpoints, ranks)
    best, network = state and state["best"], network.to(ranks.device)
    average = AveragedWeights(network, schedule.ema, state and state["average"]) if schedule.ema else None
    module = driver.prepare(network, schedule, state)
    log = MetricsFile(metrics, progress, trackers) if ranks.is_main else None
    stop, started = StopSignal(), time.monotonic() - progress.seconds
    loss_sum, first, waited = torch.zeros((), dtype=torch.float64, device=ranks.device), progress.step, Stopwatch()

    saver = BackgroundSaver() if in_background(ranks) else None

    def checkpoint():
        progress.lost = passes.all_lost(everywhere)
        state = {
            **driver.state(), "progress": vars(progress), "best": best,
            "average": average.average if average else None, "rng": gather(random_state(ranks), ranks),
        }  # fmt: skip
        if saver is None:
            save_checkpoint(checkpoints, progress.step, state, schedule.keep, best=progress.best_step, ranks=ranks)
        elif ranks.is_main:
            saver.save(checkpoints, progress.step, on_cpu(state), schedule.keep, best=progress.best_step)

    def everywhere(value):
        return gather(value, ranks)

    def judge():
        """Validate (averaged weights where there are any), remember the best, decide whether to stop early."""
        nonlocal best
        with driver.judged(average) as judged:
            figures = validate(judged)
            better = figures["loss"] < progress.best_loss
            if better and schedule.patience:
                best = {name: value.clone() for name, value in judged.state_dict().items()}
        if log:
            log.write({"step": progress.step, **{f"val/{key}": value for key, value in figures.items()}})
        progress.waited += 1
        if better:
            progress.best_loss, progress.best_step, progress.waited = figures["loss"], progress.step, 0
        if not schedule.patience or progress.best_step == progress.step:
            progress.val = figures
        progress.stopped = bool(schedule.patience) and progress.waited >= schedule.patience

    if validate and progress.step == 0 and schedule.patience:
        judge()  # the start is a candidate too: a specialist that only gets worse stays the generalist
    module.train()
    passes = Passes(stream, progress.step, ranks.rank, ranks.world_size, progress.lost)
    batches = passes.watch(stream.loader(progress.step, steps, ranks.rank, ranks.world_size, workers))
    while progress.step < steps and not progress.stopped:
        with waited:
            batch = next(batches).to(ranks.device)
        rate = learning_rate(progress.step, steps, schedule)
        parts = micro_batches(batch, schedule.accumulation)
        for index, part in enumerate(parts):
            with driver.accumulating(last=index == len(parts) - 1):
                with driver.autocast():
                    loss = objective(module, part) / len(parts)
                driver.backward(loss)
            loss_sum += loss.detach()
        driver.step(rate)
        if average:
            average.update(network, progress.step)
        progress.step += 1
        ranks.progress()
        passes.close_ended(everywhere)
        last = progress.step == steps
        stopping = stop.agreed(ranks)
        saving = last or stopping or progress.step % schedule.checkpoint_every == 0
        if saving or progress.step % schedule.log_every == 0:  # nothing is saved whose loss nobody has looked at
            mean = float(sum_over_ranks(loss_sum, ranks)) / ranks.world_size / (progress.step - first)
            loss_sum.zero_()
            first = progress.step
            progress.seconds = time.monotonic() - started
            progress.first_loss = mean if progress.first_loss is None else progress.first_loss
            if not mean < DIVERGED * max(1.0, progress.first_loss):  # nan is not smaller either
                raise UserError(diverged(mean, progress, rate, checkpoints))
            if log:
                log.write(training_row(progress, steps, mean, rate, stream.batch_size, started, waited, ranks))
        if validate and (last or (schedule.validate_every and progress.step % schedule.validate_every == 0)):
            judge()
            module.train()
        if saving or progress.stopped:
            progress.seconds = time.monotonic() - started
            checkpoint()
        if saver is not None and (stopping or last or progress.stopped):
            saver.wait()
        if stopping and not last:
            raise Interrupted()
    network = driver.export()
    if schedule.patience and best is not None:
        network.load_state_dict(best)
    elif average:
        average.swap(network)
    network.eval()
    return network, {
        "seconds": round(progress.seconds, 3), "examples_seen": progress.step * stream.batch_size,
        "peak_memory_bytes": peak_memory(ranks), "steps": progress.step, "best_step": progress.best_step,
        "stopped_early": progress.stopped, "val": progress.val, "lost": progress.lost,
    }  # fmt: skip


def micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """Equal parts of one rank's batch (check_batch_size made sure that they are equal)."""
    if parts == 1:
        return [batch]
    pieces = [tensor.chunk(parts) for tensor in (batch.inputs, batch.labels, batch.ids, batch.source)]
    return [Batch(*piece) for piece in zip(*pieces, strict=True)]


def resume(checkpoints: Path, ranks: Ranks) -> tuple[Progress, dict | None]:
    """The newest checkpoint's progress and state, its generators set; where there is none, a beginning and None.

    It may be another engine's, or of another number of ranks.
    """
    step = broadcast(newest_step(checkpoints), ranks)
    if step is None:
        return Progress(), None
    state = load_checkpoint(checkpoints, step, ranks.device)
    if len(state["rng"]) == ranks.world_size:
        set_random_state(state["rng"][ranks.rank], ranks)
    return Progress(**state["progress"]), state


def in_background(ranks: Ranks) -> bool:
    """Whether checkpoints are written while training goes on: where a copy on the CPU stands apart from the state."""
    return ranks.device.type == "cuda"


def on_cpu(state):
    """A deep copy whose tensors are on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, (list, tuple)) else state


def random_state(ranks: Ranks) -> dict:
    """torch's generators on this rank; data needs none, its order is a function of seed and step."""
    cuda = {"cuda": torch.cuda.get_rng_state(ranks.device)} if ranks.device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_random_state(state: dict, ranks: Ranks) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if ranks.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), ranks.device)


class MetricsFile:
    """metrics.jsonl: the rows up to the checkpoint first, then each new one as it comes.  Trackers get the same."""

    def __init__(self, path: Path, progress: Progress, trackers: Sequence[Callable[[dict], None]] = ()):
        self.path, self.progress, self.trackers = path, progress, trackers
        path.write_text("".join(line + "\n" for line in progress.metrics))
        for line in progress.metrics:
            self.track(json.loads(line))

    def write(self, row: dict) -> None:
        line = json.dumps({key: round(value, 8) if isinstance(value, float) else value for key, value in row.items()})
        self.progress.metrics.append(line)
        with open(self.path, "a") as file:
            file.write(line + "\n")
        self.track(row)

    def track(self, row: dict) -> None:
        for tracker in self.trackers:
            tracker(row)


class Stopwatch:
    """Seconds spent inside its `with`, since it was last read; and the seconds since then."""

    def __init__(self):
        self.inside, self.since = 0.0, time.monotonic()

    def __enter__(self):
        self.entered = time.monotonic()

    def __exit__(self, *_):
        self.inside += time.monotonic() - self.entered

    def share(self) -> float:
        now = time.monotonic()
        share = self.inside / max(now - self.since, 1e-9)
        self.inside, self.since = 0.0, now
        return share


def training_row(
    progress: Progress, steps: int, loss: float, rate: float, batch: int, started: float, waited: Stopwatch,
    ranks: Ranks,
) -> dict:  # fmt: skip
    """seconds: of training so far, earlier attempts included.  data_wait: rank 0's share of the time since the last row
    that went to waiting for batches."""
    elapsed = time.monotonic() - started
    pace = elapsed / progress.step if progress.step else 0.0
    return {
        "step": progress.step, "steps": steps, "loss": loss, "lr": rate, "examples": progress.step * batch,
        "seconds": round(elapsed, 3), "samples_per_s": round(batch / pace, 1) if pace else 0.0,
        "data_wait": round(waited.share(), 4), "memory_bytes": peak_memory(ranks), "time": time.time(),
    }  # fmt: skip


def diverged(loss: float, progress: Progress, rate: float, checkpoints: Path) -> str:
    good = newest_step(checkpoints)
    stands = f"the last good checkpoint is that of step {good} in {checkpoints}" if good else "there is no checkpoint"
    return (
        f"the loss is {loss:.4g} at step {progress.step} (it began at {progress.first_loss:.4g}); lower the learning "
        f"rate ({rate:.3g}) or clip gradients (clip_norm); {stands}"
    )


def check_batch_size(batch: int, ranks: int, accumulation: int) -> None:
    parts = ranks * accumulation
    if batch % parts:
        near = f"{batch // parts * parts} or {(batch // parts + 1) * parts}" if batch > parts else f"{parts}"
        raise UserError(
            f"batch {batch} is not divisible by {ranks} ranks x {accumulation} accumulation steps; try {near}"
        )


def peak_memory(ranks: Ranks) -> int:
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
