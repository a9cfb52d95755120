"""A run of Referral as scikit-learn's estimators are used: fit, predict, predict_proba.

    from referral.sklearn import ReferralClassifier

`fit` writes shards, proposes a config as `referral init` does, and does the run's stages one after
the other in this process.  It computes no result in another way than `referral run` would.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import scipy.sparse
import tomli_w
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_array,
    check_is_fitted,
    check_random_state,
    column_or_1d,
    validate_data,
)

from ensemble import (
    DeepEnsemble,
    ShortlistEnsemble,
    SpecialistEnsemble,
    export_bundle,
    load_ensemble,
)
from networks import Classifier, load_classifier, read_inputs, save_classifier
from pipeline.config import Config, UserError, load_config, save_config
from pipeline.config.loading import flat
from pipeline.graph import RunDirectory
from pipeline.label_set import num_classes
from pipeline.store import Stage
from pipeline.trust import record

from .commands.export import Probabilities
from .commands.init import this_hardware, values_of
from .data.authoring.arrays import encode
from .data.authoring.reporting import Report
from .data.authoring.splitting import add_missing_splits, write_splits
from .data.labels import clean
from .distributed.ranks import StopSignal, process_group
from .proposal.data_summary import TEXT_DECODERS, DataSummary, find_shards, summarise
from .proposal.settings import propose
from .session import Session
from .stages import run_stage

Answer = Literal["ensemble", "generalist", "student"]
Kind = Literal["numbers", "pictures", "bags"]
Network = SpecialistEnsemble | DeepEnsemble | ShortlistEnsemble | Classifier

STUDENT = "main"
BATCH = 256  # rows that are asked about at a time
MOST_INDICES = 4_096  # of a row of counts. Longer ones are thinned out evenly
DENSE_BYTES = 2**30  # sparse rows of other values than counts become dense, up to so much


class ReferralClassifier(ClassifierMixin, BaseEstimator):
    """A generalist, specialists for the classes that it confuses, joined by the KL objective.

    Parameters
    ----------
    run : path, optional
        The run directory to make: shards, config, networks, results.json and report.html.  It must
        be empty or absent.  None takes a temporary one, does only what predictions need, and holds
        no examples out for a report.
    answer : "ensemble", "generalist" or "student"
        What predicts.  Stages behind it are not trained in a temporary run.
    epochs : float, optional
        Of the generalist. None lets the data and the machine say it, as `referral init` does.
    groups : int, optional
        Of confusable classes, each of which gets a specialist. None lets the classes say it.
    val_share, test_share : float
        Of each class: what groups, early stopping and weights are chosen on, and what the report
        of a run is measured on.
    config : mapping, optional
        {"section.key": value}, further keys of the config (docs/config.md).
    device : "auto", "cpu" or "cuda"
    random_state : int, RandomState or None
        Of the networks, the splits and the order of the examples.

    Attributes
    ----------
    classes_ : array [C]
    n_features_in_ : int
        Of rows of numbers or counts.
    run_ : Path or None
        The run directory. None of a temporary one.
    config_ : dict
        {"section.key": value} of the whole config.

    Notes
    -----
    X is a matrix of numbers [N, D], pictures [N, H, W] or [N, H, W, C], uint8 or floats, or a
    sparse matrix.  Sparse whole numbers from 0 on are counts: each row becomes a bag of indices for
    an `embedding_bag`.  Other sparse values are made dense, up to 1 GiB.
    """

    answer: Answer
    _kind: Kind

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        answer: Answer = "ensemble",
        epochs: float | None = None,
        groups: int | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        config: Mapping[str, Any] | None = None,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = 0,
    ):
        self.run = run
        self.answer = answer
        self.epochs = epochs
        self.groups = groups
        self.val_share = val_share
        self.test_share = test_share
        self.config = config
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # scikit-learn's methods

    def fit(self, X: Any, y: Any) -> ReferralClassifier:
        """Train on rows X and their labels y [N].

        Raises ValueError, one line, for what cannot be learned from.
        """
        if self.answer not in _LAST:
            raise ValueError(f"answer={self.answer!r}: {', '.join(_LAST)}")
        X = self._checked(X, reset=True)
        classes, y = self._labels(y, X.shape[0])
        rows = _rows_of(X)
        seed = seed_of(self.random_state)
        with _as_value_errors():
            directory = self._new_directory()
            root = Path(directory.name if directory else str(self.run)).absolute()
            self._write_shards(rows, classes, y, root / "data", seed)
            config = self._config(rows, root / "data", seed)
            run = lay_out(root, config)
            last = run.report if self.run is not None else _LAST[self.answer](run)
            with _own_signals():
                do_stages(run, last)
            network = load_answer(root, self.answer, self.device)
        # Only now: an earlier fit's results stay where this one fails.
        self.classes_ = classes
        self._kind, self._directory, self._network = rows.kind, directory, network
        self.run_ = None if directory else root
        self.config_ = flat(config.dump())
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """float64 [N, C]: the probability of each class, in the order of `classes_`."""
        return np.concatenate(list(self._probabilities(X)))

    def predict(self, X: Any) -> np.ndarray:
        """[N]: the most probable class of each row."""
        best = [p.argmax(1) for p in self._probabilities(X)]
        return self.classes_[np.concatenate(best)]

    # What is checked

    def _checked(self, X: Any, reset: bool) -> Any:
        """X as scikit-learn checks it: numbers, finite, of as many columns as before."""
        is_array = isinstance(X, np.ndarray) and X.ndim > 2
        if not is_array:
            return validate_data(
                self,
                cast(Any, X),
                reset=reset,
                accept_sparse="csr",
                dtype="numeric",
                ensure_min_samples=1,
            )
        X = check_array(X, allow_nd=True, dtype="numeric")
        if X.ndim > 4:
            raise ValueError(f"X has shape {list(X.shape)}; pictures are [N, H, W] or [N, H, W, C]")
        if reset:
            self.n_features_in_ = int(np.prod(X.shape[1:]))
        return X

    def _labels(self, y: Any, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """(the classes [C], int64 [N] the class of each row)."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None"
            )
        y = column_or_1d(y, warn=True)
        if len(y) != samples:
            raise ValueError(f"X has {samples} samples and y {len(y)}")
        if y.dtype == object and any(label is None for label in y):
            raise ValueError("y holds None: leave out rows without a label")
        check_classification_targets(y)
        classes, indices = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"y has {len(classes)} class; a classifier needs samples of at least 2 classes"
            )
        return classes, indices.astype(np.int64)

    # A run

    def _new_directory(self) -> OwnDirectory | None:
        if self.run is None:
            return OwnDirectory()
        root = Path(self.run)
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(
                f"run={str(root)!r} is not empty; name another directory (`referral run --run "
                f"{shlex.quote(str(root))}` resumes a run that was interrupted)"
            )
        return None

    def _write_shards(
        self, rows: Rows, classes: np.ndarray, y: np.ndarray, out: Path, seed: int
    ) -> None:
        shares = {"val": self.val_share}
        if self.run is not None:
            shares["test"] = self.test_share
        splits = add_missing_splits({"train": np.arange(len(y))}, y, shares, seed)
        for split in shares:
            if not len(splits.get(split, ())):
                raise UserError(
                    f"no class has an example to spare for {split} ({len(y)} samples, "
                    f"{split}_share={shares[split]:g}): give more samples of some class"
                )

        def sample(index: int) -> dict:
            extension, content = encode(rows.row(index), rows.channels)
            return {extension: content, "cls": b"%d" % y[index]}

        made_by = {"command": "ReferralClassifier.fit", "seed": seed}
        names = class_names(classes)
        write_splits(out, names, splits, sample, made_by, report=Report(), quiet=True)

    def _config(self, rows: Rows, data: Path, seed: int) -> Config:
        """What `referral init` proposes for these shards, and the parameters over it."""
        needed = ("train", "val") if self.run is None else ("train", "val", "test")
        shards = find_shards(str(data))
        assert shards is not None, data
        summary = summarise(shards, needed=needed)
        values = proposed(summary, rows)
        values["seed"] = seed
        # Nothing reads the test split of a run that is not evaluated.
        values["data"].setdefault("test", str(data))
        values["controls"] = {"enabled": False}
        values["launch"] = {"processes": 1}
        values["engine"]["device"] = self.device
        if self.answer != "student":
            del values["students"]
        own: dict[str, Any] = dict(self.config or {})
        if self.epochs is not None and "train.steps" not in own:
            own.setdefault("train.epochs", float(self.epochs))
        if self.groups is not None:
            own.setdefault("clusters.num_groups", int(self.groups))
        return load_config(None, [override(key, value) for key, value in own.items()], values)

    # Answers

    def _probabilities(self, X: Any) -> Iterator[np.ndarray]:
        """float64 [n, C] of a batch after another."""
        check_is_fitted(self, "classes_")
        X = self._checked(X, reset=False)
        rows = _rows_of(X, self._kind)
        for start in range(0, len(rows), BATCH):
            raw = rows.batch(start, min(start + BATCH, len(rows)), _shape(self._network))
            p = probabilities(self._network, raw)
            yield p / p.sum(1, keepdims=True)

    # Copies and pickles hold the networks as safetensors and JSON

    def __getstate__(self) -> dict:
        state: dict[str, Any] = dict(cast(dict, super().__getstate__()))
        state.pop("_directory", None)
        network = state.pop("_network", None)
        if network is not None:
            state["_bundle"] = files_of(network)
        return state

    def __setstate__(self, state: dict) -> None:
        state = dict(state)
        bundle = state.pop("_bundle", None)
        super().__setstate__(state)
        if bundle is not None:
            directory = OwnDirectory()
            for name, content in bundle.items():
                path = Path(directory.name, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._directory = directory
            self._network = load_bundle(Path(directory.name), self.device)


class OwnDirectory:
    """A temporary directory, as long as the estimator lives that reads it."""

    def __init__(self):
        self.name = tempfile.mkdtemp(prefix="referral-")
        weakref.finalize(self, _remove, self.name, os.getpid())


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has the same object
        shutil.rmtree(directory, ignore_errors=True)


# Rows of X


class Rows:
    """The rows of a checked X as the networks read them.

    channels: of `encode`: where the channels of pictures are.
    """

    kind: Kind
    channels: Literal["", "first", "last"] = ""

    def __len__(self) -> int:
        raise NotImplementedError

    def row(self, index: int) -> np.ndarray:
        """What is written for one row."""
        raise NotImplementedError

    def batch(self, start: int, end: int, shape: tuple[int, ...]) -> np.ndarray:
        """[n, *shape] of rows from start to end, in a network's shape."""
        raise NotImplementedError


class Numbers(Rows):
    """[N, D] of any type, as float32."""

    kind = "numbers"

    def __init__(self, X: np.ndarray):
        with np.errstate(over="ignore"):
            self.X = X.astype(np.float32)
        if not np.isfinite(self.X).all():
            raise ValueError("X holds infinity, or numbers too large for float32")

    def __len__(self) -> int:
        return len(self.X)

    def row(self, index: int) -> np.ndarray:
        return self.X[index]

    def batch(self, start: int, end: int, shape: tuple[int, ...]) -> np.ndarray:
        return self.X[start:end]


class Pictures(Rows):
    """[N, H, W] or [N, H, W, C]: uint8, or numbers as float32."""

    kind = "pictures"

    def __init__(self, X: np.ndarray):
        pictures = X[..., None] if X.ndim == 3 else X
        if pictures.dtype == np.uint8 and pictures.shape[3] in (1, 3):
            self.channels = "last"  # written as PNG
            self.X = pictures
            return
        self.channels = "first"
        self.X = np.moveaxis(pictures, 3, 1)
        if self.X.dtype != np.uint8:
            self.X = self.X.astype(np.float32)

    def __len__(self) -> int:
        return len(self.X)

    def row(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self.X[index])

    def batch(self, start: int, end: int, shape: tuple[int, ...]) -> np.ndarray:
        raw = self.X[start:end]
        return np.moveaxis(raw, 3, 1) if self.channels == "last" else raw


class Bags(Rows):
    """Counts, CSR [N, D]: each row as the indices of its columns, as often as it counts them."""

    kind = "bags"

    def __init__(self, X: scipy.sparse.csr_matrix):
        self.X: Any = X
        self.counts = np.asarray(X.sum(1)).reshape(-1).astype(np.int64)
        self.length = int(np.clip(self.counts.max(), 1, MOST_INDICES))

    def __len__(self) -> int:
        return self.X.shape[0]

    def row(self, index: int) -> np.ndarray:
        return self._bag(index, self.length)

    def batch(self, start: int, end: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.stack([self._bag(index, shape[0]) for index in range(start, end)])

    def _bag(self, index: int, length: int) -> np.ndarray:
        """int32 [length]: indices, then -1. Of more than `length`, so many spread evenly."""
        part = slice(self.X.indptr[index], self.X.indptr[index + 1])
        times = self.X.data[part].astype(np.int64)
        count = self.counts[index]
        # The numbers of the places that are taken: all, or some in equal steps.
        taken = np.arange(count)
        if count > length:
            taken = np.linspace(0, count - 1, length).round().astype(np.int64)
        ends = times.cumsum()
        columns = self.X.indices[part][np.searchsorted(ends, taken, side="right")]
        bag = np.full(length, -1, np.int32)
        bag[: len(columns)] = columns
        return bag


def seed_of(random_state: int | np.random.RandomState | None) -> int:
    """A number as it is, or a generator's next one."""
    if isinstance(random_state, (int, np.integer)):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _rows_of(X: Any, kind: Kind | None = None) -> Rows:
    """The rows of a checked X.  kind: what a network was fitted on."""
    if not scipy.sparse.issparse(X) and X.ndim > 2:
        rows: Rows = Pictures(X)
    elif kind == "bags" or (kind is None and scipy.sparse.issparse(X) and _are_counts(X.data)):
        rows = Bags(_as_counts(X))
    elif scipy.sparse.issparse(X):
        rows = Numbers(_as_dense(X))
    else:
        rows = Numbers(X)
    if kind is not None and rows.kind != kind:
        raise ValueError(f"X holds {rows.kind}; the classifier was fitted on {kind}")
    return rows


def _are_counts(values: np.ndarray) -> bool:
    """Whether all are whole numbers from 0 on."""
    return bool((values >= 0).all() and (values == np.floor(values)).all())


def _as_counts(X: Any) -> scipy.sparse.csr_matrix:
    counts = scipy.sparse.csr_matrix(X)
    if not _are_counts(counts.data):
        raise ValueError(
            "X holds other numbers than counts; the classifier was fitted on counts, which are "
            "whole and not below 0"
        )
    counts.sum_duplicates()
    return counts


def _as_dense(X: Any) -> np.ndarray:
    size = X.shape[0] * X.shape[1] * X.dtype.itemsize
    if size > DENSE_BYTES:
        raise ValueError(
            f"sparse X of {X.shape[0]} x {X.shape[1]} {X.dtype} is {size / 2**30:.1f} GiB when "
            "dense, at most 1 is made; give counts (whole numbers from 0 on), or fewer columns"
        )
    return X.toarray()


def class_names(classes: np.ndarray) -> list[str]:
    """Names for the run: the labels as texts. Their numbers where those are not told apart."""
    names = [clean(str(each)) for each in classes]
    if len(set(names)) == len(names) and all(names):
        return names
    return [str(number) for number in range(len(names))]


# A run


def proposed(summary: DataSummary, rows: Rows) -> dict:
    """The config that `referral init` proposes, of bags with a row for each column of X."""
    if not isinstance(rows, Bags):
        return values_of(propose(summary, this_hardware()))
    bags = replace(summary, kind="text", decoders=TEXT_DECODERS)
    values = values_of(propose(bags, this_hardware()))
    del values["data"]["decoders"]  # the shards hold the indices themselves
    values["model"]["width"] = rows.X.shape[1]
    return values


def override(key: str, value: Any) -> str:
    """`key=value` in TOML, as the command line has it."""
    try:
        text = tomli_w.dumps({"value": value}, multiline_strings=False)
    except TypeError as error:
        raise UserError(f"config[{key!r}] = {value!r}: {error}") from None
    if isinstance(value, Mapping):
        raise UserError(f"config[{key!r}]: name its keys, e.g. {key}.{next(iter(value), 'key')}")
    return f"{key}={text.partition('=')[2].strip()}"


def lay_out(root: Path, config: Config) -> RunDirectory:
    """RUN/config.toml, from which `referral run --run RUN` goes on, too.

    Raises UserError where the data have too few classes for what the config asks for.
    """
    run = RunDirectory(root, config)
    run.method.check(*num_classes(config))
    save_config(config, root / "config.toml")
    record(run)
    return run


def do_stages(run: RunDirectory, last: Stage) -> None:
    """Do `last` and the stages that it needs, one after the other in this process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UserError("fit runs by itself: leave the process group of torch.distributed first")
    needed = with_inputs(last)
    with process_group(run.config.engine, guest=True) as ranks:
        session = Session(run, ranks)
        for stage in run.stages:
            if last is run.report or stage.place in needed:
                run_stage(session, stage)


def with_inputs(stage: Stage) -> set[str]:
    """The places of a stage and of all stages that it stands behind."""
    places = {stage.place}
    for each in stage.inputs:
        places |= with_inputs(each)
    return places


@contextmanager
def _own_signals() -> Iterator[None]:
    """Training heeds SIGTERM and SIGUSR2. Afterwards they are whose they were before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # else it is not Python's
                signal.signal(number, handler)
        if StopSignal.received:  # it was meant for the process
            StopSignal.received = False
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """The user's mistakes as scikit-learn's callers expect them."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from error


# What predicts

_LAST = {
    "ensemble": lambda run: run.ensemble,
    "generalist": lambda run: run.generalist,
    "student": lambda run: run.students[STUDENT],
}


def load_answer(root: Path, answer: Answer, device: str) -> Network:
    """The ensemble, the generalist or the student of a run."""
    if answer == "ensemble":
        return load_ensemble(root, _device(device))
    place = "generalist" if answer == "generalist" else f"students/{STUDENT}"
    return load_classifier(root / place, _device(device)).eval()


def load_bundle(root: Path, device: str) -> Network:
    """Load what `files_of` returned."""
    if (root / "ensemble.json").is_file():
        return load_ensemble(root, _device(device))
    return load_classifier(root, _device(device)).eval()


def _device(name: str) -> str:
    """Where to predict. A machine may lack what another trained on."""
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return "cuda"


def files_of(network: Network) -> dict[str, bytes]:
    """{name: content} of the safetensors and JSON of an ensemble or a network."""
    with tempfile.TemporaryDirectory(prefix="referral-") as name:
        root = Path(name)
        if isinstance(network, Classifier):
            save_classifier(network, root)
        elif isinstance(network, SpecialistEnsemble):
            export_bundle(network, root)
        else:
            network.save(root)
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        return {str(path.relative_to(root)): path.read_bytes() for path in files}


def _shape(network: Network) -> tuple[int, ...]:
    """The shape of one input."""
    first = network if isinstance(network, Classifier) else network.generalist
    return first.spec.input.shape


@torch.inference_mode()
def probabilities(network: Network, raw: np.ndarray) -> np.ndarray:
    """float64 [B, C] of raw inputs [B, ...]."""
    if isinstance(network, Classifier):
        inputs = read_inputs(raw, network.spec.input).to(next(network.parameters()).device)
        p = Probabilities(network)(inputs)
    else:
        p = network.probabilities(raw)
    return p.double().cpu().numpy()
