"""results.json says what came of an advice: the rows that are levers, pulled in full."""

import io
import json

import pytest
from advised import LEVERS, made_up

from launch.results import show_results
from pipeline.advice.outcomes import outcomes, row_of
from pipeline.advice.showing import outcome_sentence
from pipeline.config import load_config
from pipeline.results import collect, read_results
from pipeline.store import write_json
from pipeline.terminal import Console

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


@pytest.mark.parametrize(
    "top1, half, words",
    [
        (0.533, 0.005, "+3.3 (2.9 to 3.7) points, inside"),
        (0.513, 0.005, "+1.3 (0.9 to 1.7) points, below"),
        (0.553, 0.005, "+5.3 (4.9 to 5.7) points, above"),
    ],
)
def test_a_sentence_says_where_the_measured_gain_lies_of_the_predicted_interval(top1, half, words):
    """Of `wider`, +3.3 (2.0 to 4.6)."""
    wider = [each for each in LEVERS if each["name"] == "wider"]
    versus = {"generalist": {"top1": top1 - 0.5, "top1_half": half, "nll": 0.0, "nll_half": 0.0}}
    rows = {"generalist": {"top1": 0.5}, "wider": {"top1": top1, "versus": versus}}
    came = outcomes(made_up("training", 2.0, wider), load_config(None, []), rows)
    assert outcome_sentence(came) == (
        f"Predicted of wider, on val: +3.3 points (2.0 to 4.6). Measured on test: {words} the "
        "predicted interval."
    )


def test_what_the_terminal_shows_of_a_run_has_what_came_of_its_advice(hand_worked):
    """It is silent where the advised lever was not pulled."""
    copies = [each for each in LEVERS if each["name"] == "copies"]
    write_json(hand_worked.root / "advice.json", made_up("wall_clock", levers=copies))
    write_json(hand_worked.root / "results.json", collect(hand_worked))
    assert "Measured on test: +20.0" in shown(hand_worked)
    write_json(hand_worked.root / "advice.json", made_up())
    write_json(hand_worked.root / "results.json", collect(hand_worked))
    assert "Measured on test" not in shown(hand_worked)


def shown(run):
    console = Console(file=io.StringIO(), width=120)
    show_results(run, console)
    return console.file.getvalue()
