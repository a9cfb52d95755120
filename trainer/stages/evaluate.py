"""Generalist, ensemble, controls and students on test: the only reader of that split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from clustering import captured_confusion
from ensemble import DeepEnsemble, ShortlistEnsemble, SpecialistEnsemble
from ensemble.listed import Listed
from ensemble.listed_ensemble import Wanted, rows_of_block
from networks import Branch, BranchedClassifier, Classifier, lazy_logits, member_log_probabilities
from networks.members import mean_of_members
from pipeline.choices import STUDENT_METHODS
from pipeline.controls import evaluated_controls
from pipeline.store import Attempt, Stage, read_json

from ..core.dense_logits import (
    Asked,
    DenseLogits,
    ListedPredictor,
    dense_log_probabilities,
    predictor_of,
)
from ..core.metrics import dirichlet_uncertainty
from ..data.streams import Batch
from ..session import Session
from .control_rows import load_pair
from .costs import cost_of, cost_of_control, cost_of_ensemble, cost_of_student
from .deep import ensemble_sizes
from .evaluator import TOP, MemberMetrics, TestEvaluator, metrics_of_members
from .extending import before_new_classes, old_classes, split_old_new
from .grouping import groups_of
from .joining import (
    by_group,
    dropped_specialists,
    load_deep_ensemble,
    load_shortlist_ensembles,
    read_settings,
    specialist_ensemble,
)
from .networks import load_network
from .shortlist import shortlist_sizes
from .sizes import of_generalists, of_network, of_specialists, times_asked


def evaluate(session: Session, stage: Stage) -> None:
    """A run of specialists: evaluation/NAME.json and NAME.npz of each row of the results."""
    with session.attempt(stage) as attempt:
        evaluate_specialists(session, TestEvaluator(session, attempt))


def evaluate_extended(session: Session, stage: Stage) -> None:
    """Evaluate a run that adds classes, with old and new classes also by themselves."""
    with session.attempt(stage) as attempt:
        evaluator = TestEvaluator(
            session, attempt, parts=partial(split_old_new, old_classes(session))
        )
        evaluate_specialists(session, evaluator, added=partial(before_new_classes, session))


def evaluate_deep(session: Session, stage: Stage) -> None:
    """A deep ensemble's run: what its first 1, 2, ... M members are worth, too."""
    with session.attempt(stage) as attempt:
        ensemble = load_deep_ensemble(session)
        evaluate_generalists(session, attempt, ensemble, ensemble_sizes(session, ensemble))


def evaluate_shortlist(session: Session, stage: Stage) -> None:
    """A run whose further networks are asked about the generalist's shortlists."""
    with session.attempt(stage) as attempt:
        ensembles = load_shortlist_ensembles(session)
        sizes = shortlist_sizes(session, ensembles)
        evaluate_generalists(session, attempt, ensembles[-1], sizes)


def evaluate_generalists(
    session: Session,
    attempt: Attempt,
    ensemble: DeepEnsemble | ShortlistEnsemble,
    sizes: list[dict],
) -> None:
    """Every network that a row is of, then the ensemble. sizes: what its first networks give."""
    evaluator = TestEvaluator(session, attempt, sizes)
    evaluate_networks(session, evaluator, ensemble.generalist)
    evaluator(
        lambda raw: dense_log_probabilities(ensemble.probabilities(raw)),
        "ensemble",
        cost_of_ensemble(session),
        metrics_of_generalists(ensemble),
        together=generalists_in_one_pass(ensemble),
        more=lambda values: {"sizes": sizes},
        answering=of_generalists(ensemble),
    )


