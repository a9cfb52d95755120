"""What one of R ranks holds and sends, and what a stage writes: the formulas of docs/scaling.md.

    R        ranks
    P        weights of a network, its head's included
    C, D     classes, and numbers that a row of the head reads, a bias beside them
    B, b     examples of the global batch, and those of a rank in one pass
    N        examples of a split

All sizes are bytes.  Weights, gradients and averages are float32.  Activations of the trunk are
not counted: they are the network's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .config import Engine, ResolvedSchedule

FLOAT = 4
INDEX = 8  # an id or a label
LEAST_BUCKET, BUCKET = 2**20, 2**26  # weights of a bucket of DeepSpeed's
BUCKETS = 16  # of a network between these
ALIGNED = 1024  # buckets are multiples of this: DeepSpeed wants even ones
HEAD_BLOCK = {"cpu": 2**24, "cuda": 2**28}  # of logits that are computed at a time
SPECIALISTS_HELD = 2**29  # of an ensemble's specialists, those last used
SPARSE_FROM = 2**14  # classes from which on eq. 5 lists some of them
GENERAL_NUMBERS, GENERAL_ROWS = 2**23, 2**8  # of the generalist's probabilities then, at most
CACHED_NUMBERS, FEWEST_ROWS = 2**21, 32  # and so many where a cache holds them
MEASURED_NUMBERS = 2**26  # of probabilities in a batch that is measured
MEASURED_ROWS = 512  # of such a batch
MEASURED_ROW = 2 * INDEX + 10 * (4 + 4)  # id, label, the ten likeliest classes and probabilities
# Label, the five likeliest and their probabilities, the label's before and after calibration.
EVALUATED_ROW = 8 + 5 * (4 + 4) + 2 * 4
EVALUATED_SENT = EVALUATED_ROW + INDEX + 5 * 4 + 2 * 4  # and id, after calibration, errors
TARGET_ROW = 8 + 4 + 2  # where a row begins, its length, the log of what is left out
WEIGHTS_TRIED = 14  # of the specialists in eq. 5, whose losses on val are kept
TRAIN_MEASURED = 2**20  # examples of train that groups are found by, where val is thin,
FEWEST_OF_CLASS = 8  # or so many a class, where that is more
TARGET_LEAST = 32  # classes of a stored prediction, where there are as many

# Bytes a weight of R ranks, with k numbers of the optimizer's each: weights, gradients, the
# optimizer's states, and from ZeRO 1 on the rank's share of the weights once more.
STATE: dict[str, Callable[[int, int], float]] = {
    "ddp": lambda R, k: FLOAT * (2 + k),
    "zero0": lambda R, k: FLOAT * (2 + k),
    "zero1": lambda R, k: FLOAT * (2 + (1 + k) / R),
    "zero2": lambda R, k: FLOAT * (1 + (2 + k) / R),
    "zero3": lambda R, k: FLOAT * (3 + k) / R,
}
# How often a step moves all trained weights: an all-reduce is twice, an all-gather once.
MOVED = {"ddp": 2, "zero0": 2, "zero1": 3, "zero2": 3, "zero3": 3}


@dataclass(frozen=True)
class Network:
    """The size of a network that a stage trains or asks.

    weights: all that it has.  classes: rows of a head over the whole label set, which ranks can
    split. 0 of another head.  features: D.  outputs: logits of an example.  frozen: weights that
    training does not change.
    """

    weights: int
    classes: int
    features: int
    outputs: int
    frozen: int = 0

    @property
    def learning(self) -> int:
        return self.weights - self.frozen

    @property
    def head(self) -> int:
        """Weights of a head that ranks can split."""
        return self.classes * (self.features + 1)

    @property
    def bytes(self) -> int:
        """Bytes of its file."""
        return FLOAT * self.weights


@dataclass(frozen=True)
class Held:
    """What a rank holds while it trains, by what it is.

    states: weights, gradients, the optimizer's numbers and averaged weights.  bucket: DeepSpeed's.
    logits: and their gradient.  features: of the batch that the head reads.  whole_head: the head
    once more, where a split one comes together.
    """

    states: float
    bucket: float
    logits: float
    features: float
    whole_head: float

    @property
    def total(self) -> int:
        return round(self.states + self.bucket + self.logits + self.features + self.whole_head)


def engine_name(engine: Engine) -> str:
    """A key of STATE and MOVED."""
    return "ddp" if engine.name == "ddp" else f"zero{engine.zero_stage}"


def optimizer_numbers(schedule: ResolvedSchedule) -> int:
    """Numbers kept for each weight: AdamW's two averages, SGD's momentum."""
    if schedule.optimizer == "adamw":
        return 2
    return 1 if schedule.momentum else 0


def row_numbers(schedule: ResolvedSchedule) -> int:
    """Numbers kept for each weight of a head over all classes."""
    return optimizer_numbers(schedule) if schedule.row_rate is None else 0


def averages(schedule: ResolvedSchedule) -> int:
    """Further copies of the weights: averaged ones, and the best of early stopping."""
    return bool(schedule.ema) + bool(schedule.patience)


def splits_head(network: Network, engine: Engine, ranks: int) -> bool:
    return engine.shard_head and network.classes > 0 and ranks > 1


def held_by_training(
    network: Network,
    schedule: ResolvedSchedule,
    engine: Engine,
    ranks: int,
    device: str,
    starts_whole: bool = False,
) -> Held:
    """What training takes on the rank that holds most.

    device: "cpu" or "cuda".  starts_whole: of a network that starts as another, whose split head
    comes together for validation and export.
    """
    k, of_row = optimizer_numbers(schedule), row_numbers(schedule)
    split = network.head if splits_head(network, engine, ranks) else 0
    replicated, state = network.learning - split, STATE[engine_name(engine)]
    whole_head = network.head - split
    states = (replicated - whole_head) * state(ranks, k) + whole_head * state(ranks, of_row)
    states += FLOAT * network.frozen + split * FLOAT * (2 + of_row) / ranks
    states += FLOAT * averages(schedule) * (network.weights - split + split / ranks)
    bucket = 0
    if engine.name == "deepspeed" and ranks > 1:
        bucket = FLOAT * bucket_weights(replicated)
    batch = schedule.batch_size / schedule.accumulation
    rows = batch / ranks
    if engine.shard_head and network.classes:
        logits = min(HEAD_BLOCK[device], 2 * FLOAT * batch * network.outputs / ranks)
        features = 2 * FLOAT * (batch if ranks > 1 else rows) * network.features
    else:
        logits = 2 * FLOAT * rows * network.outputs
        features = FLOAT * rows * network.features
    whole = FLOAT * split if starts_whole else 0
    return Held(states, bucket, logits, features, whole)


def bucket_weights(weights: int) -> int:
    """Weights whose gradients DeepSpeed exchanges at once, of a network that has so many.

    A few times this is held beside the rank's share: the bucket, a copy of it, weights of stage 3
    that were gathered ahead.  So it is a part of the network, whatever that has.
    """
    most = min(BUCKET, max(LEAST_BUCKET, weights // BUCKETS))
    return -(-min(weights, most) // ALIGNED) * ALIGNED


def sent_per_step(
    network: Network, schedule: ResolvedSchedule, engine: Engine, ranks: int
) -> float:
    """Bytes that a rank sends in a step, by ring all-reduce."""
    split = network.head if splits_head(network, engine, ranks) else 0
    share = (ranks - 1) / ranks
    sent = MOVED[engine_name(engine)] * FLOAT * (network.learning - split) * share
    if split:
        # All-gather of the features, reduce-scatter of their gradients, and three sums a row.
        sent += 2 * FLOAT * schedule.batch_size * network.features * share
        sent += 6 * FLOAT * schedule.batch_size
    return sent


def checkpoint_bytes(network: Network, schedule: ResolvedSchedule) -> int:
    """Bytes of one checkpoint, all its files together."""
    numbers = network.weights * (1 + averages(schedule))
    trunk = network.learning - network.head
    states = trunk * optimizer_numbers(schedule) + network.head * row_numbers(schedule)
    return FLOAT * (numbers + states)


def kept_checkpoints(schedule: ResolvedSchedule, steps: int) -> int:
    """At most: those that stay, the one that is written, and the best one of early stopping."""
    written = -(-steps // schedule.checkpoint_every)
    return min(schedule.keep + 1, written) + bool(schedule.patience)


def steps_of(schedule: ResolvedSchedule, examples: int) -> int:
    """How many steps a schedule takes of so many examples."""
    if schedule.steps is not None:
        return schedule.steps
    assert schedule.epochs is not None, "one of both is set"
    return max(1, math.ceil(schedule.epochs * examples / schedule.batch_size))


def measuring_rows(classes: int) -> int:
    """Examples that are measured at a time."""
    return max(1, min(MEASURED_ROWS, MEASURED_NUMBERS // classes))


def held_by_measuring(network: Network, collected: int, device: str) -> int:
    """Held by a rank that reads logits in blocks: the network, a block, and all ranks' results.

    collected: bytes of all examples' rows.
    """
    rows = measuring_rows(network.classes)
    block = min(HEAD_BLOCK[device], FLOAT * rows * network.outputs)
    return network.bytes + block + collected


def held_by_ensemble(generalist: Network, specialists: int, collected: int) -> int:
    """Held by a rank that asks an ensemble. specialists: bytes of all of them."""
    rows = measuring_rows(generalist.classes) * generalist.classes
    if generalist.classes >= SPARSE_FROM:
        rows = general_rows(generalist.classes) * generalist.classes
    # Probabilities, those without what is listed, and q.
    return generalist.bytes + min(specialists, SPECIALISTS_HELD) + 3 * FLOAT * rows + collected


def general_rows(classes: int) -> int:
    """Rows on which an ensemble runs its generalist at a time, where eq. 5 lists classes."""
    cached = max(FEWEST_ROWS, CACHED_NUMBERS // classes)
    return max(1, min(GENERAL_ROWS, cached, GENERAL_NUMBERS // classes))


def exchanged(examples: int, row_bytes: int, ranks: int) -> float:
    """Sent by a rank where each has a part of N rows and all get the whole."""
    return examples * row_bytes * (ranks - 1) / ranks


def targets_bytes(rows: int, kept: int, classes: int) -> int:
    """Bytes of stored targets. rows: samples x views x members. kept: classes of each."""
    of_class = 2 + (2 if classes <= 2**16 else 4)
    return rows * (TARGET_ROW + of_class * kept)


def most_measured(given: int | None, classes: int) -> int:
    """Examples of train that groups are found by, where val is thin. given: by the config."""
    return given or max(TRAIN_MEASURED, FEWEST_OF_CLASS * classes)
