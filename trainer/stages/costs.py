"""What each row of the results took to train, everything that it starts from included."""

from __future__ import annotations

from pipeline.choices import CONTROL_ROWS
from pipeline.controls import twins
from pipeline.results.rows import Cost
from pipeline.store import Stage

from ..session import Session
from .networks import read_summary


def cost_of(stage: Stage) -> Cost:
    """The cost of one stage's training, from its summary."""
    return total_cost([stage])


def cost_of_ensemble(session: Session) -> Cost:
    """The cost of the generalist and of every network that joins it."""
    joined = [stage for stage in session.run.method.joined() if stage.is_done]
    return total_cost([session.run.generalist, *joined])


def cost_of_control(session: Session, name: str, stage: Stage) -> Cost:
    """A control's own cost, and that of what it starts from or consists of."""
    row = CONTROL_ROWS.get(name)
    if row is None and name in twins(session.config):
        return cost_of_all_behind(stage)
    if row is None:  # the search for its rate is not charged
        return total_cost([session.run.generalist, stage])
    if row.goes_on:
        return total_cost([*stage.inputs, stage])
    return total_cost([stage] if row.trains else list(stage.inputs))


def cost_of_student(session: Session, name: str) -> Cost:
    """A student's training, and that of everyone it comes from, each once."""
    return cost_of_all_behind(session.run.students[name])


def cost_of_all_behind(last: Stage) -> Cost:
    """The training of a stage, and of every stage that leads to it."""
    waiting = [last]
    sources: dict[str, Stage] = {}
    while waiting:
        stage = waiting.pop()
        if stage.place not in sources:
            sources[stage.place] = stage
            waiting += stage.inputs
    trained = [stage for stage in sources.values() if stage.kind.trains and stage.is_done]
    return total_cost(trained)


def total_cost(stages: list[Stage]) -> Cost:
    """The sum of seconds and examples, the maximum of memory."""
    summaries = [read_summary(stage) for stage in stages]
    cost = Cost(
        seconds=round(sum(each["seconds"] for each in summaries), 3),
        examples_seen=sum(each["examples_seen"] for each in summaries),
        peak_memory_bytes=max(each["peak_memory_bytes"] for each in summaries),
    )
    cpu_seconds = [_cpu_seconds(summary) for summary in summaries]
    known = [each for each in cpu_seconds if each is not None]
    if len(known) == len(summaries):
        cost["cpu_seconds"] = round(sum(known), 3)
    return cost


def _cpu_seconds(summary: dict) -> float | None:
    """CPU seconds of one training. None on GPUs, and of earlier versions."""
    if not summary["examples_seen"]:
        return 0.0  # given, inherited or left as it was
    return summary.get("cpu_seconds")
