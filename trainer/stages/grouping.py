"""Which classes does the generalist confuse?

Measure its predictions, group classes, route samples.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clustering import (
    ClassGroups,
    GroupForecast,
    PredictionStatistics,
    captured_confusion,
    captured_unlabelled,
    covariance_fits,
    forecast,
    forecast_table,
    group_trained_classes,
    method_inputs,
    predictions_to_keep,
)
from clustering.choices import READ_COVARIANCE
from networks import Classifier, lazy_logits
from networks.temporaries import appearing
from pipeline.config import Clusters, UserError
from pipeline.results.forecasts import captured_text, ceiling_text, is_thin, measured_on
from pipeline.scaling import most_measured
from pipeline.store import Stage, read_json, write_json, write_text

from ..data.orders import part_of_each_class
from ..data.routing import route as route_samples
from ..data.streams import Batch
from ..session import Session
from .networks import load_network

ROUTED_TOP = 10  # the generalist's most probable classes, kept for every val example
OF_VAL = "val.npz"  # of `measure` where val is thin. Else statistics.npz is of val


def measure(session: Session, stage: Stage) -> None:
    """The generalist's predictions on val: what they expect to be confused is all that is needed.

    Where val has few examples a class groups are found by those on train: how the probability is
    spread says who is like whom, even where the network knows the examples. Errors are counted on
    val however thin, since on what a network knows it makes few.
    """
    with session.attempt(stage) as attempt:
        network = load_network(session, session.run.generalist)
        val = session.shards("val")
        statistics, predictions = gather_predictions(session, network, "val")
        if is_thin(val.num_samples, val.num_classes):
            session.say(
                "val has %d examples for %d classes: groups are found by the predictions on train, "
                "and judged by the errors on val",
                val.num_samples,
                val.num_classes,
            )
            save_merged(session, statistics, attempt.path(OF_VAL))
            statistics, _ = gather_predictions(session, network, "train", train_ids(session))
        save_merged(session, statistics, attempt.path("statistics.npz"))
        if session.ranks.is_main:
            arrays: dict[str, Any] = predictions
            np.savez(attempt.path("predictions.npz"), **arrays)


def train_ids(session: Session) -> np.ndarray | None:
    """The train examples that groups are found by, ascending. None is all, where they are few.

    Of more than `clusters.train_examples` they are a part of each class, drawn by the run's seed.
    Without that key these are 2^20, or 8 of a class where that is more.
    """
    train = session.shards("train")
    most = most_measured(session.config.clusters.train_examples, session.num_classes)
    if len(train) <= most:
        return None
    part = most / len(train)
    ids = part_of_each_class(train.labels, np.arange(len(train)), part, session.seed("measured", 0))
    session.say(
        "of train's %d examples %d are measured, %.2g %% of each class",
        len(train),
        len(ids),
        100 * part,
    )
    return ids


def gather_predictions(
    session: Session, network: Classifier, split: str, ids: np.ndarray | None = None
) -> tuple[PredictionStatistics, dict[str, np.ndarray]]:
    """This rank's statistics of a split, and the most probable classes of all of its examples.

    ids: only these examples.
    """
    config, num_classes = session.config.clusters, session.num_classes
    dense = config.top_k in (None, "all") and covariance_fits(num_classes)
    if config.top_k == "all" and not dense:
        raise UserError(
            f'clusters.top_k = "all": the covariance of {num_classes} classes is above the limit '
            "of 1 GiB; give the number of predictions to keep, 10 say"
        )
    top_k = config.top_k
    if top_k is None:
        top_k = predictions_to_keep(num_classes, config.method)
    statistics = PredictionStatistics(num_classes, top_k=None if top_k == "all" else top_k)
    try:
        predictions = session.measured(
            session.shards(split),
            lambda batch: predicted_top(network, batch, statistics, dense),
            ids=ids,
        )
    except ValueError as error:  # of the statistics: NaN, say
        raise UserError(f"the generalist's predictions cannot be counted: {error}") from None
    return statistics, predictions


def save_merged(session: Session, statistics: PredictionStatistics, path: Path) -> None:
    """Each rank's statistics in a file of its own beside `path`, and their sum there."""

    def of_rank(rank: int) -> Path:
        return path.with_name(f"{path.stem}-{rank}.npz")

    _save(statistics, of_rank(session.ranks.rank))
    session.barrier()
    if session.ranks.is_main:
        merged = PredictionStatistics.load(of_rank(0))
        for rank in range(1, session.ranks.world_size):
            merged.merge(PredictionStatistics.load(of_rank(rank)))
        _save(merged, path)


def _save(statistics: PredictionStatistics, path: Path) -> None:
    """Under a temporary name that says who writes, so that a kill leaves nothing for good."""
    with appearing(path) as temporary, open(temporary, "wb") as file:
        statistics.write(file)


def predicted_top(
    network: Classifier, batch: Batch, statistics: PredictionStatistics, dense: bool
) -> dict[str, Tensor]:
    """The most probable classes of a batch, whose predictions enter the statistics.

    dense: all predictions are computed, and the statistics keep what they need.
    """
    logits = lazy_logits(network, batch.inputs)
    if dense:
        top = logits.summary(ROUTED_TOP)
        statistics.update(logits.materialize().softmax(1), batch.labels)
    else:
        k = statistics.top_k
        assert k is not None
        top = logits.summary(max(ROUTED_TOP, k))
        statistics.update(top.indices[:, :k], top.probabilities[:, :k], batch.labels)
    return {
        "top": top.indices[:, :ROUTED_TOP].int(),
        "top_probability": top.probabilities[:, :ROUTED_TOP],
        "labels": batch.labels,
    }


