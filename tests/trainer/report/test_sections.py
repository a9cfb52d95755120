"""Sections that are there only where they say something: students, what was fitted, time."""

import json
import re

import numpy as np
import pytest
from altered import altered
from pages import rows_of, text_of

from pipeline.results import collect
from pipeline.store import write_json
from trainer.report.evidence import Evidence
from trainer.report.fitted import fitted
from trainer.report.overview import cost_plots
from trainer.report.page import render
from trainer.report.specialists import specialist_rows, unpaired_half


def headings(page):
    return dict(
        re.findall(r'<section id="(\w+)"[^>]*>\s*<div class="intro"><h2>([^<]*)</h2>', page)
    )


@pytest.mark.parametrize("kind", ["hand_worked", "deep"])
def test_the_navigation_repeats_the_headings(kind, request):
    run = request.getfixturevalue(kind)
    page = render(run, collect(run))
    links = dict(re.findall(r'<a href="#(\w+)">([^<]*)</a>', page))
    assert links == headings(page) and len(links) > 8


def test_a_run_without_students_changes_or_curves_has_no_section_of_them(
    tmp_path, make_hand_worked
):
    run = make_hand_worked(tmp_path, students=(), controls=False, only=("generalist", "ensemble"))
    for stage in run.stages:
        if stage.kind.trains:
            stage.path("metrics.jsonl").unlink()
            altered(stage)
    with np.load(run.evaluate.path("ensemble.npz")) as file:
        active = file["active"]
    with np.load(run.evaluate.path("generalist.npz")) as file:
        np.savez(run.evaluate.path("ensemble.npz"), **file, active=active)
    altered(run.evaluate)
    shown = headings(render(run, collect(run)))
    assert not {"students", "learning", "examples", "diversity", "fitted"} & shown.keys()
    assert {"metrics", "cost", "groups", "specialists", "classes", "run"} <= shown.keys()


# Students


SIZES = {
    "generalist": {"parameters": 1000, "cnll": 1.0},
    "ensemble": {"parameters": 9000, "cnll": 0.8},
    "control_wall": {"cnll": 1.0},
    "control_compute": {"cnll": 1.0},
    "student_hard": {"parameters": 1000, "cnll": 0.95},
    "main": {"parameters": 1000, "cnll": 0.9},
    "wide": {"parameters": 2400, "cnll": 0.7},
}


def test_students_stand_beside_their_twins_and_only_those_of_its_size_keep_a_share(
    tmp_path, make_hand_worked
):
    run = make_hand_worked(tmp_path, further=SIZES)
    page = render(run, collect(run))
    main, wide = rows_of(page, "students")
    assert main[:4] == ["main", "1.00", "60.00 %", "50.00 %"]
    assert main[4].startswith("+10.00 ± ") and main[4].endswith("no measurable difference")
    assert main[5:7] == ["0.9000", "0.9500"]
    # On ten examples the ensemble's gain is not measurable, so that nothing of it can be kept.
    assert main[-1] == "no gain to keep" and wide[-1] == "another size"
    assert "paired over the 10 test examples" in text_of(page)
    assert "wide has no twin in this run." in text_of(page)


def test_no_share_of_the_gain_is_above_all_of_it(tmp_path, make_hand_worked):
    run = make_hand_worked(tmp_path)
    results = collect(run)
    results["students"]["main"] = dict(results["students"]["wide"], top1=0.9)
    for row in [results["generalist"], results["ensemble"], *results["students"].values()]:
        row.pop("versus", None)
    main, _ = rows_of(render(run, results), "students")
    assert main[-1] == "100 %"


def test_calibrated_differences_of_students_have_an_interval_where_it_is_known(deep):
    rows = rows_of(render(deep, collect(deep)), "students")
    assert [row[0] for row in rows] == ["main", "heads"]
    assert "±" in text_of(" ".join(rows[0]))


# What was fitted


def with_settings(run, **settings):
    stage = run.ensemble
    content = {"schema": 1, "gate": 1, "combine": "kl", **settings}
    write_json(stage.path("ensemble.json"), content)
    altered(stage)
    return Evidence(run, collect(run))


