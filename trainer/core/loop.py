"""One loop trains everything: generalist, specialists, controls and students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from pipeline.config import Schedule, UserError

from ..data.sample_accounting import EpochAccounting
from ..data.streams import NUMBERS, Batch, TrainingStream
from ..distributed.ranks import Ranks, StopSignal, broadcast, gather
from .checkpoints import Saver, load_checkpoint, newest_step
from .objectives import Objective
from .optim import AveragedWeights, learning_rate
from .progress import MetricsLogger, Progress, peak_memory

Validate = Callable[
    [nn.Module], dict[str, float]
]  # -> {"loss": ..., "top1": ...}, equal on every rank
REQUEUE = 75  # EX_TEMPFAIL: "run me again, I shall go on"


class Interrupted(SystemExit):
    """SIGTERM or SIGUSR2 arrived; a checkpoint is written."""

    def __init__(self):
        super().__init__(REQUEUE)


def train(
    engine,
    network: nn.Module,
    objective: Objective,
    stream: TrainingStream,
    schedule: Schedule,
    steps: int,
    *,
    ranks: Ranks,
    checkpoints: Path,
    metrics: Path,
    validate: Validate | None = None,
    workers: int = 0,
    trackers: Sequence[Callable[[dict], None]] = (),
) -> tuple[nn.Module, dict]:
    """Train `network` for `steps` steps by an engine (trainer.engines), going on from the newest checkpoint.

    Returns the network (the best validated weights where schedule.patience is set, the last ones otherwise; averaged
    weights where schedule.ema is set) and its summary {seconds, examples_seen, peak_memory_bytes, steps, best_step,
    val, lost}.
    Raises Interrupted after SIGTERM or SIGUSR2 (with a checkpoint), UserError where the loss is not finite or diverges.
    """
    check_batch_size(stream.batch_size, ranks.world_size, schedule.accumulation)
    progress, state = resume(checkpoints, ranks)
    best, network = state and state["best"], network.to(ranks.device)
    average = (
        AveragedWeights(network, schedule.ema, state and state["average"]) if schedule.ema else None
    )
    module = engine.prepare(network, schedule, state)
    logger = MetricsLogger(metrics, progress, ranks, steps, stream.batch_size, trackers)
    saver, stop = Saver(checkpoints, schedule.keep, ranks), StopSignal()

    def everywhere(value):
        return gather(value, ranks)

    def judge():
        """Validate (averaged weights where there are any), remember the best, decide whether to stop early."""
        nonlocal best
        with engine.eval_model(average) as eval_model:
            figures = validate(eval_model)
            better = figures["loss"] < progress.best_loss
            if better and schedule.patience:
                best = {name: value.clone() for name, value in eval_model.state_dict().items()}
        logger.write(
            {"step": progress.step, **{f"val/{key}": value for key, value in figures.items()}}
        )
        progress.waited += 1
        if better:
            progress.best_loss, progress.best_step, progress.waited = (
                figures["loss"],
                progress.step,
                0,
            )
        if not schedule.patience or progress.best_step == progress.step:
            progress.val = figures
        progress.stopped = bool(schedule.patience) and progress.waited >= schedule.patience

    def checkpoint():
        logger.look_at_the_clock()
        progress.lost = passes.all_lost(everywhere)
        saver.save(
            progress.step,
            {
                **engine.state(),
                "progress": vars(progress),
                "best": best,
                "average": average.average if average else None,
                "rng": everywhere(random_state(ranks)),
            },
            progress.best_step,
        )

    if validate and progress.step == 0 and schedule.patience:
        judge()  # the start is a candidate too: a specialist that only gets worse stays the generalist
    module.train()
    passes = EpochAccounting(stream, progress.step, ranks.rank, ranks.world_size, progress.lost)
    batches = passes.watch(
        stream.loader(progress.step, steps, ranks.rank, ranks.world_size, workers)
    )
    while progress.step < steps and not progress.stopped:
        with logger.waiting():
            batch = next(batches).to(ranks.device)
        rate = learning_rate(progress.step, steps, schedule)
        parts = micro_batches(batch, schedule.accumulation)
        for index, part in enumerate(parts):
            with engine.accumulating(last=index == len(parts) - 1):
                with engine.autocast():
                    loss = objective(module, part) / len(parts)
                engine.backward(loss)
            logger.add(loss)
        engine.step(rate)
        if average:
            average.update(network, progress.step)
        progress.step += 1
        ranks.progress()
        passes.close_ended(everywhere)
        last, stopping = progress.step == steps, stop.agreed(ranks)
        saving = last or stopping or progress.step % schedule.checkpoint_every == 0
        if (
            saving or progress.step % schedule.log_every == 0
        ):  # nothing is saved whose loss nobody has looked at
            logger.row(rate, checkpoints)
        if validate and (
            last or (schedule.validate_every and progress.step % schedule.validate_every == 0)
        ):
            judge()
            module.train()
        if saving or progress.stopped:
            checkpoint()
        if stopping and not last:
            saver.close()
            raise Interrupted()
    saver.close()
    network = engine.export()
    if schedule.patience and best is not None:
        network.load_state_dict(best)
    elif average:
        average.swap(network)
    network.eval()
    return network, {
        "seconds": round(progress.seconds, 3),
        "examples_seen": progress.step * stream.batch_size,
        "peak_memory_bytes": peak_memory(ranks),
        "steps": progress.step,
        "best_step": progress.best_step,
        "stopped_early": progress.stopped,
        "val": progress.val,
        "lost": progress.lost,
    }


def micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """Equal parts of one rank's batch (check_batch_size made sure that they are equal)."""
    if parts == 1:
        return [batch]
    pieces = {name: getattr(batch, name).chunk(parts) for name in ("inputs", *NUMBERS)}
    return [Batch(**{name: found[part] for name, found in pieces.items()}) for part in range(parts)]


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


def random_state(ranks: Ranks) -> dict:
    """torch's generators on this rank; data needs none, its order is a function of seed and step."""
    cuda = {"cuda": torch.cuda.get_rng_state(ranks.device)} if ranks.device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_random_state(state: dict, ranks: Ranks) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if ranks.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), ranks.device)


def check_batch_size(batch: int, ranks: int, accumulation: int) -> None:
    parts = ranks * accumulation
    if batch % parts:
        near = (
            f"{batch // parts * parts} or {(batch // parts + 1) * parts}"
            if batch > parts
            else f"{parts}"
        )
        raise UserError(
            f"batch {batch} is not divisible by {ranks} ranks x {accumulation} accumulation steps; try {near}"
        )
