"""How good is it?  Networks and ensembles over val (while training) and test (once, at the end)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustering import captured_confusion
from ensemble import DeepEnsemble, combiner, fit_temperature
from networks import Summary, lazy_logits, mean_log_probabilities, member_log_probabilities
from networks.linear_logits import LinearLogits
from pipeline.store import Attempt, read_json, write_json

from ..core.metrics import (
    auroc,
    deep_ensemble_equivalent,
    dirichlet_uncertainty,
    disagreement,
    model_uncertainty,
    pairwise_kl,
    reliability,
    summarise,
)
from ..core.objectives import specialist_columns, with_dustbin
from ..data.streams import Batch
from ..session import Session, read_summary

TOP = 5


def validate_classifier(session: Session) -> Callable[[nn.Module], dict[str, float]]:
    """Loss (nats) and top-1 over the whole of val."""
    shards = session.shards("val")

    def validate(network: nn.Module) -> dict[str, float]:
        network.eval()

        def judge(batch: Batch):
            found = of_network(network)(batch.inputs).summary(1, batch.labels)
            return {"loss": -found.log_label, "right": found.indices[:, 0] == batch.labels}

        found = session.measured(shards, judge)
        return {
            "loss": float(found["loss"].mean(dtype=np.float64)),
            "top1": float(found["right"].mean()),
        }

    return validate


class validate_specialist:
    """A specialist on the val examples that the generalist refers to it, at their natural frequencies.

    One that keeps a full softmax (dustbin = "full") is eval_model as what becomes of it.
    """

    def __init__(self, session: Session, members: np.ndarray):
        self.session = session
        self.shards = session.shards("val")
        self.members = members
        self.columns = specialist_columns(members, session.num_classes).to(session.ranks.device)
        with np.load(session.run.measure.path("predictions.npz"), allow_pickle=False) as found:
            top, ids = found["top"][:, : session.config.ensemble.gate], found["ids"]
        referred = np.isin(top, members).any(axis=1)
        self.ids = ids[referred] if referred.any() else ids

    def answers(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """(logits [n, |S_m| + 1], targets [n])"""
        network.eval()

        def judge(batch: Batch):
            logits = network(batch.inputs).float()
            if network.spec.head["kind"] == "linear":
                logits = with_dustbin(logits, self.members)
            return {"logits": logits, "targets": self.columns[batch.labels]}

        found = self.session.measured(self.shards, judge, ids=self.ids)
        return torch.from_numpy(found["logits"]), torch.from_numpy(found["targets"])

    def loss(self, network: nn.Module) -> dict[str, float]:
        logits, targets = self.answers(network)
        return {
            "loss": float(F.cross_entropy(logits, targets)),
            "top1": float((logits.argmax(1) == targets).float().mean()),
        }

    def temperature(self, network: nn.Module) -> float:
        return fit_temperature(*self.answers(network))


WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def fit_weight(session: Session, ensemble) -> list[float]:
    """[1 + M]: 1 for the generalist and one weight for all specialists in eq. 5, the best of WEIGHTS by NLL on val.

    The specialists start from the generalist and then learn more about their classes: what they say differs from it
    where
    they know better, so that counting both alike may count the generalist too much.
    """
    M = len(ensemble.groups.members)

    def ask(batch: Batch):
        p_general, p_special, active = ensemble.predictions(batch.inputs)
        losses = []
        for weight in WEIGHTS:
            weights = torch.tensor([1.0, *[weight] * M])
            q = combiner(ensemble.combine)(
                p_general, p_special, ensemble.groups, active=active, weights=weights
            )
            losses.append(-q.gather(1, batch.labels[:, None])[:, 0].clamp_min(1e-30).log())
        return {"losses": torch.stack(losses, dim=1)}

    losses = session.measured(session.shards("val"), ask)["losses"].mean(axis=0, dtype=np.float64)
    best = WEIGHTS[int(losses.argmin())]
    session.say(
        "eq. 5: the specialists' weight is %g (NLL on val %s)",
        best,
        ", ".join(f"{w:g}: {loss:.4f}" for w, loss in zip(WEIGHTS, losses, strict=True)),
    )
    return [1.0, *[best] * M]


CALIBRATED = (
    2**23
)  # numbers held at a time while a temperature is fitted: n C, of as many val examples as fit
FEWEST = 500


class DenseLogits(NamedTuple):
    """Log-probabilities [b, C] that are held, to be asked as LinearLogits are."""

    log_p: Tensor

    def materialize(self) -> Tensor:
        return self.log_p

    def scale_by_temperature(self, temperature: float) -> DenseLogits:
        return DenseLogits(self.log_p / temperature)

    def summary(self, k: int, labels: Tensor) -> Summary:
        log_p = self.log_p.log_softmax(1)
        top = log_p.topk(min(k, log_p.shape[1]), dim=1)
        log_label = log_p.gather(1, labels[:, None])[:, 0]
        return Summary(top.indices, top.values.exp(), log_label, (2 * log_p).exp().sum(1))


def dense_log_probabilities(p: Tensor) -> DenseLogits:
    return DenseLogits(p.float().clamp_min(torch.finfo(torch.float32).tiny).log())


def of_network(network: nn.Module) -> Callable[[Tensor], LinearLogits | DenseLogits]:
    """What a network answers to raw inputs; one with several members by their mean."""
    if network.num_members == 1:
        return lambda raw: lazy_logits(network, raw)
    return lambda raw: DenseLogits(mean_log_probabilities(network, raw))


def calibration_ids(session: Session, members: int = 1) -> np.ndarray:
    """Val examples, evenly over it, that a temperature is fitted on: a number needs no million."""
    val = session.shards("val")
    count = max(FEWEST, CALIBRATED // (session.num_classes * members))
    return np.unique(np.linspace(0, len(val) - 1, min(count, len(val))).astype(np.int64))


def calibrate(session: Session, answer: Callable[[Tensor], LinearLogits | DenseLogits]) -> float:
    """The temperature that fits val best.  Guo et al. 2017, section 4.2."""

    def ask(batch: Batch):
        return {"logits": answer(batch.inputs).materialize().float(), "labels": batch.labels}

    found = session.measured(session.shards("val"), ask, ids=calibration_ids(session))
    return fit_temperature(torch.from_numpy(found["logits"]), torch.from_numpy(found["labels"]))


def figures(found: Summary, labels: Tensor) -> dict[str, Tensor]:
    """What one batch contributes to a row."""
    missing = TOP - found.indices.shape[1]  # fewer than five classes: -1 stands for none
    p_label = found.log_label.exp()
    return {
        "labels": labels,
        "top5": F.pad(found.indices, (0, missing), value=-1).int(),
        "top5_probability": F.pad(found.probabilities, (0, missing)).float(),
        "label_probability": p_label.float(),
        "squared_error": found.squares - 2 * p_label + 1,
    }


def evaluate_all(session: Session, attempt: Attempt) -> None:
    """Write evaluation/NAME.json and NAME.npz for the generalist, the ensemble, every control and every student."""
    run, costs = session.run, Costs(session)
    ensemble = session.ensemble()
    generalist = session.load(run.generalist)
    sizes = ensemble_sizes(session, ensemble) if session.config.is_deep else []
    judge = TestEvaluator(session, attempt, sizes)

    adds = (lambda found: {"added": before_new_classes(session, generalist)}) if run.old else None
    before = judge(
        of_network(generalist), "generalist", costs.generalist, of_members(generalist), more=adds
    )
    for name, stage in named_controls(session).items():
        network = session.load(stage)
        judge(of_network(network), name, costs.after_generalist(stage), of_members(network))
    for name, stage in run.students.items():
        student, network = session.config.students[name], session.load(stage)
        extra = of_prior(network) if student.method == "prior" else of_members(network)
        judge(of_network(network), name, costs.student(name), extra)

    if session.config.is_deep:
        judge(
            lambda raw: dense_log_probabilities(ensemble.probabilities(raw)),
            "ensemble",
            costs.ensemble,
            of_deep(ensemble),
            more=lambda found: {"sizes": sizes},
        )
        return

    def joint(raw: Tensor) -> tuple[DenseLogits, dict[str, Tensor]]:
        answer = ensemble.forward_with_details(raw)
        return dense_log_probabilities(answer.q), {"active": answer.active}

    judge(
        lambda raw: joint(raw)[0],
        "ensemble",
        costs.ensemble,
        both=joint,
        more=lambda found: {
            "specialists": specialist_rows(session, generalist, ensemble, found["active"], costs),
            "clusters": captured(session, before),
            "missing": read_json(run.combine.path("ensemble.json"))["missing"],
        },
    )


class Extra(NamedTuple):
    """What the figures of `count` members add: figures(raw inputs) -> {"mu": [b], ...}"""

    count: int
    figures: Callable[[Tensor], dict[str, Tensor]]


def of_members(network: nn.Module) -> Extra | None:
    if network.num_members == 1:
        return None
    return Extra(
        network.num_members, lambda raw: member_figures(member_log_probabilities(network, raw))
    )


def of_deep(ensemble: DeepEnsemble) -> Extra | None:
    if len(ensemble.networks) == 1:
        return None
    return Extra(
        len(ensemble.networks), lambda raw: member_figures(ensemble.member_log_probabilities(raw))
    )


def of_prior(network: nn.Module) -> Extra:
    return Extra(1, lambda raw: {"mu": dirichlet_uncertainty(network(raw))})


def member_figures(log_p: Tensor) -> dict[str, Tensor]:
    """Of members' answers [K, b, C]: what each example adds to MU, pairwise KL and disagreement."""
    p = log_p.exp()
    return {
        "mu": model_uncertainty(p),
        "pairwise_kl": pairwise_kl(log_p),
        "disagreement": disagreement(p),
    }


