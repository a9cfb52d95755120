"""Which share a round trains for, what it goes on from, and which families it leaves out."""

from __future__ import annotations

from pipeline.store import Stage, read_json

from ...session import Session

# What a share of the steps of a family's pilot may cost, in that share of the generalist's compute.
COSTS = {"rerank": 0.5}


def read_record(stage: Stage) -> dict:
    """measured.json of a finished pilot."""
    return read_json(stage.path("measured.json"))


def previous_round(stage: Stage, family: str, number: int) -> Stage | None:
    """The family's pilot of the round before; None in the first round."""
    if number == 0:
        return None
    name = f"{family}-{number - 1}"
    return next(each for each in stage.inputs if each.address == name)


def records_before(stage: Stage) -> list[dict]:
    """measured.json of every pilot that this one waits for."""
    return [read_record(each) for each in stage.inputs if each.kind is stage.kind]


def share_of_round(session: Session, number: int) -> float:
    """Of the generalist's steps that each pilot of a round is to take."""
    raise NotImplementedError


def why_dropped(session: Session, stage: Stage, family: str, number: int) -> str:
    """Why a family does not go on after the round before; "" where it does."""
    raise NotImplementedError


def better_form(record: dict, forms: list[str]) -> str:
    """The form that promises most, by its measured gain."""
    return max(forms, key=lambda form: record["forms"][form]["gain"])
