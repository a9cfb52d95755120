"""What the generalist and a pilot's networks say of val, alone and joined, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ensemble.fitting import fit_temperature_to_losses, fit_weight_to_losses
from ensemble.shortlist_ensemble import whole_logits
from networks import Classifier

from ...data.streams import Batch
from ...session import Session
from ..calibrate import examples_for
from .measuring import (
    Join,
    form_metrics,
    joined,
    losses_at_temperatures,
    losses_at_weights,
    of_examples,
    residual_correlation,
    residual_product,
)

GENERALIST = "generalist"
# Of val, temperatures and weights are fitted on so many examples at most, and on as many as have
# so many numbers n C, which are computed anew for each value that is tried.
FITTED_ON = 2**13
NUMBERS = 2**24


class Fitted(NamedTuple):
    """Temperatures of the networks, by name, and weights of the joins, by form."""

    temperatures: dict[str, float]
    weights: dict[str, float]


class Answers(NamedTuple):
    """What was measured of each example, in their order: by form, except ids.

    ids       int64 [n], of val
    correct   bool [n]
    log_p     float32 [n], of the label
    brier     float32 [n], the sum over classes
    products  float32 [n], <y - p, y - p_g> with the generalist, of the networks alone
    """

    ids: np.ndarray
    correct: dict[str, np.ndarray]
    log_p: dict[str, np.ndarray]
    brier: dict[str, np.ndarray]
    products: dict[str, np.ndarray]

    def metrics(self) -> dict[str, dict[str, float]]:
        """The metrics of each form. The generalist's gain is 0."""
        reference = self.correct[GENERALIST]
        return {
            form: form_metrics(self.correct[form], self.log_p[form], self.brier[form], reference)
            for form in self.correct
        }

    def residual_correlation(self, form: str) -> float:
        """How residuals of a network alone correlate with the generalist's."""
        return residual_correlation(self.products[form], self.brier[form], self.brier[GENERALIST])

    def arrays(self) -> dict[str, np.ndarray]:
        """What answers.npz holds."""
        arrays = {"ids": self.ids}
        arrays |= {f"correct/{form}": values for form, values in self.correct.items()}
        return arrays | {f"logp/{form}": values for form, values in self.log_p.items()}


def measured_forms(
    session: Session,
    generalist: Classifier,
    networks: dict[str, Classifier],
    alone: dict[str, str],
    joins: dict[str, Join] | None = None,
    ids: np.ndarray | None = None,
) -> Answers:
    """Every form on the whole of val. Temperatures and weights are cross-fitted.

    They are fitted on the even positions of val and measured on the odd ones, and the other way
    round.

    Parameters
    ----------
    session : Session
    generalist : Classifier
    networks : dict
        The others, by name.
    alone : dict
        {form: network} of those that are measured by themselves. The generalist always is.
    joins : dict, optional
        {form: Join} of those that are joined with the generalist.
    ids : int64 array, optional
        Only these examples of val, ascending. Positions are theirs.
    """
    asked = {GENERALIST: generalist.eval()}
    asked |= {name: network.eval() for name, network in networks.items()}
    alone = {GENERALIST: GENERALIST, **alone}
    if ids is None:
        ids = np.arange(len(session.shards("val")))
    parts = []
    for fitted_on, measured_on in halves_of(ids):
        fitted = fit(session, asked, joins or {}, fitted_on)
        measure = measure_with(asked, alone, joins or {}, fitted)
        parts.append(session.measured(session.shards("val"), measure, ids=measured_on))
    return answers_of(in_order(parts))


def halves_of(ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(examples to fit on, examples to measure on), twice. Each example is measured once."""
    even, odd = ids[0::2], ids[1::2]
    return [(fitted, measured) for fitted, measured in ((even, odd), (odd, even)) if len(measured)]


def in_order(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What was measured in parts, by ids."""
    values = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.argsort(values["ids"], kind="stable")
    return {key: value[order] for key, value in values.items()}


def answers_of(values: dict[str, np.ndarray]) -> Answers:
    """values: "ids", and "KIND/FORM" for each kind of numbers."""

    def by_form(kind: str) -> dict[str, np.ndarray]:
        prefix = f"{kind}/"
        return {
            key.removeprefix(prefix): value
            for key, value in values.items()
            if key.startswith(prefix)
        }

    kinds = ("correct", "log_p", "brier", "products")
    return Answers(values["ids"], *(by_form(kind) for kind in kinds))


def fit(
    session: Session, networks: dict[str, Classifier], joins: dict[str, Join], ids: np.ndarray
) -> Fitted:
    """Temperatures first, then the joins' weights at them, by the NLL of these examples."""
    ones = Fitted(dict.fromkeys(networks, 1.0), dict.fromkeys(joins, 1.0))
    if not len(ids):
        return ones
    val = session.shards("val")
    few = evenly(ids, min(FITTED_ON, len(examples_for(session, NUMBERS))) // 2)

    def at_temperatures(batch: Batch) -> dict[str, Tensor]:
        return {
            name: losses_at_temperatures(logits, batch.labels)
            for name, logits in logits_of(networks, batch).items()
        }

    values = session.measured(val, at_temperatures, ids=few)
    temperatures = {name: fit_temperature_to_losses(values[name]) for name in networks}
    if not joins:
        return Fitted(temperatures, {})

    def at_weights(batch: Batch) -> dict[str, Tensor]:
        log_p = log_probabilities(networks, batch, temperatures)
        return {
            form: losses_at_weights(join, log_p[GENERALIST], log_p[join.network], batch.labels)
            for form, join in joins.items()
        }

    values = session.measured(val, at_weights, ids=few)
    return Fitted(temperatures, {form: fit_weight_to_losses(values[form]) for form in joins})


def measure_with(
    networks: dict[str, Classifier],
    alone: dict[str, str],
    joins: dict[str, Join],
    fitted: Fitted,
) -> Callable[[Batch], dict[str, Tensor]]:
    """A function of a batch -> "KIND/FORM" of each of its examples."""

    def measure(batch: Batch) -> dict[str, Tensor]:
        log_p = log_probabilities(networks, batch, fitted.temperatures)
        own, values = log_p[GENERALIST], {}
        for form, name in alone.items():
            values |= named(form, of_examples(log_p[name], batch.labels))
            values[f"products/{form}"] = residual_product(own, log_p[name], batch.labels)
        for form, join in joins.items():
            log_q = joined(join, own, log_p[join.network], fitted.weights[form])
            values |= named(form, of_examples(log_q, batch.labels))
        return values

    return measure


def named(form: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}/{form}": value for kind, value in values.items()}


def logits_of(networks: dict[str, Classifier], batch: Batch) -> dict[str, Tensor]:
    """Float32 [b, C] of each."""
    return {name: whole_logits(each, batch.inputs).float() for name, each in networks.items()}


def log_probabilities(
    networks: dict[str, Classifier], batch: Batch, temperatures: dict[str, float]
) -> dict[str, Tensor]:
    """[b, C] of each, at its temperature."""
    logits = logits_of(networks, batch)
    return {name: (z / temperatures[name]).log_softmax(1) for name, z in logits.items()}


def evenly(ids: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the ids, and at least one, evenly over them."""
    places = np.linspace(0, len(ids) - 1, min(len(ids), max(1, count)))
    return ids[np.unique(places.astype(np.int64))]