class TestEvaluator:
    """One answer after the other on test, after a temperature was fitted on val: evaluation/NAME.json and NAME.npz."""

    def __init__(self, session: Session, attempt: Attempt, sizes: list[dict]):
        self.session, self.attempt, self.sizes = session, attempt, sizes
        self.old_classes = session.old_classes() if session.run.old else None

    def __call__(
        self, answer, name: str, cost: dict, extra: Extra | None = None, both=None, more=None
    ) -> dict:
        """answer: raw inputs -> LinearLogits or DenseLogits.  extra: figures of each example beside it.  both: answer and
        extra from one pass.  more(found): further entries of the JSON.  Returns what was found, arrays over test."""
        session, both = (
            self.session,
            both or (lambda raw: (answer(raw), extra.figures(raw) if extra else {})),
        )
        temperature = calibrate(session, answer)
        scores = self.scores(answer, extra) if session.config.data.ood else None

        def judge(batch: Batch):
            answers, beside = both(batch.inputs)
            found = figures(answers.summary(TOP, batch.labels), batch.labels)
            scaled = figures(
                answers.scale_by_temperature(temperature).summary(TOP, batch.labels), batch.labels
            )
            scaled = {f"calibrated_{key}": scaled[key] for key in OF_CALIBRATION}
            return {**found, **scaled, **beside, **(scores(batch.inputs) if scores else {})}

        found = session.measured(session.shards("test"), judge)
        outside = (
            session.measured(session.shards("ood"), lambda batch: scores(batch.inputs))
            if scores
            else {}
        )
        if session.ranks.is_main:
            self.write(name, found, cost, temperature, outside, more(found) if more else {}, extra)
        elif more:
            more(found)  # it measures on all ranks
        return found

    def scores(self, answer, extra: Extra | None) -> Callable[[Tensor], dict[str, Tensor]]:
        """What tells inputs like test's from others; larger is more like test's."""

        def score(raw: Tensor) -> dict[str, Tensor]:
            log_p = answer(raw).materialize().float().log_softmax(1)
            found = {"confidence": log_p.amax(1).exp(), "entropy": (log_p.exp() * log_p).sum(1)}
            beside = extra.figures(raw) if extra else {}
            found |= {"mu": -beside["mu"]} if "mu" in beside else {}
            return {f"score_{key}": value for key, value in found.items()}

        return score

    def write(
        self,
        name: str,
        found: dict,
        cost: dict,
        temperature: float,
        outside: dict,
        more: dict,
        extra,
    ) -> None:
        found = dict(found)
        scaled = {key: found.pop(f"calibrated_{key}") for key in OF_CALIBRATION}
        inside = {key: found.pop(key) for key in outside if key != "ids"}
        beside = {
            key: found.pop(key) for key in ("mu", "pairwise_kl", "disagreement") if key in found
        }
        parts = {} if self.old_classes is None else split_old_new(self.old_classes, found)
        top = (found["labels"], found["top5"])
        row = summarise(
            *top, found["top5_probability"], found["label_probability"], found.pop("squared_error")
        )
        after = summarise(
            *top, scaled["top5_probability"], scaled["label_probability"], scaled["squared_error"]
        )
        row |= parts | {
            "temperature": temperature,
            **{f"c{key}": after[key] for key in ("nll", "brier", "ece")},
        }
        if beside:
            means = {key: float(value.mean(dtype=np.float64)) for key, value in beside.items()}
            row["members"] = {"count": extra.count, **means}
        if len(self.sizes) > 1:  # the ensemble is worth itself, however its temperature was rounded
            row |= (
                {"dee": float(len(self.sizes))}
                if name == "ensemble"
                else equivalent(row["cnll"], self.sizes)
            )
        if inside:
            row["ood_auroc"] = {
                key.removeprefix("score_"): auroc(inside[key], outside[key]) for key in inside
            }
        right = found["top5"][:, 0] == found["labels"]
        write_json(
            self.attempt.path(f"{name}.json"),
            {
                "name": name,
                "row": {**row, "cost": cost},
                "reliability": reliability(found["top5_probability"][:, 0], right),
                "reliability_calibrated": reliability(scaled["top5_probability"][:, 0], right),
                **more,
            },
        )
        np.savez(self.attempt.path(f"{name}.npz"), **found)
        self.session.say(
            "%-16s top-1 %6.2f %%  top-5 %6.2f %%  NLL %.4f  Brier %.4f  ECE %.4f  calibrated NLL %.4f",
            name,
            100 * row["top1"],
            100 * row["top5"],
            row["nll"],
            row["brier"],
            row["ece"],
            row["cnll"],
        )


