"""What is the generalist short of: capacity, data or steps?  And can specialists help?

One pass over val and one over as many random examples of train, as they are and as they are
augmented.  trainer.core.diagnosis is the mathematics, pipeline.advice.diagnosis_text the words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ensemble import fit_temperature
from pipeline.advice.diagnosis_text import diagnosis_lines
from pipeline.files import read_rows
from pipeline.results.forecasts import judged_on
from pipeline.store import Stage, read_json

from ..core.dense_logits import Predictor, predictor_of
from ..core.diagnosis import (
    Fit,
    Mean,
    among_likeliest,
    enough_errors,
    fall_of,
    fit_of,
    last_fifth,
    paired,
    state_of,
    unpaired,
)
from ..core.metrics import expected_calibration_error, reliability
from ..data.augment import Views
from ..data.orders import generator
from ..data.streams import Batch
from ..session import Session
from .calibrate import calibration_ids
from .networks import load_network, read_summary
from .targets import view_of

SCHEMA = 1
MOST = 20_000  # examples of a split
COUNTS = (5, 20, 100)  # likeliest classes among which the true one is looked for
Arrays = dict[str, np.ndarray]


def diagnosis(session: Session, stage: Stage) -> None:
    """The generalist on train and val, and what its errors are like: diagnosis.json."""
    with session.attempt(stage) as attempt:
        found = diagnose(session)
        sentences = diagnosis_lines(found)
        session.say_each(sentences)
        session.write_json(attempt.path("diagnosis.json"), {**found, "sentences": sentences})


def diagnose(session: Session) -> dict:
    """What diagnosis.json holds, but for the sentences."""
    predict = predictor_of(load_network(session, session.run.generalist).eval())
    ids = chosen_ids(session)
    temperatures = fold_temperatures(session, predict, ids["val"])
    val = measured(session, predict, "val", ids["val"], temperatures)
    train = measured(session, predict, "train", ids["train"])
    fits = {"train": fit(train), "val": fit(val)}
    trained_here = bool(read_summary(session.run.generalist)["steps"])
    rows = metrics_of_generalist(session)
    fall = fall_of(rows)
    summary = read_json(session.run.cluster.path("summary.json"))
    counts = [k for k in COUNTS if k < session.num_classes]
    return {
        "schema": SCHEMA,
        "state": state_of(fits["train"], fits["val"], fall, trained_here),
        "trained_here": trained_here,
        "errors": int((~val["correct"]).sum()),
        "enough_errors": enough_errors(fits["val"]),
        **{split: as_json(each) for split, each in fits.items()},
        "gap": as_json(gap(fits)),
        "augmented": augmented(session, predict, ids, {"train": train, "val": val}),
        "last_fifth": as_json(last_fifth(rows)),
        "fall": None if fall is None else {**fall._asdict(), "by_twice": fall.by_twice},
        "groups": {
            "captured": summary["captured"],
            "chance": summary["chance"],
            "split": judged_on(session.run),
        },
        "among": among_likeliest(val["top"], val["labels"], counts),
        "calibration": calibration(val, ids["val"], temperatures),
    }


def chosen_ids(session: Session) -> dict[str, np.ndarray]:
    """Ids of as many random examples of train as of val, sorted."""
    sizes = {split: len(session.shards(split)) for split in ("train", "val")}
    count = min(MOST, *sizes.values())
    drawn = {}
    for index, (split, size) in enumerate(sizes.items()):
        random = generator(session.seed("diagnosis", index))
        drawn[split] = np.sort(random.choice(size, count, replace=False))
    return drawn


def fold_temperatures(session: Session, predict: Predictor, ids: np.ndarray) -> list[float]:
    """A temperature fitted on every second example of val from the first on, and one on the others.

    ids: of those that are measured.  A few of each fold are enough for one number.
    """

    def measure(batch: Batch) -> dict[str, Tensor]:
        return {"logits": predict(batch.inputs).materialize().float(), "labels": batch.labels}

    temperatures = []
    few = len(calibration_ids(session)) // 2
    for fold in (ids[::2], ids[1::2]):
        places = np.linspace(0, len(fold) - 1, min(few, len(fold))).astype(np.int64)
        values = session.measured(session.shards("val"), measure, ids=fold[np.unique(places)])
        logits, labels = (torch.from_numpy(values[name]) for name in ("logits", "labels"))
        temperatures.append(fit_temperature(logits, labels))
    return temperatures


def measured(
    session: Session,
    predict: Predictor,
    split: str,
    ids: np.ndarray,
    temperatures: Sequence[float] = (),
    augment: bool = False,
) -> Arrays:
    """Of each example: labels, top [n, k], confidence, correct, nll, and scaled [n, T], its
    confidence at each of the temperatures.
    """
    source = ("train", "val").index(split)
    views = Views(1, session.seed("diagnosis views", 0)) if augment else None
    see = view_of(session.augmentation(), views, source, 0)
    k = min(max(COUNTS), session.num_classes)

    def measure(batch: Batch) -> dict[str, Tensor]:
        logits = predict(see(batch))
        summary = logits.summary(k, batch.labels)
        assert summary.log_label is not None
        values = {
            "labels": batch.labels,
            "top": summary.indices,
            "confidence": summary.probabilities[:, 0],
            "correct": summary.indices[:, 0] == batch.labels,
            "nll": -summary.log_label,
        }
        if temperatures:
            scaled = [logits.scale_by_temperature(t).summary(1, batch.labels) for t in temperatures]
            values["scaled"] = torch.stack([each.probabilities[:, 0] for each in scaled], dim=1)
        return values

    return session.measured(session.shards(split), measure, ids=ids)


def fit(values: Arrays) -> Fit:
    return fit_of(values["correct"], values["nll"])


def gap(fits: dict[str, Fit]) -> dict[str, Mean]:
    """How much more train has than val."""
    train, val = fits["train"], fits["val"]
    return {"top1": unpaired(train.top1, val.top1), "loss": unpaired(train.loss, val.loss)}


def augmented(
    session: Session, predict: Predictor, ids: dict[str, np.ndarray], plain: dict[str, Arrays]
) -> dict | None:
    """Both splits in one augmented view, against the same examples as they are."""
    if session.augmentation() is None:
        return None
    seen = {name: measured(session, predict, name, ids[name], augment=True) for name in plain}
    fits = {name: fit(values) for name, values in seen.items()}
    changes = {
        name: {
            "top1": paired(values["correct"], plain[name]["correct"]),
            "loss": paired(values["nll"], plain[name]["nll"]),
        }
        for name, values in seen.items()
    }
    return {
        "augment": session.config.data.augment,
        **{name: as_json(each) for name, each in fits.items()},
        "gap": as_json(gap(fits)),
        "change": as_json(changes),
    }


def metrics_of_generalist(session: Session) -> list[dict]:
    """Rows of its metrics.jsonl. None of a given one."""
    path = session.run.generalist.path("metrics.jsonl")
    if not path.exists():
        return []
    return read_rows(path)


def calibration(val: Arrays, ids: np.ndarray, temperatures: Sequence[float]) -> dict:
    """How sure and how right, as it is and at the temperature that the other fold has.

    ids: that were to be measured. Every second one is of the second fold.
    """
    of_second = np.isin(val["ids"], ids[1::2])
    scaled = np.where(of_second, val["scaled"][:, 0], val["scaled"][:, 1])
    return {
        "raw": sureness(val["confidence"], val["correct"]),
        "scaled": sureness(scaled, val["correct"]),
        "temperature": math.prod(temperatures) ** (1 / len(temperatures)),
    }


def sureness(confidence: np.ndarray, correct: np.ndarray) -> dict:
    bins = reliability(confidence, correct)
    return {
        "ece": expected_calibration_error(bins),
        "confidence": float(confidence.mean(dtype=np.float64)),
        "accuracy": float(correct.mean()),
        "bins": bins,
    }


def as_json(value: Any) -> Any:
    """Named tuples as dicts, all the way down."""
    fields = getattr(value, "_asdict", None)
    if fields is not None:
        value = fields()
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    return value
