"""The stage `cluster`: what it writes, and what it forecasts of the specialists' worth."""

import logging
import shutil

import pytest
from toy import toy_config

import clustering.statistics
from clustering import ClassGroups, PredictionStatistics
from pipeline.config import UserError
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages.grouping import cluster

load = PredictionStatistics.load


@pytest.fixture
def clustered(small_run, tmp_path, caplog):
    """Options of [clusters] -> the run of the toy, its classes grouped anew with them."""
    caplog.set_level(logging.INFO, "referral")

    def again(*overrides):
        shutil.copytree(small_run.root, tmp_path / "run", symlinks=True)
        of_small_run = ("controls.enabled=false", "clusters.num_groups=4", "ensemble.gate=2")
        data = small_run.config.data.train
        config = toy_config(data, *of_small_run, "train.steps=40", *overrides)
        run = RunDirectory(tmp_path / "run", config)
        run.cluster.clear()
        with process_group(config.engine) as ranks:
            cluster(Session(run, ranks), run.cluster)
        return run

    return again


def lines_of(run):
    """The stage's log, without the times."""
    return [line[24:] for line in run.cluster.path("log-0.txt").read_text().splitlines()]


def test_the_log_gives_captured_confusion_chance_and_every_groups_forecast(clustered):
    run = clustered()
    summary, lines = read_json(run.cluster.path("summary.json")), lines_of(run)
    (headline,) = [line for line in lines if "of the generalist's errors" in line]
    smallest, largest = min(summary["sizes"]), max(summary["sizes"])
    assert headline.startswith(f"4 groups of {smallest} to {largest} classes, 1.00 per class")
    assert f"hold {100 * summary['captured']:.1f} % of the generalist's errors on val" in headline
    assert f"(chance {100 * summary['chance']:.1f} %)" in headline
    head = lines.index("group  classes  examples  errors inside  gain at most  expected")
    table = lines[head + 1 : head + 5]
    gains = [float(line.split()[4].rstrip("%")) for line in table]
    assert gains == sorted(gains, reverse=True)
    for line in table:
        group, *counts = map(int, line.replace(",", "").split()[:4])
        row = summary["forecast"][group]
        assert counts == [row[key] for key in ("classes", "examples", "errors_inside")]


def test_groups_below_the_smallest_gain_are_skipped_and_marked(small_run, clustered):
    gains = [row["gain"] for row in read_json(small_run.cluster.path("summary.json"))["forecast"]]
    enough = sorted(gains)[2]
    run = clustered(f"clusters.min_gain={enough}")
    skipped = [m for m, gain in enumerate(gains) if gain < enough]
    assert read_json(run.cluster.path("summary.json"))["skipped"] == skipped and len(skipped) == 2
    lines = lines_of(run)
    assert sorted(int(line.split()[0]) for line in lines if line.endswith("skipped")) == skipped
    forecast = f"forecast to gain less than clusters.min_gain = {enough:g}"
    assert f"2 of 4 groups are {forecast}: no specialist" in lines


def test_of_a_bounded_number_of_specialists_the_largest_forecasts_are_kept(small_run, clustered):
    gains = [row["gain"] for row in read_json(small_run.cluster.path("summary.json"))["forecast"]]
    run = clustered("clusters.specialists=1")
    best = gains.index(max(gains))
    assert read_json(run.cluster.path("summary.json"))["skipped"] == sorted({0, 1, 2, 3} - {best})
    words = "3 of 4 groups are not among the clusters.specialists = 1 with the largest forecasts"
    assert f"{words}: no specialist" in lines_of(run)


def test_a_coverage_lets_some_classes_join_a_second_group(clustered):
    run = clustered("clusters.overlap=2", "clusters.coverage=0.9")
    groups = ClassGroups.load(run.cluster.path("groups.json"))
    assert 24 <= groups.sizes.sum() < 48
    assert read_json(run.cluster.path("summary.json"))["captured_unlabelled"] >= 0.9


def test_statistics_of_another_version_are_one_clear_error(
    clustered, small_run, tmp_path, monkeypatch
):
    statistics = PredictionStatistics.load(small_run.measure.path("statistics.npz"))
    monkeypatch.setattr(PredictionStatistics, "load", lambda path: load(tmp_path / "other.npz"))
    monkeypatch.setattr(clustering.statistics, "SCHEMA", 99)
    statistics.save(tmp_path / "other.npz")
    monkeypatch.setattr(clustering.statistics, "SCHEMA", 1)
    message = "has schema 99, this version reads 1; gather the statistics again"
    with pytest.raises(UserError, match=message):
        clustered()


def test_a_coverage_without_overlap_is_refused_before_anything_is_trained():
    message = "coverage = 0.9 decides who joins a second group: it needs overlap = 2"
    with pytest.raises(UserError, match=message):
        toy_config("data", "clusters.coverage=0.9")


def test_an_absent_coverage_leaves_the_stages_of_older_runs_as_they_were(tmp_path):
    assert "coverage" not in toy_config("data").dump()["clusters"]
