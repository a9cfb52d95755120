"""Classes that come later: what differs in a run that adds them to a finished one.

The old run's generalist gets new rows, which alone learn.  Its groups and specialists are
inherited, and one new group has the new classes and the old ones that they are confused with
most.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clustering import ClassGroups, forecast
from ensemble import fit_shift
from networks import (
    Classifier,
    DustbinHead,
    ModelSpec,
    add_classes,
    lazy_logits,
    load_classifier,
    match_classes,
    merge_grown_head,
    named_by,
    remap_specialist,
)
from pipeline.config import UserError
from pipeline.methods import ExtendingMethod
from pipeline.store import Stage, read_json, write_json, write_text

from ..core.metrics import summarise
from ..data.streams import Batch
from ..session import Session
from .grouping import (
    confusion_with,
    groups_of,
    judging_statistics,
    say_groups,
    skipped_groups,
    summarise_groups,
)
from .networks import builders_of, load_network, record_inputs, save_network
from .specialist import save_skipped
from .training import generalist_task, train_network
from .validate import referred_examples, validate_classifier


def method_of(session: Session) -> ExtendingMethod:
    return cast(ExtendingMethod, session.run.method)


def generalist(session: Session, stage: Stage) -> None:
    """The old generalist with rows for the new classes. These alone learn."""
    with session.attempt(stage) as attempt:
        validate = validate_classifier(session)
        network = grown_generalist(session)
        task = generalist_task(session, network, session.config.train, validate)
        network, summary = train_network(session, attempt, task)
        save_network(session, attempt, merge_grown_head(network), summary)


def grown_generalist(session: Session) -> Classifier:
    """The old run's generalist, with rows for new classes that are still to be learned."""
    old = method_of(session).old
    shape = tuple(session.shards("train").input_shape)
    try:
        network = load_classifier(
            old / "generalist", session.ranks.device, builders_of(session.config)
        )
        if network.spec.input.shape != shape:
            raise ValueError(
                f"its generalist reads inputs of shape {list(network.spec.input.shape)}, "
                f"the data's are {list(shape)}"
            )
        record_inputs(session, network)
        return add_classes(network, session.class_names)
    except ValueError as error:
        raise UserError(f"extend.run = {old}: {error}") from None


def old_classes(session: Session) -> np.ndarray:
    """The classes that the old run knows, in its order, by their indices here, int64 [C_old]."""
    spec = ModelSpec.load(method_of(session).old / "generalist" / "model.json")
    return np.array(match_classes(spec.class_names, session.class_names))


def cluster(session: Session, stage: Stage) -> None:
    """The old run's groups and one more.

    What the old run skipped stays skipped: what is there costs nothing, and the new classes need a
    specialist.
    """
    with session.attempt(stage) as attempt:
        if not session.ranks.is_main:
            return
        statistics = judging_statistics(session)
        groups = extend_groups(session)
        write_text(attempt.path("groups.json"), groups.to_json())
        rows = forecast(groups, statistics)
        skipped = method_of(session).skipped()
        summary = summarise_groups(session, groups, statistics, rows, skipped)
        write_json(attempt.path("summary.json"), summary)
        say_groups(session, groups, summary)


def extend_groups(session: Session) -> ClassGroups:
    """The old run's groups, and one of the new classes with the old ones most confused with them.

    It is as large as the largest old group, or has as many old classes as new ones where that is
    more, unless extend.companions says how many.
    """
    groups = ClassGroups.load(method_of(session).old / "clusters" / "groups.json")
    known = old_classes(session)
    new = np.setdiff1d(np.arange(session.num_classes), known)
    count = session.config.extend.companions
    if count is None:
        count = max(int(groups.sizes.max()) - len(new), len(new))
    confusion = confusion_with(session, new)
    companions = known[np.argsort(-confusion[known], kind="stable")[:count]]
    session.say(
        "%d new classes, in a group with the %d of the %d old ones that they are confused with "
        "most: %.1f %% of what they are confused with",
        len(new),
        len(companions),
        len(known),
        100 * confusion[companions].sum() / max(confusion.sum(), 1e-30),
    )
    inherited = [known[classes] for classes in groups.members]
    return ClassGroups([*inherited, np.r_[new, companions]], session.num_classes)


