"""The benchmark of places: how names are split, which runs a row needs, and what pairs say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import places
from benchmarks.places import EXPERIMENTS, PAIRS, RUN_OF, Seed
from pipeline.config import load_config
from pipeline.graph import RunDirectory

SEED = Seed(Path("/work/runs/seed-3"), 3)


# The data


@pytest.mark.parametrize(
    "names, test, val", [(12, 2, 1), (15, 2, 1), (16, 2, 2), (24, 4, 3), (40, 6, 5), (90, 6, 5)]
)
def test_a_sixth_of_a_places_names_is_for_test_and_an_eighth_for_val(names, test, val):
    given = [f"name {index}" for index in range(names)]
    parts = places.split_names(given, np.random.default_rng(0))
    assert {split: len(part) for split, part in parts.items()} == {
        "test": test,
        "val": val,
        "train": min(names, 40) - test - val,
    }
    drawn = [name for part in parts.values() for name in part]
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(given)


def test_names_that_differ_in_case_or_spacing_are_one():
    assert places.distinct(["New  York", "new york", " NEW YORK ", "", "  ", "NYC"]) == [
        "new york",
        "nyc",
    ]


# The runs


def test_every_run_has_a_config_that_can_be_read_and_trains_what_its_rows_need(tmp_path):
    for name in EXPERIMENTS:
        config = load_config(None, [], places.config_of(name, SEED, tmp_path))
        assert config.seed == 3 and config.model.name == "embedding_bag"
        assert config.generalist.init in ("", SEED.generalist)


def test_a_network_is_trained_once_and_then_taken_by_its_path():
    assert places.needed(["generalist"]) == ["generalist"]
    assert places.needed(["shortlist"]) == ["generalist", "geometric", "shortlist"]
    assert places.needed(["student_hard"]) == ["generalist", "geometric", "geometric_4", "student"]
    assert places.needed(["copies_other"]) == ["generalist", "geometric", "copies_other"]
    assert places.needed(RUN_OF) == list(EXPERIMENTS)


def test_a_runs_own_networks_stand_before_those_who_take_them():
    order = list(EXPERIMENTS)
    for name, experiment in EXPERIMENTS.items():
        for place in (*experiment.given, *experiment.adopted):
            assert order.index(place.partition("/")[0]) < order.index(name)


def test_pairs_name_rows():
    assert {row for pair in PAIRS for row in pair} <= set(RUN_OF)


def test_stages_of_another_run_are_adopted_under_the_same_key(tmp_path):
    """The second generalist is in the run of two and in that of four."""
    keys = []
    for name in ("geometric", "geometric_4"):
        values = places.config_of(name, SEED, tmp_path)
        run = RunDirectory(tmp_path / name, load_config(None, [], values))
        keys.append(run.members[0].key)
    assert keys[0] == keys[1]


def test_adopting_copies_a_stage_once(tmp_path):
    seed = Seed(tmp_path, 0)
    made = seed.run("geometric") / "members" / "001"
    made.mkdir(parents=True)
    (made / "DONE").write_text("1")
    places.adopt(seed, "geometric_4")
    copied = seed.run("geometric_4") / "members" / "001" / "DONE"
    assert copied.read_text() == "1"
    copied.write_text("2")
    places.adopt(seed, "geometric_4")
    assert copied.read_text() == "2"


# The rows


def answers(correct: list[int], p_label: list[float]) -> places.Answers:
    count = len(correct)
    return {
        "ids": np.arange(count),
        "correct": np.array(correct, bool),
        "nll": -np.log(np.array(p_label)),
    }


def test_a_difference_is_over_the_same_names_of_all_seeds():
    """By hand: top-1 differences 1, 0 and -1, 0. Their deviation is sqrt(1 / 2)."""
    ours = [answers([1, 1], [0.5, 0.5]), answers([0, 0], [0.25, 0.5])]
    theirs = [answers([0, 1], [0.25, 0.5]), answers([1, 0], [0.25, 0.5])]
    found = places.difference(ours, theirs)
    assert found["top1"] == 0
    assert found["top1_half"] == pytest.approx(1.96 * math.sqrt(0.5) / 2)
    assert found["nll"] == pytest.approx(-math.log(2) / 4)
    deviation = math.log(2) * math.sqrt(1 / 4 - 1 / 16)
    assert found["nll_half"] == pytest.approx(1.96 * deviation / 2)


def test_rows_of_other_names_are_no_pair():
    other = answers([1, 0], [0.5, 0.5]) | {"ids": np.array([1, 0])}
    with pytest.raises(AssertionError):
        places.difference([answers([1, 0], [0.5, 0.5])], [other])


def test_errors_removed_are_a_share_of_the_generalists():
    rows = {name: {"top1": top1} for name, top1 in (("generalist", 0.5), ("a", 0.6), ("b", 0.4))}
    assert places.removed(rows) == pytest.approx({"a": 0.2, "b": -0.2})


def test_rows_of_several_seeds_are_their_mean():
    rows = places.mean_rows([{"a": {"top1": 0.5, "nll": 1.0}}, {"a": {"top1": 0.7, "nll": 2.0}}])
    assert rows == {"a": {"top1": pytest.approx(0.6), "nll": 1.5}}
