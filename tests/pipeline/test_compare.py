"""`referral compare`: repetitions, variants, and metrics that not every run has.

All runs are written by hand.
"""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compare import (
    METRICS,
    cell,
    compare,
    differing,
    flat,
    moments,
    read_runs,
    sentences,
    words,
)
from pipeline.config import UserError, load_config, save_config
from pipeline.graph import RunDirectory
from pipeline.store import write_json
from trainer.commands.compare_plot import draw, main


def row(top1=0.5, nll=1.0, n=200, **more):
    return {
        "n": n,
        "top1": top1,
        "top5": 0.9,
        "nll": nll,
        "brier": 0.5,
        "ece": 0.05,
        "macro_top1": top1,
        "cost": {"seconds": 60.0, "examples_seen": 2_000_000, "peak_memory_bytes": 2**20},
        **more,
    }


@pytest.fixture
def finished(tmp_path):
    """finished("a", generalist=row(...), overrides=["seed=1"]) -> the path of a finished run."""

    def make(name, overrides=(), generalist=None, ensemble=None, students=None, controls=None):
        config = load_config(None, ["controls.enabled=false", "clusters.num_groups=1", *overrides])
        run = RunDirectory(tmp_path / name, config)
        run.root.mkdir()
        save_config(config, run.root / "config.toml")
        for stage in run.stages:
            stage.begin().finish()
        write_json(
            run.root / "results.json",
            {
                "generalist": generalist or row(),
                "ensemble": ensemble or row(0.6, 0.8),
                "controls": controls or {},
                "students": students or {},
            },
        )
        return run.root

    return make


def rows_of(found):
    return {(one["row"], one["variant"]): one for one in found["rows"]}


def test_mean_and_sample_deviation_over_seeds_by_hand(finished):
    runs = [
        finished(f"s{i}", [f"seed={i}"], generalist=row(top1))
        for i, top1 in enumerate((0.5, 0.6, 0.7))
    ]
    found = compare(read_runs(runs), ["top1"])
    over = rows_of(found)["generalist", "A"]["figures"]["top1"]
    # Mean 0.6. Squares .01 + 0 + .01 over n - 1 = 2: the root of .01.
    assert over["n"] == 3
    assert over["mean"] == pytest.approx(0.6) and over["deviation"] == pytest.approx(0.1)
    assert list(over["values"].values()) == [0.5, 0.6, 0.7]
    assert cell(over, "top1") == "60.00 ± 10.00"
    assert sentences(found) == ["3 runs, 3 seeds (0, 1, 2); mean ± sample deviation over runs"]


def test_one_run_has_no_deviation(finished):
    found = compare(read_runs([finished("a")]), ["nll"])
    over = rows_of(found)["ensemble", "A"]["figures"]["nll"]
    assert over["deviation"] is None and cell(over, "nll") == "0.8000"


def test_rows_and_metrics_that_some_runs_lack_say_how_many_have_them(finished):
    runs = [
        finished("old", ["seed=1"], students={"main": row(0.55)}),
        finished("new", ["seed=2"], generalist=row(0.5, 1.0, cnll=0.9)),
    ]
    found = compare(read_runs(runs))
    # What some run has, of those shown without being asked.
    assert found["metrics"] == ["top1", "nll", "cnll", "ece"]
    rows = rows_of(found)
    assert rows["student main", "A"]["runs"] == 1 and rows["generalist", "A"]["runs"] == 2
    cnll = rows["generalist", "A"]["figures"]["cnll"]
    assert (cnll["n"], cnll["mean"]) == (1, 0.9)
    assert cell(rows["student main", "A"]["figures"]["cnll"], "cnll") == "–"


def test_rows_come_in_the_order_of_the_results_whichever_run_has_them(finished):
    runs = [
        finished("a", ["seed=1"], students={"main": row()}),
        finished("b", ["seed=2"], controls={"control_wall": row()}),
    ]
    names = [one["row"] for one in compare(read_runs(runs))["rows"]]
    assert names == ["generalist", "control_wall", "ensemble", "student main"]