def evaluate_specialists(
    session: Session,
    evaluator: TestEvaluator,
    added: Callable[[Classifier], dict] | None = None,
) -> None:
    """Every network, then generalist and specialists together.

    added: a note on the generalist's row, by the network.
    """
    ensemble = specialist_ensemble(session)
    generalist = ensemble.generalist
    before = evaluate_networks(session, evaluator, generalist, added)

    def predict_and_gate(raw: Tensor) -> tuple[DenseLogits, dict[str, Tensor]]:
        output = ensemble.forward_with_details(raw)
        return dense_log_probabilities(output.q), {"asked": ensemble.asked(output.active)}

    def more(values: dict[str, np.ndarray]) -> dict:
        asked = values["asked"]
        return {
            "specialists": specialist_rows(session, generalist, ensemble, asked),
            "clusters": captured(session, before),
            "missing": read_settings(session).missing,
            "dropped": sorted({*ensemble.skipped} & {*dropped_specialists(session)}),
            "multiplications": multiplications_of(session, ensemble, asked),
        }

    def predict(raw: Tensor) -> DenseLogits:
        return predict_and_gate(raw)[0]

    evaluator(
        listed_predictor(ensemble) if ensemble.is_sparse else predict,
        "ensemble",
        cost_of_ensemble(session),
        together=predict_and_gate,
        more=more,
        answering=of_specialists(ensemble),
        ids=by_group(ensemble, before["ids"], before["top5"][:, 0]),
    )


def listed_predictor(ensemble: SpecialistEnsemble) -> ListedPredictor:
    """q of the classes that metrics read, and who was asked."""

    def predict(raw: Tensor, asked: Asked) -> Iterator[tuple[Listed, dict[str, Tensor]]]:
        wanted = Wanted(TOP, asked.powers, asked.moments)
        for answers in ensemble.ask_in_blocks(raw, wanted, asked.labels):
            yield answers.join(ensemble.weights), {"asked": ensemble.asked(answers.active)}

    return ListedPredictor(predict, rows_of_block(ensemble, TOP))


def multiplications_of(
    session: Session, ensemble: SpecialistEnsemble, asked: np.ndarray
) -> dict[str, int]:
    """For one example on average: the generalist's, and with the specialists that are asked.

    asked: int32 [N, most], the gate over test.
    """
    times = times_asked(asked, len(ensemble.available))
    together = round(ensemble.mean_multiplications(times, len(asked)))
    alone = round(ensemble.mean_multiplications(np.zeros_like(times), len(asked)))
    session.say(
        "multiplications an example: generalist %s, with %.2f specialists asked %s",
        f"{alone:,}",
        times.sum() / len(asked),
        f"{together:,}",
    )
    return {"generalist": alone, "ensemble": together}


def evaluate_networks(
    session: Session,
    evaluator: TestEvaluator,
    generalist: Classifier,
    added: Callable[[Classifier], dict] | None = None,
) -> dict[str, np.ndarray]:
    """Generalist, controls and students.  Returns the generalist's values over test."""
    run = session.run
    before = evaluator(
        predictor_of(generalist),
        "generalist",
        cost_of(run.generalist),
        metrics_of_network(generalist),
        more=None if added is None else lambda values: {"added": added(generalist)},
        answering=of_network(generalist),
    )
    for name, stage in evaluated_controls(run).items():
        evaluate_control(session, evaluator, name, stage)
    for name, stage in run.students.items():
        network = load_network(session, stage)
        members, together = metrics_of_network(network), network_in_one_pass(network)
        if STUDENT_METHODS[session.config.students[name].method].dirichlet:
            members, together = metrics_of_prior(network), None
        evaluator(
            predictor_of(network),
            name,
            cost_of_student(session, name),
            members,
            together=together,
            answering=of_network(network),
        )
    return before


def evaluate_control(session: Session, evaluator: TestEvaluator, name: str, stage: Stage) -> None:
    """One network, or two generalists that answer together."""
    cost = cost_of_control(session, name, stage)
    pair = load_pair(session, stage)
    if pair is None:
        network = load_network(session, stage)
        evaluator(
            predictor_of(network),
            name,
            cost,
            metrics_of_network(network),
            together=network_in_one_pass(network),
            answering=of_network(network),
        )
        return
    evaluator(
        lambda raw: dense_log_probabilities(pair.probabilities(raw)),
        name,
        cost,
        metrics_of_generalists(pair),
        together=generalists_in_one_pass(pair),
        answering=of_generalists(pair),
    )


def metrics_of_network(network: Classifier) -> MemberMetrics | None:
    """What several members add to each example's metrics. None for a single network."""
    if network.num_members == 1:
        return None
    return MemberMetrics(
        network.num_members,
        lambda raw: metrics_of_members(member_log_probabilities(network, raw)),
    )


