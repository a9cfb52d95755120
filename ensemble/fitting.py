"""Temperatures and weights from predictions on val: pure functions, nothing is trained."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from clustering.groups import ClassGroups

from .choices import combiner
from .predictions import SpecialistInput

# Temperatures and weights are looked for within a factor of this.
WIDEST = 32.0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """T minimising the mean of - log softmax(logits / T)[label].

    The NLL is convex in 1 / T, so the zero of its slope is found by bisection.

    Parameters
    ----------
    logits : Tensor [n, K]
        Entries may be -inf, as a dustbin's is.
    labels : int64 Tensor [n]
        Columns of `logits`.

    Returns
    -------
    float
        1 where there is nothing to fit.  At most WIDEST, or its inverse, where the labels are
        never, or always, the most probable.

    References
    ----------
    Guo, Pleiss, Sun and Weinberger 2017, "On calibration of modern neural networks", section 4.2.
    """
    if len(logits) == 0:
        return 1.0
    logits = logits.detach().double()
    logits = (logits - logits.amax(1, keepdim=True)).clamp(min=-1e4)
    of_label = logits.gather(1, labels.to(logits.device)[:, None])[:, 0]

    def slope(inverse: float) -> float:
        expected = (torch.softmax(logits * inverse, 1) * logits).sum(1)
        return float((expected - of_label).mean())

    low, high = -math.log(WIDEST), math.log(WIDEST)
    for _ in range(28):  # to 1e-7 of its logarithm
        middle = (low + high) / 2
        if slope(math.exp(middle)) > 0:
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)


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
    log_odds = logits[:, mask].double().logsumexp(1) - logits[:, ~mask].double().logsumexp(1)
    fraction = float(mask[labels.cpu()].double().mean())
    low, high = -64.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(torch.sigmoid(log_odds + middle).mean()) > fraction:
            high = middle
        else:
            low = middle
    return (low + high) / 2


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
        The generalist's first; 1 for a specialist that is None.
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
        As `combine_kl` has them.
    labels : int64 Tensor [n]
    combine : str
        A name of `COMBINERS`.
    shared : bool
        One weight for all specialists.  Otherwise one each, its logarithm drawn towards the shared
        one as by one example, so that a specialist that no row needs has the shared weight.

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

    common = _golden(shared_loss, -math.log(WIDEST), math.log(WIDEST))
    logs = torch.full((count,), common, dtype=torch.float64, device=device)
    if not shared:
        logs = _refined(loss, logs, len(labels))
    return [1.0, *logs.exp().tolist()]


def _refined(loss: Callable[[Tensor], Tensor], start: Tensor, examples: int) -> Tensor:
    """The log weights [M] near `start` that minimise the loss and their distance from it."""
    widest = math.log(WIDEST)
    logs = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logs], max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            total = loss(logs.clamp(-widest, widest))
            total = total + (logs - start).square().sum() / (2 * max(1, examples))
        total.backward()
        return total

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]  # the stub wants a float
    return logs.detach().clamp(-widest, widest)


def _golden(f: Callable[[float], float], low: float, high: float, steps: int = 16) -> float:
    """The minimum of f by golden sections of a grid's best bracket: f need not be convex."""
    grid = [low + (high - low) * i / 8 for i in range(9)]
    values = [f(x) for x in grid]
    best = min(range(9), key=values.__getitem__)
    low, high = grid[max(0, best - 1)], grid[min(8, best + 1)]
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    f_a, f_b = f(a), f(b)
    for _ in range(steps):
        if f_a <= f_b:
            high, b, f_b = b, a, f_a
            a = high - ratio * (high - low)
            f_a = f(a)
        else:
            low, a, f_a = a, b, f_b
            b = low + ratio * (high - low)
            f_b = f(b)
    return (low + high) / 2