OF_AGE = ("n", "top1", "top5", "nll", "macro_top1")


def split_old_new(old: np.ndarray, found: dict) -> dict[str, dict]:
    """Of a run that adds classes: the figures of the test examples of old classes and of those of new ones, where there
    are any.  Every answer is among all classes."""
    keys = ("labels", "top5", "top5_probability", "label_probability", "squared_error")
    inside, rows = np.isin(found["labels"], old), {}
    for name, chosen in (("old_classes", inside), ("new_classes", ~inside)):
        if chosen.any():
            row = summarise(*(found[key][chosen] for key in keys))
            rows[name] = {key: row[key] for key in OF_AGE}
    return rows


def before_new_classes(session: Session, generalist) -> dict:
    """What there was: the old run's generalist on the test examples of its classes, among these alone.

    Its logits are this generalist's, whose old rows and trunk are the same.
    """
    test, old = session.shards("test"), session.old_classes()
    found = {"run": str(session.run.old), "old": len(old), "new": session.num_classes - len(old)}
    ids, among = (
        np.flatnonzero(np.isin(test.labels, old)),
        torch.from_numpy(old).to(session.ranks.device),
    )
    if len(ids):
        asked = session.measured(
            test,
            lambda batch: {
                "said": among[lazy_logits(generalist, batch.inputs).of_classes(among).argmax(1)],
                "labels": batch.labels,
            },
            ids=ids,
        )
        found["top1_before"] = float((asked["said"] == asked["labels"]).mean())
    return found


