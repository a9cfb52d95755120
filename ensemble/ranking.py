"""The most probable classes of each row, as `predict` gives them."""

from typing import TypedDict

from torch import Tensor

from .listed import Listed


class Prediction(TypedDict):
    """One row: its most probable classes, best first, and the specialists that were active."""

    classes: list[int]
    names: list[str]
    probabilities: list[float]
    specialists: list[int]


def top_predictions(
    q: Tensor, class_names: list[str], top: int, active: Tensor | None = None
) -> list[Prediction]:
    """q: [B, C].  active: bool [B, M]. None is no specialists."""
    values, classes = q.topk(min(top, q.shape[1]), dim=1)
    return _as_predictions(values, classes, class_names, active)


def listed_predictions(
    q: Listed, class_names: list[str], top: int, active: Tensor | None = None
) -> list[Prediction]:
    """The same of rows that list some classes."""
    values, places = q.values.topk(min(top, q.values.shape[1]), dim=1)
    return _as_predictions(values, q.indices.gather(1, places), class_names, active)


def _as_predictions(
    values: Tensor, classes: Tensor, class_names: list[str], active: Tensor | None
) -> list[Prediction]:
    """values, classes: [B, top], best first."""
    specialists: list[list[int]] = [[] for _ in range(len(values))]
    if active is not None:
        specialists = [row.nonzero()[:, 0].tolist() for row in active.cpu()]
    return [
        Prediction(
            classes=row,
            names=[class_names[c] for c in row],
            probabilities=probabilities,
            specialists=active_ones,
        )
        for row, probabilities, active_ones in zip(
            classes.tolist(), values.tolist(), specialists, strict=True
        )
    ]