def test_configs_that_differ_are_variants_and_the_keys_are_named(finished):
    runs = [
        finished("a1", ["seed=1", "specialists.steps=20"], ensemble=row(0.60)),
        finished("a2", ["seed=2", "specialists.steps=20"], ensemble=row(0.62)),
        finished("b1", ["seed=1", "specialists.steps=40"], ensemble=row(0.70)),
    ]
    found = compare(read_runs(runs), ["top1"])
    assert found["differ"] == ["specialists.steps"]
    assert [(one["name"], one["settings"], one["runs"]) for one in found["variants"]] == [
        ("A", {"specialists.steps": 20}, 2),
        ("B", {"specialists.steps": 40}, 1),
    ]
    rows = rows_of(found)
    assert rows["ensemble", "A"]["figures"]["top1"]["mean"] == pytest.approx(0.61)
    assert rows["ensemble", "B"]["figures"]["top1"]["mean"] == pytest.approx(0.70)
    assert [one["variant"] for one in found["runs"]] == ["A", "A", "B"]
    assert sentences(found)[1:] == [
        "beside the seed the runs differ in specialists.steps",
        "A: specialists.steps = 20 (2 runs)",
        "B: specialists.steps = 40 (1 run)",
    ]


def test_a_setting_without_a_number_in_json_is_text(finished):
    runs = [
        finished(name, [f"students.main.temperature={t}"])
        for name, t in (("a", "inf"), ("b", "2.0"))
    ]
    found = compare(read_runs(runs))
    assert [one["settings"] for one in found["variants"]] == [
        {"students.main.temperature": "inf"},
        {"students.main.temperature": 2.0},
    ]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_keys_that_are_inherited_from_train_are_not_named_twice(finished):
    students = ["students.main.method=distill"]
    runs = [finished(name, [f"train.steps={n}", *students]) for name, n in (("a", 5), ("b", 6))]
    # Neither specialists.steps nor students.main.steps.
    assert compare(read_runs(runs))["differ"] == ["train.steps"]
    runs += [finished("c", ["train.steps=6", "specialists.steps=9", *students])]
    assert compare(read_runs(runs))["differ"] == ["train.steps", "specialists.steps"]


def test_keys_of_no_stage_make_no_variant(finished):
    keys = "engine.precision=bf16 launch.pool=3 train.log_every=7 data.workers=2"
    runs = [finished("a", ["seed=1"]), finished("b", ["seed=2", *keys.split()])]
    found = compare(read_runs(runs))
    assert found["differ"] == [] and len(found["variants"]) == 1
    # Unless one asks for it.
    assert len(compare(read_runs(runs), by=["engine.precision"])["variants"]) == 2


