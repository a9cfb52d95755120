"""The most probable classes of each row, as `predict` gives them."""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

from .listed import Listed


class Prediction(TypedDict):
    """One row: its most probable classes, best first, and the specialists that were active."""

    classes: list[int]
    names: list[str]
    probabilities: list[float]
    specialists: list[int]


def check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"top = {top}; at least 1 class is needed")


def top_predictions(
    q: Tensor, class_names: list[str], top: int, active: Tensor | None = None
) -> list[Prediction]:
    """q: [B, C].  active: bool [B, M]. None is no specialists."""
    values, classes = q.topk(min(top, q.shape[1]), dim=1)
    return _as_predictions(values, classes, class_names, active)


def listed_predictions(
    q: Listed, class_names: list[str], top: int, active: Tensor | None = None
) -> list[Prediction]:
    """`top_predictions` of rows that list some classes."""
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


def prediction_columns(
    predictions: Sequence[Prediction], keys: Sequence[str] | None = None
) -> dict[str, list]:
    """Predictions as the columns of a table, best class first: `pandas.DataFrame` takes them.

    Parameters
    ----------
    predictions : sequence of dicts
        As `SpecialistEnsemble.predict` gives them.
    keys : sequence of str, optional
        What each row is called.  None: its number.

    Returns
    -------
    dict of lists
        "key", then "class_1", "name_1", "probability_1", "class_2", ..., and "specialists", the
        numbers of those that were active, joined by blanks.

    Raises
    ------
    ValueError
        For another number of keys, and for predictions of different numbers of classes.
    """
    if keys is None:
        keys = [str(number) for number in range(len(predictions))]
    if len(keys) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions and {len(keys)} keys; give one for each")
    ranks = {len(each["classes"]) for each in predictions}
    if len(ranks) > 1:
        raise ValueError(f"predictions of {min(ranks)} to {max(ranks)} classes are no one table")
    columns: dict[str, list] = {"key": list(keys)}
    for rank in range(max(ranks, default=0)):
        columns[f"class_{rank + 1}"] = [each["classes"][rank] for each in predictions]
        columns[f"name_{rank + 1}"] = [each["names"][rank] for each in predictions]
        columns[f"probability_{rank + 1}"] = [each["probabilities"][rank] for each in predictions]
    columns["specialists"] = [" ".join(map(str, each["specialists"])) for each in predictions]
    return columns
