"""Which classes does the generalist confuse?

Measure its predictions, group classes, route samples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from clustering import (
    ClassGroups,
    GroupForecast,
    PredictionStatistics,
    captured_confusion,
    captured_unlabelled,
    forecast,
    forecast_table,
    group_trained_classes,
    method_inputs,
)
from networks import Classifier, lazy_logits
from pipeline.config import UserError
from pipeline.store import Stage, read_json, write_json

from ..data.routing import route as route_samples
from ..data.shards import ShardSet
from ..data.streams import Batch
from ..session import Session
from .networks import load_network

ROUTED_TOP = 10  # the generalist's most probable classes, kept for every val example
VAL_EXAMPLES_PER_CLASS = 10  # fewer than this, and `measure` reads training data instead


def measure(session: Session, stage: Stage) -> None:
    """The generalist's predictions on val: their covariance is all that clustering needs."""
    with session.attempt(stage) as attempt:
        network = load_network(session, session.run.generalist)
        shards = measuring_shards(session)
        statistics = PredictionStatistics(session.num_classes, top_k=session.config.clusters.top_k)
        try:
            predictions = session.measured(
                shards, lambda batch: predicted_top(network, batch, statistics)
            )
        except ValueError as error:  # of the statistics: NaN, say
            raise UserError(f"the generalist's predictions cannot be counted: {error}") from None
        if shards is not session.shards("val"):
            predictions = session.measured(
                session.shards("val"),
                lambda batch: predicted_top(network, batch, statistics, count=False),
            )
        statistics.save(attempt.path(f"statistics-{session.ranks.rank}.npz"))
        session.barrier()
        if session.ranks.is_main:
            merged = PredictionStatistics.load(attempt.path("statistics-0.npz"))
            for rank in range(1, session.ranks.world_size):
                other = attempt.path(f"statistics-{rank}.npz")
                merged.merge(PredictionStatistics.load(other))
            merged.save(attempt.path("statistics.npz"))
            arrays: dict[str, Any] = predictions
            np.savez(attempt.path("predictions.npz"), **arrays)


def predicted_top(
    network: Classifier, batch: Batch, statistics: PredictionStatistics, count: bool = True
) -> dict[str, Tensor]:
    """The most probable classes of a batch; count: all of its predictions enter the statistics."""
    logits = lazy_logits(network, batch.inputs)
    top = logits.summary(max(ROUTED_TOP, statistics.top_k or 0))
    if count and statistics.exact:
        statistics.update(logits.materialize().softmax(1), batch.labels)
    elif count:
        k = statistics.top_k
        statistics.update(top.indices[:, :k], top.probabilities[:, :k], batch.labels)
    return {
        "top": top.indices[:, :ROUTED_TOP].int(),
        "top_probability": top.probabilities[:, :ROUTED_TOP],
        "labels": batch.labels,
    }


def measuring_shards(session: Session, enough: int = VAL_EXAMPLES_PER_CLASS) -> ShardSet:
    """What groups are found on: val, or train where val has few examples per class.

    A temperature or a weight is one number, and is fitted on val however few: on training data
    that the networks know by heart it says nothing.
    """
    val = session.shards("val")
    if val.num_samples < enough * val.num_classes:
        session.say(
            "val has %d examples for %d classes: predictions are measured on train",
            val.num_samples,
            val.num_classes,
        )
        return session.shards("train")
    return val


def cluster(session: Session, stage: Stage) -> None:
    """Groups of classes that the generalist confuses.  No labels are needed to find them."""
    with session.attempt(stage) as attempt:
        if not session.ranks.is_main:
            return
        statistics = prediction_statistics(session)
        groups = find_groups(session, statistics)
        groups.save(attempt.path("groups.json"))
        rows = forecast(groups, statistics)
        least = session.config.clusters.min_gain
        untaught = groups_without_examples(session, groups)
        skipped = [m for m, row in enumerate(rows) if m in untaught or forecast_gain(row) < least]
        summary = summarise_groups(session, groups, statistics, rows, skipped)
        write_json(attempt.path("summary.json"), summary)
        say_groups(session, groups, summary)


def has_examples(session: Session) -> np.ndarray:
    """Whether a class has training examples, bool [C]."""
    return session.shards("train").class_counts > 0


def groups_without_examples(session: Session, groups: ClassGroups) -> set[int]:
    """Groups of classes that train has no example of: nothing can be learnt about these."""
    trained = has_examples(session)
    return {m for m, classes in enumerate(groups.members) if not trained[classes].any()}


def prediction_statistics(session: Session) -> PredictionStatistics:
    try:
        return PredictionStatistics.load(session.run.measure.path("statistics.npz"))
    except ValueError as error:
        raise UserError(f"[clusters] {error}") from None


