"""What a few specialists say of the val examples that the generalist refers to their groups.

They are joined with it as the run's ensemble joins them. What is fitted for that is cross-fitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clustering.groups import ClassGroups
from ensemble import SpecialistEnsemble, fit_temperature
from ensemble.choices import COMBINERS
from ensemble.fitting import WEIGHTS, fit_weight_to_losses
from networks import Branch, Classifier

from ...data.kept_arrays import kept_npz
from ...data.streams import Batch
from ...session import Session
from ..branches import columns_of
from ..calibrate import weight_ids
from .forms import FITTED_ON, GENERALIST, Answers, evenly, halves_of, in_order
from .healing import opened
from .measuring import of_examples

TOP = ("iu", (None, None))
LEAST_P = 1e-30


def referred_ids(session: Session, members: Sequence[np.ndarray]) -> np.ndarray:
    """Ids of the val examples for which the gate opens one of the groups."""
    predictions = val_predictions(session)
    top = predictions["top"][:, : session.config.ensemble.gate]
    return predictions["ids"][opened(top, members)]


def val_predictions(session: Session) -> dict[str, np.ndarray]:
    """ids, labels and top [n, k], the generalist's likeliest classes, of every example of val."""
    path = session.run.measure.path("predictions.npz")
    return kept_npz(path, {"ids": ("iu", (None,)), "labels": ("iu", (None,)), "top": TOP})


def with_form(
    answers: Answers, form: str, ids: np.ndarray, values: dict[str, np.ndarray]
) -> Answers:
    """The answers and one form more, which is the generalist's but for the examples `ids`.

    values: "correct", "log_p", "brier" of these.
    """
    places = np.searchsorted(answers.ids, ids)
    added = {}
    for kind in ("correct", "log_p", "brier"):
        by_form = getattr(answers, kind)
        whole = by_form[GENERALIST].copy()
        whole[places] = values[kind]
        added[kind] = {**by_form, form: whole}
    return answers._replace(**added)


def joined_answers(
    session: Session,
    generalist: Classifier,
    specialists: Sequence[Classifier | Branch],
    members: Sequence[np.ndarray],
    ids: np.ndarray,
) -> dict[str, np.ndarray]:
    """ids, correct, log_p and brier of each of the examples, joined by eq. 5.

    Temperatures and weight are fitted on every second one and measured on the others, and the
    other way round.
    """
    join = Join(session, generalist, specialists, members)
    parts = []
    for fitted_on, measured_on in halves_of(ids):
        few = evenly(fitted_on, min(FITTED_ON, len(weight_ids(session))) // 2)
        temperatures = join.temperatures(few)
        parts.append(join.measure(temperatures, join.weight(temperatures, few), measured_on))
    return in_order(parts)


class Join:
    """The specialists of a few groups and their generalist, by the run's [ensemble]."""

    def __init__(
        self,
        session: Session,
        generalist: Classifier,
        specialists: Sequence[Classifier | Branch],
        members: Sequence[np.ndarray],
    ):
        self.session = session
        self.config = session.config.ensemble
        self.generalist = generalist
        self.specialists = dict(enumerate(specialists))
        self.groups = ClassGroups(members, session.num_classes)

    def ensemble(self, temperatures: Sequence[float] | None = None) -> SpecialistEnsemble:
        # Of other kinds of ensembles shortlist and combine are about other networks.
        config, of_specialists = self.config, self.config.kind == "specialists"
        return SpecialistEnsemble(
            self.generalist,
            self.specialists,
            self.groups,
            gate=config.gate,
            max_specialists=config.max_specialists,
            combine=config.combine if config.combine in COMBINERS else "kl",
            temperatures=temperatures,
            shortlist=config.shortlist if of_specialists else None,
        )

    def weights(self, weight: float) -> list[float]:
        return [1.0, *[weight] * len(self.specialists)]

    def temperatures(self, ids: np.ndarray) -> list[float]:
        """[1 + M]: 1 for the generalist, and each specialist's that fits its examples best."""
        ones = self.weights(1.0)
        if not self.config.temperatures or not len(ids):
            return ones
        ensemble = self.ensemble()

        def measure(batch: Batch) -> dict[str, Tensor]:
            _, special, _ = ensemble.logits(batch.inputs)
            values = {"labels": batch.labels}
            for m, classes in enumerate(self.groups.members):
                logits = torch.full((len(batch), len(classes) + 1), torch.nan)
                entry = special[m]
                if entry is not None:
                    logits[entry[0].cpu()] = entry[1].float().cpu()
                values[f"logits/{m}"] = logits
            return values

        values = self.session.measured(self.session.shards("val"), measure, ids=ids)
        fitted = []
        for m, classes in enumerate(self.groups.members):
            logits = values[f"logits/{m}"]
            asked = ~np.isnan(logits).any(axis=1)
            targets = columns_of(values["labels"][asked], classes, len(classes))
            fitted.append(
                fit_temperature(torch.from_numpy(logits[asked]), torch.from_numpy(targets))
            )
        return [1.0, *fitted]

    def weight(self, temperatures: Sequence[float], ids: np.ndarray) -> float:
        """The specialists' in eq. 5, by the NLL of these examples."""
        if not self.config.fit_weight or not len(ids):
            return 1.0
        ensemble = self.ensemble(temperatures)

        def measure(batch: Batch) -> dict[str, Tensor]:
            join = ensemble.ask(batch.inputs)
            losses = []
            for weight in WEIGHTS:
                q = join(torch.tensor(self.weights(weight), dtype=torch.float64))
                losses.append(-of_label(q, batch.labels))
            return {"losses": torch.stack(losses, dim=1)}

        values = self.session.measured(self.session.shards("val"), measure, ids=ids)
        return fit_weight_to_losses(values["losses"])

    def measure(
        self, temperatures: Sequence[float], weight: float, ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        ensemble = self.ensemble(temperatures)

        def measure(batch: Batch) -> dict[str, Tensor]:
            weights = torch.tensor(self.weights(weight), dtype=torch.float64)
            q = ensemble.ask(batch.inputs)(weights)
            return of_examples(q.clamp_min(LEAST_P).log(), batch.labels)

        return self.session.measured(self.session.shards("val"), measure, ids=ids)


def of_label(q: Tensor, labels: Tensor) -> Tensor:
    """log q[label], [b]."""
    return q.gather(1, labels[:, None])[:, 0].clamp_min(LEAST_P).log()
