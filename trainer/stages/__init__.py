"""The method, stage by stage.  Hinton, Vinyals & Dean 2015, section 5, and back into one network.

    generalist -> measure -> cluster -> route -> specialist 0 ... M-1 -> ensemble
                                   \\-> controls
    ensemble -> students; all of them -> evaluate -> report

`measure` and everything that is fitted (groups, early stopping, temperatures, weights) read val.
Test is read by `evaluate` alone.  pipeline.stages is the table of stages, one function here for
each row:

    generalist.py   one network learns all classes
    grouping.py     which classes does it confuse?  measure, cluster, route
    specialist.py   the generalist again, for one group of classes and a dustbin
    features.py, branches.py               or corrections of its logits, from features
                                           that it keeps
    shortlist.py, rerank.py                or others, asked about (trained on) its
                                           likeliest classes
    joining.py      eq. 5: what it needs beside the networks
    control.py      the same examples for the generalist alone
    targets.py, student.py, teachers.py    one network learns what the ensemble predicts
    evaluate.py, report.py                 test
    diagnosis.py    what the generalist is short of
    extending.py    what differs in a run that adds classes
    pilots/         a small share of what could come next, for `referral advise`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.choices import resolve

if TYPE_CHECKING:
    from pipeline.store import Stage

    from ..session import Session


def run_stage(session: Session, stage: Stage) -> None:
    """Do one stage: the function that its row names."""
    resolve(stage.kind.function)(session, stage, *stage.arguments)


def run_together(session: Session, stages: list[Stage]) -> None:
    """Do stages of one kind, at once where their row knows how."""
    together = stages[0].kind.together
    if together:
        resolve(together)(session, stages)
        return
    for stage in stages:
        run_stage(session, stage)
