"""How large a row of the results is, and what an answer of it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from ensemble import DeepEnsemble, ShortlistEnsemble, SpecialistEnsemble
from ensemble.listed import Listed
from ensemble.listed_ensemble import Wanted
from networks import Classifier, mean_log_probabilities, multiplications, parameter_count

from ..core.latency import Answer, batches_to_measure, latencies_ms
from ..session import Session, measuring_batch

LISTED = 5  # of an answer that lists the likeliest classes
MOST_ROWS = 1024  # inputs that latency is measured on


class Size(TypedDict):
    """multiplications: of one example, on average.  asked: networks beside the generalist, too."""

    parameters: int
    multiplications: int
    asked: NotRequired[float]


@dataclass(frozen=True)
class Answering:
    """answer: raw inputs -> probabilities.  size: what it is, by what was measured on test."""

    answer: Answer
    size: Callable[[dict[str, np.ndarray]], Size]


def of_network(network: Classifier) -> Answering:
    size = Size(
        parameters=parameter_count(network),
        multiplications=multiplications(network, network.zero_input()),
    )

    def answer(raw: Tensor) -> Tensor:
        if network.num_members > 1:
            return mean_log_probabilities(network, raw).exp()
        return network(raw).softmax(1)

    return Answering(answer, lambda values: size)


def of_generalists(ensemble: DeepEnsemble | ShortlistEnsemble) -> Answering:
    """The size of networks of one label set, where each example asks all further ones."""
    size = Size(
        parameters=ensemble.parameters(),
        multiplications=round(ensemble.multiplications()),
        asked=float(len(ensemble.networks) - 1),
    )
    return Answering(ensemble.probabilities, lambda values: size)


def of_specialists(ensemble: SpecialistEnsemble) -> Answering:
    """The gate over test says how many specialists an example asks."""

    def size(values: dict[str, np.ndarray]) -> Size:
        rows = len(values["asked"])
        times = times_asked(values["asked"], len(ensemble.available))
        return Size(
            parameters=ensemble.parameters(),
            multiplications=round(ensemble.mean_multiplications(times, rows)),
            asked=float(np.float32(times.sum() / rows)),
        )

    def listed(raw: Tensor) -> list[Listed]:
        parts = ensemble.ask_in_blocks(raw, Wanted(LISTED))
        return [answers.join(ensemble.weights) for answers in parts]

    def whole(raw: Tensor) -> Tensor:
        return ensemble.forward_with_details(raw).q

    return Answering(listed if ensemble.is_sparse else whole, size)


def times_asked(asked: np.ndarray, num_specialists: int) -> np.ndarray:
    """How many rows ask each specialist, int64 [M]. asked: int32 [n, most], -1 for none."""
    return np.bincount(asked[asked >= 0], minlength=num_specialists)


class Stopwatch:
    """Latency of each row on the same test inputs, at the same batches, by rank 0.

    The first row, the generalist's, decides how large the larger batch can be.
    """

    def __init__(self, session: Session):
        self.session = session
        self.batches: list[int] = []
        self.raw: Tensor | None = None

    def __call__(self, answer: Answer, ids: np.ndarray) -> dict[str, float]:
        """Milliseconds of an example by the size of the batch.  ids: of test, readable ones."""
        if self.raw is None:
            few = np.linspace(0, len(ids) - 1, min(len(ids), MOST_ROWS)).astype(np.int64)
            inputs = self.session.shards("test").inputs(ids[np.unique(few)])
            self.raw = torch.as_tensor(inputs).to(self.session.ranks.device)
        raw = self.raw
        if not self.batches:
            room = raw[: measuring_batch(self.session.num_classes)]
            self.batches = batches_to_measure(answer, room)
        return rounded(latencies_ms(answer, raw, self.batches))

    def softmax_ms(self) -> dict[str, float]:
        """The latency of a softmax over all classes, which multiplications do not count."""
        assert self.raw is not None, "a row was timed before"
        rows = max(self.batches)
        logits = torch.randn(rows, self.session.num_classes, device=self.raw.device)
        return rounded(latencies_ms(lambda part: part.softmax(1), logits, self.batches))


def rounded(times: dict[str, float]) -> dict[str, float]:
    return {size: round(ms, 6) for size, ms in times.items()}
