"""results.json says what came of an advice: the rows that are levers, pulled in full."""

import json

import pytest
from advised import LEVERS, made_up

from pipeline.advice.outcomes import outcomes, row_of
from pipeline.config import load_config
from pipeline.results import collect, read_results
from pipeline.store import write_json

PAIR = ["ensemble.kind=deep", "ensemble.members=2"]
ROWS = ["generalist", "ensemble", "wider", "average", "shortlist", "train_on", "student main"]


@pytest.mark.parametrize(
    "settings, row_by_lever",
    [
        ([], {"copies": "ensemble", "branches": None, "average": "average", "rerank": None}),
        (["specialists.kind=branch", "specialists.ema=0"], {"branches": "ensemble"}),
        (["specialists.from=member"], {"copies": None}),
        (PAIR, {"average": "ensemble", "average_student": "student main", "copies": None}),
        ([*PAIR, "students.main.model.width=64"], {"average_student": None}),
        ([*PAIR, "students.main.teacher=generalist"], {"average_student": None}),
        (["ensemble.kind=deep", "ensemble.members=3"], {"average": "average"}),
        (["ensemble.kind=shortlist", "ensemble.members=2"], {"shortlist": "ensemble"}),
        (["ensemble.kind=rerank", "ensemble.members=2"], {"rerank": "ensemble"}),
        ([], {"wider": "wider", "train_on": "train_on", "shortlist": "shortlist", "stop": None}),
    ],
)
def test_a_lever_is_the_row_that_was_made_as_it_says(settings, row_by_lever):
    config = load_config(None, settings, {"students": {"main": {"steps": 5}}})
    rows = dict.fromkeys(ROWS, {})
    assert {lever: row_of(lever, config, rows) for lever in row_by_lever} == row_by_lever


def test_a_lever_without_its_row_has_no_outcome():
    assert row_of("wider", load_config(None, []), {"generalist": {}, "ensemble": {}}) is None


def test_a_measured_gain_is_in_points_with_a_90_percent_interval():
    """The row's own interval, half a point, is one of 95 %."""
    versus = {"generalist": {"top1": 0.04, "top1_half": 0.005, "nll": 0.0, "nll_half": 0.0}}
    rows = {"generalist": {"top1": 0.5}, "wider": {"top1": 0.54, "versus": versus}}
    came = outcomes(made_up(), load_config(None, []), rows)
    measured = came["levers"]["wider"]["measured"]
    assert measured["row"] == "wider"
    assert measured["gain"] == pytest.approx(4.0)
    assert measured["high"] - measured["gain"] == pytest.approx(0.5 * 1.645 / 1.96)
    assert measured["gain"] - measured["low"] == pytest.approx(0.5 * 1.645 / 1.96)


def test_without_predictions_to_pair_there_is_a_gain_and_no_interval():
    rows = {"generalist": {"top1": 0.5}, "wider": {"top1": 0.47}}
    came = outcomes(made_up(), load_config(None, []), rows)
    assert came["levers"]["wider"]["measured"] == {"row": "wider", "gain": pytest.approx(-3.0)}


def test_results_have_the_predicted_gain_of_the_advice_and_the_measured_one(hand_worked):
    """The ensemble of copies is right on two more of the ten examples."""
    levers = [each for each in LEVERS if each["name"] == "copies"]
    advice = made_up("wall_clock", levers=levers)
    assert advice["best"] == "copies"
    write_json(hand_worked.root / "advice.json", advice)
    found = collect(hand_worked)["advice"]
    assert found["best"] == "copies"
    assert found["predicted"] == {"gain": 1.2, "low": 0.3, "high": 2.1}
    assert found["measured"]["row"] == "ensemble"
    assert found["measured"]["gain"] == pytest.approx(20.0)
    assert found["levers"]["stop"]["measured"] is None


def test_what_was_not_pulled_was_not_measured(hand_worked):
    write_json(hand_worked.root / "advice.json", made_up())
    found = collect(hand_worked)["advice"]
    assert found["best"] == "shortlist" and found["measured"] is None


def test_results_with_an_advice_are_read_as_others_are(hand_worked, tmp_path):
    write_json(hand_worked.root / "advice.json", made_up())
    write_json(tmp_path / "results.json", collect(hand_worked))
    text = (tmp_path / "results.json").read_text()
    assert read_results(tmp_path / "results.json") == json.loads(text)


def test_a_run_without_advice_has_none(hand_worked):
    assert "advice" not in collect(hand_worked)
