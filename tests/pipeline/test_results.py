import copy
import json
import math

import pytest
from altered import altered

from pipeline.config import Config, UserError
from pipeline.graph import RunDirectory
from pipeline.results import (
    collect,
    dropped_line,
    errors,
    missing_line,
    named_rows,
    share_kept,
    share_of_gain,
    student_verdict,
    tone,
    verdict,
    verdict_sentences,
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
        "missing_controls",
        "students",
        "student",
        "clusters",
        "specialists",
        "dropped",
        "damage",
    }
    assert found["damage"] == {}
    assert set(found["controls"]) == {"control_wall", "control_compute", "student_hard"}
    assert set(found["students"]) == {"main", "wide"}
    assert found["student"] == found["students"]["main"]
    for name, one in named_rows(found).items():
        assert set(one) == ROW | {"versus"}
        twin = {"student_hard"} if name == "student main" else set()
        assert set(one["versus"]) == {"generalist", "ensemble"} - {name} | twin
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
    altered(hand_worked.evaluate)
    assert collect(hand_worked)["clusters"]["chance"] is None


def test_verdict_of_an_ensemble_that_wins():
    found = results(
        row(368, 1.23), row(351, 1.17), control_wall=row(373, 1.24), control_compute=row(362, 1.2)
    )
    assert verdict(found) == (
        "The ensemble makes 4.6 % fewer top-1 errors than the generalist "
        "(351 against 368 of 1,000 test examples). It makes fewer than every control and has the "
        "lowest NLL of them all."
    )
    assert wins(found)


def test_verdict_names_first_a_control_that_has_fewer_errors():
    found = results(
        row(368, 1.23), row(351, 1.17), control_wall=row(373, 1.24), control_compute=row(340, 1.2)
    )
    assert verdict(found) == (
        "control_compute beats the ensemble on test: 340 top-1 errors against 351. "
        "control_compute is the generalist, trained on with up to as many examples as all "
        "specialists saw. The ensemble makes 4.6 % fewer top-1 errors than the generalist "
        "(351 against 368 of 1,000 test examples)."
    )
    assert not wins(found)


def test_verdict_names_every_control_that_has_a_lower_nll():
    found = results(
        row(368, 1.23), row(351, 1.17), control_wall=row(373, 1.16), control_compute=row(340, 1.1)
    )
    line = verdict(found)
    assert line.startswith(
        "control_compute beats the ensemble on test: 340 top-1 errors against 351, an NLL of "
        "1.1000 against 1.1700. So does control_wall in NLL. control_compute is the generalist, "
    )


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
    assert verdict(found) == (
        "The ensemble makes about as many top-1 errors as the generalist: no measurable "
        "difference on 10 test examples (3 against 5). Against control_wall, control_compute and "
        "student_hard there is no measurable difference in top-1."
    )


def measured_alone(found):
    """The same results without paired intervals, as older versions wrote them."""
    found = copy.deepcopy(found)
    for one in named_rows(found).values():
        one.pop("versus", None)
    return found


