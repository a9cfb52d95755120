"""One row of the results: a predictor on test, after a temperature was fitted on val."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from networks import Summary
from networks.linear_logits import LinearLogits
from pipeline.results.rows import Cost
from pipeline.store import Attempt, write_json

from ..core.dense_logits import DenseLogits, Predictor
from ..core.metrics import (
    auroc,
    deep_ensemble_equivalent,
    disagreement,
    model_uncertainty,
    pairwise_kl,
    reliability,
    summarise,
)
from ..data.streams import Batch
from ..session import Session
from .calibrate import calibrate
from .sizes import Answering, Stopwatch

TOP = 5
MEMBER_KEYS = ("mu", "pairwise_kl", "disagreement")
CALIBRATED_KEYS = ("top5_probability", "label_probability", "squared_error")
Values = dict[str, np.ndarray]  # over test, in the order of its shards


class MemberMetrics(NamedTuple):
    """What members add to each example's metrics: function(raw inputs) -> {"mu": [b], ...}"""

    count: int
    function: Callable[[Tensor], dict[str, Tensor]]


def metrics_of_members(log_p: Tensor) -> dict[str, Tensor]:
    """What each example adds to MU, pairwise KL and disagreement; log_p: [K, b, C]."""
    p = log_p.exp()
    return {
        "mu": model_uncertainty(p),
        "pairwise_kl": pairwise_kl(log_p),
        "disagreement": disagreement(p),
    }


def metrics_of_batch(summary: Summary, labels: Tensor) -> dict[str, Tensor]:
    """What one batch contributes to a row."""
    missing = TOP - summary.indices.shape[1]  # fewer than five classes: -1 stands for none
    assert summary.log_label is not None
    p_label = summary.log_label.exp()
    return {
        "labels": labels,
        "top5": F.pad(summary.indices, (0, missing), value=-1).int(),
        "top5_probability": F.pad(summary.probabilities, (0, missing)).float(),
        "label_probability": p_label.float(),
        "squared_error": summary.squares - 2 * p_label + 1,
    }


