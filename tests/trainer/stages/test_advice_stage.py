"""The whole way to an advice on a toy run: diagnosis, pilots in two rounds, advice.json."""

from __future__ import annotations

import json

import pytest
from running import run_all
from toy import toy_config, write_toy

from pipeline.advice.document import read_advice
from pipeline.advice.levers import LEVERS
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.core.loop import Interrupted
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_stage
from trainer.stages.lever_costs import LeverCosts

STEPS = ("train.steps=200", "specialists.steps=20", "rerank.k=6", "rerank.random=4")
ALL = set(LEVERS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


def advised(root, config, stop_in=""):
    """Every stage of an advice. stop_in: a place whose training is interrupted once."""
    run = run_all(root, config, only={"generalist"})
    with process_group(config.engine) as ranks:
        session = Session(run.advice.run, ranks)
        for stage in run.advice.stages:
            if stage.is_done:
                continue
            if stage.place == stop_in:
                interrupt(session, stage)
            run_stage(session, stage)
    return run


def interrupt(session, stage):
    """The stage's training stops at its first step, as by SIGTERM."""
    from trainer.core import loop

    take, steps = loop.Trainer.train_step, []

    def once(self, *arguments):
        if steps:
            raise Interrupted
        steps.append(1)
        return take(self, *arguments)

    loop.Trainer.train_step = once
    try:
        with pytest.raises(Interrupted):
            run_stage(session, stage)
    finally:
        loop.Trainer.train_step = take


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return advised(tmp_path_factory.mktemp("run") / "run", toy_config(data, *STEPS))


def but_times(advice):
    """Without what a clock measured, and where the run lies."""
    text = json.loads(json.dumps(advice))
    text["generalist"].pop("latency_ms")
    for lever in text["levers"]:
        for key in ("latency_ms", "command", "pareto"):
            lever.pop(key, None)
    text["best_for"].pop("latency")
    text.pop("elsewhere", None)
    return text


def test_an_advice_is_published_with_every_lever_priced(run):
    advice = read_advice(run.root / "advice.json")
    assert advice is not None
    levers = {lever["name"]: lever for lever in advice["levers"]}
    assert levers.keys() | advice["not_possible"].keys() == ALL
    assert advice["best"] in levers and advice["sentence"]
    assert 0 < advice["spent"] <= advice["budget"]
    assert levers["stop"]["gain"] == 0 and levers["stop"]["training"] == 0
    for lever in levers.values():
        assert lever["low"] <= lever["gain"] <= lever["high"]
    assert (run.root / "advice.html").read_text().startswith("<!")


def test_amounts_are_those_of_a_run_that_goes_on(run):
    advice = read_advice(run.root / "advice.json")
    assert advice is not None
    own, levers = advice["generalist"], {lever["name"]: lever for lever in advice["levers"]}
    pixels, units, classes = 64, 24, 24
    assert own["multiplications"] == pixels * units + units * classes
    assert levers["average"]["multiplications"] == 2 * own["multiplications"]
    # Two generalists answer each of 960 examples once, for 200 steps of 96: a third of learning.
    assert levers["average_student"]["training"] == pytest.approx(2 + 2 * 960 / (3 * 200 * 96))
    # 6 groups without overlap: every example asks one copy of 20 steps, of a batch like the
    # generalist's, for 200 of its own.
    assert levers["copies"]["multiplications"] == pytest.approx(2 * own["multiplications"])
    assert levers["copies"]["training"] == pytest.approx(6 * 20 / 200, rel=0.05)
    assert levers["copies"]["parameters"] == 7 * own["parameters"]
    assert levers["wider"]["training"] == pytest.approx(2, rel=0.15)


def test_branches_cost_what_they_were_piloted_as(run):
    """Of a shape and length of their own, where [specialists] is of copies."""
    own = {"model": {"embedding": 8}, "full_seen": [96 * 40]}
    with process_group(run.config.engine) as ranks:
        session = Session(run.advice.run, ranks)
        short, long = (
            LeverCosts(session, 1, own | {"full_seen": [96 * steps]}).amounts("branches")
            for steps in (40, 80)
        )
        narrow, wide = (
            LeverCosts(session, 1, own | {"model": {"embedding": width}}) for width in (8, 16)
        )
        features = (960 + 288) / 3 / (200 * 96)  # a pass over train and val
        # Twice the steps cost twice as much, but for the features.
        twice = 2 * (short["training"] - features) + features
        assert long["training"] == pytest.approx(twice)
        assert wide.branch_section.embedding == 16
        more = wide.amounts("branches")["parameters"] - narrow.amounts("branches")["parameters"]
        assert more is not None and more > 0


def test_an_advice_that_comes_after_the_report_is_in_it(run, data, tmp_path):
    """The report's stage is done once more, so its files and their checksums are new."""
    few = ('advise.levers=["train_on"]', "students={}", "controls.enabled=false")
    reported = run_all(tmp_path / "run", toy_config(data, "train.steps=20", *few))
    page, attempt = reported.root / "report.html", reported.report.done()["attempt"]
    assert "advice" not in read_json(reported.root / "results.json")
    before = page.read_text()
    again = advised(reported.root, reported.config)
    sentence = read_json(again.root / "advice.json")["sentence"]
    assert read_json(again.root / "results.json")["advice"]["levers"].keys() == {"stop", "train_on"}
    assert sentence[:40] in page.read_text() and sentence[:40] not in before
    assert again.report.done()["attempt"] != attempt
    assert again.report.path("report.html").read_text() == page.read_text()


def test_workers_train_specialists_side_by_side(run):
    with process_group(run.config.engine) as ranks:
        session = Session(run.advice.run, ranks)
        alone, three = (LeverCosts(session, workers).amounts("copies") for workers in (1, 3))
    assert alone["wall_clock"] == alone["training"] == three["training"]
    assert three["wall_clock"] == pytest.approx(alone["training"] / 3)


def test_pilots_of_the_second_round_go_on_with_the_better_half(run):
    rounds = read_json(run.root / "advice.json")["rounds"]
    assert len(rounds) == 2
    assert set(rounds[1]["families"]) | set(rounds[0]["dropped"]) == set(rounds[0]["families"])
    assert len(rounds[1]["families"]) <= (len(rounds[0]["families"]) + 1) // 2


@pytest.mark.parametrize("place", ["pilots/second-0", "pilots/on-0"])
def test_an_interrupted_pilot_leads_to_the_same_advice(run, data, tmp_path, place):
    again = advised(tmp_path / "again", toy_config(data, *STEPS), stop_in=place)
    expected, came = (but_times(read_json(each.root / "advice.json")) for each in (run, again))
    assert came == expected


def test_what_is_scarce_changes_the_advice_alone(run, data):
    scarce = toy_config(data, *STEPS, "advise.scarce=parameters", "advise.limit=1.0")
    again = RunDirectory(run.root, scarce)
    assert [stage.place for stage in again.advice.stages if not stage.is_done] == ["advice"]


def test_a_shortlist_is_priced_at_the_length_that_the_run_has(data, tmp_path):
    kind = ("ensemble.kind=shortlist", "ensemble.members=2", "ensemble.shortlist=3", "students={}")
    run = run_all(tmp_path / "run", toy_config(data, *STEPS, *kind), only={"generalist"})
    with process_group(run.config.engine) as ranks:
        costs = LeverCosts(Session(run.advice.run, ranks), 1)
        second = costs.amounts("shortlist")["multiplications"] - costs.own_multiplications
    assert second == 64 * 24 + 24 * 3  # its trunk, and 3 of 24 rows


def test_a_deep_ensembles_run_is_advised_on_as_it_is(data, tmp_path):
    deep = ('ensemble.kind="deep"', "ensemble.members=2", "students={}", "controls.enabled=false")
    run = advised(tmp_path / "run", toy_config(data, *STEPS, *deep))
    assert read_json(run.root / "advice.json")["best"] in ALL
