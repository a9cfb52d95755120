"""Temperature scaling on val.  Guo et al. 2017, section 4.2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ensemble import fit_temperature
from ensemble.fitting import fit_temperature_by_slopes

from ..core.dense_logits import Asked, ListedPredictor, Predictor, slopes_of
from ..data.streams import Batch
from ..session import Session

# Numbers in memory while a temperature is fitted: n C, of as many val examples as fit.
LOGITS_IN_MEMORY = 2**23
# Probabilities n C that are joined for each weight that is tried. None of them stay in memory.
JOINED = 2**26
FEWEST_EXAMPLES = 500


def calibration_ids(session: Session, members: int = 1) -> np.ndarray:
    """Val examples to fit a temperature on."""
    return examples_for(session, LOGITS_IN_MEMORY // members)


def weight_ids(session: Session) -> np.ndarray:
    """Val examples to fit the specialists' weight on.

    Every weight joins them anew: of 20,000 classes and ten examples of each, that would take as
    long as training the specialists.
    """
    return examples_for(session, JOINED)


def examples_for(session: Session, numbers: int) -> np.ndarray:
    """Val examples, evenly over it, of so many numbers n C: one parameter needs no million."""
    count = max(FEWEST_EXAMPLES, numbers // session.num_classes)
    val = len(session.shards("val"))
    return np.unique(np.linspace(0, val - 1, min(count, val)).astype(np.int64))


def calibrate(session: Session, predict: Predictor | ListedPredictor) -> float:
    """The temperature that fits val best.

    Each rank holds the logits of its examples.  More than LOGITS_IN_MEMORY of all are not held: the
    examples are passed over a few times.
    """
    ids = calibration_ids(session)
    if isinstance(predict, ListedPredictor):
        return fit_in_passes(session, ids, partial(listed_slopes, predict), predict.rows)
    if len(ids) * session.num_classes > LOGITS_IN_MEMORY:
        return fit_in_passes(session, ids, partial(whole_slopes, predict))

    def measure(batch: Batch) -> dict[str, Tensor]:
        return {
            "logits": predict(batch.inputs).materialize().float(),
            "labels": batch.labels,
        }

    own = session.measured_here(session.shards("val"), measure, ids=ids)
    logits, labels = torch.empty(0, session.num_classes), torch.empty(0, dtype=torch.int64)
    if own:
        logits, labels = torch.from_numpy(own["logits"]), torch.from_numpy(own["labels"])
    return fit_temperature(logits, labels, session.mean)


Slopes = tuple[Tensor, Tensor]  # of each example's NLL in beta = 1 / T, and their own, [b]


def fit_in_passes(
    session: Session,
    ids: np.ndarray,
    slopes: Callable[[Batch, float], Slopes],
    rows: int | None = None,
) -> float:
    """The temperature at which the mean slope over val's `ids` is 0. rows: of a batch."""

    def mean_slopes(beta: float) -> tuple[float, float]:
        def measure(batch: Batch) -> dict[str, Tensor]:
            slope, curvature = slopes(batch, beta)
            return {"slope": slope, "curvature": curvature}

        values = session.measured(session.shards("val"), measure, ids=ids, rows=rows)
        return float(values["slope"].mean()), float(values["curvature"].mean())

    return fit_temperature_by_slopes(mean_slopes)


def whole_slopes(predict: Predictor, batch: Batch, beta: float) -> Slopes:
    return slopes_of(predict(batch.inputs), batch.labels, beta)


def listed_slopes(predict: ListedPredictor, batch: Batch, beta: float) -> Slopes:
    asked = Asked(batch.labels, (beta,), moments=True)
    parts = [q.slopes(labels, beta) for q, _, labels in predict.in_parts(batch.inputs, asked)]
    slopes, curvatures = (torch.cat(each) for each in zip(*parts, strict=True))
    return slopes, curvatures