def test_fitted_weights_are_shown_and_warn_only_at_a_bound(hand_worked):
    evidence = with_settings(hand_worked, weights=[1.0, 2.88, 2.88], temperatures=[1, 1.5, 2.0])
    found = fitted(evidence)
    assert [row.value for row in found.rows] == ["2.88", "1", "1.5 to 2"]
    assert found.warnings == []
    page = render(hand_worked, evidence.results)
    assert headings(page)["fitted"] == "What was fitted to join them"
    assert "2.88 the generalist’s is 1; tried on val from 0.0156 to 8192" in text_of(page)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"weights": [1, 1 / 64, 1 / 64]}, "is the least that was tried on val"),
        ({"weights": [1, 8192, 8192]}, "is the most that was tried on val"),
        ({"temperatures": [1.0, 32.0, 1.5]}, "The temperature of 1 of 2 specialists (0) is at a"),
        ({"temperatures": [1.0, 1.5, 1 / 32]}, "The temperature of 1 of 2 specialists (1) is at"),
    ],
)
def test_a_value_at_the_end_of_what_was_tried_is_a_warning(hand_worked, settings, words):
    evidence = with_settings(hand_worked, **settings)
    (warning,) = fitted(evidence).warnings
    assert words in warning
    assert words in text_of(render(hand_worked, evidence.results))


def test_a_calibration_at_its_bound_is_a_warning(hand_worked):
    evidence = with_settings(hand_worked)
    evidence.rows["control_wall"]["temperature"] = 32.0
    assert "The calibration of control_wall, T = 32, is at a bound" in fitted(evidence).warnings[0]


# Gain and forecast in one unit


def test_a_specialists_gain_and_its_ceiling_are_points_of_their_whole_split(hand_worked):
    """Of ten test examples, of which it is asked about five, it fixes one: .1 ± .186."""
    rows = {
        row.index: row for row in specialist_rows(Evidence(hand_worked, collect(hand_worked))).rows
    }
    assert rows[0].gained.value == pytest.approx(0.1) and rows[0].forecast == 0.012
    assert rows[0].gained.half == pytest.approx(1.96 * (0.09 / 10) ** 0.5)
    assert not rows[0].gained.is_measurable
    page = text_of(render(hand_worked, collect(hand_worked)).replace("<br>", "<br> "))
    assert "gained, points of all test" in page and "at most, points of all val" in page


def test_a_difference_of_accuracies_needs_twenty_examples():
    assert unpaired_half(0.4, 0.8, 19) == float("inf")
    # 1.96 sqrt((.24 + .16) / 100)
    assert unpaired_half(0.4, 0.8, 100) == pytest.approx(0.1239613, abs=1e-6)


# Seconds of training


def captions(run):
    return [plot.caption for plot in cost_plots(Evidence(run, collect(run)))]


def moved(run, seconds):
    """As if each training had begun `seconds` after the one before, and taken ten."""
    trained = [stage for stage in run.stages if stage.kind.trains and stage.done()]
    for number, stage in enumerate(trained):
        path = stage.directory / "DONE"
        content = json.loads(path.read_text())
        path.unlink()
        path.write_text(
            json.dumps({**content, "seconds": 10.0, "finished": 1000.0 + seconds * number})
        )


def test_seconds_are_compared_only_where_no_two_trainings_ran_side_by_side(hand_worked):
    moved(hand_worked, 10.0)
    assert not Evidence(hand_worked, collect(hand_worked)).is_contended
    assert "Top-1 against seconds of training" in captions(hand_worked)
    moved(hand_worked, 5.0)
    assert Evidence(hand_worked, collect(hand_worked)).is_contended
    assert "Top-1 against seconds of training" not in captions(hand_worked)
    assert "cannot be compared" in text_of(render(hand_worked, collect(hand_worked)))


def test_cpu_seconds_stand_for_seconds_where_every_row_has_them(hand_worked):
    for name in ("generalist", "ensemble", *hand_worked_rows(hand_worked)):
        path = hand_worked.evaluate.path(f"{name}.json")
        content = json.loads(path.read_text())
        content["row"]["cost"]["cpu_seconds"] = 75.0
        path.write_text(json.dumps(content))
    altered(hand_worked.evaluate)
    assert "Top-1 against CPU seconds of training" in captions(hand_worked)
    assert "1 min 15 s" in rows_of(render(hand_worked, collect(hand_worked)), "cost")[0]


def hand_worked_rows(run):
    results = collect(run)
    return [*results["controls"], *results["students"]]
