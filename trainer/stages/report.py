"""results.json, report.html and the files it links to, published in RUN."""

from __future__ import annotations

from pipeline.store import Stage

from ..session import Session


def report(session: Session, stage: Stage) -> None:
    from ..report.page import FILES, write_report

    with session.attempt(stage, FILES) as attempt:
        if session.ranks.is_main:
            test, counts = session.shards("test"), session.shards("train").class_counts
            write_report(session.run, attempt.directory, test, counts)
