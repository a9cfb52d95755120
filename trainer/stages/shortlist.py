"""Second opinions: what joins them on each example's shortlist, fitted on val, and what sizes give.

test is read by what `evaluate` calls alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ensemble import EnsembleSettings, ShortlistEnsemble, fit_temperature
from ensemble.shortlist_ensemble import logits_at, whole_logits
from ensemble.shortlist_fitting import (
    Joining,
    ShortlistPredictions,
    choose_shortlist,
    fit_joining,
    fit_order,
    nll_of_each,
    settings_of,
    sizes_up_to,
)
from networks import Classifier, top_k

from ..core.dense_logits import predictor_of
from ..data.streams import Batch
from ..session import Session, rows_in_cache
from .calibrate import calibrate, calibration_ids

# Numbers in memory while a shortlist is fitted: one for each network, val example and class of its
# longest shortlist, of as many examples as fit.
LOGITS_IN_MEMORY = 2**25


def fit_shortlist(session: Session, networks: list[Classifier]) -> list[EnsembleSettings]:
    """What joins the first 1, 2, ... networks. Length and order are those of all of them."""
    config = session.config.ensemble
    longest = session.num_classes
    if session.config.has_rerankers:  # farther down they have learnt less
        longest = session.config.rerank.k
    candidates = sizes_up_to(longest)
    if config.shortlist is not None:
        candidates = [min(config.shortlist, session.num_classes)]
    temperature = 1.0
    if config.temperatures:
        temperature = calibrate(session, predictor_of(networks[0]))
    predictions = predict_shortlists(session, networks, max(candidates), temperature)

    what = {"weights": config.fit_weight, "temperatures": config.temperatures}
    order = config.order
    if order == "fit":
        order = fit_order(predictions, max(candidates), **what)
    joinings = {k: fit_joining(predictions, k, order, **what) for k in candidates}
    losses = {k: nll_of_each(predictions, joining) for k, joining in joinings.items()}
    chosen = choose_shortlist(losses)
    say_shortlist(session, losses, joinings[chosen])

    by_size = [
        fit_joining(predictions.of(size), chosen, order, **what) for size in range(1, len(networks))
    ]
    return [settings_of(each, temperature) for each in [*by_size, joinings[chosen]]]


def predict_shortlists(
    session: Session, networks: list[Classifier], longest: int, temperature: float
) -> ShortlistPredictions:
    """What the networks say of val, or of examples evenly over it where it is large."""
    generalist, *others = networks

    def measure(batch: Batch) -> dict[str, Tensor]:
        raw = batch.inputs
        log_p = (whole_logits(generalist, raw).float() / temperature).log_softmax(1)
        own, indices = top_k(log_p, longest)
        asked = [own, *(logits_at(network, raw, indices).float() for network in others)]
        hits = indices == batch.labels[:, None]
        return {
            "logits": torch.stack(asked, 1),
            "column": torch.where(hits.any(1), hits.int().argmax(1), longest),
            "log_label": log_p.gather(1, batch.labels[:, None])[:, 0],
        }

    val = session.shards("val")
    count = min(len(val), max(1, LOGITS_IN_MEMORY // (len(networks) * longest)))
    ids = np.unique(np.linspace(0, len(val) - 1, count).astype(np.int64))
    values = session.measured(val, measure, ids=ids)
    return ShortlistPredictions(
        torch.from_numpy(values["logits"]).transpose(0, 1),
        torch.from_numpy(values["column"]),
        torch.from_numpy(values["log_label"]),
    )


def say_shortlist(session: Session, losses: dict[int, np.ndarray], joining: Joining) -> None:
    """What was fitted, for whoever watches."""
    session.say(
        "second opinions on the generalist's %d likeliest classes (NLL on val %s), order %g, "
        "weights %s, temperatures %s",
        joining.shortlist,
        ", ".join(f"{k}: {loss.mean():.4f}" for k, loss in losses.items()),
        joining.order,
        ", ".join(f"{w:.3g}" for w in joining.weights),
        ", ".join(f"{T:.3g}" for T in joining.temperatures[1:]),
    )


def shortlist_sizes(session: Session, ensembles: list[ShortlistEnsemble]) -> list[dict]:
    """The first 1, 2, ... networks on test: NLL before and after calibration, and top-1."""
    temperatures = fit_temperatures_of_ensembles(session, ensembles)

    def measure(batch: Batch) -> dict[str, Tensor]:
        rows = []
        for ensemble, temperature in zip(ensembles, temperatures, strict=True):
            log_p = log_probabilities(ensemble, batch.inputs)
            scaled = (log_p / temperature).log_softmax(1)
            hit = log_p.argmax(1) == batch.labels
            rows.append(
                torch.stack([-of_labels(log_p, batch), -of_labels(scaled, batch), hit.float()])
            )
        return {"rows": torch.stack(rows).permute(2, 0, 1)}

    rows_at_once = rows_in_cache(session.num_classes, session.ranks.device)
    values = session.measured(session.shards("test"), measure, rows=rows_at_once)
    means = values["rows"].mean(0, dtype=np.float64)
    return [
        {
            "size": len(ensemble.networks),
            "temperature": temperature,
            "nll": float(nll),
            "cnll": float(cnll),
            "top1": float(top1),
        }
        for ensemble, temperature, (nll, cnll, top1) in zip(
            ensembles, temperatures, means, strict=True
        )
    ]


def fit_temperatures_of_ensembles(
    session: Session, ensembles: list[ShortlistEnsemble]
) -> list[float]:
    """The temperature of each one's distribution that fits val best."""

    def measure(batch: Batch) -> dict[str, Tensor]:
        log_p = [log_probabilities(ensemble, batch.inputs) for ensemble in ensembles]
        return {"log_p": torch.stack(log_p, 1), "labels": batch.labels}

    ids = calibration_ids(session, len(ensembles))
    values = session.measured(session.shards("val"), measure, ids=ids)
    labels = torch.from_numpy(values["labels"])
    log_p = torch.from_numpy(values["log_p"])
    return [fit_temperature(log_p[:, index], labels) for index in range(len(ensembles))]


def log_probabilities(ensemble: ShortlistEnsemble, raw: Tensor) -> Tensor:
    """[b, C]. A probability of 0 becomes the smallest normal one."""
    p = ensemble.probabilities(raw)
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def of_labels(log_p: Tensor, batch: Batch) -> Tensor:
    """[b]"""
    return log_p.gather(1, batch.labels[:, None])[:, 0]
