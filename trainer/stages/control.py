"""The honest comparison: what the same examples do for the generalist alone.

pipeline.controls says which controls there are. control_rows.py makes those of other networks.
"""

from __future__ import annotations

import math
from pathlib import Path

from pipeline.controls import COMPUTE, is_wall, twins, wall_rate
from pipeline.files import read_rows
from pipeline.store import Stage

from ..core.loop import TrainingTask
from ..session import Session
from .grouping import groups_of, skipped_groups
from .networks import load_network, read_summary, save_network
from .student import hard_twin_task
from .training import (
    branch_steps,
    count_steps,
    generalist_task,
    specialist_steps,
    train_network,
)
from .validate import validate_calibrated


def control(session: Session, stage: Stage, name: str) -> None:
    """The generalist trains on without groups. A twin learns from labels alone."""
    student = twins(session.config).get(name)
    with session.attempt(stage) as attempt:
        if student is None:
            task = trained_on(session, name)
        else:
            task = hard_twin_task(session, student)
        network, summary = train_network(session, attempt, task)
        summary["learning_rate"] = task.schedule.learning_rate
        if student is None and session.ranks.is_main:
            summary["last"] = last_validation(attempt.path("metrics.jsonl"))
        save_network(session, attempt, network, summary)
        if student is None and summary["best_step"] == 0:
            session.say("%s: no step was better on val than the generalist, which it stays", name)


def trained_on(session: Session, name: str) -> TrainingTask:
    """The generalist for as many steps as one specialist took, or as controls.max_share of all.

    It keeps its best step on val, and the start is a candidate, as of a specialist with patience.
    The best one is calibrated first: training on makes a network overconfident, and by its loss
    alone the control would give up errors that it had healed.
    """
    config = session.config
    lengths = trained_lengths(session)
    rate, steps = wall_or_compute(session, name, lengths)
    # As many times as one specialist: val is larger than the examples that one is validated on.
    validate_every = config.specialists.validate_every * steps // max(lengths)
    schedule = config.specialists.model_copy(
        update={"learning_rate": rate, "validate_every": validate_every, "patience": never(steps)}
    )
    network = load_network(session, session.run.generalist)
    validate = validate_calibrated(session)
    seed = session.seed("control", steps)
    return generalist_task(session, network, schedule, validate, seed, steps)


def never(steps: int) -> int:
    """A patience above the number of validations: it keeps the best step and never stops early."""
    return steps + 2


def wall_or_compute(session: Session, name: str, lengths: list[int]) -> tuple[float, int]:
    """(peak learning rate, steps) of one of these controls."""
    if name != COMPUTE:
        return wall_rate(session.config, name), max(lengths)
    steps = sum(lengths) + steps_of_another(session)
    share = session.config.controls.max_share
    return rate_to_go_on_with(session), max(1, round(share * steps))


def steps_of_another(session: Session) -> int:
    """Steps in which a control sees as many examples as the generalist that specialists start as.

    0 where that is the run's own, or was there before.
    """
    if not any(stage.kind.trains for stage in session.run.members):
        return 0
    schedule = session.config.train
    examples = count_steps(schedule, session.shards("train").num_samples) * schedule.batch_size
    return math.ceil(examples / session.config.specialists.batch_size)


def rate_to_go_on_with(session: Session) -> float:
    """The wall controls' rate that ends at the lowest loss on val, whichever step each keeps.

    A rate that pays in the end may be worse than the start for a while.
    """
    walls = [stage for name, stage in session.run.controls.items() if is_wall(name)]
    summaries = [read_summary(stage) for stage in walls]
    best = min(summaries, key=lambda summary: summary["last"]["raw_loss"])
    return best["learning_rate"]


def last_validation(metrics: Path) -> dict[str, float]:
    """What the last validation of a training found, from its metrics.jsonl."""
    rows = read_rows(metrics)
    last = [row for row in rows if "val/loss" in row][-1]
    prefix = "val/"
    return {key.removeprefix(prefix): value for key, value in last.items() if prefix in key}


def trained_lengths(session: Session) -> list[int]:
    """Steps of each specialist that was trained here. One stopped early counts what it took.

    Without patience they take what is planned, and the controls need not wait for them.
    """
    if not session.config.specialists.patience:
        return list(planned_lengths(session).values())
    trained = [stage for stage in session.run.specialists if stage.kind.trains and stage.is_done]
    steps = [read_summary(stage).get("steps", 0) for stage in trained]  # none of a skipped group
    lengths = [count for count in steps if count]
    return lengths or list(planned_lengths(session).values())


def planned_lengths(session: Session) -> dict[int, int]:
    """Steps that each group's specialist is to take, of those that are trained here."""
    counts = session.shards("train").class_counts
    schedule, skipped = session.config.specialists, skipped_groups(session)
    own_examples = {
        m: int(counts[classes].sum())
        for m, classes in enumerate(groups_of(session).members)
        if session.run.specialists[m].kind.trains and m not in skipped
    }
    if schedule.is_branch:
        return dict.fromkeys(own_examples, branch_steps(schedule, list(own_examples.values())))
    return {m: specialist_steps(schedule, count) for m, count in own_examples.items()}
