"""What the stages ask of predictions: logits [B, C] in memory, and rows that list some classes.

They are asked as networks.linear_logits.LinearLogits are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble.listed import Listed, logits_slopes
from networks import Classifier, Summary, lazy_logits, mean_log_probabilities
from networks.linear_logits import LinearLogits


class DenseLogits(NamedTuple):
    """log_p: logits [B, C]. Log-probabilities are logits too."""

    log_p: Tensor

    def materialize(self) -> Tensor:
        return self.log_p

    def scale_by_temperature(self, temperature: float) -> DenseLogits:
        return DenseLogits(self.log_p / temperature)

    def summary(self, k: int, labels: Tensor) -> Summary:
        log_p = self.log_p.log_softmax(1)
        top = log_p.topk(min(k, log_p.shape[1]), dim=1)
        log_label = log_p.gather(1, labels[:, None])[:, 0]
        return Summary(top.indices, top.values.exp(), log_label, (2 * log_p).exp().sum(1))


class ListedLogits(NamedTuple):
    """A distribution that lists some classes of each row, and what its logits are divided by."""

    q: Listed
    temperature: float = 1.0

    def scale_by_temperature(self, temperature: float) -> ListedLogits:
        return ListedLogits(self.q, self.temperature * temperature)

    def summary(self, k: int, labels: Tensor) -> Summary:
        return self.q.summary(k, labels, self.temperature)


@dataclass(frozen=True)
class Asked:
    """What is to be known of rows whose classes are not all listed.

    labels: int64 [B], listed too.  powers, moments: of the sums over the others, as Listed has
    them.
    """

    labels: Tensor
    powers: tuple[float, ...]
    moments: bool = False


@dataclass(frozen=True)
class ListedPredictor:
    """predict: (raw inputs, what is asked) -> (q, what is beside it) of some rows after the other.

    rows: that are best asked together.
    """

    predict: Callable[[Tensor, Asked], Iterator[tuple[Listed, dict[str, Tensor]]]]
    rows: int

    def in_parts(
        self, raw: Tensor, asked: Asked
    ) -> Iterator[tuple[Listed, dict[str, Tensor], Tensor]]:
        """(q, what is beside it, the labels) of some rows after the other."""
        start = 0
        for q, beside in self.predict(raw, asked):
            end = start + len(q.values)
            yield q, beside, asked.labels[start:end]
            start = end


Predictor = Callable[[Tensor], LinearLogits | DenseLogits]  # raw inputs -> logits [B, C]


def dense_log_probabilities(p: Tensor) -> DenseLogits:
    """Probabilities [B, C] as logits. 0 becomes the smallest normal float32."""
    return DenseLogits(p.float().clamp_min(torch.finfo(torch.float32).tiny).log())


def predictor_of(network: Classifier) -> Predictor:
    """What a network predicts for raw inputs. One with several members by their mean."""
    if network.num_members == 1:
        return lambda raw: lazy_logits(network, raw)
    return lambda raw: DenseLogits(mean_log_probabilities(network, raw))


NUMBERS_AT_ONCE = 2**22  # logits [b, C] of rows whose slopes are taken together


def slopes_of(
    logits: LinearLogits | DenseLogits, labels: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """`Listed.slopes` of logits that are given as a whole, a few rows at a time."""
    pieces = []
    for rows in torch.arange(len(labels)).split(_rows_at_once(logits)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        z = _rows_of(logits, part).materialize()
        pieces.append(logits_slopes(z, labels[part], beta))
    slopes, curvatures = (torch.cat(each) for each in zip(*pieces, strict=True))
    return slopes, curvatures


def _rows_at_once(logits: LinearLogits | DenseLogits) -> int:
    classes = logits.log_p.shape[1] if isinstance(logits, DenseLogits) else logits.num_classes
    return max(1, NUMBERS_AT_ONCE // classes)


def _rows_of(logits: LinearLogits | DenseLogits, rows: slice) -> LinearLogits | DenseLogits:
    if isinstance(logits, DenseLogits):
        return DenseLogits(logits.log_p[rows])
    return replace(logits, features=logits.features[rows])