OF_CALIBRATION = ("top5_probability", "label_probability", "squared_error")


def equivalent(cnll: float, sizes: list[dict]) -> dict:
    """DEE, as JSON knows it: null beyond the largest ensemble."""
    dee = deep_ensemble_equivalent(cnll, [row["cnll"] for row in sizes])
    return {"dee": None if math.isinf(dee) else dee, "dee_beyond": math.isinf(dee)}


def ensemble_sizes(session: Session, ensemble: DeepEnsemble) -> list[dict]:
    """NLL before and after calibration, and top-1, of the first 1, 2, ... M members together."""
    count = len(ensemble.networks)

    def ask(batch: Batch):
        return {
            "log_p": means(ensemble.member_log_probabilities(batch.inputs)).transpose(0, 1),
            "labels": batch.labels,
        }

    def means(log_p: Tensor) -> Tensor:
        """[M, b, C] -> log of the mean of the first 1, ..., M"""
        return (
            log_p.logcumsumexp(0)
            - torch.arange(1, count + 1, device=log_p.device).log()[:, None, None]
        )

    found = session.measured(session.shards("val"), ask, ids=calibration_ids(session, count))
    labels = torch.from_numpy(found["labels"])
    temperatures = [
        fit_temperature(torch.from_numpy(found["log_p"][:, k]), labels) for k in range(count)
    ]

    def judge(batch: Batch):
        log_p, rows = (
            means(ensemble.member_log_probabilities(batch.inputs)),
            batch.labels[None, :, None],
        )
        each = torch.tensor(temperatures, device=log_p.device)[:, None, None]
        scaled = (log_p / each).log_softmax(2)
        of_label = [
            part.gather(2, rows.expand(count, -1, 1))[:, :, 0].T for part in (log_p, scaled)
        ]
        return {
            "nll": -of_label[0],
            "cnll": -of_label[1],
            "top1": (log_p.argmax(2) == batch.labels).T.float(),
        }

    found = session.measured(session.shards("test"), judge)
    mean = {key: found[key].mean(0, dtype=np.float64) for key in ("nll", "cnll", "top1")}
    return [
        {
            "size": k + 1,
            "temperature": temperatures[k],
            **{key: float(value[k]) for key, value in mean.items()},
        }
        for k in range(count)
    ]


