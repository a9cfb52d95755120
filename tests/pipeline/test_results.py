import copy
import json

import pytest

from pipeline.config import Config, UserError
from pipeline.graph import RunDirectory
from pipeline.results import (
    collect,
    errors,
    named_rows,
    share_of_gain,
    student_verdict,
    verdict,
    wins,
    worth,
)

ROW = {"n", "top1", "top5", "nll", "brier", "ece", "macro_top1", "cost"}


def row(wrong, nll, n=1000):
    return {"n": n, "top1": (n - wrong) / n, "nll": nll}


def results(generalist, ensemble, students=None, **controls):
    return {
        "generalist": generalist,
        "ensemble": ensemble,
        "controls": controls,
        "students": students or {},
    }


def test_results_have_the_keys_of_the_design(hand_worked):
    found = collect(hand_worked)
    assert set(found) == {
        "generalist",
        "ensemble",
        "controls",
        "students",
        "student",
        "clusters",
        "specialists",
        "damage",
    }
    assert found["damage"] == {}
    assert set(found["controls"]) == {"control_wall", "control_compute", "student_hard"}
    assert set(found["students"]) == {"main", "wide"}
    assert found["student"] == found["students"]["main"]
    for one in named_rows(found).values():
        assert set(one) == ROW
        assert set(one["cost"]) == {"seconds", "examples_seen", "peak_memory_bytes"}
    assert set(found["clusters"]) == {
        "captured_confusion",
        "chance",
        "captured_unlabelled",
        "sizes",
    }
    assert [one["index"] for one in found["specialists"]] == [0, 1]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_metrics_are_those_that_evaluate_wrote(hand_worked):
    found = collect(hand_worked)
    assert [errors(found[name]) for name in ("generalist", "ensemble")] == [5, 3]
    assert {name: errors(one) for name, one in found["controls"].items()} == {
        "control_wall": 4,
        "control_compute": 2,
        "student_hard": 5,
    }
    # Of the five errors (0,1), (1,0), (2,3), (3,2), (5,0) four lie inside a group.
    assert found["clusters"]["captured_confusion"] == pytest.approx(4 / 5)


def test_nothing_to_report_before_evaluation(tmp_path):
    with pytest.raises(UserError, match="evaluate"):
        collect(RunDirectory(tmp_path, Config()))


def test_metrics_that_are_no_numbers_are_absent_from_json(hand_worked):
    path = hand_worked.evaluate.path("ensemble.json")
    content = json.loads(path.read_text())
    content["clusters"]["chance"] = float("nan")
    path.write_text(json.dumps(content))
    assert collect(hand_worked)["clusters"]["chance"] is None


def test_verdict_of_an_ensemble_that_wins():
    found = results(
        row(368, 1.23), row(351, 1.17), control_wall=row(373, 1.24), control_compute=row(362, 1.2)
    )
    assert verdict(found) == (
        "The ensemble makes 4.6 % fewer top-1 errors than the generalist "
        "(351 against 368 of 1,000), fewer than every control, with the lowest NLL of them all."
    )
    assert wins(found)


def test_verdict_names_first_a_control_that_has_fewer_errors():
    found = results(
        row(368, 1.23), row(351, 1.17), control_wall=row(373, 1.24), control_compute=row(340, 1.2)
    )
    assert verdict(found) == (
        "control_compute beats the ensemble in top-1 (340 errors against 351). "
        "The ensemble makes 4.6 % fewer top-1 errors than the generalist "
        "(351 against 368 of 1,000)."
    )
    assert not wins(found)


def test_verdict_names_every_control_that_has_a_lower_nll():
    found = results(
        row(368, 1.23), row(351, 1.17), control_wall=row(373, 1.16), control_compute=row(340, 1.1)
    )
    line = verdict(found)
    assert line.startswith(
        "control_wall beats the ensemble in NLL (1.1600 against 1.1700); control_compute beats"
    )
    assert "top-1 (340 errors against 351) and NLL (1.1000 against 1.1700)" in line


def test_verdict_of_an_ensemble_that_is_worse_than_the_generalist():
    found = results(row(300, 1.0), row(330, 1.1), control_wall=row(340, 1.2))
    assert "10.0 % more top-1 errors than the generalist" in verdict(found)
    assert "lowest NLL" not in verdict(found) and not wins(found)


def test_verdict_without_controls_says_so_and_a_tie_is_no_win():
    assert "no control was trained" in verdict(results(row(300, 1.0), row(290, 0.9)))
    tie = results(row(300, 1.0), row(290, 0.9), control_wall=row(290, 0.95))
    assert "as many as control_wall" in verdict(tie) and not wins(tie)


def test_verdict_is_one_line(hand_worked):
    found = collect(hand_worked)
    assert "\n" not in verdict(found)
    assert verdict(found).startswith(
        "control_compute beats the ensemble in top-1 (2 errors against 3)"
    )


def test_share_of_the_gain_that_a_student_keeps(hand_worked):
    found = collect(hand_worked)
    # The generalist makes 5 errors, the ensemble 3; main makes 4, wide 3.
    assert share_of_gain(found["students"]["main"], found) == 0.5
    assert share_of_gain(found["students"]["wide"], found) == 1
    assert student_verdict(found).startswith(
        "The student main, one network, keeps 50 % of the ensemble's gain in top-1"
    )
    assert student_verdict(found, "nobody") is None


def test_there_is_no_share_of_a_gain_that_is_not_there(hand_worked):
    found = copy.deepcopy(collect(hand_worked))
    found["ensemble"] = found["generalist"]
    assert share_of_gain(found["student"], found) is None
    assert "no gain of the ensemble to keep" in student_verdict(found)


def test_results_of_a_deep_ensemble_have_sizes_and_no_groups(deep):
    found = collect(deep)
    assert set(found) == {
        "generalist",
        "ensemble",
        "controls",
        "students",
        "student",
        "sizes",
        "damage",
    }
    assert [(one["size"], one["cnll"]) for one in found["sizes"]] == [(1, 1.0), (2, 0.8), (3, 0.7)]
    assert set(found["controls"]) == {"student_hard"}
    calibrated = {"temperature", "cnll", "cbrier", "cece"}
    assert set(found["controls"]["student_hard"]) == ROW | calibrated
    assert set(found["students"]["heads"]) == ROW | calibrated | {
        "members",
        "dee",
        "dee_beyond",
        "ood_auroc",
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_verdicts_of_a_deep_ensemble_say_its_size_and_what_students_are_worth(deep):
    found = collect(deep)
    assert verdict(found).startswith(
        "The ensemble of 3 makes 40.0 % fewer top-1 errors than the generalist (3 against"
    )
    assert worth(found["student"], found) == "1.50"
    assert worth(found["students"]["heads"], found) == ">3"
    assert worth(found["controls"]["student_hard"], found) == "–"
    assert "it is worth 1.50 networks of a deep ensemble." in student_verdict(found)
    assert "it is worth >3 networks" in student_verdict(found, "heads")
    found["students"]["main"]["dee"] = 1.0
    assert "no more than one network" in student_verdict(found)


def test_a_deep_ensemble_needs_no_control_to_tell_where_its_gain_comes_from(deep):
    found = {**collect(deep), "controls": {}}
    assert verdict(found).endswith("than the generalist (3 against 5 of 10).")
