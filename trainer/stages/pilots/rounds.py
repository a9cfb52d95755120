"""Which share a round trains for, what it goes on from, and which families it leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.advice.extrapolation import LIKELY, Evidence, gains
from pipeline.advice.graph import pilot_name
from pipeline.advice.halving import better_half, round_steps
from pipeline.advice.levers import FAMILIES, LEVERS, sees_bags
from pipeline.config import Config
from pipeline.store import Stage, read_json

from ...session import Session
from ..training import count_steps
from .forms import GENERALIST


def read_record(stage: Stage) -> dict:
    """measured.json of a finished pilot."""
    return read_json(stage.path("measured.json"))


def previous_round(stage: Stage, family: str, number: int) -> Stage | None:
    """The family's pilot of the round before. None in the first round."""
    if number == 0:
        return None
    name = pilot_name(family, number - 1)
    return next(each for each in stage.inputs if each.address == name)


def share_of_round(session: Session, number: int) -> float:
    """The share of the generalist's steps that each pilot of a round takes: whole steps."""
    advice = session.run.advice
    steps, budget = whole_steps(session), advice.asked.config.advise.budget
    return round_steps(advice.costs, budget, steps, advice.may_go_on)[number] / steps


def whole_steps(session: Session) -> int:
    """T, the steps that [train] says."""
    return count_steps(session.config.train, session.shards("train").num_samples)


def why_dropped(session: Session, stage: Stage, family: str, number: int) -> str:
    """Why a family does not go on after the round before. "" where it does."""
    if number == 0:
        return ""
    before = records_before(stage)
    records = {record["family"]: record for record in before}
    own = records[family]
    if "not_possible" in own or "dropped" in own:
        return own.get("not_possible") or own["why"]
    if not FAMILIES[family].tells_more:
        return "a longer pilot would not narrow what is expected of it"
    diagnosis = read_json(session.run.diagnosis.path("diagnosis.json"))
    evidence = evidence_of(session.config, diagnosis, before)
    highs = {name: high for name, high in promises(evidence).items() if FAMILIES[name].tells_more}
    going_on = better_half(highs)
    if family in going_on:
        return ""
    others = ", ".join(f"{name} {highs[name]:+.2f}" for name in going_on)
    return f"it promises {highs[family]:+.2f} points of top-1 at most, others more: {others}"


def records_before(stage: Stage) -> list[dict]:
    """measured.json of every pilot that this one waits for."""
    return [read_record(each) for each in stage.inputs if each.name == stage.name]


def evidence_of(config: Config, diagnosis: Mapping, records: Sequence[dict]) -> Evidence:
    """What is known of the generalist and of the pilots that measured something.

    config: of the run that is advised on.  diagnosis: diagnosis.json.  records: measured.json of
    pilots, of one round or more, in order.
    """
    error = 1 - diagnosis["val"]["top1"]["value"]
    on_train = 1 - diagnosis["train"]["top1"]["value"]
    fit = min(1.0, on_train / error) if error > 0 else 1.0
    measured: dict[str, list[dict]] = {}
    for record in sorted(records, key=lambda each: each["round"]):
        if record["forms"]:
            measured.setdefault(record["family"], []).append(record)
    fall = diagnosis.get("fall")
    return Evidence(
        error,
        fit,
        measured,
        has_bags=sees_bags(config.model.name),
        fall=fall["by_twice"] if fall else None,
    )


def promises(evidence: Evidence) -> dict[str, float]:
    """The most that each piloted family's levers may gain, in points."""
    expected, highs = gains(evidence), {}
    for name, gain in expected.items():
        family = next((each for each in LEVERS[name].families if each in evidence.records), None)
        if family is not None:
            highs[family] = max(gain.high, highs.get(family, gain.high))
    return highs


def better_form(record: dict) -> str:
    """The form that promises most."""
    return max(own_forms(record), key=lambda form: high_of(record, form))


def own_forms(record: dict) -> list[str]:
    return [form for form in record["forms"] if form != GENERALIST]


def high_of(record: dict, form: str) -> float:
    """The optimistic end of a form's measured gain."""
    measured = record["forms"][form]
    return measured["gain"] + LIKELY * measured["gain_se"]