def inherit_specialist(session: Session, stage: Stage, index: int) -> None:
    """A specialist of the old run, its dustbin grown by the new classes.  It costs nothing here."""
    classes = groups_of(session).members[index]
    with session.attempt(stage) as attempt:
        if index in skipped_groups(session):
            save_skipped(session, attempt, index)
            return
        network, summary = inherited_specialist(session, index)
        summary["new_rows_shift"] = calibrate_new_class_bias(session, network, classes)
        save_network(session, attempt, network, summary)


def inherited_specialist(session: Session, index: int) -> tuple[Classifier, dict]:
    """The old run's specialist among the classes of this one, and its summary without costs."""
    old = method_of(session).old
    path = old / "specialists" / f"{index:03d}"
    try:
        network = load_classifier(path, session.ranks.device, builders_of(session.config))
        network.spec = named_by(network.spec, ModelSpec.load(old / "generalist" / "model.json"))
        generalist = load_network(session, session.run.generalist)
        network = remap_specialist(network, generalist)
        free = {"seconds": 0.0, "examples_seen": 0, "peak_memory_bytes": 0, "steps": 0}
        summary = read_json(path / "summary.json") | free
    except (OSError, ValueError) as error:
        raise UserError(f"extend.run = {old}: {error}") from None
    return network, summary | {"taken_from": str(path)}


def calibrate_new_class_bias(
    session: Session, network: Classifier, classes: np.ndarray
) -> float | None:
    """Raise the biases of an inherited specialist's rows of the new classes.  Changes the network.

    The shift is what fits best the val examples that the generalist refers to it. What it
    predicts among its own classes stays.  These rows are the generalist's, and read features that
    were learned without them, on which they come out too low.  None, and no change, where it has
    no such rows or is referred no example of a new class.
    """
    head = network.eval().head
    if not isinstance(head, DustbinHead) or head.kept is not None:
        return None
    new = torch.ones(session.num_classes, dtype=torch.bool)
    new[torch.from_numpy(old_classes(session))] = False
    new = new.to(head.bias.device)
    rows = new[head.row_classes]

    def old_or_new(batch: Batch) -> dict[str, Tensor]:
        features = network.trunk(network.preprocess(batch.inputs))
        logits = F.linear(features, head.weight, head.bias).float()
        either = [logits[:, ~rows].logsumexp(1), logits[:, rows].logsumexp(1)]
        return {"logits": torch.stack(either, 1), "labels": new[batch.labels].long()}

    ids = referred_examples(session, classes)
    values = session.measured(session.shards("val"), old_or_new, ids=ids)
    if not values["labels"].any():
        return None
    logits, labels = (torch.from_numpy(values[key]) for key in ("logits", "labels"))
    shift = fit_shift(logits, labels, [1])
    with torch.no_grad():
        head.bias[rows] += shift
    return shift


# What evaluate says of old and new classes

AGE_KEYS = ("n", "top1", "top5", "nll", "macro_top1")


def split_old_new(old: np.ndarray, values: dict[str, np.ndarray]) -> dict[str, dict]:
    """Metrics of the test examples of old classes and of new ones, where there are any.

    Every prediction is among all classes.
    """
    keys = ("labels", "top5", "top5_probability", "label_probability", "squared_error")
    is_old = np.isin(values["labels"], old)
    rows = {}
    for name, chosen in (("old_classes", is_old), ("new_classes", ~is_old)):
        if chosen.any():
            row = summarise(*(values[key][chosen] for key in keys))
            rows[name] = {key: row[key] for key in AGE_KEYS}
    return rows


def before_new_classes(session: Session, network: Classifier) -> dict:
    """Before: the old generalist on the test examples of its classes, among these alone.

    Its logits are this generalist's, whose old rows and trunk are the same.
    """
    test, old = session.shards("test"), old_classes(session)
    row: dict = {
        "run": str(method_of(session).old),
        "old": len(old),
        "new": session.num_classes - len(old),
    }
    ids = np.flatnonzero(np.isin(test.labels, old))
    among = torch.from_numpy(old).to(session.ranks.device)

    def predict(batch: Batch) -> dict[str, Tensor]:
        logits = lazy_logits(network, batch.inputs).of_classes(among)
        return {"predicted": among[logits.argmax(1)], "labels": batch.labels}

    if len(ids):
        values = session.measured(test, predict, ids=ids)
        row["top1_before"] = float((values["predicted"] == values["labels"]).mean())
    return row