def cluster(session: Session, stage: Stage) -> None:
    """Groups of classes that the generalist confuses.  No labels are needed to find them."""
    with session.attempt(stage) as attempt:
        if not session.ranks.is_main:
            return
        groups = find_groups(session, prediction_statistics(session))
        write_text(attempt.path("groups.json"), groups.to_json())
        statistics = judging_statistics(session)
        rows = forecast(groups, statistics)
        untaught = groups_without_examples(session, groups)
        skipped = groups_without_specialist(session.config.clusters, rows, untaught)
        summary = summarise_groups(session, groups, statistics, rows, skipped)
        write_json(attempt.path("summary.json"), summary)
        say_groups(session, groups, summary)


def groups_without_specialist(
    config: Clusters, rows: list[GroupForecast], untaught: set[int]
) -> list[int]:
    """Groups that get none, ascending: untaught, too small a forecast, or not among the largest.

    rows: the forecast of each group.
    """
    worth = [
        m
        for m, row in enumerate(rows)
        if m not in untaught and forecast_gain(row) >= config.min_gain
    ]
    largest_first = sorted(worth, key=lambda m: -forecast_gain(rows[m]))  # sorted() is stable
    chosen = set(largest_first[: config.specialists])
    return [m for m in range(len(rows)) if m not in chosen]


def has_examples(session: Session) -> np.ndarray:
    """Whether a class has training examples, bool [C]."""
    return session.shards("train").class_counts > 0


def groups_without_examples(session: Session, groups: ClassGroups) -> set[int]:
    """Groups of classes that train has no example of: nothing can be learnt about these."""
    trained = has_examples(session)
    return {m for m, classes in enumerate(groups.members) if not trained[classes].any()}


def prediction_statistics(session: Session) -> PredictionStatistics:
    """What groups are found with.  Raises UserError where `cluster` cannot read it."""
    return load_statistics(session.run.measure.path("statistics.npz"))


def judging_statistics(session: Session) -> PredictionStatistics:
    """What groups are judged by: of the split that `judged_on` names, alone."""
    of_val = session.run.measure.path(OF_VAL)
    return load_statistics(of_val) if of_val.exists() else prediction_statistics(session)


def load_statistics(path: Path) -> PredictionStatistics:
    try:
        return PredictionStatistics.load(path)
    except ValueError as error:
        raise UserError(f"[clusters] {error}") from None


def check_covariance(session: Session, statistics: PredictionStatistics) -> None:
    """Raises UserError where a method reads the covariance, and another measured without it."""
    config = session.config.clusters
    wants_all = config.top_k is None and config.method in READ_COVARIANCE
    if wants_all and not statistics.exact and covariance_fits(session.num_classes):
        raise UserError(
            f'clusters.method = "{config.method}" reads the exact covariance, and the predictions '
            f"were measured for another method: the {statistics.top_k} largest of each example "
            'are kept; set clusters.top_k = "all" and run again with --force'
        )


def find_groups(session: Session, statistics: PredictionStatistics) -> ClassGroups:
    """The user's own groups, or those of clustering.

    Raises UserError if they do not fit the data.
    """
    config = session.config.clusters
    weights = None
    if config.capacity_of == "examples":
        weights = session.shards("train").class_counts
    try:
        if config.groups_file:
            groups = ClassGroups.load(config.groups_file)
        else:
            check_covariance(session, statistics)
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
                weights=weights,
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

    statistics: `judging_statistics`.  rows: the forecast of each.  Raises UserError if all are
    skipped.
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
    counts = session.shards("train").class_counts
    return {
        "split": measured_on(session.run.measure),
        "captured": no_nan(captured),
        "chance": chance,
        "captured_unlabelled": no_nan(unlabelled),
        "chance_unlabelled": unlabelled_chance,
        "sizes": [len(classes) for classes in groups.members],
        "train_examples": [int(counts[classes].sum()) for classes in groups.members],
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
        "%d groups of %d to %d classes, %.2f per class, %s; without labels %.1f %% were expected",
        len(groups),
        groups.sizes.min(),
        groups.sizes.max(),
        groups.sizes.sum() / groups.num_classes,
        captured_text(summary["captured"], summary["chance"], summary["split"]),
        percent(summary["captured_unlabelled"]),
    )
    if session.config.clusters.capacity_of == "examples":
        examples = summary["train_examples"]
        session.say(
            "%d to %d training examples a group, %.0f on average",
            min(examples),
            max(examples),
            sum(examples) / len(examples),
        )
    for line in forecast_table(summary["forecast"], summary["skipped"]):
        session.say("%s", line)
    session.say("%s", ceiling_text(summary["split"]))
    untaught = groups_without_examples(session, groups)
    config = session.config.clusters
    taught = [m for m in summary["skipped"] if m not in untaught]
    too_small = [m for m in taught if forecast_gain(summary["forecast"][m]) < config.min_gain]
    if too_small:
        session.say(
            "%d of %d groups are forecast to gain less than clusters.min_gain = %g: no specialist",
            len(too_small),
            len(groups),
            config.min_gain,
        )
    if len(taught) > len(too_small):
        session.say(
            "%d of %d groups are not among the clusters.specialists = %d with the largest "
            "forecasts: no specialist",
            len(taught) - len(too_small),
            len(groups),
            config.specialists,
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

    By its predictions alone. 0 for the group's own classes.
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
