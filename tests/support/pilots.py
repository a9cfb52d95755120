"""Pilots of a run, made by hand: whatever the graph says of rounds and budgets."""

from __future__ import annotations

from pipeline.choices import resolve
from pipeline.stages import StageKind
from pipeline.store import Stage, read_json
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages.pilots import PILOTS
from trainer.stages.pilots.outcome import save_outcome

KIND = StageKind(
    "pilot",
    "pilots/{name}",
    "trainer.stages.pilots:pilot",
    addressed_by="name",
    slurm="specialists",
    trains=True,
)


def pilot_stage(run, name, inputs=()):
    """The stage pilots/NAME of a run whose generalist is done."""
    return Stage(run.root, KIND, (f"key of {name}",), [run.generalist, *inputs], name)


def make_pilot(run, name, share, previous=None):
    """The finished stage of one pilot, of `share` of the generalist's steps."""
    family, _, number = name.rpartition("-")
    stage = pilot_stage(run, name, [previous] if previous else [])
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        with session.attempt(stage) as attempt:
            outcome = resolve(PILOTS[family])(session, attempt, share, previous)
            save_outcome(session, attempt, outcome, family, int(number))
    return stage


def measured(stage):
    return read_json(stage.path("measured.json"))
