"""The generalist's features of the examples that a few branches need alone, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from networks import Classifier
from networks.cutting import Cut

from ...data.orders import generator
from ...data.routing import routed_ids
from ...session import Session
from ..branches import BranchFeatures
from ..features import BLOCK_BYTES, BLOCK_ROWS, FeatureWriter, KeptFeatures
from .group_answers import referred_ids
from .healing import plan_features


class Extraction(NamedTuple):
    """What is taken from the generalist.

    groups: whose branches it is for.  own: ids of train of their classes, sorted.  natural: ids
    that stand for all others, drawn at natural frequencies.  val: ids that are referred to them.
    views: of each training example.
    """

    groups: list[int]
    own: np.ndarray
    natural: np.ndarray
    val: np.ndarray
    views: int

    @property
    def train(self) -> np.ndarray:
        return np.union1d(self.own, self.natural)

    @property
    def passes(self) -> int:
        """Passes of the generalist, counted for one example each."""
        return len(self.train) * self.views + len(self.val)


def plan_extraction(
    session: Session,
    members: Mapping[int, np.ndarray],
    left: Sequence[float],
    otherwise: float,
    fewest: int,
) -> Extraction:
    """The examples that passes of the generalist on one example are enough for.

    members: the classes of each group, of which the first are taken, and at least `fewest`.
    left, otherwise: as in `plan_features`.
    """
    train, classes = session.shards("train"), list(members.values())
    firsts = [np.unique(np.concatenate(classes[: k + 1])) for k in range(len(classes))]
    own = [int(train.class_counts[each].sum()) for each in firsts]
    plan = plan_features(
        [min(2 * count, train.num_samples) for count in own],
        [len(referred_ids(session, classes[: k + 1])) for k in range(len(classes))],
        left,
        otherwise,
        session.config.specialists.views_of(session.config.data.augment),
        fewest,
    )
    groups, chosen = list(members)[: plan.groups], classes[: plan.groups]
    inside = sampled(session, chosen, plan.part)
    random = generator(session.seed("pilot branches others", 0))
    count = min(len(inside), len(train))
    natural = np.sort(random.choice(len(train), count, replace=False))
    return Extraction(groups, inside, natural, referred_ids(session, chosen), plan.views)


def sampled(session: Session, members: Sequence[np.ndarray], part: float) -> np.ndarray:
    """Ids of train of these groups, sorted: of each group a part, and at least one."""
    labels = session.shards("train").labels
    kept = []
    for index, classes in enumerate(members):
        ids = routed_ids(labels, classes)
        random = generator(session.seed("pilot branches own", index))
        count = max(1, int(part * len(ids)))
        kept.append(random.permutation(ids)[:count])
    return np.unique(np.concatenate(kept))


def extract(
    session: Session, generalist: Classifier, cut: Cut, wanted: Extraction
) -> BranchFeatures:
    """The features of both splits. Of val one view, as it is."""
    train = features_of(session, generalist, cut, "train", wanted.train, wanted.views)
    natural = np.zeros(len(train.readable), bool)
    natural[wanted.natural] = True
    val = features_of(session, generalist, cut, "val", wanted.val, 1)
    return BranchFeatures(session, dataclasses.replace(train, natural=natural), val)


def features_of(
    session: Session, generalist: Classifier, cut: Cut, split: str, ids: np.ndarray, views: int
) -> KeptFeatures:
    """ids: sorted.  What the stage `features` would keep of these samples."""
    writer = FeatureWriter(session, generalist, cut, split, views)
    places = np.full(len(writer.shards), -1)
    places[ids] = np.arange(len(ids))
    readable = np.zeros(len(writer.shards), bool)
    arrays = {
        name: np.zeros((len(ids) * views, *shape), dtype)
        for name, (shape, dtype) in writer.shapes.items()
    }
    size = max(1, min(BLOCK_ROWS, BLOCK_BYTES // writer.row_bytes))
    for view in range(views):
        measure = writer.measure_view(view)
        for start in range(0, len(ids), size):
            block = ids[start : start + size]
            values = session.measured(writer.shards, measure, ids=block)
            readable[values["ids"]] = True
            rows = places[values["ids"]] * views + view
            for name, array in arrays.items():
                array[rows] = values[name]
    at_cut = arrays["at_cut"]
    general = arrays.get("general", at_cut)
    return KeptFeatures(at_cut, general, arrays["total"], views, readable, places)
