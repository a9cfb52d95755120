"""What a shortlist's ensemble needs beside its networks, from predictions on val.

    K   networks, the generalist first
    n   examples
    k   classes of a row's shortlist, largest of the generalist's first

Pure functions, nothing is trained.  What is added up over examples is added up in float64.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .fitting import WIDEST
from .settings import EnsembleSettings
from .shortlist import GEOMETRIC, join_within

# Shortlists among which the size is chosen, and orders among which the order is.
SIZES = (5, 20, 100)
ORDERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Numbers K n k that weights and temperatures are fitted on: a few parameters need no more.
FITTED_ON = 2**22
BLOCK = 4096


class ShortlistPredictions(NamedTuple):
    """What the networks say of n examples at their longest shortlist.

    logits     [K, n, k]. The generalist's are log-probabilities of all classes, at its temperature,
               the others' are up to a constant of the row
    column     int64 [n], the label's column of the shortlist. k or more where it is not on it
    log_label  [n], the generalist's log-probability of the label
    """

    logits: Tensor
    column: Tensor
    log_label: Tensor

    def of(self, networks: int) -> "ShortlistPredictions":
        """The predictions of the first networks alone."""
        return self._replace(logits=self.logits[:networks])


class Joining(NamedTuple):
    """How predictions are joined. Weights and temperatures [K], the generalist's first.

    The generalist's temperature is 1 here: its predictions have it already.
    """

    shortlist: int
    order: float
    weights: list[float]
    temperatures: list[float]


def nll_of_each(predictions: ShortlistPredictions, joining: Joining) -> np.ndarray:
    """- log q[label] of each example, float64 [n]."""
    scale = predictions.logits.new_tensor(joining.temperatures)[:, None, None]
    weights = predictions.logits.new_tensor(joining.weights)
    parts = []
    for start in range(0, len(predictions.column), BLOCK):
        rows = slice(start, start + BLOCK)
        logits = predictions.logits[:, rows, : joining.shortlist]
        log_mass = logits[0].logsumexp(1)
        log_q = join_within(logits / scale, log_mass, joining.order, weights)
        column = predictions.column[rows]
        listed = column < joining.shortlist
        of_label = log_q.gather(1, column.clamp(max=joining.shortlist - 1)[:, None])[:, 0]
        of_label = torch.where(listed, of_label, predictions.log_label[rows])
        parts.append(-of_label.double())
    return torch.cat(parts).cpu().numpy()


def fit_joining(
    predictions: ShortlistPredictions,
    shortlist: int,
    order: float = GEOMETRIC,
    weights: bool = True,
    temperatures: bool = True,
) -> Joining:
    """Weights, and a temperature for each further network, that minimise the NLL on val.

    Only examples whose label is on the shortlist tell: elsewhere the generalist stands.  The
    logarithms are drawn towards 0 as by one example, so that what no example needs stays 1.

    Parameters
    ----------
    predictions : ShortlistPredictions
    shortlist : int
        k: so many columns of the predictions are joined.
    order : float
    weights, temperatures : bool
        What to fit. The others are 1.

    Returns
    -------
    Joining
    """
    count = len(predictions.logits)
    ones = Joining(shortlist, order, [1.0] * count, [1.0] * count)
    listed = (predictions.column < shortlist).nonzero()[:, 0]
    rows = evenly(listed, FITTED_ON // (count * shortlist))
    if count == 1 or not len(rows) or not (weights or temperatures):
        return ones
    logits = predictions.logits[:, rows, :shortlist].double()
    column = predictions.column[rows, None]
    log_mass = logits.new_zeros(len(rows))
    logs = logits.new_zeros(2, count, requires_grad=True)
    # Only ratios of weights matter: the generalist's is 1.  Its temperature is fitted already.
    free = torch.tensor([weights, temperatures], device=logits.device)[:, None].repeat(1, count)
    free[:, 0] = False
    widest = math.log(WIDEST)
    optimiser = torch.optim.LBFGS([logs], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        log_w, log_T = (logs * free).clamp(-widest, widest)
        scaled = logits * torch.exp(-log_T)[:, None, None]
        log_q = join_within(scaled, log_mass, order, log_w.exp())
        loss = -log_q.gather(1, column).mean()
        loss = loss + logs.square().sum() / (2 * len(rows))
        loss.backward()
        return loss

    with torch.inference_mode(False), torch.enable_grad():
        optimiser.step(closure)  # pyright: ignore[reportArgumentType]  # the stub wants a float
    log_w, log_T = (logs * free).detach().clamp(-widest, widest)
    return Joining(shortlist, order, log_w.exp().tolist(), log_T.exp().tolist())


def fit_order(predictions: ShortlistPredictions, shortlist: int, **what: bool) -> float:
    """The one of ORDERS with the lowest NLL on val, each with what is fitted beside it."""
    losses = []
    for order in ORDERS:
        joining = fit_joining(predictions, shortlist, order, **what)
        losses.append(float(nll_of_each(predictions, joining).mean()))
    return ORDERS[int(np.argmin(losses))]


def choose_shortlist(losses: dict[int, np.ndarray]) -> int:
    """The smallest shortlist that is as good as the best, as far as val can tell.

    That is: whose mean NLL is above the lowest by no more than one standard error of the paired
    differences.

    Parameters
    ----------
    losses : dict
        {k: NLL of each example [n]}.
    """
    best = min(losses, key=lambda k: (float(losses[k].mean()), k))
    for k in sorted(losses):
        difference = losses[k] - losses[best]
        error = float(difference.std()) / math.sqrt(len(difference))
        if float(difference.mean()) <= error:
            return k
    return best


def sizes_up_to(num_classes: int, longest: Iterable[int] = SIZES) -> list[int]:
    """The shortlists to choose among where there are so many classes."""
    return sorted({min(k, num_classes) for k in longest})


def settings_of(joining: Joining, general_temperature: float) -> EnsembleSettings:
    """A Joining as ensemble.json has it."""
    return EnsembleSettings(
        kind="shortlist",
        members=len(joining.weights),
        order=joining.order,
        shortlist=joining.shortlist,
        weights=joining.weights,
        temperatures=[general_temperature, *joining.temperatures[1:]],
    )


def evenly(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly over them."""
    if len(rows) <= count:
        return rows
    places = torch.linspace(0, len(rows) - 1, max(1, count), dtype=torch.float64)
    return rows[places.long().to(rows.device)]
