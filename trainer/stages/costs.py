"""What each row of the results took to train, everything that it starts from included."""

from __future__ import annotations

from pipeline.store import Stage

from ..session import Session
from .networks import read_summary

COST_KEYS = ("seconds", "examples_seen", "peak_memory_bytes")


def cost_of(stage: Stage) -> dict:
    """The cost of one stage's training, from its summary."""
    summary = read_summary(stage)
    return {key: summary[key] for key in COST_KEYS}


def cost_of_ensemble(session: Session) -> dict:
    """The generalist's, and that of every network that joins it."""
    joined = [stage for stage in session.run.method.joined() if stage.is_done]
    return total_cost([session.run.generalist, *joined])


def cost_of_control(session: Session, stage: Stage) -> dict:
    """The generalist's, from which it starts, and its own."""
    return total_cost([session.run.generalist, stage])


def cost_of_student(session: Session, name: str) -> dict:
    """A student's training, and that of everyone it comes from, each once."""
    waiting = [session.run.students[name]]
    sources: dict[str, Stage] = {}
    while waiting:
        stage = waiting.pop()
        if stage.place not in sources:
            sources[stage.place] = stage
            waiting += stage.inputs
    trained = [stage for stage in sources.values() if stage.kind.trains and stage.is_done]
    return total_cost(trained)


def total_cost(stages: list[Stage]) -> dict:
    """The sum of seconds and examples, the maximum of memory."""
    total = cost_of(stages[0])
    for stage in stages[1:]:
        cost = cost_of(stage)
        total = {
            "seconds": round(total["seconds"] + cost["seconds"], 3),
            "examples_seen": total["examples_seen"] + cost["examples_seen"],
            "peak_memory_bytes": max(total["peak_memory_bytes"], cost["peak_memory_bytes"]),
        }
    return total
