"""Which share a round trains for, what it goes on from, and which families it leaves out."""

from __future__ import annotations

from pipeline.advice.graph import pilot_name
from pipeline.advice.halving import better_half, round_steps
from pipeline.store import Stage, read_json

from ...session import Session
from ..training import count_steps
from .forms import GENERALIST

LIKELY = 1.645  # standard errors: the ends of an interval of 90 %


def read_record(stage: Stage) -> dict:
    """measured.json of a finished pilot."""
    return read_json(stage.path("measured.json"))


def previous_round(stage: Stage, family: str, number: int) -> Stage | None:
    """The family's pilot of the round before; None in the first round."""
    if number == 0:
        return None
    name = pilot_name(family, number - 1)
    return next(each for each in stage.inputs if each.address == name)


def share_of_round(session: Session, number: int) -> float:
    """Of the generalist's steps that each pilot of a round is to take: whole steps, at least 1."""
    advice = session.run.advice
    costs = {family.name: family.cost for family in advice.families}
    steps = whole_steps(session)
    return round_steps(costs, advice.asked.config.advise.budget, steps)[number] / steps


def whole_steps(session: Session) -> int:
    """T, the steps that [train] says."""
    return count_steps(session.config.train, session.shards("train").num_samples)


def why_dropped(stage: Stage, family: str, number: int) -> str:
    """Why a family does not go on after the round before; "" where it does."""
    if number == 0:
        return ""
    records = {record["family"]: record for record in records_before(stage)}
    own = records[family]
    if "not_possible" in own or "dropped" in own:
        return own.get("not_possible") or own["why"]
    highs = {name: promise(record) for name, record in records.items() if record["forms"]}
    going_on = better_half(highs)
    if family in going_on:
        return ""
    others = ", ".join(f"{name} {100 * highs[name]:+.2f}" for name in going_on)
    return f"it promises {100 * highs[family]:+.2f} points of top-1 at most, others more: {others}"


def records_before(stage: Stage) -> list[dict]:
    """measured.json of every pilot that this one waits for."""
    return [read_record(each) for each in stage.inputs if each.name == stage.name]


def promise(record: dict) -> float:
    """The most that a family's best form may gain, as a fraction.

    Specialists of a few groups stand for those of all: they heal as much of what these could.
    """
    if "healed" in record:
        return (record["healed"] + LIKELY * record["healed_se"]) * record["ceiling_all"]
    return max(high_of(record, form) for form in own_forms(record))


def better_form(record: dict) -> str:
    """The form that promises most."""
    return max(own_forms(record), key=lambda form: high_of(record, form))


def own_forms(record: dict) -> list[str]:
    return [form for form in record["forms"] if form != GENERALIST]


def high_of(record: dict, form: str) -> float:
    """The optimistic end of a form's measured gain."""
    measured = record["forms"][form]
    return measured["gain"] + LIKELY * measured["gain_se"]
