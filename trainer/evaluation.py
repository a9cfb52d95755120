"""How good is it?  Networks and ensembles over val (while training) and test (once, at the end)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustering import captured_confusion
from ensemble import COMBINERS, fit_temperature
from networks import Summary, unheld_logits

from .data.streams import Batch
from .metrics import reliability, summarise
from .objectives import specialist_columns
from .run_directory import Attempt, read_json, write_json
from .session import Session, read_summary

TOP = 5


def validate_classifier(session: Session) -> Callable[[nn.Module], dict[str, float]]:
    """Loss (nats) and top-1 over the whole of val."""
    shards = session.shards("val")

    def validate(network: nn.Module) -> dict[str, float]:
        network.eval()

        def judge(batch: Batch):
            found = unheld_logits(network, batch.inputs).summary(1, batch.labels)
            return {"loss": -found.log_label, "right": found.indices[:, 0] == batch.labels}

        found = session.measured(shards, judge)
        return {"loss": float(found["loss"].mean(dtype=np.float64)), "top1": float(found["right"].mean())}

    return validate


class validate_specialist:
    """A specialist on the val examples that the generalist refers to it, at their natural frequencies."""

    def __init__(self, session: Session, members: np.ndarray):
        self.session = session
        self.shards = session.shards("val")
        self.columns = specialist_columns(members, session.num_classes).to(session.ranks.device)
        with np.load(session.run.measure.path("predictions.npz"), allow_pickle=False) as found:
            top, ids = found["top"][:, : session.config.ensemble.gate], found["ids"]
        referred = np.isin(top, members).any(axis=1)
        self.ids = ids[referred] if referred.any() else ids

    def answers(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """(logits [n, |S_m| + 1], targets [n])"""
        network.eval()

        def judge(batch: Batch):
            return {"logits": network(batch.inputs).float(), "targets": self.columns[batch.labels]}

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


WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0)


def fit_weight(session: Session, ensemble) -> list[float]:
    """[1 + M]: 1 for the generalist and one weight for all specialists in eq. 5, the best of WEIGHTS by NLL on val.

    The specialists start from the generalist and then learn more about their classes: what they say differs from it
    where
    they know better, so that counting both alike may count the generalist too much.
    """
    M = len(ensemble.groups.members)

    def ask(batch: Batch):
        p_general, p_special, active = ensemble.opinions(batch.inputs)
        losses = []
        for weight in WEIGHTS:
            weights = torch.tensor([1.0, *[weight] * M])
            q = COMBINERS[ensemble.combine](p_general, p_special, ensemble.groups, active=active, weights=weights)
            losses.append(-q.gather(1, batch.labels[:, None])[:, 0].clamp_min(1e-30).log())
        return {"losses": torch.stack(losses, dim=1)}

    losses = session.measured(session.shards("val"), ask)["losses"].mean(axis=0, dtype=np.float64)
    best = WEIGHTS[int(losses.argmin())]
    session.say("eq. 5: the specialists' weight is %g (NLL on val %s)", best,
                ", ".join(f"{w:g}: {loss:.4f}" for w, loss in zip(WEIGHTS, losses, strict=True)))  # fmt: skip
    return [1.0, *[best] * M]


def summary_of(probabilities: Tensor, labels: Tensor) -> Summary:
    """probabilities [b, C], labels [b]."""
    top = probabilities.topk(min(TOP, probabilities.shape[1]), dim=1)
    log_label = probabilities.gather(1, labels[:, None])[:, 0].log()
    return Summary(top.indices, top.values, log_label, probabilities.square().sum(1))


def figures(found: Summary, labels: Tensor) -> dict[str, Tensor]:
    """What one batch contributes to a row."""
    missing = TOP - found.indices.shape[1]  # fewer than five classes: -1 stands for none
    p_label = found.log_label.exp()
    return {
        "labels": labels, "top5": F.pad(found.indices, (0, missing), value=-1).int(),
        "top5_probability": F.pad(found.probabilities, (0, missing)).float(), "label_probability": p_label.float(),
        "squared_error": found.squares - 2 * p_label + 1,
    }  # fmt: skip


def evaluate_all(session: Session, attempt: Attempt) -> None:
    """Write evaluation/NAME.json and NAME.npz for the generalist, the ensemble, every control and every student."""
    run, test = session.run, session.shards("test")
    costs = Costs(session)
    generalist = session.load(run.generalist)
    before = evaluate_network(session, attempt, "generalist", generalist, costs.generalist)
    for name, stage in named_controls(session).items():
        evaluate_network(session, attempt, name, session.load(stage), costs.after_generalist(stage))
    for name, stage in run.students.items():
        base = costs.generalist if session.config.students[name].method == "hard" else costs.ensemble
        evaluate_network(session, attempt, name, session.load(stage), add_costs(base, costs.of(stage)))

    ensemble = session.ensemble()

    def consult(batch: Batch):
        answer = ensemble.consult(batch.inputs)
        return {**figures(summary_of(answer.q, batch.labels), batch.labels), "active": answer.active}

    after = session.measured(test, consult)
    extra = {
        "specialists": specialist_rows(session, generalist, ensemble, after["active"], costs),
        "clusters": captured(session, before),
        "missing": read_json(run.combine.path("ensemble.json"))["missing"],
    }  # fmt: skip
    write_evaluation(session, attempt, "ensemble", after, costs.ensemble, extra)


def evaluate_network(session: Session, attempt: Attempt, name: str, network: nn.Module, cost: dict):
    def judge(batch: Batch):
        return figures(unheld_logits(network, batch.inputs).summary(TOP, batch.labels), batch.labels)

    found = session.measured(session.shards("test"), judge)
    write_evaluation(session, attempt, name, found, cost)
    return found


def write_evaluation(session: Session, attempt: Attempt, name: str, found: dict, cost: dict, extra: dict | None = None):
    if not session.ranks.is_main:
        return
    found = dict(found)
    row = summarise(
        found["labels"],
        found["top5"],
        found["top5_probability"],
        found["label_probability"],
        found.pop("squared_error"),
    )
    bins = reliability(found["top5_probability"][:, 0], found["top5"][:, 0] == found["labels"])
    write_json(attempt.path(f"{name}.json"), {
        "name": name, "row": {**row, "cost": cost}, "reliability": bins, **(extra or {}),
    })  # fmt: skip
    np.savez(attempt.path(f"{name}.npz"), **found)
    session.say("%-16s top-1 %6.2f %%  top-5 %6.2f %%  NLL %.4f  Brier %.4f  ECE %.4f", name, 100 * row["top1"],
                100 * row["top5"], row["nll"], row["brier"], row["ece"])  # fmt: skip


def named_controls(session: Session) -> dict[str, object]:
    """control_wall (the rate that did best on val), control_compute, student_hard."""
    controls = session.run.controls
    walls = [stage for name, stage in controls.items() if name.startswith("control_wall")]
    found = {name: stage for name, stage in controls.items() if not name.startswith("control_wall")}
    if walls:
        found = {"control_wall": min(walls, key=lambda each: read_summary(each)["val"]["loss"]), **found}
    return found


def specialist_rows(session: Session, generalist, ensemble, active: np.ndarray, costs: Costs) -> list[dict]:
    """Each specialist on the test examples of its classes, predictions restricted to them, beside the generalist."""
    test, rows = session.shards("test"), []
    for m, members in enumerate(session.groups().members):
        if m not in ensemble.specialists:
            continue
        network = ensemble.specialists[m]
        ids = np.flatnonzero(np.isin(test.labels, members))
        row = {"index": m, "classes": len(members), "routed": int(active[:, m].sum()), "n": len(ids)}
        inside = torch.tensor(members).to(session.ranks.device)
        if len(ids):
            found = session.measured(test, lambda batch, network=network, inside=inside: {
                "before": inside[unheld_logits(generalist, batch.inputs).of_classes(inside).argmax(1)],
                "after": inside[network(batch.inputs)[:, :-1].argmax(1)], "labels": batch.labels,
            }, ids=ids)  # fmt: skip
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
    share, chance = captured_confusion(groups, coo_array(pairs, shape=(session.num_classes,) * 2).tocsr())
    share = None if np.isnan(share) else share  # no errors, no share
    return {"captured_confusion": share, "chance": chance, "captured_unlabelled": summary["captured_unlabelled"],
            "sizes": summary["sizes"]}  # fmt: skip


class Costs:
    """What each answer took to train, everything that it starts from included."""

    def __init__(self, session: Session):
        self.generalist = self.of(session.run.generalist)
        parts = [self.of(stage) for stage in session.run.specialists if stage.is_done]
        self.ensemble = self.generalist
        for part in parts:
            self.ensemble = add_costs(self.ensemble, part)

    def of(self, stage) -> dict:
        summary = read_summary(stage)
        return {key: summary[key] for key in ("seconds", "examples_seen", "peak_memory_bytes")}

    def after_generalist(self, stage) -> dict:
        return add_costs(self.generalist, self.of(stage))


def add_costs(first: dict, second: dict) -> dict:
    return {
        "seconds": round(first["seconds"] + second["seconds"], 3),
        "examples_seen": first["examples_seen"] + second["examples_seen"],
        "peak_memory_bytes": max(first["peak_memory_bytes"], second["peak_memory_bytes"]),
    }