def find_groups(session: Session, statistics: PredictionStatistics) -> ClassGroups:
    """The user's own groups, or those of clustering.

    Raises UserError if they do not fit the data.
    """
    config = session.config.clusters
    try:
        if config.groups_file:
            groups = ClassGroups.load(config.groups_file)
        else:
            rows = None
            if "classifier_rows" in method_inputs(config.method):
                network = load_network(session, session.run.generalist)
                rows = network.linear_head.weight.detach().cpu().numpy()
            groups = group_trained_classes(
                statistics,
                has_examples(session),
                config.num_groups,
                method=config.method,
                capacity=config.capacity,
                overlap=config.overlap,
                coverage=config.coverage,
                seed=session.config.seed,
                classifier_rows=rows,
            )
    except ValueError as error:
        raise UserError(f"[clusters] {error}") from None
    if groups.num_classes != session.num_classes:
        raise UserError(
            f"clusters.groups_file = {config.groups_file} is for {groups.num_classes} classes, "
            f"the data has {session.num_classes}"
        )
    return groups


def summarise_groups(
    session: Session,
    groups: ClassGroups,
    statistics: PredictionStatistics,
    rows: list[GroupForecast],
    skipped: list[int],
) -> dict:
    """What summary.json says of groups: the errors that they capture, against chance.

    rows: the forecast of each.  Raises UserError if all are skipped.
    """
    if len(skipped) == len(groups_without_examples(session, groups)) == len(groups):
        raise UserError(
            f"clusters.groups_file = {session.config.clusters.groups_file}: train has no example "
            "of a class in any of its groups, so there is no specialist to train"
        )
    if len(skipped) == len(groups):
        best = max(forecast_gain(row) for row in rows)
        raise UserError(
            f"clusters.min_gain = {session.config.clusters.min_gain} leaves no group a "
            f"specialist; the best forecast is {best:.4f}"
        )
    captured, chance = captured_confusion(groups, statistics.confusion)
    unlabelled, unlabelled_chance = captured_unlabelled(groups, statistics)
    return {
        "captured": no_nan(captured),
        "chance": chance,
        "captured_unlabelled": no_nan(unlabelled),
        "chance_unlabelled": unlabelled_chance,
        "sizes": [len(classes) for classes in groups.members],
        "forecast": rows,
        "skipped": skipped,
    }


def forecast_gain(row: GroupForecast) -> float:
    """The gain of a forecast with labels, which val always has."""
    assert row["gain"] is not None
    return row["gain"]


def say_groups(session: Session, groups: ClassGroups, summary: dict) -> None:
    """The groups, and what each could gain, for whoever watches."""
    session.say(
        "%d groups of %d to %d classes, %.2f per class, hold %.1f %% of the generalist's errors on "
        "val (chance %.1f %%); without labels %.1f %% were expected",
        len(groups),
        groups.sizes.min(),
        groups.sizes.max(),
        groups.sizes.sum() / groups.num_classes,
        percent(summary["captured"]),
        percent(summary["chance"]),
        percent(summary["captured_unlabelled"]),
    )
    for line in forecast_table(summary["forecast"], summary["skipped"]):
        session.say("%s", line)
    session.say(
        "gain: fraction of val that a perfect specialist would correct; shared errors count in "
        "every group"
    )
    untaught = groups_without_examples(session, groups)
    too_small = [m for m in summary["skipped"] if m not in untaught]
    if too_small:
        session.say(
            "%d of %d groups are forecast to gain less than clusters.min_gain = %g: no specialist",
            len(too_small),
            len(groups),
            session.config.clusters.min_gain,
        )
    if untaught:
        session.say(
            "%d of %d groups have no class with a training example: no specialist",
            len(untaught),
            len(groups),
        )


def route(session: Session, stage: Stage) -> None:
    """All groups' samples in one pass, so that no specialist reads the whole to keep a part."""
    config = session.config.route
    untrained = skipped_groups(session)
    untrained |= {m for m, each in enumerate(session.run.specialists) if not each.kind.trains}
    with session.attempt(stage) as attempt:
        groups = {
            m: classes for m, classes in enumerate(groups_of(session).members) if m not in untrained
        }
        if session.ranks.is_main:
            train = session.shards("train")
            lost = route_samples(
                train, groups, attempt.directory, config.mode, config.max_bytes, session.say
            )
            session.losses.add(train, lost)


def groups_of(session: Session) -> ClassGroups:
    """The run's groups, once they are found."""
    return ClassGroups.load(session.run.cluster.path("groups.json"))


def skipped_groups(session: Session) -> set[int]:
    """Groups that were forecast to gain too little for a specialist."""
    return set(read_json(session.run.cluster.path("summary.json"))["skipped"])


def confusion_with(session: Session, classes: np.ndarray) -> np.ndarray:
    """How much the generalist confuses each class with those of a group, float [C].

    By its predictions alone; 0 for the group's own classes.
    """
    expected = prediction_statistics(session).expected_confusion
    total = expected[classes].sum(axis=0) + expected[:, classes].sum(axis=1)
    confusion = np.asarray(total, float).ravel()
    confusion[classes] = 0
    return confusion


def no_nan(fraction: float) -> float | None:
    """JSON has no NaN: a fraction of no errors at all is null."""
    return None if math.isnan(fraction) else fraction


def percent(fraction: float | None) -> float:
    return math.nan if fraction is None else 100 * fraction