def named_controls(session: Session) -> dict[str, object]:
    """control_wall (the rate that did best on val), control_compute, student_hard."""
    controls = session.run.controls
    walls = [stage for name, stage in controls.items() if name.startswith("control_wall")]
    found = {name: stage for name, stage in controls.items() if not name.startswith("control_wall")}
    if walls:
        found = {
            "control_wall": min(walls, key=lambda each: read_summary(each)["val"]["loss"]),
            **found,
        }
    return found


def specialist_rows(
    session: Session, generalist, ensemble, active: np.ndarray, costs: Costs
) -> list[dict]:
    """Each specialist on the test examples of its classes, predictions restricted to them, beside the generalist."""
    test, rows = session.shards("test"), []
    for m, members in enumerate(session.groups().members):
        if m not in ensemble.specialists:
            continue
        network = ensemble.specialists[m]
        ids = np.flatnonzero(np.isin(test.labels, members))
        row = {
            "index": m,
            "classes": len(members),
            "routed": int(active[:, m].sum()),
            "n": len(ids),
        }
        inside = torch.tensor(members).to(session.ranks.device)
        if len(ids):
            found = session.measured(
                test,
                lambda batch, network=network, inside=inside: {
                    "before": inside[
                        lazy_logits(generalist, batch.inputs).of_classes(inside).argmax(1)
                    ],
                    "after": inside[network(batch.inputs)[:, :-1].argmax(1)],
                    "labels": batch.labels,
                },
                ids=ids,
            )
            row["n"] = len(found["ids"])
            row["conditional_before"] = float((found["before"] == found["labels"]).mean())
            row["conditional_after"] = float((found["after"] == found["labels"]).mean())
            row["gain"] = row["conditional_after"] - row["conditional_before"]
        rows.append({**row, "cost": costs.of(session.run.specialists[m])})
    return rows


def captured(session: Session, before: dict) -> dict:
    """The share of the generalist's top-1 errors on test whose two classes share a group, against chance."""
    from scipy.sparse import coo_array

    groups, summary = session.groups(), read_json(session.run.cluster.path("summary.json"))
    pairs = (np.ones(len(before["labels"])), (before["labels"], before["top5"][:, 0]))
    share, chance = captured_confusion(
        groups, coo_array(pairs, shape=(session.num_classes,) * 2).tocsr()
    )
    share = None if np.isnan(share) else share  # no errors, no share
    return {
        "captured_confusion": share,
        "chance": chance,
        "captured_unlabelled": summary["captured_unlabelled"],
        "sizes": summary["sizes"],
    }


TRAINED = ("generalist", "member", "specialist", "student")


class Costs:
    """What each answer took to train, everything that it starts from included."""

    def __init__(self, session: Session):
        self.generalist = self.of(session.run.generalist)
        self.session = session
        each = session.run.members if session.config.is_deep else session.run.specialists
        parts = [self.of(stage) for stage in each if stage.is_done]
        self.ensemble = self.generalist
        for part in parts:
            self.ensemble = add_costs(self.ensemble, part)

    def of(self, stage) -> dict:
        summary = read_summary(stage)
        return {key: summary[key] for key in ("seconds", "examples_seen", "peak_memory_bytes")}

    def after_generalist(self, stage) -> dict:
        return add_costs(self.generalist, self.of(stage))

    def student(self, name: str) -> dict:
        """A student's training, and that of everyone it comes from, each once."""
        waiting, seen = [self.session.run.students[name]], {}
        while waiting:
            stage = waiting.pop()
            if stage.place not in seen:
                seen[stage.place] = stage
                waiting += stage.inputs
        parts = [
            self.of(stage) for stage in seen.values() if stage.name in TRAINED and stage.is_done
        ]
        total = parts[0]
        for part in parts[1:]:
            total = add_costs(total, part)
        return total


def add_costs(first: dict, second: dict) -> dict:
    return {
        "seconds": round(first["seconds"] + second["seconds"], 3),
        "examples_seen": first["examples_seen"] + second["examples_seen"],
        "peak_memory_bytes": max(first["peak_memory_bytes"], second["peak_memory_bytes"]),
    }
