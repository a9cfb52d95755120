"""Which lever pays: from the diagnosis and the pilots to advice.json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from pipeline.advice.choosing import choose
from pipeline.advice.document import SCHEMA, Advice, GeneralistSize, Lever, Pilot, Round
from pipeline.advice.extrapolation import Evidence, Gain, gains, measured_gain
from pipeline.advice.levers import LEVERS
from pipeline.store import Stage, read_json

from ..session import Session
from .lever_costs import LeverCosts
from .networks import read_summary
from .pilots.networks import shortlist_length
from .pilots.rounds import evidence_of, read_record, whole_steps
from .report import report

FORMS = {  # of a pilot's record, that show a lever, the first that there is
    "train_on": ("on",),
    "wider": ("grown", "scratch"),
    "average": ("average",),
    "shortlist": ("shortlist",),
    "rerank": ("rerank", "shortlist"),
    "copies": ("copies",),
    "branches": ("branches",),
}
FILES = ("advice.json", "advice.html")


def advice(session: Session, stage: Stage) -> None:
    """Forecast every lever, choose by what is scarce, and publish the advice in RUN."""
    from ..report.advice_page import advice_html

    with session.attempt(stage, FILES) as attempt:
        document = advise(session, stage)
        session.say("%s", document["sentence"])
        session.write_json(attempt.path("advice.json"), document)
        if session.ranks.is_main:
            attempt.path("advice.html").write_text(advice_html(document), encoding="utf-8")
    renew_report(session)


def renew_report(session: Session) -> None:
    """Make the report of a run that has one anew, since it shows the run's advice."""
    asked = Session(session.run.advice.asked, session.ranks)
    stage = asked.run.report
    if not stage.is_done:
        return
    session.barrier()  # before it is cleared, every rank has seen that it was done
    if session.ranks.is_main:
        stage.clear()
    session.barrier()
    report(asked, stage)
    session.say("%s is made anew: it shows the advice", session.run.root / "report.html")


def advise(session: Session, stage: Stage) -> Advice:
    """What advice.json holds."""
    config = session.config.advise
    pilots = [each for each in stage.inputs if each.name == "pilot"]
    records = [read_record(each) for each in pilots]
    diagnosis = read_json(session.run.diagnosis.path("diagnosis.json"))
    evidence = evidence_of(session.config, diagnosis, records)
    costs = LeverCosts(session, config.workers, evidence.last("branches"))
    expected = gains(evidence)
    not_possible = dict(session.run.advice.not_possible)
    levers = []
    for name in session.run.advice.levers:
        try:
            if name not in expected:
                raise ValueError(why_unknown(name, records))
            levers.append(lever_of(session, name, expected[name], evidence, costs))
        except ValueError as error:
            not_possible[name] = str(error)
    generalist = generalist_size(session, diagnosis, costs)
    chosen = choose(levers, generalist, config.scarce, config.limit)
    return Advice(
        schema=SCHEMA,
        spent=sum(record["spent"] for record in records),
        budget=config.budget,
        diagnosis=diagnosis,
        generalist=generalist,
        rounds=rounds_of(records),
        not_possible=not_possible,
        **chosen,
    )


def lever_of(
    session: Session, name: str, gain: Gain, evidence: Evidence, costs: LeverCosts
) -> Lever:
    """One lever of advice.json.  Raises ValueError where the generalist does not allow it."""
    lever = Lever(name=name, gain=gain.gain, low=gain.low, high=gain.high, **costs.amounts(name))
    lever["measured"] = measured_of(name, evidence)
    lever["needs"] = LEVERS[name].needs
    lever["command"] = f"referral run --advised --run {shlex.quote(str(session.run.root))}"
    if name == "shortlist":
        lever["shortlist"] = shortlist_length(session)
    piloted = evidence.last("branches")
    if name == "branches" and piloted is not None and piloted.get("model"):
        lever["model"] = piloted["model"]
    if name == "rerank":
        lever["shortlist"] = min(session.config.rerank.k, session.num_classes)
    return lever


def measured_of(name: str, evidence: Evidence) -> Pilot | None:
    """What the last pilot of a lever measured, in points. None where none shows it."""
    for family in LEVERS[name].families:
        record = evidence.last(family)
        for form in FORMS.get(name, ()):
            if record is not None and form in record["forms"]:
                gain = measured_gain(record, form)
                return Pilot(share=record["share"], gain=gain.gain, low=gain.low, high=gain.high)
    return None


def why_unknown(name: str, records: Sequence[Mapping]) -> str:
    """Why nothing says what a lever gains."""
    for family in LEVERS[name].families:
        for record in records:
            if record["family"] == family and "not_possible" in record:
                return record["not_possible"]
    return f"no pilot of {', '.join(LEVERS[name].families)} measured anything"


def generalist_size(session: Session, diagnosis: Mapping, costs: LeverCosts) -> GeneralistSize:
    own = costs.generalists
    steps = read_summary(session.run.generalist)["steps"] or whole_steps(session)
    return GeneralistSize(
        top1=diagnosis["val"]["top1"]["value"],
        nll=diagnosis["val"]["loss"]["value"],
        steps=steps,
        multiplications=own.multiplications,
        parameters=own.parameters,
        latency_ms=own.latency_ms,
    )


def rounds_of(records: Sequence[Mapping]) -> list[Round]:
    """Which families each round piloted, what it spent, and which ended there."""
    rounds: list[Round] = []
    last = max(record["round"] for record in records)
    for number in range(last + 1):
        of_round = [record for record in records if record["round"] == number]
        following = [record for record in records if record["round"] == number + 1]
        rounds.append(
            Round(
                families=[each["family"] for each in of_round if "dropped" not in each],
                dropped=[each["family"] for each in following if "dropped" in each],
                share=sum(each["spent"] for each in of_round),
            )
        )
    return rounds
