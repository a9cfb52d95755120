"""One network learns all classes; a deep ensemble has several."""

from __future__ import annotations

from pipeline.store import Stage

from ..session import Session
from .networks import fresh_network, given_generalist, save_network
from .training import generalist_task, train_network
from .validate import validate_classifier


def generalist(session: Session, stage: Stage) -> None:
    """One network learns all classes, on all ranks; one that is given is only validated."""
    schedule = session.config.train
    with session.attempt(stage) as attempt:
        validate = validate_classifier(session)
        network = given_generalist(session)
        if network is None:
            task = generalist_task(session, fresh_network(session), schedule, validate)
            network, summary = train_network(session, attempt, task)
        else:
            summary = {
                "seconds": 0.0,
                "examples_seen": 0,
                "peak_memory_bytes": 0,
                "steps": 0,
                "best_step": 0,
                "val": validate(network),
            }
        save_network(session, attempt, network, summary)


def member(session: Session, stage: Stage, index: int) -> None:
    """The generalist's task again, from another seed: one more of a deep ensemble."""
    schedule, seed = session.config.train, session.seed("member", index)
    with session.attempt(stage) as attempt:
        validate = validate_classifier(session)
        network = fresh_network(session, seed=seed)
        task = generalist_task(session, network, schedule, validate, seed)
        network, summary = train_network(session, attempt, task)
        save_network(session, attempt, network, summary)