class TestEvaluator:
    """Predictors on test, one after the other: evaluation/NAME.json and NAME.npz.

    sizes: of a deep ensemble, the row of each size.  parts: further rows of a part of test, by
    name.
    """

    __test__ = False  # not a test of pytest's

    def __init__(
        self,
        session: Session,
        attempt: Attempt,
        sizes: list[dict] | None = None,
        parts: Callable[[Values], dict[str, dict]] | None = None,
    ):
        self.session = session
        self.attempt = attempt
        self.sizes = sizes or []
        self.parts = parts
        self.stopwatch = Stopwatch(session)

    def __call__(
        self,
        predict: Predictor,
        name: str,
        cost: Cost,
        members: MemberMetrics | None = None,
        together: Callable[[Tensor], tuple[LinearLogits | DenseLogits, dict]] | None = None,
        more: Callable[[Values], dict] | None = None,
        answering: Answering | None = None,
    ) -> Values:
        """Evaluate one predictor.

        members: metrics of each example beside it.  together: predictions and such metrics from one
        pass.  more(values): further entries of the JSON; it may measure, on all ranks.
        answering: its size, and what an answer is timed by.
        Returns what was measured, arrays over test.
        """
        session = self.session
        temperature = calibrate(session, predict)
        scores = scores_of(predict, members) if session.config.data.ood else None

        def predict_all(raw: Tensor) -> tuple[LinearLogits | DenseLogits, dict]:
            if together is not None:
                return together(raw)
            return predict(raw), members.function(raw) if members else {}

        def measure(batch: Batch) -> dict[str, Tensor]:
            logits, beside = predict_all(batch.inputs)
            values = metrics_of_batch(logits.summary(TOP, batch.labels), batch.labels)
            calibrated = logits.scale_by_temperature(temperature).summary(TOP, batch.labels)
            scaled = metrics_of_batch(calibrated, batch.labels)
            values |= {f"calibrated_{key}": scaled[key] for key in CALIBRATED_KEYS}
            values |= beside
            if scores is not None:
                values |= scores(batch.inputs)
            return values

        values = session.measured(session.shards("test"), measure)
        outside: Values = {}
        if scores is not None:
            ood = session.shards("ood")
            outside = session.measured(ood, lambda batch: scores(batch.inputs))
        entries = more(values) if more else {}
        if session.ranks.is_main:
            row = self.row(name, values, temperature, outside, members)
            if answering is not None:
                row |= answering.size(values)
                cost = {**cost, "latency_ms": self.stopwatch(answering.answer, values["ids"])}
            if answering is not None and name == "generalist":
                cost = {**cost, "softmax_ms": self.stopwatch.softmax_ms()}
            self.write(name, {**row, "cost": cost}, values, entries)
        return values

    def row(
        self,
        name: str,
        values: Values,
        temperature: float,
        outside: Values,
        members: MemberMetrics | None,
    ) -> dict:
        """The metrics of one predictor, without its cost."""
        row = summary_of(values)
        if self.parts is not None:
            row |= self.parts(values)
        calibrated = summary_of(
            values | {key: values[f"calibrated_{key}"] for key in CALIBRATED_KEYS}
        )
        row["temperature"] = temperature
        row |= {f"c{key}": calibrated[key] for key in ("nll", "brier", "ece")}
        means = {
            key: float(values[key].mean(dtype=np.float64)) for key in MEMBER_KEYS if key in values
        }
        if means and members is not None:
            row["members"] = {"count": members.count, **means}
        if len(self.sizes) > 1:
            row |= self.equivalent(name, row["cnll"])
        scores = [key for key in outside if key != "ids"]
        if scores:
            row["ood_auroc"] = {
                key.removeprefix("score_"): auroc(values[key], outside[key]) for key in scores
            }
        return row

    def equivalent(self, name: str, cnll: float) -> dict:
        """DEE, as JSON knows it: null beyond the largest ensemble.

        The ensemble is worth itself, however its temperature was rounded.
        """
        if name == "ensemble":
            return {"dee": float(len(self.sizes))}
        dee = deep_ensemble_equivalent(cnll, [size["cnll"] for size in self.sizes])
        beyond = math.isinf(dee)
        return {"dee": None if beyond else dee, "dee_beyond": beyond}

    def write(self, name: str, row: dict, values: Values, entries: dict) -> None:
        correct = values["top5"][:, 0] == values["labels"]
        calibrated = values["calibrated_top5_probability"]
        content = {
            "name": name,
            "row": row,
            "reliability": reliability(values["top5_probability"][:, 0], correct),
            "reliability_calibrated": reliability(calibrated[:, 0], correct),
            **entries,
        }
        write_json(self.attempt.path(f"{name}.json"), content)
        arrays: dict[str, Any] = kept(values)
        np.savez(self.attempt.path(f"{name}.npz"), **arrays)
        self.session.say(
            "%-16s top-1 %6.2f %%  top-5 %6.2f %%  NLL %.4f  Brier %.4f  ECE %.4f  "
            "calibrated NLL %.4f",
            name,
            100 * row["top1"],
            100 * row["top5"],
            row["nll"],
            row["brier"],
            row["ece"],
            row["cnll"],
        )


def scores_of(
    predict: Predictor, members: MemberMetrics | None
) -> Callable[[Tensor], dict[str, Tensor]]:
    """What tells inputs like test's from others: a function of raw inputs; larger is more alike."""

    def scores(raw: Tensor) -> dict[str, Tensor]:
        log_p = predict(raw).materialize().float().log_softmax(1)
        values = {
            "score_confidence": log_p.amax(1).exp(),
            "score_entropy": (log_p.exp() * log_p).sum(1),
        }
        beside = members.function(raw) if members else {}
        if "mu" in beside:
            values["score_mu"] = -beside["mu"]
        return values

    return scores


def summary_of(values: Values) -> dict:
    return summarise(
        values["labels"],
        values["top5"],
        values["top5_probability"],
        values["label_probability"],
        values["squared_error"],
    )


def kept(values: Values) -> Values:
    """What evaluation/NAME.npz has: no metric that the row has already summed."""
    left_out = {*MEMBER_KEYS, "squared_error", *(f"calibrated_{key}" for key in CALIBRATED_KEYS)}
    return {
        key: value
        for key, value in values.items()
        if key not in left_out and not key.startswith("score_")
    }
