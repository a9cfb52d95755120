"""What came of an advice on a set and seed: kept advice, pilots and test predictions, read.

Gains are predicted anew, by today's rules, from what the pilots measured: a constant that changes
needs no pilot again.  Which families go on after the first round was settled by the rules of then.
`same_families` says whether today's would have sent on the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemble import ShortlistEnsemble
from networks import load_classifier
from pipeline.advice.choosing import STOP, choose
from pipeline.advice.document import Advice, Lever, read_advice
from pipeline.advice.extrapolation import Evidence, Gain, gains
from pipeline.advice.halving import better_half
from pipeline.advice.levers import FAMILIES
from pipeline.config import load_config
from pipeline.store import read_json
from trainer.stages.pilots.rounds import evidence_of, promises

from .gains import JOINS, SHORTLIST, arithmetic, correct, fitted_weight
from .judging import ALLOWED, Held, Pulled, Verdict, held, verdict
from .lines import Kept

# lever -> its row in truth.jsonl.  train_on and average_student are below: the one keeps its best
# step, the other is the student that the product trains.
ROWS = {
    "wider": "wider",
    "average": "average",
    "shortlist": "shortlist",
    "rerank": "rerank",
    "copies": "copies",
    "branches": "branches",
}
TRAIN_ON, TRAINED_ON = "train_on", "train_on_full_rate"
STUDENT = "average_student"
# row -> its network, the first that there is: bags are mixed, and every student starts as its G
STUDENTS = {"average_student_mixed": "student_mixed_on", "average_student_on": "student_on"}
ASKED = "asked on shortlist"


@dataclass(frozen=True)
class Judged:
    """An advice on a set and seed, beside what was pulled.

    predicted, pulled: by lever.  verdicts: by scarcity.  spent: on pilots, a share of the
    generalist's training.  same_families: see above.
    """

    name: str
    seed: int
    budget: float
    predicted: dict[str, Gain]
    pulled: dict[str, Pulled]
    verdicts: dict[str, Verdict]
    spent: float
    same_families: bool

    @property
    def held(self) -> dict[str, Held]:
        """Of each lever that was both predicted and pulled."""
        return {name: held(self.predicted[name], self.pulled[name]) for name in self.levers}

    @property
    def levers(self) -> list[str]:
        return [name for name in self.predicted if name != STOP]


def judge(line: dict, budget: float, kept: Path, root: Path) -> Judged:
    """line: of truth.jsonl.  kept: of asking.advise.  root: TO/SET/seed-S."""
    name, seed = line["set"], line["seed"]
    measured = measured_answers(root, kept.parent / f"{name}-{seed}.npz")
    pulled = pulled_of(line, measured)
    advice = read_advice(kept / "advice.json")
    assert advice is not None
    records = records_in(kept)
    predicted = predict_again(advice, records, kept)
    levers = [again(lever, predicted) for lever in advice["levers"] if lever["name"] in pulled]
    best_for = choose(levers, advice["generalist"], "", None)["best_for"]
    return Judged(
        name,
        seed,
        budget,
        {lever["name"]: predicted[lever["name"]] for lever in levers},
        pulled,
        {name: verdict(best_for[name]["lever"], pulled, name) for name in ALLOWED},
        advice["spent"],
        sends_on_the_same(records, kept),
    )


# Predictions


def records_in(kept: Path) -> list[dict]:
    """measured.json of all pilots."""
    return [read_json(path) for path in sorted((kept / "pilots").glob("*/measured.json"))]


def evidence_in(kept: Path, records: Sequence[dict]) -> Evidence:
    config = load_config(kept / "config.toml")
    return evidence_of(config, read_json(kept / "diagnosis" / "diagnosis.json"), records)


def predict_again(advice: Advice, records: Sequence[dict], kept: Path) -> dict[str, Gain]:
    expected = gains(evidence_in(kept, records))
    return {lever["name"]: expected[lever["name"]] for lever in advice["levers"]}


def again(lever: Lever, predicted: Mapping[str, Gain]) -> Lever:
    """The lever with another prediction."""
    return lever | predicted[lever["name"]]._asdict()  # pyright: ignore


def sends_on_the_same(records: Sequence[dict], kept: Path) -> bool:
    """Whether today's rules let the same families go on after the first round."""
    first = [record for record in records if record["round"] == 0]
    went = {record["family"] for record in records if record["round"] and record["forms"]}
    highs = promises(evidence_in(kept, first))
    return set(better_half({name: highs[name] for name in highs if may_go_on(name)})) == went


