"""The honest comparison: what the same examples do for the generalist alone.

pipeline.controls says which controls there are.
"""

from __future__ import annotations

import math

from pipeline.controls import COMPUTE, HARD_TWIN, best_wall, wall_rate
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
from .validate import validate_classifier


def control(session: Session, stage: Stage, name: str) -> None:
    """The generalist trains on without groups; student_hard learns from labels alone."""
    with session.attempt(stage) as attempt:
        if name == HARD_TWIN:
            task = hard_twin_task(session, "main")
        else:
            task = trained_on(session, name)
        network, summary = train_network(session, attempt, task)
        summary["learning_rate"] = task.schedule.learning_rate
        save_network(session, attempt, network, summary)


def trained_on(session: Session, name: str) -> TrainingTask:
    """The generalist for as many steps as one specialist takes, or as all together."""
    config = session.config
    lengths = trained_lengths(session)
    rate, steps = wall_or_compute(session, name, lengths)
    # As many times as one specialist: val is larger than the examples that one is validated on.
    validate_every = config.specialists.validate_every * steps // max(lengths)
    schedule = config.specialists.model_copy(
        update={"learning_rate": rate, "patience": 0, "validate_every": validate_every}
    )
    network = load_network(session, session.run.generalist)
    validate = validate_classifier(session)
    seed = session.seed("control", steps)
    return generalist_task(session, network, schedule, validate, seed, steps)


def wall_or_compute(session: Session, name: str, lengths: list[int]) -> tuple[float, int]:
    """(peak learning rate, steps) of one of these controls."""
    if name != COMPUTE:
        return wall_rate(session.config, name), max(lengths)
    best = best_wall(session.run)
    assert best is not None, "control_compute waits for the wall controls"
    steps = sum(lengths) + steps_of_another(session)
    return read_summary(session.run.controls[best])["learning_rate"], steps


def steps_of_another(session: Session) -> int:
    """Steps in which a control sees as many examples as the generalist that specialists start as.

    0 where that is the run's own, or was there before.
    """
    if not any(stage.kind.trains for stage in session.run.members):
        return 0
    schedule = session.config.train
    examples = count_steps(schedule, session.shards("train").num_samples) * schedule.batch_size
    return math.ceil(examples / session.config.specialists.batch_size)


def trained_lengths(session: Session) -> list[int]:
    """Planned steps of each specialist that is trained here."""
    counts = session.shards("train").class_counts
    schedule, skipped = session.config.specialists, skipped_groups(session)
    own_examples = {
        m: int(counts[classes].sum())
        for m, classes in enumerate(groups_of(session).members)
        if session.run.specialists[m].kind.trains and m not in skipped
    }
    if schedule.is_branch:
        return [branch_steps(schedule, list(own_examples.values()))] * len(own_examples)
    return [specialist_steps(schedule, count) for count in own_examples.values()]