def test_share_of_the_gain_that_a_student_keeps(hand_worked):
    found = collect(hand_worked)
    # The generalist makes 5 errors, the ensemble 3. Main makes 4, wide 3.
    assert share_of_gain(found["students"]["main"], found) == 0.5
    assert share_of_gain(found["students"]["wide"], found) == 1
    assert student_verdict(found).startswith(
        "The student main reaches 60.00 % top-1 on test; there is no gain of the ensemble to keep"
    )
    assert student_verdict(measured_alone(found)).startswith(
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
        "missing_controls",
        "students",
        "student",
        "sizes",
        "damage",
    }
    assert [(one["size"], one["cnll"]) for one in found["sizes"]] == [(1, 1.0), (2, 0.8), (3, 0.7)]
    assert set(found["controls"]) == {"student_hard"}
    calibrated = {"temperature", "cnll", "cbrier", "cece"}
    assert set(found["controls"]["student_hard"]) == ROW | calibrated | {"versus"}
    assert set(found["students"]["heads"]) == ROW | calibrated | {
        "versus",
        "members",
        "dee",
        "dee_beyond",
        "ood_auroc",
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_verdicts_of_a_deep_ensemble_say_its_size_and_what_students_are_worth(deep):
    found = measured_alone(collect(deep))
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
    found = {**measured_alone(collect(deep)), "controls": {}}
    assert verdict(found).endswith("than the generalist (3 against 5 of 10 test examples).")


def test_a_verdict_is_good_news_bad_news_or_open(hand_worked):
    assert tone(decided()) == "wins"
    assert tone(decided(wider=with_versus(row(250, 0.9), top1=0.05, nll=-0.1))) == "beaten"
    assert tone(results(row(300, 1.0), row(330, 1.1))) == "beaten"
    assert tone(collect(hand_worked)) == "open"  # ten examples tell nothing apart


def test_where_there_is_no_difference_nobody_asks_where_it_comes_from():
    same = with_versus(row(299, 1.0), top1=0.001, nll=-0.001, name="generalist")
    assert verdict(results(row(300, 1.0), same)) == (
        "The ensemble makes about as many top-1 errors as the generalist: no measurable "
        "difference on 1,000 test examples (299 against 300); no control was trained."
    )


# Paired intervals


def with_versus(one, top1=0.0, nll=0.0, name="ensemble", half=0.01):
    """A row whose differences to another one have intervals of `half` on each side."""
    paired = {"top1": top1, "top1_half": half, "nll": nll, "nll_half": half}
    return {**one, "versus": {**one.get("versus", {}), name: paired}}


def decided(**controls):
    """Results whose ensemble is measurably better than its generalist, 300 errors against 368."""
    ensemble = with_versus(row(300, 1.0), top1=0.068, nll=-0.2, name="generalist")
    return results(row(368, 1.2), ensemble, **controls)


def test_a_control_beats_the_ensemble_only_measurably():
    ahead = decided(wider=with_versus(row(295, 0.995), top1=0.005, nll=-0.005))
    line = verdict(ahead)
    assert "beats" not in line and not wins(ahead)
    assert line.endswith(". Against wider there is no measurable difference in top-1.")
    beaten = decided(wider=with_versus(row(250, 0.9), top1=0.05, nll=-0.1))
    assert verdict(beaten).startswith(
        "wider beats the ensemble on test: 250 top-1 errors against 300, "
    )


def test_of_many_controls_that_win_the_best_has_figures_and_the_others_names():
    ahead = {"top1": 0.02, "nll": -0.05}
    found = decided(
        control_wall=with_versus(row(280, 0.95), **ahead),
        wider=with_versus(row(200, 0.8), **ahead),
        average=with_versus(row(270, 0.9), **ahead),
        student_hard=with_versus(row(305, 0.95), -0.005, -0.05),
    )
    assert verdict(found).startswith(
        "wider beats the ensemble on test: 200 top-1 errors against 300, an NLL of 0.8000 "
        "against 1.0000. So do control_wall and average in top-1 and NLL, and student_hard in NLL. "
        "wider is a generalist of the ensemble's multiplications. The ensem"
    )


def test_the_headline_is_short_and_says_next_what_a_twin_is():
    ahead = {"top1": 0.02, "nll": -0.05}
    found = decided(wide_hard=with_versus(row(280, 0.95), **ahead))
    found["students"] = {"wide": row(290, 0.95)}
    headline, what, *_ = verdict_sentences(found)
    assert headline == (
        "wide_hard beats the ensemble on test: 280 top-1 errors against 300, an NLL of 0.9500 "
        "against 1.0000."
    )
    assert what == "wide_hard is the network of student wide, taught by labels alone."


def test_verdict_tells_the_controls_that_it_beats_from_those_that_it_may_not():
    found = decided(
        wider=with_versus(row(305, 1.0), top1=-0.005),
        control_wall=with_versus(row(360, 1.1), top1=-0.06, nll=0.1),
    )
    assert verdict(found).endswith(
        " It makes fewer than control_wall. Against wider there is no measurable difference in "
        "top-1."
    )


def test_the_lowest_nll_is_claimed_where_it_is_measured():
    won = decided(control_wall=with_versus(row(360, 1.1), top1=-0.06, nll=0.1))
    assert verdict(won).endswith(" and has the lowest NLL of them all.") and wins(won)
    close = decided(control_wall=with_versus(row(360, 1.004), top1=-0.06, nll=0.004))
    assert verdict(close).endswith("It makes fewer than every control.") and not wins(close)


def test_a_control_of_more_multiplications_is_no_rival():
    larger = with_versus(row(250, 0.9), top1=0.05, nll=-0.1) | {"multiplications": 300}
    found = decided(wide_hard=larger)
    found["ensemble"]["multiplications"] = 200
    assert "wide_hard" not in verdict(found)
    found["controls"]["wide_hard"]["multiplications"] = 205  # widths are whole numbers
    assert verdict(found).startswith("wide_hard beats the ensemble")


def student_line(student, **more):
    found = decided(**more)
    found["students"] = {"main": student}
    return student_verdict(found)


def test_a_student_never_keeps_more_than_the_gain():
    better = with_versus(row(200, 0.9), 0.1, -0.1)
    better = with_versus(better, 0.168, -0.3, name="generalist")
    found = decided()
    assert share_of_gain(better, found) > 2 and share_kept(better, found) == 1
    line = student_line(better)
    assert "keeps all of the ensemble's gain in top-1 on test, and makes fewer errors still" in line
    assert "%" not in line


def test_a_student_of_another_size_keeps_no_share():
    wide = with_versus(row(250, 0.9), 0.118, -0.3, name="generalist") | {"parameters": 240}
    found = decided()
    found["generalist"]["parameters"] = 100
    assert share_kept(wide, found) is None and share_of_gain(wide, found) > 1
    found["students"] = {"main": wide}
    assert student_verdict(found) == (
        "The student main, a network of 2.4 times the generalist's parameters, reaches 75.00 % "
        "top-1 on test."
    )


def test_a_student_is_held_against_its_own_twin():
    student = with_versus(row(334, 1.1), 0.034, -0.1, name="generalist")
    twin = row(336, 1.15)
    unclear = with_versus(student, 0.002, -0.05, name="student_hard")
    assert student_line(unclear, student_hard=twin).endswith(
        "keeps 50 % of the ensemble's gain in top-1 on test. Its NLL of 1.100 is below the 1.150 "
        "of its twin, which learned from labels alone, and there is no measurable difference in "
        "top-1 on 1,000 test examples."
    )
    better = with_versus(student, 0.02, -0.005, name="student_hard")
    assert student_line(better, student_hard=row(354, 1.105)).endswith(
        "Its NLL of 1.100 is not measurably different from the 1.105 of its twin, which learned "
        "from labels alone, and its top-1 is 2.00 points above the twin's."
    )


def test_a_student_and_its_twin_are_compared_after_calibration_where_that_is_known():
    """As predicted the student leads by .1. Calibrated nothing tells the two apart."""
    student = with_versus(row(334, 1.1), 0.034, -0.1, name="generalist") | {"cnll": 1.05}
    twin = row(336, 1.2) | {"cnll": 1.06}
    older = with_versus(student, 0.002, -0.1, name="student_hard")
    assert "Its calibrated NLL of 1.050 stands beside the 1.060" in student_line(
        older, student_hard=twin
    )
    newer = copy.deepcopy(older)
    newer["versus"]["student_hard"] |= {"cnll": -0.01, "cnll_half": 0.02}
    line = student_line(newer, student_hard=twin)
    assert "Its calibrated NLL of 1.050 is not measurably different from the 1.060" in line
    newer["versus"]["student_hard"] |= {"cnll_half": 0.005}
    assert "Its calibrated NLL of 1.050 is below the 1.060" in student_line(
        newer, student_hard=twin
    )


def test_the_verdict_has_the_interval_of_the_errors_that_are_gone():
    """6.8 points of 1,000 examples, of 368 errors: 18.5 %. A point on either side is 2.7 %."""
    line = verdict(decided())
    assert "18.5 % fewer top-1 errors than the generalist" in line
    assert "(300 against 368 of 1,000 test examples; 95 % interval 15.8 to 21.2 %)" in line


def test_calibrated_differences_are_paired_where_predictions_were_kept(deep):
    found = collect(deep)
    versus = found["students"]["main"]["versus"]["generalist"]
    # One of ten examples differs: main is right there, and both are as sure as calibrated.
    before, after = 0.9**0.8, 0.02**0.8
    lead = math.log(before / after) / 10
    assert versus["cnll"] == pytest.approx(-lead, abs=1e-5)
    assert versus["cnll_half"] == pytest.approx(1.96 * 10 * lead * (0.09 / 10) ** 0.5, abs=1e-4)


def test_a_twin_may_be_a_student_of_the_users_own():
    student = with_versus(row(334, 1.1), 0.034, -0.1, name="generalist")
    found = decided()
    found["students"] = {"few": student, "few_hard": row(350, 1.2)}
    line = student_verdict(found, "few")
    assert line.endswith(
        "below the 1.200 of its twin, which learned from labels alone, and its top-1 is 1.60 "
        "points above the twin's."
    )


def test_a_student_without_a_measurable_gain_keeps_none():
    same = with_versus(row(364, 1.19), 0.004, -0.01, name="generalist")
    assert student_line(same).endswith(
        "keeps none of the ensemble's gain: no measurable difference to the generalist in top-1 "
        "on 1,000 test examples."
    )


def test_paired_differences_are_those_of_the_examples(hand_worked):
    """main is right at example 1 and 2 less often than the ensemble: 4 errors against 3."""
    found = collect(hand_worked)
    versus = found["students"]["main"]["versus"]["ensemble"]
    n, difference = 10, -1 / 10
    assert versus["top1"] == pytest.approx(difference)
    variance = 1 / n - difference**2  # one example of ten differs, by 1
    assert versus["top1_half"] == pytest.approx(1.96 * (variance / n) ** 0.5)
    for name in ("generalist", "ensemble"):
        expected = found["students"]["main"]["nll"] - found[name]["nll"]
        paired = found["students"]["main"]["versus"][name]
        assert paired["nll"] == pytest.approx(expected, abs=1e-6)


def test_what_was_not_trained_is_named_with_the_line_that_does(hand_worked):
    missing = collect(hand_worked)["missing_controls"]
    assert missing["names"] == ["wider", "average", "shortlist", "wide_hard"]
    assert missing["command"] == (
        'referral run --run RUN --set \'controls.rows=["wider", "average", "shortlist"]\' --force'
    )
    line = missing_line(collect(hand_worked), "runs/mine")
    assert line.startswith("not trained: wider, average, shortlist and wide_hard; ")
    assert "--run runs/mine --set" in line


def test_dropped_specialists_are_named(hand_worked):
    found = collect(hand_worked)
    assert found["dropped"] == [] and dropped_line(found) is None
    found["dropped"] = [3]
    assert dropped_line(found) == (
        "Specialist 3 was never better on val than the generalist: the ensemble goes without it."
    )
    found["dropped"] = [1, 3]
    assert "Specialists 1 and 3 were" in dropped_line(found)
