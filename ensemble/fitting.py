"""Temperatures and weights from predictions on val: pure functions, nothing is trained."""

import math

import torch
from torch import Tensor

from .pooling import COMBINERS

# Temperatures and weights are looked for within a factor of this.
WIDEST = 32.0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """T minimising the mean of - log softmax(logits / T)[label].  Guo et al. 2017, section 4.2.

    logits: [n, K].  labels: int64 [n].  The NLL is convex in 1 / T: bisection of its slope.  1 where there is nothing
    to fit; at most WIDEST, or its inverse, where the labels are never, or always, the most probable.
    """
    if len(logits) == 0:
        return 1.0
    logits = logits.detach().double()
    logits = (logits - logits.amax(1, keepdim=True)).clamp(
        min=-1e4
    )  # a dustbin's logit may be -inf
    of_label = logits.gather(1, labels.to(logits.device)[:, None])[:, 0]

    def slope(inverse: float) -> float:
        expected = (torch.softmax(logits * inverse, 1) * logits).sum(1)
        return float((expected - of_label).mean())

    low, high = -math.log(WIDEST), math.log(WIDEST)
    for _ in range(28):  # to 1e-7 of its logarithm
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def fit_shift(logits: Tensor, labels: Tensor, classes) -> float:
    """b minimising the mean of - log softmax(logits + b on `classes`)[label].

    logits: [n, C].  labels: int64 [n].  The NLL is convex in b and its slope is the mean mass on `classes` less their
    share of the labels: bisection.  Within +-64, where only `classes`, or none of them, occur among the labels.
    """
    mask = torch.zeros(logits.shape[1], dtype=torch.bool)
    mask[torch.as_tensor(classes)] = True
    log_odds = logits[:, mask].double().logsumexp(1) - logits[:, ~mask].double().logsumexp(1)
    share = float(mask[labels.cpu()].double().mean())
    low, high = -64.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (low, middle)
            if float(torch.sigmoid(log_odds + middle).mean()) > share
            else (middle, high)
        )
    return (low + high) / 2


def fit_temperatures(general: Tensor, special, groups, labels: Tensor) -> list[float]:
    """[1 + M], the generalist's first, each by itself.

    general: logits [n, C].  special[m]: logits [n, |S_m| + 1], dustbin last, or (rows, logits), or None.  labels: int64
    [n].  To specialist m a label outside S_m is its dustbin.  As SpecialistEnsemble.logits gives them.
    """
    found = [fit_temperature(general, labels)]
    for given, members in zip(special, groups.members, strict=True):
        if given is None:
            found.append(1.0)
            continue
        rows, logits = (torch.arange(len(labels)), given) if isinstance(given, Tensor) else given
        column = torch.full((groups.num_classes,), len(members))
        column[torch.tensor(members)] = torch.arange(len(members))
        found.append(
            fit_temperature(
                logits, column[labels.cpu()[torch.as_tensor(rows).cpu()]].to(logits.device)
            )
        )
    return found


def fit_weights(
    p_general: Tensor,
    p_special,
    groups,
    labels: Tensor,
    active=None,
    combine: str = "kl",
    shared: bool = True,
) -> list[float]:
    """[1 + M] minimising the mean of - log q[label]: 1 for the generalist, and one for all specialists or
    (shared=False) for each.

    Arguments as combine_kl's; labels: int64 [n].  With shared=False each log weight is drawn towards the shared one as
    by one example, so that a specialist nobody asked has the shared weight.  Only ratios of weights matter to eq. 5.
    """
    if combine not in COMBINERS:
        raise ValueError(
            f"combine = {combine!r} is unknown; it must be one of {', '.join(COMBINERS)}"
        )
    count, device = len(groups.members), p_general.device
    labels = labels.to(device)

    def loss(logs: Tensor) -> Tensor:
        weights = torch.cat([torch.ones(1, dtype=torch.float64, device=device), logs.exp()])
        q = COMBINERS[combine](p_general, p_special, groups, active=active, weights=weights)
        return -q.gather(1, labels[:, None])[:, 0].clamp(min=1e-30).log().double().mean()

    def shared_loss(log: float) -> float:
        with torch.no_grad():
            return float(loss(torch.full((count,), log, dtype=torch.float64, device=device)))

    common = _golden(shared_loss, -math.log(WIDEST), math.log(WIDEST))
    logs = torch.full((count,), common, dtype=torch.float64, device=device)
    if not shared:
        start = logs.clone()
        logs.requires_grad_()
        optimiser = torch.optim.LBFGS([logs], max_iter=30, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            with torch.enable_grad():
                total = loss(logs.clamp(-math.log(WIDEST), math.log(WIDEST)))
                total = total + (logs - start).square().sum() / (2 * max(1, len(labels)))
            total.backward()
            return total

        optimiser.step(closure)
        logs = logs.detach().clamp(-math.log(WIDEST), math.log(WIDEST))
    return [1.0, *logs.exp().tolist()]


def _golden(f, low: float, high: float, steps: int = 16) -> float:
    """The minimum of f by golden sections of a grid's best bracket: f need not be convex everywhere."""
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
