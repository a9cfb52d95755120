"""How good is a network on val, while it trains?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble import fit_temperature
from networks import Classifier
from networks.heads import ShardedHead

from ..core.dense_logits import predictor_of
from ..core.objectives import specialist_columns, with_dustbin
from ..data.kept_arrays import kept_npz
from ..data.streams import Batch
from ..session import Session
from .calibrate import calibrate


def validate_classifier(session: Session) -> Callable[[nn.Module], dict[str, float]]:
    """A function network -> {"loss": nats, "top1"} over the whole of val."""
    shards = session.shards("val")

    def validate(network: nn.Module) -> dict[str, float]:
        assert isinstance(network, Classifier)
        predict = predictor_of(network.eval())

        def measure(batch: Batch) -> dict[str, Tensor]:
            summary = predict(batch.inputs).summary(1, batch.labels)
            assert summary.log_label is not None
            return {
                "loss": -summary.log_label,
                "correct": summary.indices[:, 0] == batch.labels,
            }

        # Of a head that ranks split no rank can measure alone.
        together = isinstance(network.head, ShardedHead)
        values = session.measured(shards, measure, together=together)
        return {
            "loss": float(values["loss"].mean(dtype=np.float64)),
            "top1": float(values["correct"].mean()),
        }

    return validate


def validate_calibrated(session: Session) -> Callable[[nn.Module], dict[str, float]]:
    """The same, but "loss" is after a temperature was fitted on val. "raw_loss" is before.

    Of two steps the one that knows more has the lower loss, however overconfident it is.
    """
    shards = session.shards("val")

    def validate(network: nn.Module) -> dict[str, float]:
        assert isinstance(network, Classifier)
        predict = predictor_of(network.eval())
        temperature = calibrate(session, predict)

        def measure(batch: Batch) -> dict[str, Tensor]:
            logits = predict(batch.inputs)
            raw = logits.summary(1, batch.labels)
            scaled = logits.scale_by_temperature(temperature).summary(1, batch.labels)
            assert raw.log_label is not None and scaled.log_label is not None
            return {
                "loss": -scaled.log_label,
                "raw_loss": -raw.log_label,
                "correct": raw.indices[:, 0] == batch.labels,
            }

        values = session.measured(shards, measure)
        return {
            "loss": float(values["loss"].mean(dtype=np.float64)),
            "top1": float(values["correct"].mean()),
            "raw_loss": float(values["raw_loss"].mean(dtype=np.float64)),
        }

    return validate


class SpecialistValidator:
    """A specialist on the val examples that the generalist refers to it, at natural frequencies.

    One that keeps a full softmax (dustbin = "full") is measured as what becomes of it.
    """

    def __init__(self, session: Session, classes: np.ndarray):
        self.session = session
        self.shards = session.shards("val")
        self.classes = classes
        columns = specialist_columns(classes, session.num_classes)
        self.columns = columns.to(session.ranks.device)
        self.ids = referred_examples(session, classes)

    def logits_and_targets(self, network: Classifier) -> tuple[Tensor, Tensor]:
        """(logits [n, |S_m| + 1], columns of the labels [n])"""
        network.eval()

        def measure(batch: Batch) -> dict[str, Tensor]:
            logits = network(batch.inputs).float()
            if network.spec.head["kind"] == "linear":
                logits = with_dustbin(logits, self.classes)
            return {"logits": logits, "targets": self.columns[batch.labels]}

        values = self.session.measured(self.shards, measure, ids=self.ids)
        return torch.from_numpy(values["logits"]), torch.from_numpy(values["targets"])

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """{"loss": nats, "top1"}"""
        assert isinstance(network, Classifier)
        logits, targets = self.logits_and_targets(network)
        return {
            "loss": float(F.cross_entropy(logits, targets)),
            "top1": float((logits.argmax(1) == targets).float().mean()),
        }

    def temperature(self, network: Classifier) -> float:
        """The temperature that fits these examples best."""
        return fit_temperature(*self.logits_and_targets(network))


def referred_examples(session: Session, classes: np.ndarray) -> np.ndarray:
    """Ids of the val examples for which the gate opens a group. Of all val, if there are none."""
    path = session.run.measure.path("predictions.npz")
    predictions = kept_npz(path, {"ids": ("iu", (None,)), "top": ("iu", (None, None))})
    top = predictions["top"][:, : session.config.ensemble.gate]
    ids = predictions["ids"]
    referred = np.isin(top, classes).any(axis=1)
    return ids[referred] if referred.any() else ids
