"""The table of a specialist ensemble's students: its configs, and its arithmetic by hand."""

from pathlib import Path

import pytest

from benchmarks.papers import specialists as script
from launch.demo import demo_config
from pipeline.config import load_config


def row(top1: float, nll: float) -> dict:
    return {"n": 1000, "top1": top1, "nll": nll, "cnll": nll}


GOOD, FAIR = row(0.94, 0.25), row(0.92, 0.35)


def results(distilled: dict = GOOD, hard: dict = FAIR) -> dict:
    """100 errors of the generalist, 50 of the ensemble. Every student is alike."""
    students = {name: hard if name.endswith(script.HARD) else distilled for name in script.STUDENTS}
    asked = [{"routed": 400, "gain": 0.01}, {"routed": 350, "gain": 0.03}]
    return {
        "generalist": row(0.9, 0.4),
        "ensemble": row(0.95, 0.2),
        "students": students,
        "specialists": asked,
    }


def test_a_twin_differs_from_its_student_in_the_method_alone_and_both_are_the_demos():
    config = load_config(None, [], script.config_of(Path("data"), seed=3))
    demo = demo_config(Path("."), 3, False, []).students
    assert config.seed == 3 and not config.controls.enabled
    for width, (like, model) in script.WIDTHS.items():
        student, twin = (
            config.students[script.student_name(width) + end] for end in ("", script.HARD)
        )
        assert (student.method, twin.method) == ("distill", "hard")
        assert student.model_copy(update={"method": "hard"}) == twin
        assert student == demo[like].model_copy(update={"model": model})


def test_widths_are_multiples_of_the_generalists():
    model = script.config_of(Path("data"), 0)["model"]
    for width, (_, given) in script.WIDTHS.items():
        found = model | given
        assert (found["width"], found["embedding"]) == (float(width) * 12, float(width) * 24)


def test_the_second_run_differs_in_its_specialists_alone_and_teaches_nobody(tmp_path):
    config = script.config_of(Path("data"), 0)
    first, second = (
        load_config(None, [], each)
        for each in (config, script.full_config_of(config, tmp_path, 0.2))
    )
    assert second.generalist.init == str(tmp_path) and second.students == {}
    assert first.specialists.dustbin == "preserving"
    assert (second.specialists.dustbin, second.specialists.soft_weight) == ("full", 0.2)
    changed = {
        "generalist": first.generalist,
        "students": first.students,
        "specialists": first.specialists,
    }
    assert second.model_copy(update=changed) == first


def test_shares_of_the_gain_in_errors_and_in_nll():
    found = results()
    rows = script.student_rows([found], dict.fromkeys(script.STUDENTS, (1000, 2000)), costs())
    # 40 of 50 errors and .15 of .20 nats. The twin 20 of 50 and .05 of .20.
    assert [each[3:5] for each in rows[:2]] == [
        ["**80 %** (80)", "**75 %** (75)"],
        ["**40 %** (40)", "**25 %** (25)"],
    ]
    assert rows[0][:3] + rows[0][5:] == [
        "1 x, distilled",
        "94.00",
        "0.2500",
        "0.2500",
        "1,000",
        "2 k",
        "0.50 M, 7 s",
    ]
    assert script.fewer_errors(found["ensemble"], found) == pytest.approx(0.5)


def test_an_ensemble_runs_the_generalist_and_the_specialists_that_are_asked():
    """750 of 1000 examples ask one: 1.75 networks of 2,000 multiplications run.

    Three of 1,000 parameters are kept.
    """
    generalist, ensemble = script.ensemble_rows({"joint": [results()]}, 1000, 2000, costs())
    assert generalist == [
        "generalist",
        "90.00",
        "0.4000",
        "0.4000",
        "1,000",
        "2 k",
        "0.50 M, 7 s",
        "",
        "",
        "",
    ]
    assert ensemble == [
        "joint",
        "95.00",
        "0.2000",
        "0.2000",
        "3,000",
        "4 k",
        "0.50 M, 7 s",
        "**50.0 %** (50.0)",
        "2.00",
        "1.50",
    ]


def test_a_mean_over_seeds_names_each_seed_and_no_gain_is_no_share():
    assert script.percents([0.5, 0.7]) == "**60 %** (50, 70)"
    assert script.percents([0.5, None]).startswith("no gain to keep")
    worse = results() | {"ensemble": row(0.9, 0.4)}
    assert script.nll_share(row(0.94, 0.25), worse) is None


def test_the_verdict_counts_the_seeds_that_pass():
    good, poor = results(), results(distilled=row(0.92, 0.3), hard=row(0.93, 0.35))
    assert script.verdicts([good, poor])[0] == (
        "* 1 x: keeps at least 70 % of the gain in top-1 at 1 of 2 seeds, "
        "fewer errors than its twin at 1 (by 20, -10), a lower NLL at 2 (by 0.100, 0.050)."
    )


def costs() -> dict:
    one = [{"seconds": 7.0, "examples_seen": 500_000, "temperature": 1.5}]
    return dict.fromkeys([*script.STUDENTS, "generalist", "joint"], one)