def test_other_data_alone_makes_no_variant_and_is_said(finished, tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    runs = [
        finished(name, [f"seed={i}", f"data.train={tmp_path / name}/train-*.tar"])
        for i, name in enumerate(("a", "b"))
    ]
    found = compare(read_runs(runs))
    assert len(found["variants"]) == 1 and "--by data.train" in sentences(found)[2]
    assert len(compare(read_runs(runs), by=["data.train"])["variants"]) == 2


def test_data_moved_elsewhere_are_the_same_data(finished, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "manifest.json", {"classes": ["a"]})
    runs = [finished(f"r{name}", [f"data.train={tmp_path / name}"]) for name in ("one", "two")]
    assert compare(read_runs(runs))["differ"] == []


def test_versus_takes_the_difference_within_each_run(finished):
    """Seeds move all rows of a run together: the difference scatters less than either."""
    runs = [
        finished("a", ["seed=1"], generalist=row(0.50), ensemble=row(0.60)),
        finished("b", ["seed=2"], generalist=row(0.70), ensemble=row(0.80)),
    ]
    found = compare(read_runs(runs), ["top1"], versus="generalist")
    over = rows_of(found)["ensemble", "A"]["figures"]["top1"]
    assert over["mean"] == pytest.approx(0.1) and over["deviation"] == pytest.approx(0, abs=1e-12)
    assert cell(over, "top1", signed=True) == "+10.00 ± 0.00"
    assert "generalist" not in {one["row"] for one in found["rows"]}


def test_a_dee_beyond_the_largest_ensemble_has_no_mean(finished):
    runs = [
        finished("a", ["seed=1"], students={"main": row(dee=2.5)}),
        finished("b", ["seed=2"], students={"main": row(dee=None, dee_beyond=True)}),
    ]
    over = rows_of(compare(read_runs(runs), ["dee"]))["student main", "A"]["figures"]["dee"]
    assert over["mean"] is None and over["beyond"] == 1
    assert list(over["values"].values()) == [2.5, None]
    assert cell(over, "dee") == "beyond in 1 of 2"
    assert json.loads(json.dumps(over, allow_nan=False)) == over


def test_metrics_lie_where_results_have_them(finished):
    one = row(
        0.55,
        members={"count": 4, "mu": 0.1, "pairwise_kl": 0.2, "disagreement": 0.3},
        ood_auroc={"confidence": 0.8, "entropy": 0.81, "mu": 0.9},
        temperature=1.5,
        cece=0.01,
    )
    expected = {
        "errors": "90.0",
        "mu": "0.1000",
        "pairwise_kl": "0.2000",
        "disagreement": "30.00",
        "ood_mu": "0.9000",
        "temperature": "1.500",
        "cece": "0.0100",
        "seconds": "60.0",
        "examples_seen": "2.000",
    }
    found = compare(read_runs([finished("a", students={"main": one})]), list(expected))
    spreads = rows_of(found)["student main", "A"]["figures"]
    assert {metric: cell(spread, metric) for metric, spread in spreads.items()} == expected


@pytest.mark.parametrize(
    "options, words",
    [
        ({"metrics": ["top-1"]}, r"--metric top-1: must be of top1, .*; did you mean top1\?"),
        ({"metrics": ["dee"]}, "--metric dee: none of these runs has it; they have top1, top5"),
        (
            {"by": ["specialists.stepz"]},
            r"no run's config has this key; did you mean specialists.steps\?",
        ),
        ({"versus": "nobody"}, "the runs' rows are generalist, ensemble"),
    ],
)
def test_what_cannot_be_compared_is_said_with_what_can(finished, options, words):
    with pytest.raises(UserError, match=words):
        compare(read_runs([finished("a", ["specialists.steps=9"])]), **options)


def test_no_run_an_unfinished_one_and_the_same_twice_are_refused(finished, tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        read_runs([tmp_path])
    one = finished("a")
    with pytest.raises(UserError, match="are the same run"):
        read_runs([one, tmp_path / "." / "a"])
    shutil.copytree(one, tmp_path / "copy")
    with pytest.raises(UserError, match="a and .*copy are the same run"):
        read_runs([one, tmp_path / "copy"])
    (one / "report" / "DONE").unlink()  # results.json of an earlier config may still lie there
    with pytest.raises(UserError, match="is not finished: referral run --run"):
        read_runs([one])


def test_one_seed_twice_is_no_independent_draw(finished):
    found = compare(read_runs([finished("a", ["seed=3"]), finished("b", ["seed=3"])]))
    assert sentences(found)[-1].startswith("seed 3 more than once")


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_moments_are_those_of_the_definition(values):
    found = moments(values)
    mean = sum(values) / len(values)
    deviation = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
    assert found["mean"] == pytest.approx(mean, rel=1e-9, abs=1e-6)
    assert found["deviation"] == pytest.approx(deviation, rel=1e-6, abs=1e-6)


def test_flat_settings_and_what_differs():
    a = flat({"seed": 1, "train": {"steps": 5, "rates": [1, 2]}, "model": {}})
    assert a == {"seed": 1, "train.steps": 5, "train.rates": [1, 2], "model": {}}
    assert differing([a, {**a, "train.steps": 6}, {**a, "new": 1}]) == ["train.steps", "new"]
    assert words(" top1, nll,,") == ["top1", "nll"]


def test_the_plot_has_a_panel_for_each_metric_and_its_file_must_be_writable(finished, tmp_path):
    runs = [
        finished("a", ["seed=1", "train.steps=5"], students={"main": row(dee=2.5)}),
        finished(
            "b", ["seed=2", "train.steps=6"], students={"main": row(dee=None, dee_beyond=True)}
        ),
    ]
    assert (
        main([*map(str, runs), "--plot", str(tmp_path / "plot.svg"), "--metric", "top1,dee"]) == 0
    )
    text = (tmp_path / "plot.svg").read_text()
    assert all(f"<!-- {METRICS[name].label} -->" in text for name in ("top1", "dee"))
    assert "<!-- student main -->" in text and "<!-- A: train.steps = 5, n = 1 -->" in text
    found = compare(read_runs(runs))
    for file in ("plot.text", "nowhere/plot.png"):
        with pytest.raises(UserError, match="--plot"):
            draw(found, tmp_path / file)
