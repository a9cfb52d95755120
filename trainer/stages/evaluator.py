"""One row of the results: a predictor on test, after a temperature was fitted on val."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble.listed import Listed
from networks import Summary
from networks.linear_logits import LinearLogits
from pipeline.results.paired import CALIBRATED
from pipeline.results.rows import Cost
from pipeline.store import Attempt, write_json

from ..core.dense_logits import Asked, DenseLogits, ListedLogits, ListedPredictor, Predictor
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
from ..session import Session, rows_in_cache
from .calibrate import calibrate
from .sizes import Answering, Stopwatch

TOP = 5
MEMBER_KEYS = ("mu", "pairwise_kl", "disagreement")
MASK_BYTES = 2**26  # of who is asked, as a mask beside the numbers
CALIBRATED_KEYS = ("top5_probability", "label_probability", "squared_error")
Values = dict[str, np.ndarray]  # over test, in the order of its shards


class MemberMetrics(NamedTuple):
    """What members add to each example's metrics: function(raw inputs) -> {"mu": [b], ...}"""

    count: int
    function: Callable[[Tensor], dict[str, Tensor]]


def metrics_of_members(log_p: Tensor) -> dict[str, Tensor]:
    """What each example adds to MU, pairwise KL and disagreement. log_p: [K, b, C]."""
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
        predict: Predictor | ListedPredictor,
        name: str,
        cost: Cost,
        members: MemberMetrics | None = None,
        together: Callable[[Tensor], tuple[LinearLogits | DenseLogits, dict]] | None = None,
        more: Callable[[Values], dict] | None = None,
        answering: Answering | None = None,
        ids: np.ndarray | None = None,
    ) -> Values:
        """Evaluate one predictor.

        members: metrics of each example beside it.  together: predictions and such metrics from one
        pass.  more(values): further entries of the JSON. It may measure, on all ranks.
        answering: its size, and what an answer is timed by.  ids: the order in which test is read.
        Returns what was measured, arrays over test.
        """
        session = self.session
        temperature = calibrate(session, predict)
        with_scores = bool(session.config.data.ood)
        if isinstance(predict, ListedPredictor):
            rows = predict.rows
            measure = listed_measure(predict, temperature, with_scores)
            score = listed_scores(predict)
        else:
            dense = together is not None or members is not None
            rows = rows_in_cache(session.num_classes, session.ranks.device) if dense else None
            scores = scores_of(predict, members) if with_scores else None
            measure = whole_measure(predict, temperature, members, together, scores)
            score = scores
        values = session.measured(session.shards("test"), measure, ids, rows)
        outside: Values = {}
        if with_scores:
            assert score is not None
            ood = session.shards("ood")
            outside = session.measured(ood, lambda batch: score(batch.inputs), rows=rows)
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
        if "asked" in values:
            arrays |= active_of(values["asked"], len(self.session.run.specialists))
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


def whole_measure(
    predict: Predictor,
    temperature: float,
    members: MemberMetrics | None,
    together: Callable[[Tensor], tuple[LinearLogits | DenseLogits, dict]] | None,
    scores: Callable[[Tensor], dict[str, Tensor]] | None,
) -> Callable[[Batch], dict[str, Tensor]]:
    """A function batch -> what it contributes to a row, of predictions of all classes."""

    def predict_all(raw: Tensor) -> tuple[LinearLogits | DenseLogits, dict]:
        if together is not None:
            return together(raw)
        return predict(raw), members.function(raw) if members else {}

    def measure(batch: Batch) -> dict[str, Tensor]:
        logits, beside = predict_all(batch.inputs)
        values = metrics_of_logits(logits, batch.labels, temperature) | beside
        if scores is not None:
            values |= scores(batch.inputs)
        return values

    return measure


def metrics_of_logits(
    logits: LinearLogits | DenseLogits | ListedLogits, labels: Tensor, temperature: float
) -> dict[str, Tensor]:
    """What a batch contributes to a row, before a temperature and after."""
    values = metrics_of_batch(logits.summary(TOP, labels), labels)
    calibrated = logits.scale_by_temperature(temperature).summary(TOP, labels)
    scaled = metrics_of_batch(calibrated, labels)
    return values | {f"calibrated_{key}": scaled[key] for key in CALIBRATED_KEYS}


def listed_measure(
    predict: ListedPredictor, temperature: float, with_scores: bool
) -> Callable[[Batch], dict[str, Tensor]]:
    """A function batch -> what it contributes to a row, of predictions that list some classes."""

    def measure(batch: Batch) -> dict[str, Tensor]:
        asked = Asked(batch.labels, (1.0, 1 / temperature), moments=with_scores)
        parts = []
        for q, beside, labels in predict.in_parts(batch.inputs, asked):
            values = metrics_of_logits(ListedLogits(q), labels, temperature) | beside
            parts.append(values | (scores_of_listed(q) if with_scores else {}))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    return measure


def listed_scores(predict: ListedPredictor) -> Callable[[Tensor], dict[str, Tensor]]:
    """Like scores_of, for predictions that list some classes."""

    def scores(raw: Tensor) -> dict[str, Tensor]:
        nobody = torch.zeros(len(raw), dtype=torch.int64, device=raw.device)
        asked = Asked(nobody, (1.0,), moments=True)
        parts = [scores_of_listed(q) for q, _ in predict.predict(raw, asked)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    return scores


def scores_of_listed(q: Listed) -> dict[str, Tensor]:
    return {
        "score_confidence": q.values.amax(1),
        "score_entropy": -q.entropy().float(),
    }


def scores_of(
    predict: Predictor, members: MemberMetrics | None
) -> Callable[[Tensor], dict[str, Tensor]]:
    """What tells inputs like test's from others: a function of raw inputs. Larger is more alike."""

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
    """What evaluation/NAME.npz has: no metric that the row has already summed.

    The label's calibrated probability stays: two rows' calibrated NLL are compared by it.
    """
    left_out = {*MEMBER_KEYS, "squared_error", *(f"calibrated_{key}" for key in CALIBRATED_KEYS)}
    left_out.discard(CALIBRATED)
    return {
        key: value
        for key, value in values.items()
        if key not in left_out and not key.startswith("score_")
    }


def active_of(asked: np.ndarray, num_specialists: int) -> Values:
    """{"active": bool [n, M]} of the specialists' numbers int32 [n, most], -1 for none.

    Nothing where it would be more than MASK_BYTES.
    """
    if len(asked) * num_specialists > MASK_BYTES:
        return {}
    active = np.zeros((len(asked), num_specialists), bool)
    rows, columns = np.nonzero(asked >= 0)
    active[rows, asked[rows, columns]] = True
    return {"active": active}
