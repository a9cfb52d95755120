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
FEWEST_EXAMPLES = 500


def calibration_ids(session: Session, members: int = 1) -> np.ndarray:
    """Val examples, evenly over it, to fit a temperature on: one number needs no million."""
    val = session.shards("val")
    count = max(FEWEST_EXAMPLES, LOGITS_IN_MEMORY // (session.num_classes * members))
    return np.unique(np.linspace(0, len(val) - 1, min(count, len(val))).astype(np.int64))


def calibrate(session: Session, predict: Predictor) -> float:
    """The temperature that fits val best."""

    def measure(batch: Batch) -> dict[str, Tensor]:
        return {
            "logits": predict(batch.inputs).materialize().float(),
            "labels": batch.labels,
        }

    values = session.measured(session.shards("val"), measure, ids=calibration_ids(session))
    return fit_temperature(torch.from_numpy(values["logits"]), torch.from_numpy(values["labels"]))
