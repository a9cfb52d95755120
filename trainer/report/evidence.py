"""What a finished run left on disk, read once for all sections of the page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.config import UserError
from pipeline.graph import RunDirectory
from pipeline.results import (
    Results,
    Row,
    SpecialistMetrics,
    named_rows,
    read_evaluation,
    read_file,
)
from pipeline.results.forecasts import judged_on
from pipeline.store import read_json

from ..data.label_files import class_counts as class_counts_of
from . import tables
from .predictions import Predictions

if TYPE_CHECKING:
    from ..data.shards import ShardSet

AT_ONCE_S = 1.0  # by which two trainings overlap before they count as side by side
LONGEST_NAME = 80  # characters of a class name


class Changes(NamedTuple):
    """How many test examples routed to a specialist the ensemble fixed, and broke."""

    fixed: int
    broken: int


class Conditional(NamedTuple):
    """Accuracy on a specialist's classes, among these: of the generalist, of the specialist."""

    before: float
    after: float


class Names(Sequence[str]):
    """A name for each of C classes, made when it is read: a page shows few of a million.

    given: names of the first classes. The others' are empty.  as_shown: (name, class) -> name.
    """

    def __init__(self, given: Sequence, num_classes: int, as_shown: Callable[[str, int], str]):
        self._given = given
        self._num_classes = num_classes
        self._as_shown = as_shown

    def __len__(self) -> int:
        return self._num_classes

    def __getitem__(self, c):
        if not 0 <= c < self._num_classes:
            raise IndexError(f"class {c}; there are {self._num_classes}")
        name = str(self._given[c]) if c < len(self._given) else ""
        return self._as_shown(name, int(c))


