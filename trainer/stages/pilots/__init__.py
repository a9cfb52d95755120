"""Pilots: a small share of a lever's training, to tell what all of it would bring.

A stage `pilots/FAMILY-ROUND` trains what its family of levers needs for a share of the generalist's
steps, by the same schedule compressed, and measures it beside the generalist on val.

    networks.py    whole networks: on, wide, second, rerank
    groups.py      specialists of a few groups: copies, branches
    forms.py       what the networks, alone and joined, say of val
    measuring.py   the mathematics of that
    outcome.py     what a pilot leaves: measured.json, answers.npz and its networks

A later round goes on from the networks of the round before, with the families that are promising.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.choices import resolve

if TYPE_CHECKING:
    from pipeline.store import Stage

    from ...session import Session

# {family: "module:function" of (session, attempt, share, previous) -> Outcome}.  share: of the
# generalist's steps that this round is to take. previous: the family's stage of the round before.
PILOTS: dict[str, str] = {
    "on": "trainer.stages.pilots.networks:pilot_on",
    "wide": "trainer.stages.pilots.networks:pilot_wide",
    "second": "trainer.stages.pilots.networks:pilot_second",
    "rerank": "trainer.stages.pilots.networks:pilot_rerank",
    "copies": "trainer.stages.pilots.groups:copies",
    "branches": "trainer.stages.pilots.groups:branches",
}


def pilot(session: Session, stage: Stage, name: str) -> None:
    """One family's pilot of one round. A family that was dropped is done at once."""
    from pipeline.advice.graph import parse_pilot

    from .outcome import Outcome, save_outcome
    from .rounds import previous_round, share_of_round, why_dropped

    family, number = parse_pilot(name)
    with session.attempt(stage) as attempt:
        why = why_dropped(session, stage, family, number)
        if why:
            outcome = Outcome.dropped(why)
            session.say("%s: left out, %s", stage.place, why)
        else:
            share = share_of_round(session, number)
            previous = previous_round(stage, family, number)
            outcome = resolve(PILOTS[family])(session, attempt, share, previous)
        save_outcome(session, attempt, outcome, family, number)
