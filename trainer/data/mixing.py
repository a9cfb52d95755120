"""Mixup and cutmix: inputs made of two examples of one batch, as pure functions of uniform numbers.

B examples of a global batch.  The example at position i is mixed with the one at i + B / 2.  That
is any other one, since the order is random.  The same rank reads it wherever B / 2 is a multiple of
the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.config import ResolvedSchedule, ResolvedTrain, UserError

NUMBERS = 4  # uniforms per example: the share, which of the two, where the box lies


@dataclass(frozen=True)
class Mixing:
    """Parameters of Beta(a, a), from which an input's share of itself is drawn. 0 leaves one out.

    Where both are given, either is as likely for each example.
    """

    mixup: float = 0.0
    cutmix: float = 0.0


def mixing_of(schedule: ResolvedSchedule) -> Mixing | None:
    """The mixing that a schedule asks for. Only [train] can."""
    if not isinstance(schedule, ResolvedTrain) or not (schedule.mixup or schedule.cutmix):
        return None
    return Mixing(schedule.mixup, schedule.cutmix)


def check_mixable(mixing: Mixing, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """UserError for inputs that have no average, or no boxes.  shape: of one input."""
    key = "mixup" if mixing.mixup else "cutmix"
    if dtype != np.uint8 and dtype.kind != "f":
        raise UserError(
            f"train.{key} averages inputs, and {dtype} are indices; leave it out (data.augment = "
            '"drop_ngrams" varies bags)'
        )
    if mixing.cutmix and len(shape) != 3:
        raise UserError(
            f"train.cutmix needs pictures [C, H, W]; the inputs are {list(shape)}: take train.mixup"
        )


def partners(positions: np.ndarray, batch_size: int) -> np.ndarray:
    """Where in the global batch the examples stand that those at `positions` are mixed with."""
    return (positions + batch_size // 2) % batch_size


def mix(
    inputs: np.ndarray, others: np.ndarray, uniforms: np.ndarray, mixing: Mixing
) -> tuple[np.ndarray, np.ndarray]:
    """Each input mixed with the other one, and the share of it that is still its own.

    Parameters
    ----------
    inputs, others : array [n, ...]
        uint8 or floating.
    uniforms : float64 array [n, 4]
    mixing : Mixing

    Returns
    -------
    mixed : array [n, ...]
        Of the inputs' dtype. uint8 is rounded.
    own_share : float32 array [n]
        The weight of an input's own label. Its partner's has the rest.

    References
    ----------
    Zhang et al. 2018, "mixup: Beyond empirical risk minimization".
    Yun et al. 2019, "CutMix: Regularization strategy to train strong classifiers".
    """
    boxed = np.full(len(inputs), not mixing.mixup)
    if mixing.mixup and mixing.cutmix:
        boxed = uniforms[:, 1] < 0.5
    own = np.empty(len(inputs))
    mixed = inputs.copy()
    averaged = np.flatnonzero(~boxed)
    own[averaged] = beta_quantile(mixing.mixup, uniforms[averaged, 0])
    mixed[averaged] = _average(inputs[averaged], others[averaged], own[averaged])
    for row in np.flatnonzero(boxed):
        kept = beta_quantile(mixing.cutmix, uniforms[row, 0])
        rows, columns = box(float(kept), uniforms[row, 2:], *inputs.shape[2:])
        mixed[row, :, rows, columns] = others[row, :, rows, columns]
        pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
        own[row] = 1 - pasted / (inputs.shape[2] * inputs.shape[3])
    return mixed, own.astype(np.float32)


def beta_quantile(a: float, probability: np.ndarray) -> np.ndarray:
    """The quantile function of Beta(a, a): of uniform numbers it makes Beta-distributed ones."""
    from scipy.special import betaincinv

    if not len(np.atleast_1d(probability)):
        return np.zeros(0)
    return betaincinv(a, a, probability)


def box(own_share: float, centre: np.ndarray, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a box with (1 - own_share) of the area, cut at the picture's edges.

    centre: uniforms [2], down and across.
    """
    half = 0.5 * np.sqrt(1 - own_share)
    sides = []
    for size, uniform in ((height, centre[0]), (width, centre[1])):
        middle, reach = int(uniform * size), int(half * size)
        sides.append(slice(max(0, middle - reach), min(size, middle + reach)))
    return sides[0], sides[1]


def _average(inputs: np.ndarray, others: np.ndarray, own: np.ndarray) -> np.ndarray:
    share = own.reshape(-1, *[1] * (inputs.ndim - 1)).astype(np.float32)
    average = share * inputs + (1 - share) * others
    if inputs.dtype == np.uint8:
        average = np.rint(average)
    return average.astype(inputs.dtype)
