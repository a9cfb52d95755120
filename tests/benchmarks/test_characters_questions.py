"""The questions about specialists: what each row changes and shares, and the tables."""

from pathlib import Path

import pytest

from benchmarks.characters import questions as script
from benchmarks.characters.runs import config_of
from pipeline.config import load_config
from pipeline.graph import RunDirectory

BASE = script.base_of(Path("data"), 1, [])
QUESTIONS = script.questions(load_config(None, [], BASE))
ROWS = [(name, row) for name, rows in QUESTIONS.items() for row in rows]


def flat(values: dict, above: str = "") -> dict:
    leaves = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{above}{key}.")
        else:
            leaves[f"{above}{key}"] = value
    return leaves


def test_every_question_has_a_sentence_and_one_row_that_is_the_default():
    assert list(QUESTIONS) == list(script.ASKED)
    for rows in QUESTIONS.values():
        default = script.default_of(BASE, rows)
        assert script.changes_nothing(BASE, rows[default])


@pytest.mark.parametrize("question, row", ROWS)
def test_a_row_differs_from_the_first_run_in_its_overrides_alone(question, row):
    overrides = QUESTIONS[question][row]
    plain, changed = (flat(script.variant(BASE, each)) for each in ({}, overrides))
    differ = {key for key in plain.keys() | changed.keys() if plain.get(key) != changed.get(key)}
    assert differ <= overrides.keys()
    assert differ or script.changes_nothing(BASE, overrides)
    for key in differ:
        assert changed[key] == overrides[key]
    assert changed["seed"] == 1 and not changed["controls.enabled"]


def test_all_begin_with_the_headlines_generalist_and_groups_and_short_lessons():
    headline, first = (
        RunDirectory(Path("runs"), load_config(None, [], config))
        for config in (config_of(Path("data"), 1), BASE)
    )
    for stage in ("generalist", "measure", "cluster", "route"):
        assert getattr(headline, stage).key == getattr(first, stage).key
    assert script.steps_of(first.config) == script.STEPS < script.steps_of(headline.config)
    assert not first.students and not first.controls
    assert script.base_of(Path("data"), 1, ["specialists.steps=30"])["specialists"]["steps"] == 30


def test_the_config_that_is_varied_stays_as_it_was():
    before = flat(BASE)
    script.variant(BASE, {"specialists.dustbin": "fresh", "clusters.overlap": 3})
    assert flat(BASE) == before


def test_rows_share_with_the_first_run_what_stands_before_their_change(tmp_path):
    """All the generalist, [specialists] the groups too, [ensemble] the specialists as well."""
    first = RunDirectory(tmp_path, load_config(None, [], BASE))
    for rows in QUESTIONS.values():
        for overrides in rows.values():
            is_default = script.changes_nothing(BASE, overrides)
            sections = set() if is_default else {key.partition(".")[0] for key in overrides}
            other = RunDirectory(tmp_path, load_config(None, [], script.variant(BASE, overrides)))
            for stage in ("generalist", "measure"):
                assert getattr(first, stage).key == getattr(other, stage).key
            assert (first.cluster.key == other.cluster.key) == ("clusters" not in sections)
            specialists = [[stage.key for stage in run.specialists] for run in (first, other)]
            is_changed = bool({"clusters", "specialists"} & sections)
            assert (specialists[0] == specialists[1]) != is_changed


def test_runs_of_different_rows_lie_in_different_places_and_equal_ones_in_one():
    run, configs = Path("runs/seed-1-asked"), {}
    for rows in QUESTIONS.values():
        for overrides in rows.values():
            if not script.changes_nothing(BASE, overrides):
                of_path = configs.setdefault(script.path_of(run, overrides), [])
                of_path.append(script.variant(BASE, overrides))
    assert all(config == group[0] for group in configs.values() for config in group)
    distinct = [group[0] for group in configs.values()]
    assert all(a != b for k, a in enumerate(distinct) for b in distinct[:k])
    assert run.with_name("seed-1-asked-dustbin-full-soft_weight-0.1") in configs


def test_more_groups_share_the_same_number_of_steps():
    steps = BASE["specialists"]["steps"] * BASE["clusters"]["num_groups"]
    for overrides in QUESTIONS["number of groups"].values():
        assert overrides["clusters.num_groups"] * overrides["specialists.steps"] == steps


def test_a_question_without_the_first_runs_own_row_is_refused():
    with pytest.raises(SystemExit, match="0 are the one that all begin with"):
        script.default_of(BASE, {"fresh": {"specialists.dustbin": "fresh"}})


def results(errors: int, captured: float, routed: int) -> dict:
    row = {"n": 1000, "nll": 0.5, "cnll": 0.4}
    cost = {"examples_seen": 500_000, "seconds": 30.0}
    on_val = {"generalist": row | {"top1": 0.8}, "ensemble": row | {"top1": 0.85}}  # 50 of 200
    return {
        "on_val": on_val,
        "generalist": row | {"top1": 0.9},
        "ensemble": row | {"top1": 1 - errors / 1000},
        "clusters": {"captured_confusion": captured},
        "specialists": [{"routed": routed, "cost": cost}, {"routed": routed, "cost": cost}],
    }


def test_the_table_shows_means_and_deviations_and_marks_the_default():
    """100 errors of the generalist. 60 and 70 are left: 40 and 30 % fewer, deviation sqrt(50)."""
    rows = {
        "a": [results(60, 0.8, 500), results(70, 0.9, 700)],
        "b": [results(100, 0.5, 0), results(100, 0.5, 0)],
    }
    lines = script.question_table(rows, "a").splitlines()
    assert lines[2] == (
        "| **a**, the default | 93.50 ± 0.71 | 0.5000 ± 0.0000 | 35.0 ± 7.1 | 25.0 ± 0.0 "
        "| 0.4000 ± 0.0000 | 85.0 ± 7.1 | 1.20 | 1.00 M, 60 s |"
    )
    assert lines[3].startswith("| b | 90.00 ± 0.00 |") and "| 0.0 ± 0.0 |" in lines[3]


def test_answers_of_all_characters_stand_beside_those_of_a_sixth():
    assert script.title_of("gate", 626) == "Question: gate"
    assert script.title_of("gate", 3755) == "Question: gate, of 3,755 classes"