def metrics_of_generalists(ensemble: DeepEnsemble | ShortlistEnsemble) -> MemberMetrics | None:
    if len(ensemble.networks) == 1:
        return None
    return MemberMetrics(
        len(ensemble.networks),
        lambda raw: metrics_of_members(ensemble.member_log_probabilities(raw)),
    )


Together = Callable[[Tensor], tuple[DenseLogits, dict[str, Tensor]]]


def generalists_in_one_pass(ensemble: DeepEnsemble | ShortlistEnsemble) -> Together | None:
    """Predictions and what members add to them, for which every network runs once.

    None where the networks are not asked about all classes.
    """
    if not isinstance(ensemble, DeepEnsemble) or len(ensemble.networks) == 1:
        return None

    def together(raw: Tensor) -> tuple[DenseLogits, dict[str, Tensor]]:
        log_p = ensemble.member_log_probabilities(raw)
        return dense_log_probabilities(ensemble.joined(log_p)), metrics_of_members(log_p)

    return together


def network_in_one_pass(network: Classifier) -> Together | None:
    """Predictions and what members add to them, for one network with several members."""
    if network.num_members == 1:
        return None

    def together(raw: Tensor) -> tuple[DenseLogits, dict[str, Tensor]]:
        log_p = member_log_probabilities(network, raw)
        return DenseLogits(mean_of_members(log_p)), metrics_of_members(log_p)

    return together


def metrics_of_prior(network: Classifier) -> MemberMetrics:
    return MemberMetrics(1, lambda raw: {"mu": dirichlet_uncertainty(network(raw))})


def specialist_rows(
    session: Session, generalist: Classifier, ensemble: SpecialistEnsemble, asked: np.ndarray
) -> list[dict]:
    """Each specialist on the test examples of its classes, beside the generalist.

    Predictions are restricted to these classes.  asked: int32 [N, most], the gate over test.
    """
    rows = []
    times = times_asked(asked, len(ensemble.available))
    for m, classes in enumerate(groups_of(session).members):
        if m not in ensemble.specialists:
            continue
        row = {"index": m, "classes": len(classes), "routed": int(times[m])}
        specialist = ensemble.specialists[m]
        if isinstance(specialist, Branch):
            specialist = BranchedClassifier(generalist, specialist).eval()
        row |= conditional_accuracy(session, generalist, specialist, classes)
        rows.append({**row, "cost": cost_of(session.run.specialists[m])})
    return rows


def conditional_accuracy(
    session: Session,
    generalist: Classifier,
    network: Classifier | BranchedClassifier,
    classes: np.ndarray,
) -> dict:
    """{n, conditional_before, conditional_after, gain}. {n: 0} without examples."""
    test = session.shards("test")
    inside = np.zeros(session.num_classes, bool)
    inside[classes] = True
    ids = np.flatnonzero(inside[test.labels])
    if not len(ids):
        return {"n": 0}
    among = torch.tensor(classes).to(session.ranks.device)

    def predict(batch: Batch) -> dict[str, Tensor]:
        before = lazy_logits(generalist, batch.inputs).of_classes(among)
        after = network(batch.inputs)[:, :-1]
        return {
            "before": among[before.argmax(1)],
            "after": among[after.argmax(1)],
            "labels": batch.labels,
        }

    values = session.measured(test, predict, ids=ids)
    before = float((values["before"] == values["labels"]).mean())
    after = float((values["after"] == values["labels"]).mean())
    return {
        "n": len(values["ids"]),
        "conditional_before": before,
        "conditional_after": after,
        "gain": after - before,
    }


def captured(session: Session, before: dict[str, np.ndarray]) -> dict:
    """The fraction of the generalist's top-1 errors on test that groups capture, against chance.

    An error is captured where its two classes share a group.
    """
    from scipy.sparse import coo_array

    summary = read_json(session.run.cluster.path("summary.json"))
    pairs = (before["labels"], before["top5"][:, 0])
    size = session.num_classes
    confusion = coo_array((np.ones(len(pairs[0])), pairs), shape=(size, size)).tocsr()
    fraction, chance = captured_confusion(groups_of(session), confusion)
    return {
        "captured_confusion": None if np.isnan(fraction) else fraction,  # no errors, no fraction
        "chance": chance,
        "captured_unlabelled": summary["captured_unlabelled"],
        "sizes": summary["sizes"],
    }
