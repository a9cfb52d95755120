"""One network learns all classes. An ensemble of generalists has several."""

from __future__ import annotations

from pipeline.store import Stage

from ..session import Session
from .networks import fresh_network, given_generalist, load_given, save_network
from .training import generalist_task, open_layers, train_network
from .validate import validate_classifier


def generalist(session: Session, stage: Stage) -> None:
    """One network learns all classes, on all ranks. One that is given whole is only validated."""
    schedule = session.config.train
    with session.attempt(stage) as attempt:
        validate = validate_classifier(session)
        given = given_generalist(session)
        for note in given.notes if given else []:
            session.say("%s", note)
        if given and given.finished:
            network, summary = given.network, untrained(validate(given.network))
        else:
            if given:
                start = open_layers(given.network, schedule, "train")
            else:
                start = fresh_network(session, split=True)
            task = generalist_task(session, start, schedule, validate)
            network, summary = train_network(session, attempt, task)
        save_network(session, attempt, network, summary)


def untrained(val: dict[str, float]) -> dict:
    """summary.json of a network that cost nothing here."""
    return {
        "seconds": 0.0,
        "examples_seen": 0,
        "peak_memory_bytes": 0,
        "steps": 0,
        "best_step": 0,
        "val": val,
    }


def member(session: Session, stage: Stage, index: int) -> None:
    """The generalist's task again, from another seed: one more of the ensemble."""
    schedule, seed = session.config.train, session.seed("member", index)
    with session.attempt(stage) as attempt:
        validate = validate_classifier(session)
        network = fresh_network(session, seed=seed, split=True)
        task = generalist_task(session, network, schedule, validate, seed)
        network, summary = train_network(session, attempt, task)
        save_network(session, attempt, network, summary)


def given_member(session: Session, stage: Stage, index: int) -> None:
    """One more of the ensemble that exists already: copied, and validated."""
    path = session.config.ensemble.networks[index - session.config.ensemble.members]
    copy_given(session, stage, "ensemble.networks", path)


def given_start(session: Session, stage: Stage, index: int) -> None:
    """The generalist that specialists start as, where it exists already: the same."""
    copy_given(session, stage, "specialists.from", session.config.specialists.given_start)


def copy_given(session: Session, stage: Stage, key: str, path: str) -> None:
    """key: of the config, that names the path."""
    with session.attempt(stage) as attempt:
        network = load_given(session, key, path)
        session.say("%s is the network of %s", stage.place, path)
        summary = untrained(validate_classifier(session)(network))
        save_network(session, attempt, network, summary)
