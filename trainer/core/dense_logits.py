"""Logits [B, C] in memory, asked as networks.linear_logits.LinearLogits are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from networks import Classifier, Summary, lazy_logits, mean_log_probabilities
from networks.linear_logits import LinearLogits


class DenseLogits(NamedTuple):
    """log_p: logits [B, C]; log-probabilities are logits too."""

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


Predictor = Callable[[Tensor], LinearLogits | DenseLogits]  # raw inputs -> logits [B, C]


def dense_log_probabilities(p: Tensor) -> DenseLogits:
    """Probabilities [B, C] as logits; 0 becomes the smallest normal float32."""
    return DenseLogits(p.float().clamp_min(torch.finfo(torch.float32).tiny).log())


def predictor_of(network: Classifier) -> Predictor:
    """What a network predicts for raw inputs; one with several members by their mean."""
    if network.num_members == 1:
        return lambda raw: lazy_logits(network, raw)
    return lambda raw: DenseLogits(mean_log_probabilities(network, raw))
