"""Temperature scaling on val.  Guo et al. 2017, section 4.2."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ensemble import fit_temperature

from ..core.dense_logits import Predictor
from ..data.streams import Batch
from ..session import Session

# Numbers in memory while a temperature is fitted: n C, of as many val examples as fit.
LOGITS_IN_MEMORY = 2**23
# Probabilities n C that are joined for each weight that is tried; none of them stay in memory.
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


def calibrate(session: Session, predict: Predictor) -> float:
    """The temperature that fits val best."""

    def measure(batch: Batch) -> dict[str, Tensor]:
        return {
            "logits": predict(batch.inputs).materialize().float(),
            "labels": batch.labels,
        }

    values = session.measured(session.shards("val"), measure, ids=calibration_ids(session))
    return fit_temperature(torch.from_numpy(values["logits"]), torch.from_numpy(values["labels"]))