def may_go_on(family: str) -> bool:
    return FAMILIES[family].tells_more


# What was pulled


def measured_answers(root: Path, file: Path) -> dict[str, np.ndarray]:
    """Of each lever that was pulled, bool [N] of test, and ASKED, multiplications on a shortlist.

    file: where that is kept.
    """
    if not file.exists():
        arrays: dict = {**correct_answers(Kept(root)), ASKED: asked_on_shortlist(root)}
        np.savez(file, **arrays)
    with np.load(file) as arrays:
        return dict(arrays)


def correct_answers(kept: Kept) -> dict[str, np.ndarray]:
    labels = kept.labels["test"]
    networks = {TRAINED_ON: "on_full", "wider": "wide", **STUDENTS}
    places = {lever: f"networks/{network}" for lever, network in networks.items()}
    places |= {lever: lever for lever in ("rerank", "copies", "branches")}
    answers = {STOP: correct(kept.general["test"], labels)}
    for lever, place in places.items():
        if (kept.root / place / "cost.json").exists():
            answers[lever] = correct(kept.log_p(place)["test"], labels)
    second, general = kept.log_p("networks/second"), kept.general
    join, y = JOINS["shortlist"], kept.labels["val"]
    weight = fitted_weight(join, general["val"], second["val"], y)
    answers["shortlist"] = correct(join.join(general["test"], second["test"], weight), labels)
    answers["average"] = correct(arithmetic(general["test"], second["test"], 0.5), labels)
    return answers


def asked_on_shortlist(root: Path) -> np.ndarray:
    """Multiplications of the generalist, and of the second one asked about its likeliest classes.

    truth.jsonl counts all of the second one's.
    """
    pair = [load_classifier(root / "networks" / name).eval() for name in ("G", "second")]
    length = min(SHORTLIST, pair[0].spec.num_classes)
    return np.array(ShortlistEnsemble(pair, length).multiplications())


def pulled_of(line: dict, answers: Mapping[str, np.ndarray]) -> dict[str, Pulled]:
    """Every lever of the product that was pulled, STOP among them.  answers: measured_answers'."""
    own = line["generalist"]["multiplications"]
    nothing = {"training": 0.0, "multiplications": 1.0}
    pulled = {STOP: Pulled(0.0, 0.0, answers[STOP], nothing)}

    def add(lever: str, row: dict, right: np.ndarray) -> None:
        multiplied = answers[ASKED] if lever == "shortlist" else row["multiplications"]
        taken = {"training": row["training"], "multiplications": float(multiplied / own)}
        pulled[lever] = Pulled(row["test"]["top1"], row["test"]["se"], right, taken)

    for lever, name in ROWS.items():
        if name in line["lever"]:
            add(lever, line["lever"][name], answers[name])
    student = next(name for name in STUDENTS if name in line["lever"])
    add(STUDENT, line["lever"][student], answers[student])
    on = line["lever"][TRAINED_ON]
    if on["val"]["calibrated_nll"] > 0:
        add(TRAIN_ON, on, answers[TRAINED_ON])
    else:  # the product's keeps its best step on val, and that is the start
        add(TRAIN_ON, on | {"test": {"top1": 0.0, "se": 0.0}}, answers[STOP])
    return pulled
