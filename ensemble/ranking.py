"""The most probable classes of each row, as `predict` gives them."""

from typing import TypedDict

from torch import Tensor


class Prediction(TypedDict):
    """One row: its most probable classes, best first, and the specialists that were active."""

    classes: list[int]
    names: list[str]
    probabilities: list[float]
    specialists: list[int]


def top_predictions(
    q: Tensor, class_names: list[str], top: int, active: Tensor | None = None
) -> list[Prediction]:
    """q: [B, C].  active: bool [B, M]; None is no specialists."""
    values, classes = q.topk(min(top, q.shape[1]), dim=1)
    specialists: list[list[int]] = [[] for _ in range(len(q))]
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
