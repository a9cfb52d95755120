"""How long a run will take: steps timed on this machine, times the steps that the config asks for.

Nothing is learned: the timed network is thrown away.
"""

from __future__ import annotations

import math
import time

import torch

from networks import Classifier
from pipeline.choices import CONTROL_ROWS
from pipeline.config import Config
from pipeline.controls import twins

from ..stages.training import count_steps, specialist_steps
from .data_summary import DataSummary

TIMED_STEPS = 3
TIMED_S = 5.0  # no further step is timed beyond
TIMED_LOGITS = 2**26  # of a step, at most
WIDER = 2  # times the generalist's work, about what an ensemble's multiplications are
START_S = 3.0  # to start one job: imports and opening the shards


def seconds_per_example(network: Classifier, examples: int, device: torch.device) -> float:
    """Seconds of a forward and backward pass over one rank's share of a batch, per example."""
    examples = max(2, min(examples, TIMED_LOGITS // network.spec.num_classes))
    inputs = torch.rand(examples, *network.spec.input.shape, device=device)
    if network.spec.input.is_indices:
        inputs = (inputs * 5).int() - 4  # a fifth of a bag is filled, the rest is padding
    network = network.to(device).train()
    steps = 0
    began = elapsed = 0.0
    while steps <= TIMED_STEPS and elapsed < TIMED_S:
        if steps == 1:  # the first one warms up
            began = time.perf_counter()
        network(inputs).logsumexp(-1).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if steps:
            elapsed = time.perf_counter() - began
        steps += 1
    return elapsed / (steps - 1) / examples


def run_seconds(config: Config, data: DataSummary, of_one: float, pool: int) -> float:
    """Rough seconds of the whole run: all networks' training, `pool` of them side by side.

    of_one: seconds per training example, reading it not included.
    """
    examples = data.examples["train"]
    train, specialists = config.train, config.specialists
    ranks = config.launch.processes or 1
    generalist = count_steps(train, examples) * train.batch_size / ranks
    groups = config.clusters.num_groups
    own = math.ceil(examples * config.clusters.overlap / groups)
    lesson = specialist_steps(specialists, own) * specialists.batch_size
    beside = groups * lesson
    jobs = 5 + math.ceil(groups / (specialists.per_job or groups))
    if config.controls.enabled:
        together = config.controls.max_share * groups * lesson
        beside += len(config.controls.learning_rates) * lesson + together
        jobs += len(config.controls.learning_rates) + 1
    rows = [CONTROL_ROWS[name] for name in config.controls.rows]
    if any(row.of_second for row in rows):
        beside += generalist * ranks
        jobs += 1
    for row in rows:
        if row.trains:
            beside += (1 if row.goes_on else WIDER) * generalist * ranks
            jobs += 1
    taught_twice = twins(config).values()
    for name, student in config.students.items():
        # Its twin on hard labels learns beside it. The teacher's answers are about as much again.
        lessons = 2 + (name in taught_twice)
        beside += lessons * count_steps(student, examples) * student.batch_size
        jobs += lessons - 1
    reading_s = data.reading_s if data.split_bytes > config.data.cache_bytes else 0.0
    seconds = (generalist + beside / pool) * (of_one + reading_s)
    return seconds + START_S * jobs / pool


def in_words(seconds: float) -> str:
    """About a minute, about 20 minutes, about 3 hours."""
    if seconds < 90:
        return "about a minute"
    if seconds < 90 * 60:
        minutes = math.ceil(seconds / 60)
        if minutes > 10:
            minutes = 5 * math.ceil(minutes / 5)
        return f"about {minutes} minutes"
    hours = seconds / 3600
    if hours < 48:
        return f"about {math.ceil(hours)} hours"
    return f"about {math.ceil(hours / 24)} days"
