"""results.json, report.html and the files it links to, published in RUN."""

from __future__ import annotations

from pipeline.results import named_rows, read_results
from pipeline.store import Attempt, Stage

from ..core.tracking import config_of, table_of, trackers
from ..session import Session


def report(session: Session, stage: Stage) -> None:
    from ..report.page import FILES, write_report

    with session.attempt(stage, FILES) as attempt:
        if session.ranks.is_main:
            test, counts = session.shards("test"), session.shards("train").class_counts
            write_report(session.run, attempt.directory, test, counts)
            track_results(session, attempt)


def track_results(session: Session, attempt: Attempt) -> None:
    """Send the table of results where the rows of metrics.jsonl went."""
    names, config = session.config.engine.track, config_of(session.config)
    rows = table_of(named_rows(read_results(attempt.path("results.json"))))
    place = attempt.stage.place
    with trackers(names, attempt.directory, session.run.root, place, config) as tracked:
        for tracker in tracked:
            tracker.table(rows)
