"""Pilots as stages of an advice: rounds, their budget, who goes on, and several ranks."""

from __future__ import annotations

import numpy as np
import pytest
from pilots import measured
from ranks import stage_on_ranks
from running import run_all
from toy import toy_config, write_toy

from pipeline.advice.graph import parse_pilot
from pipeline.config import save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.__main__ import main
from trainer.distributed.ranks import ALONE
from trainer.session import Session
from trainer.stages.pilots import rounds

LEVERS = 'advise.levers=["train_on", "wider", "average", "shortlist"]'
T = 400


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


def begun(data, root, *overrides, levers=LEVERS):
    """A run with a finished generalist and groups, whose advice asks on, wide and second."""
    config = toy_config(data, levers, f"train.steps={T}", *overrides)
    stages = {"generalist", "measure", "cluster", "diagnosis", "route"}
    return run_all(root, config, only=stages)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Every pilot of both rounds, each by its command."""
    run = begun(data, tmp_path_factory.mktemp("run") / "run")
    for stage in run.advice.pilots:
        command(run, stage.address)
    return run


def command(run, *names):
    assert main(["pilot", "--name", *names, "--run", str(run.root)]) == 0


def records(run, number):
    stages = run.advice.rounds[number]
    return {parse_pilot(stage.address)[0]: measured(stage) for stage in stages}


def test_every_family_is_piloted_in_the_first_round(run):
    first = records(run, 0)
    assert list(first) == ["on", "wide", "second"]
    # .3 pays for the shares 3 f, and 2 f of on or second: f = .3 / 5, or 24 of 400 steps.
    assert first["on"]["share"] == first["second"]["share"] == pytest.approx(24 / T)
    # Half of it for each of two networks of about twice the multiplications: 6 steps, or 5.
    assert first["wide"]["share"] in (pytest.approx(5 / T), pytest.approx(6 / T))


def test_the_better_half_goes_on_for_twice_as_long(run):
    first, second = records(run, 0), records(run, 1)
    diagnosis = read_json(run.diagnosis.path("diagnosis.json"))
    highs = rounds.promises(rounds.evidence_of(run.config, diagnosis, list(first.values())))
    better, worse = sorted(("on", "second"), key=lambda family: -highs[family])
    dropped = {family for family, record in second.items() if record.get("dropped")}
    assert dropped == {worse, "wide"}
    assert "at most, others more" in second[worse]["why"]
    assert "would not narrow" in second["wide"]["why"]  # whatever it promises
    assert second[worse]["spent"] == 0 and second[worse]["forms"] == {}
    assert second[better]["share"] == pytest.approx((24 + 48) / T)


def test_all_of_them_together_stay_within_the_budget(run):
    costs = [record["spent"] for number in (0, 1) for record in records(run, number).values()]
    assert 0.15 < sum(costs) <= 0.3


def test_a_finished_pilot_is_not_made_again(run):
    before = [stage.done()["attempt"] for stage in run.advice.pilots]
    command(run, *[stage.address for stage in run.advice.pilots])
    assert [stage.done()["attempt"] for stage in run.advice.pilots] == before


def test_a_pilot_of_a_run_without_groups_knows_what_it_is_a_pilot_for(data, tmp_path):
    """Pilots of a shortlist's run are trained in a variant of it, which has groups."""
    kind = "ensemble.kind=shortlist", "ensemble.members=2", "ensemble.shortlist=3"
    run = begun(data, tmp_path / "run", *kind)
    assert run.advice.run is not run and run.advice.run.advice is run.advice
    command(run, "second-0")
    stage = next(each for each in run.advice.rounds[0] if each.address == "second-0")
    forms = measured(stage)["forms"]
    assert forms["shortlist"]["nll"] != pytest.approx(forms["geometric"]["nll"], abs=1e-6)


@pytest.mark.parametrize(
    "highs, dropped",
    [
        ({"on": 1.0, "second": 4.0}, {"on"}),
        ({"on": 2.0, "second": 1.0, "copies": 0.0}, {"copies"}),
        # One that is not possible takes nobody's place.
        ({"on": 1.0, "second": 3.0, "wide": None}, {"on", "wide"}),
    ],
)
def test_those_that_promise_least_are_left_out(monkeypatch, run, highs, dropped):
    """highs: in points. None of a family that is not possible."""
    records = [
        {"family": name, "round": 0, "forms": {"generalist": {}, name: {}}}
        if high is not None
        else {"family": name, "round": 0, "forms": {}, "not_possible": "no width"}
        for name, high in highs.items()
    ]
    promised = {name: high for name, high in highs.items() if high is not None}
    monkeypatch.setattr(rounds, "records_before", lambda stage: records)
    monkeypatch.setattr(rounds, "promises", lambda evidence: promised)
    session = Session(run.advice.run, ALONE)
    stage = run.advice.rounds[1][0]
    why = {name: rounds.why_dropped(session, stage, name, 1) for name in highs}
    assert {name for name, text in why.items() if text} == dropped
    assert not any(rounds.why_dropped(session, stage, name, 0) for name in highs)
    assert why.get("wide", "no width") == "no width"


GROUPED = 'advise.levers=["copies", "branches"]'


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, levers",
    [
        ("on-0", LEVERS),
        ("second-0", LEVERS),
        ("wide-0", LEVERS),
        ("copies-0", GROUPED),
        ("branches-0", GROUPED),
    ],
)
def test_two_ranks_measure_what_one_does(data, tmp_path, name, levers):
    sgd = ("train.optimizer=sgd", "train.learning_rate=0.1")
    pilots = []
    for ranks in (1, 2):
        run = begun(data, tmp_path / str(ranks), *sgd, levers=levers)
        save_config(run.config, run.root / "config.toml")
        stage_on_ranks(ranks, f"pilot --name {name}", run.root, timeout=300)
        again = RunDirectory(run.root, run.config)
        pilots.append(next(each for each in again.advice.pilots if each.address == name))
    one, two = map(measured, pilots)
    assert (one["share"], one["spent"], one["examples"]) == (
        two["share"],
        two["spent"],
        two["examples"],
    )
    for form, values in one["forms"].items():
        assert two["forms"][form] == pytest.approx(values, abs=2e-3), form
    answers = [np.load(stage.path("answers.npz")) for stage in pilots]
    np.testing.assert_array_equal(answers[0]["ids"], answers[1]["ids"])
    for key in ("groups", "seen", "full_seen", "referred"):
        assert one.get(key) == two.get(key), key
