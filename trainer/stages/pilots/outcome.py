"""What a pilot found out, and what it leaves in its stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from networks import Branch, Classifier, multiplications, parameter_count, save_classifier
from pipeline.store import Attempt, write_json

from ...session import Session
from ..networks import read_summary
from .forms import GENERALIST, Answers


@dataclass
class Outcome:
    """What a pilot found out.

    networks: by name. Each is saved in a directory of this name, from which a later round goes on.
    share: of the generalist's steps that its networks have taken so far, earlier rounds included.
    spent: what this round's training has cost, as a share of the generalist's.
    trainings: the summaries of this round's trainings.
    answers: on val. None where nothing was trained.
    more: what measured.json says besides.
    """

    networks: dict[str, Classifier | Branch] = field(default_factory=dict)
    share: float = 0.0
    spent: float = 0.0
    trainings: list[dict] = field(default_factory=list)
    answers: Answers | None = None
    more: dict = field(default_factory=dict)

    @classmethod
    def dropped(cls, why: str) -> Outcome:
        """The outcome of a family that does not go on."""
        return cls(more={"dropped": True, "why": why})

    @classmethod
    def not_possible(cls, why: str) -> Outcome:
        """The outcome of a family that this network or machine does not allow."""
        return cls(more={"not_possible": why})

    def record(self, family: str, number: int, unit: str) -> dict:
        """What measured.json holds, but how many seconds it took.

        unit: "generalist", or "train" of a generalist that was trained elsewhere. Shares are then
        of the length that [train] says.
        """
        forms = {} if self.answers is None else self.answers.metrics()
        examples = 0 if self.answers is None else len(self.answers.ids)
        return {
            "family": family,
            "round": number,
            "share": self.share,
            "spent": self.spent,
            "unit": unit,
            "examples": examples,
            "forms": forms,
            "multiplications": {
                name: multiplications(each, each.zero_input())
                for name, each in self.networks.items()
                if isinstance(each, Classifier)
            },
            "parameters": {name: parameter_count(each) for name, each in self.networks.items()},
            **self.more,
        }

    def summary(self) -> dict:
        """What summary.json says of all its trainings together."""
        forms = {} if self.answers is None else self.answers.metrics()
        val = None
        for form in [name for name in forms if name != GENERALIST][:1]:
            val = {"loss": forms[form]["nll"], "top1": forms[form]["top1"]}
        peaks = [each["peak_memory_bytes"] for each in self.trainings]
        return {
            "seconds": round(sum(each["seconds"] for each in self.trainings), 3),
            "examples_seen": sum(each["examples_seen"] for each in self.trainings),
            "peak_memory_bytes": max(peaks, default=0),
            "steps": sum(each["steps"] for each in self.trainings),
            "best_step": 0,
            "val": val,
        }


def save_outcome(
    session: Session, attempt: Attempt, outcome: Outcome, family: str, number: int
) -> None:
    """measured.json, answers.npz, summary.json and the networks, by rank 0."""
    if not session.ranks.is_main:
        return
    summary = outcome.summary()
    given = read_summary(session.run.generalist)["steps"] == 0
    record = outcome.record(family, number, "train" if given else "generalist")
    record["seconds"] = summary["seconds"]  # of training
    record["stage_seconds"] = round(attempt.seconds, 3)  # and val
    write_json(attempt.path("measured.json"), record)
    write_json(attempt.path("summary.json"), summary)
    if outcome.answers is not None:
        arrays: dict = outcome.answers.arrays()
        np.savez(attempt.path("answers.npz"), **arrays)
    for name, network in outcome.networks.items():
        save_classifier(network, attempt.path(f"{name}/model.json").parent)
    for line in in_words(record):
        session.say("%s: %s", attempt.stage.place, line)


def in_words(record: dict) -> list[str]:
    """A line for each form: its gain and how sure it is."""
    if "not_possible" in record:
        return [f"not possible: {record['not_possible']}"]
    return [
        f"{form} at {100 * record['share']:.3g} % of the steps: "
        f"{100 * each['gain']:+.2f} points of top-1 (+- {100 * each['gain_se']:.2f})"
        for form, each in record["forms"].items()
        if form != GENERALIST
    ]
