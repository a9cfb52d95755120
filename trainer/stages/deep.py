"""What the first 1, 2, ... M members of a deep ensemble are worth together."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ensemble import DeepEnsemble, fit_temperature, generalised_mean
from pipeline.choices import MEANS

from ..core.dense_logits import DenseLogits, slopes_of
from ..data.streams import Batch
from ..session import Session, rows_in_cache
from .calibrate import LOGITS_IN_MEMORY, Slopes, calibration_ids, fit_in_passes


def ensemble_sizes(session: Session, ensemble: DeepEnsemble) -> list[dict]:
    """Per size: NLL before and after calibration, and top-1."""
    count = len(ensemble.networks)
    temperatures = fit_temperatures_of_sizes(session, ensemble)
    divisors = torch.tensor(temperatures)[:, None, None]

    def measure(batch: Batch) -> dict[str, Tensor]:
        log_p = cumulative_means(ensemble, batch.inputs)
        scaled = (log_p / divisors.to(log_p.device)).log_softmax(2)
        labels = batch.labels[None, :, None].expand(count, -1, 1)
        return {
            "nll": -log_p.gather(2, labels)[:, :, 0].T,
            "cnll": -scaled.gather(2, labels)[:, :, 0].T,
            "top1": (log_p.argmax(2) == batch.labels).T.float(),
        }

    rows = rows_in_cache(session.num_classes, session.ranks.device)
    values = session.measured(session.shards("test"), measure, rows=rows)
    means = {key: values[key].mean(0, dtype=np.float64) for key in ("nll", "cnll", "top1")}
    return [
        {
            "size": k + 1,
            "temperature": temperatures[k],
            **{key: float(mean[k]) for key, mean in means.items()},
        }
        for k in range(count)
    ]


def fit_temperatures_of_sizes(session: Session, ensemble: DeepEnsemble) -> list[float]:
    """The temperature of each size that fits val best."""
    count = len(ensemble.networks)

    def measure(batch: Batch) -> dict[str, Tensor]:
        log_p = cumulative_means(ensemble, batch.inputs)
        return {"log_p": log_p.transpose(0, 1), "labels": batch.labels}

    ids = calibration_ids(session, count)
    if len(ids) * session.num_classes * count > LOGITS_IN_MEMORY:
        return [
            fit_in_passes(session, ids, partial(size_slopes, ensemble, k)) for k in range(count)
        ]
    values = session.measured(session.shards("val"), measure, ids=ids)
    labels = torch.from_numpy(values["labels"])
    log_p = torch.from_numpy(values["log_p"])
    return [fit_temperature(log_p[:, k], labels) for k in range(count)]


def size_slopes(ensemble: DeepEnsemble, k: int, batch: Batch, beta: float) -> Slopes:
    """As in fit_in_passes, of the first k + 1 networks."""
    first = DeepEnsemble(ensemble.networks[: k + 1], ensemble.order)
    return slopes_of(DenseLogits(cumulative_means(first, batch.inputs)[-1]), batch.labels, beta)


def cumulative_means(ensemble: DeepEnsemble, raw: Tensor) -> Tensor:
    """Log of the mean of the first 1, ..., M members: [M, b, C], for raw inputs [b, ...]."""
    log_p = ensemble.member_log_probabilities(raw)
    if ensemble.order == MEANS["arithmetic"]:
        count = torch.arange(1, len(log_p) + 1, device=log_p.device)
        return log_p.logcumsumexp(0) - count.log()[:, None, None]
    firsts = range(1, len(log_p) + 1)
    return torch.stack([generalised_mean(log_p[:size], ensemble.order) for size in firsts])