@dataclass(frozen=True)
class Evidence:
    """A finished run and what can be read of it. Absent parts are None or empty.

    results: the content of results.json. images: the test split, for its pictures.
    given_counts: [C], training examples of each class. None: the manifest's count.
    """

    run: RunDirectory
    results: Results
    images: ShardSet | None = None
    given_counts: Sequence[int] | np.ndarray | None = None

    @property
    def has_specialists(self) -> bool:
        return self.run.config.has_specialists

    @cached_property
    def rows(self) -> dict[str, Row]:
        """The rows of results.json by their name in the tables."""
        return named_rows(self.results)

    @cached_property
    def missing(self) -> list[int]:
        """Specialists that the ensemble was evaluated without."""
        ensemble = read_evaluation(self.run.evaluate, "ensemble")
        if ensemble is None:
            return []
        return sorted(ensemble.get("missing") or [])

    # Predictions

    def predictions(self, name: str) -> Predictions | None:
        return Predictions.read(self.run.evaluate.path(f"{name}.npz"))

    @cached_property
    def before(self) -> Predictions:
        """The generalist's predictions."""
        predictions = self.predictions("generalist")
        assert predictions is not None, "evaluate writes it before it is done"
        return predictions

    @cached_property
    def after(self) -> Predictions:
        """The ensemble's predictions."""
        predictions = self.predictions("ensemble")
        assert predictions is not None, "evaluate writes it before it is done"
        return predictions

    @property
    def labels(self) -> np.ndarray:
        return self.before.labels

    @cached_property
    def correct(self) -> dict[str, np.ndarray]:
        """Name -> bool [n], for every row with predictions."""
        names = ["generalist", *self.results["controls"], "ensemble", *self.results["students"]]
        predictions = {name: self.predictions(name) for name in names}
        return {name: p.correct for name, p in predictions.items() if p is not None}

    @cached_property
    def is_contended(self) -> bool:
        """Whether some trainings ran side by side, so that their seconds may not be compared.

        An attempt's DONE has when it ended and how long it took.
        """
        spans = []
        for stage in self.run.stages:
            done = stage.done() if stage.kind.trains else None
            if done is not None and "seconds" in done and "finished" in done:
                spans.append((done["finished"] - done["seconds"], done["finished"]))
        spans.sort()
        return any(start < end - AT_ONCE_S for (_, end), (start, _) in itertools.pairwise(spans))

    # Classes

    @cached_property
    def class_names(self) -> list:
        """The class names of the shards, else of the model, else none."""
        known = list(getattr(self.images, "class_names", None) or [])
        if known:
            return known
        model = read_file(self.run.generalist, "model.json") or {}
        return model.get("class_names") or []

    @cached_property
    def names(self) -> Sequence[str]:
        """A short name for every class. Its index where it has none."""
        return Names(self.class_names, self.num_classes, _short_name)

    @cached_property
    def num_classes(self) -> int:
        declared = self._groups_file.get("num_classes")
        if declared:
            return int(declared)
        largest = max(int(self.labels.max()), *(int(m.max()) for m in self.groups if len(m)), -1)
        return max(largest + 1, len(self.class_names))

    @cached_property
    def class_counts(self) -> tuple[np.ndarray, str]:
        """Examples of each class [C], and of which split."""
        if self.given_counts is not None:
            return np.asarray(self.given_counts), "training"
        counts = manifest_counts(self.run.config.data.train, self.num_classes)
        if counts is not None:
            return counts, "training"
        return np.bincount(self.labels, minlength=self.num_classes), "test"

    @cached_property
    def confusion_weights(self) -> dict[tables.Pair, float]:
        before = self.before
        return tables.confusion_weights(self.labels, before.top5, before.top5_probability)

    @cached_property
    def typical_examples(self) -> dict[int, int]:
        """Class -> row of the test example that the generalist is surest of."""
        return tables.typical_examples(self.labels, self.before.label_probability)

    # Groups and specialists

    @cached_property
    def _groups_file(self) -> dict:
        if not self.has_specialists:
            return {}
        content = read_file(self.run.cluster, "groups.json")
        assert content is not None, "evaluate needs the groups"
        return content

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """The classes of each group. None of an ensemble of generalists."""
        groups = self._groups_file.get("members", [])
        return [np.asarray(classes, dtype=np.int64) for classes in groups]

    @cached_property
    def _holders(self) -> tuple[np.ndarray, np.ndarray]:
        """Classes one group after the other, and the group of each."""
        sizes = [len(classes) for classes in self.groups]
        return np.concatenate(self.groups), np.repeat(np.arange(len(sizes)), sizes)

    def groups_of(self, c: int) -> set[int]:
        """The groups that hold a class. A page asks about few of a million classes."""
        if not self.groups:
            return set()
        classes, holders = self._holders
        return set(holders[classes == c].tolist())

    @cached_property
    def clusters(self) -> dict:
        """The summary of clustering. Empty for an ensemble of generalists."""
        if not self.has_specialists:
            return {}
        return read_file(self.run.cluster, "summary.json") or {}

    @property
    def skipped(self) -> list[int]:
        """Groups that the ensemble has no specialist for on purpose: too little to gain."""
        settings: dict = {}
        if self.has_specialists:
            settings = read_file(self.run.ensemble, "ensemble.json") or {}
        return sorted({*(self.clusters.get("skipped") or []), *settings.get("skipped", [])})

    def has_specialist(self, index: int) -> bool:
        return index not in self.missing and index not in self.skipped

    @cached_property
    def specialists(self) -> dict[int, SpecialistMetrics]:
        """The rows of results.json by the specialist's index."""
        return {row["index"]: row for row in self.results.get("specialists", [])}

    def conditional(self, index: int) -> Conditional | None:
        row = self.specialists.get(index)
        if row is None:
            return None
        before, after = row.get("conditional_before"), row.get("conditional_after")
        if before is None or after is None:
            return None
        return Conditional(before, after)

    @cached_property
    def judged_on(self) -> str:
        """The split whose errors the groups' forecasts and captured confusion count."""
        return judged_on(self.run)

    def forecast(self, index: int) -> float | None:
        """The ceiling: fraction of `judged_on` that a perfect specialist would fix."""
        forecasts = self.clusters.get("forecast") or []
        if index >= len(forecasts):
            return None
        forecast = forecasts[index]
        return forecast.get("gain") if isinstance(forecast, dict) else forecast

    def changes(self, index: int) -> Changes | None:
        if not self.has_specialist(index):
            return None
        routed = self.after.was_asked(index)
        if routed is None:
            return None
        was, now = self.correct["generalist"], self.correct["ensemble"]
        fixed = int((routed & now & ~was).sum())
        broken = int((routed & was & ~now).sum())
        return Changes(fixed, broken)

    @cached_property
    def coverage(self) -> list[tables.CoverageRow]:
        absent = {*self.missing, *self.skipped}
        covering = tables.covering_specialists(self.groups, self.num_classes, absent)
        before, after = self.correct["generalist"], self.correct["ensemble"]
        return tables.coverage_table(self.labels, before, after, covering)


def _short_name(name: str, index: int) -> str:
    if not name.strip():
        return f"class {index}"
    if len(name) > LONGEST_NAME:
        return name[: LONGEST_NAME - 1] + "…"
    return name


def manifest_counts(pattern: str, num_classes: int) -> np.ndarray | None:
    """Training examples of each class [C], from the manifest beside the shards, or None."""
    first = Path(pattern.split("::")[0])
    directory = first if first.is_dir() else first.parent
    try:
        manifest = read_json(directory / "manifest.json")
        counts = class_counts_of(directory, manifest, "train")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, UserError):
        return None
    if not counts.any() or len(counts) > num_classes:
        return None
    return np.pad(counts, (0, num_classes - len(counts)))
