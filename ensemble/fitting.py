"""Temperatures and weights from predictions on val: pure functions, nothing is trained."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from clustering.groups import ClassGroups
from networks.full_precision import full_precision

from .choices import combiner
from .predictions import SpecialistInput

# Temperatures, and weights around a shared one, are looked for within a factor of this.
WIDEST = 32.0
# Weights of the specialists among which the minimum is bracketed.  At the ends specialists, or the
# generalist, have hardly a say, and the pull to 1 is stronger than what is left to gain.
WEIGHTS = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64, 256, 1024, 8192)
# Temperatures at which losses are found where logits are not kept: 1 / WIDEST to WIDEST.
TEMPERATURES = tuple(2.0 ** (half_octave / 2) for half_octave in range(-10, 11))


def mean_of(values: Tensor) -> float:
    return float(values.mean())


@full_precision
def fit_temperature(
    logits: Tensor, labels: Tensor, mean: Callable[[Tensor], float] = mean_of
) -> float:
    """T minimising the mean of - log softmax(logits / T)[label].

    The NLL is convex in 1 / T, so the zero of its slope is found by bisection.

    Parameters
    ----------
    logits : Tensor [n, K]
        Entries may be -inf, as a dustbin's is.
    labels : int64 Tensor [n]
        Columns of `logits`.
    mean : callable
        float64 Tensor [n] -> its mean over all examples, where these are one part of them. The same
        for every part, all of which call it alike.

    Returns
    -------
    float
        1 where there is nothing to fit.  At most WIDEST, or its inverse, where the labels are
        never, or always, the most probable.

    References
    ----------
    Guo, Pleiss, Sun and Weinberger 2017, "On calibration of modern neural networks", section 4.2.
    """
    if len(logits) == 0 and mean is mean_of:
        return 1.0
    logits = logits.detach().double()
    logits = (logits - logits.amax(1, keepdim=True)).clamp(min=-1e4)
    of_label = logits.gather(1, labels.to(logits.device)[:, None])[:, 0]

    def slope(inverse: float) -> float:
        expected = (torch.softmax(logits * inverse, 1) * logits).sum(1)
        return mean(expected - of_label)

    low, high = -math.log(WIDEST), math.log(WIDEST)
    for _ in range(28):  # to 1e-7 of its logarithm
        middle = (low + high) / 2
        if slope(math.exp(middle)) > 0:
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)


@full_precision
def fit_temperature_by_slopes(slopes: Callable[[float], tuple[float, float]]) -> float:
    """fit_temperature of examples that are too many to hold: each step passes over them anew.

    Newton's method for the zero of the slope in log(1 / T), inside of a bracket that every step
    makes smaller.

    Parameters
    ----------
    slopes : callable
        beta = 1 / T -> (slope, curvature) in beta of the mean NLL of softmax(beta z): the mean over
        the examples of E[z] less z of the label, and of the variance of z.

    Returns
    -------
    float
        Within 1e-6 of its logarithm. At most WIDEST, or its inverse.
    """
    low, high = -math.log(WIDEST), math.log(WIDEST)
    x = 0.0
    for _ in range(40):
        slope, curvature = slopes(math.exp(x))
        if slope > 0:
            high = x
        else:
            low = x
        step = slope / (curvature * math.exp(x)) if curvature > 0 else math.inf
        following = x - step
        if not low < following < high:
            following = (low + high) / 2
        done = abs(following - x) < 1e-6
        x = following
        if done:
            break
    return math.exp(-x)


@full_precision
def fit_shift(logits: Tensor, labels: Tensor, classes: Sequence[int] | np.ndarray) -> float:
    """b minimising the mean of - log softmax(logits + b on `classes`)[label].

    The NLL is convex in b.  Its slope is the mean mass on `classes` less their fraction of the
    labels, so its zero is found by bisection.

    Parameters
    ----------
    logits : Tensor [n, C]
    labels : int64 Tensor [n]
    classes : sequence of int
        The classes whose logits are shifted.

    Returns
    -------
    float
        Within +-64, where only `classes`, or none of them, occur among the labels.
    """
    mask = torch.zeros(logits.shape[1], dtype=torch.bool)
    mask[torch.as_tensor(classes)] = True
    return fit_shift_to_odds(log_odds(logits, mask), float(mask[labels.cpu()].double().mean()))


def log_odds(logits: Tensor, mask: Tensor) -> Tensor:
    """log of the odds of the classes in the mask, bool [C], against the others: float64 [n]."""
    return logits[:, mask].double().logsumexp(1) - logits[:, ~mask].double().logsumexp(1)


@full_precision
def fit_shift_to_odds(log_odds: Tensor, fraction: float) -> float:
    """`fit_shift` from the log-odds of `classes`, [n], and their fraction of the labels."""
    low, high = -64.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(torch.sigmoid(log_odds + middle).mean()) > fraction:
            high = middle
        else:
            low = middle
    return (low + high) / 2


@full_precision
def fit_temperatures(
    general: Tensor, special: SpecialistInput, groups: ClassGroups, labels: Tensor
) -> list[float]:
    """A temperature for the generalist and one for each specialist, each by itself.

    To specialist m a label outside S_m is its dustbin.

    Parameters
    ----------
    general : Tensor [n, C]
        Logits.
    special : sequence of M entries
        Entry m: logits [n, |S_m| + 1], dustbin last, or (rows, logits), or None.  As
        `SpecialistEnsemble.logits` gives them.
    groups : ClassGroups
    labels : int64 Tensor [n]

    Returns
    -------
    list of 1 + M floats
        The generalist's first. 1 for a specialist that is None.
    """
    temperatures = [fit_temperature(general, labels)]
    for entry, classes in zip(special, groups.members, strict=True):
        if entry is None:
            temperatures.append(1.0)
            continue
        if isinstance(entry, Tensor):
            rows, logits = torch.arange(len(labels)), entry
        else:
            rows, logits = torch.as_tensor(entry[0]).cpu(), entry[1]
        column = torch.full((groups.num_classes,), len(classes))
        column[torch.tensor(classes)] = torch.arange(len(classes))
        targets = column[labels.cpu()[rows]]
        temperatures.append(fit_temperature(logits, targets.to(logits.device)))
    return temperatures


@full_precision
def fit_weights(
    p_general: Tensor,
    p_special: SpecialistInput,
    groups: ClassGroups,
    labels: Tensor,
    active: Tensor | None = None,
    combine: str = "kl",
    shared: bool = True,
) -> list[float]:
    """Weights minimising the mean of - log q[label]: 1 for the generalist.

    Only ratios of weights matter to eq. 5.

    Parameters
    ----------
    p_general, p_special, groups, active
        As in `combine_kl`.
    labels : int64 Tensor [n]
    combine : str
        A name of `COMBINERS`.
    shared : bool
        One weight for all specialists, its logarithm drawn towards 0 as by one example.  Otherwise
        one each, its logarithm drawn towards the shared one likewise, so that a specialist that no
        row needs has the shared weight.

    Returns
    -------
    list of 1 + M floats
        The generalist's first.

    Raises
    ------
    ValueError
        For an unknown combiner, and as it does.
    """
    function = combiner(combine)
    count = len(groups.members)
    device = p_general.device
    labels = labels.to(device)

    def loss(logs: Tensor) -> Tensor:
        weights = torch.cat([torch.ones(1, dtype=torch.float64, device=device), logs.exp()])
        q = function(p_general, p_special, groups, active=active, weights=weights)
        return -q.gather(1, labels[:, None])[:, 0].clamp(min=1e-30).log().double().mean()

    def shared_loss(log: float) -> float:
        with torch.no_grad():
            return float(loss(torch.full((count,), log, dtype=torch.float64, device=device)))

    common = fit_log_weight(shared_loss, len(labels))
    logs = torch.full((count,), common, dtype=torch.float64, device=device)
    if not shared:
        logs = _refined(loss, logs, len(labels))
    return [1.0, *logs.exp().tolist()]


def fit_log_weight(nll: Callable[[float], float], examples: int) -> float:
    """x = log w minimising nll(x) + x^2 / (2 examples): the NLL, and a pull to w = 1.

    The best of WEIGHTS is bracketed by its neighbours, for the NLL need not be convex, and Brent's
    method finds the minimum between them.

    Parameters
    ----------
    nll : callable
        x -> the mean NLL of the examples with the weight e^x.
    examples : int

    Returns
    -------
    float
        Within 1e-4.

    References
    ----------
    Brent 1973, Algorithms for minimization without derivatives, chapter 5.
    """

    def loss(x: float) -> float:
        return nll(x) + x * x / (2 * max(1, examples))

    return lowest_between(loss, [math.log(weight) for weight in WEIGHTS])


def lowest_between(loss: Callable[[float], float], grid: Sequence[float]) -> float:
    """x with the lowest loss between the neighbours of the best of an ascending grid, by Brent."""
    from scipy.optimize import minimize_scalar

    losses = [loss(x) for x in grid]
    best = min(range(len(grid)), key=losses.__getitem__)
    bounds = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(found.x) if found.fun < losses[best] else grid[best]


def fit_weight_to_losses(losses: np.ndarray) -> float:
    """The weight of all specialists, from - log q[label] of each example at each of WEIGHTS.

    Between these the mean NLL is a cubic spline in the logarithm of the weight.

    Parameters
    ----------
    losses : [n, len(WEIGHTS)]

    Returns
    -------
    float
    """
    return math.exp(fit_log_weight(mean_loss_between(losses, np.log(WEIGHTS)), len(losses)))


def fit_temperature_to_losses(losses: np.ndarray) -> float:
    """What `fit_temperature` finds, from - log p[label] of each example at each of TEMPERATURES.

    Between these the mean NLL is a cubic spline in the logarithm of the temperature.

    Parameters
    ----------
    losses : [n, len(TEMPERATURES)]

    Returns
    -------
    float
        Within 1 % of `fit_temperature`'s.  1 where there is nothing to fit.
    """
    if not len(losses):
        return 1.0
    grid = np.log(TEMPERATURES)
    return math.exp(lowest_between(mean_loss_between(losses, grid), grid.tolist()))


def mean_loss_between(losses: np.ndarray, grid: np.ndarray) -> Callable[[float], float]:
    """The mean over examples of losses [n, G] at a grid [G], a cubic spline between its points."""
    from scipy.interpolate import CubicSpline

    spline = CubicSpline(grid, losses.mean(axis=0, dtype=np.float64))
    return lambda x: float(spline(x))


def _refined(loss: Callable[[Tensor], Tensor], start: Tensor, examples: int) -> Tensor:
    """The log weights [M] near `start` that minimise the loss and their distance from it."""
    widest = math.log(WIDEST)
    low, high = start - widest, start + widest
    logs = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logs], max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            total = loss(logs.clamp(low, high))
            total = total + (logs - start).square().sum() / (2 * max(1, examples))
        total.backward()
        return total

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]  # the stub wants a float
    return logs.detach().clamp(low, high)
