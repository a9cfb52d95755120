"""Where val has few examples a class groups are found by train's predictions, and judged on val."""

import logging
import shutil

import numpy as np
import pytest
from altered import altered
from toy import NUM_CLASSES, toy_config, write_toy

import clustering.statistics
from clustering import ClassGroups, PredictionStatistics, captured_confusion
from pipeline import scaling
from pipeline.config import UserError
from pipeline.graph import RunDirectory
from pipeline.results.forecasts import judged_on
from pipeline.store import read_json, write_json
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import grouping, run_stage
from trainer.stages.grouping import cluster, measure

TRAIN, VAL = 12, 3  # images a class
OVERRIDES = ("train.steps=40", "clusters.num_groups=4")


def stages_of(run, *names):
    with process_group(run.config.engine) as ranks:
        for name in names:
            run_stage(Session(run, ranks), getattr(run, name))


@pytest.fixture(scope="module", autouse=True)
def all_lines():
    """Logs hold what the stages say."""
    log = logging.getLogger("referral")
    level = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(level)


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """A toy run up to its clusters."""
    per_class = {"train": TRAIN, "val": VAL, "test": 2}
    data = write_toy(tmp_path_factory.mktemp("data"), per_class)
    run = RunDirectory(tmp_path_factory.mktemp("thin"), toy_config(data, *OVERRIDES))
    stages_of(run, "generalist", "measure", "cluster")
    return run


@pytest.fixture
def again(thin, tmp_path):
    """Overrides -> a copy of the run with them, grouped anew, and measured anew if asked."""
    shutil.copytree(thin.root, tmp_path / "run", symlinks=True)

    def regrouped(*overrides, remeasure=False):
        config = toy_config(thin.config.data.train, *OVERRIDES, *overrides)
        run = RunDirectory(tmp_path / "run", config)
        with process_group(config.engine) as ranks:
            session = Session(run, ranks)
            if remeasure:
                run.measure.clear()
                measure(session, run.measure)
            run.cluster.clear()
            cluster(session, run.cluster)
        return run

    return regrouped


def statistics_of(run, name="statistics.npz"):
    return PredictionStatistics.load(run.measure.path(name))


def confusion_on_val(run):
    """True class x predicted class, counted by hand from the kept predictions."""
    with np.load(run.measure.path("predictions.npz")) as predictions:
        confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
        np.add.at(confusion, (predictions["labels"], predictions["top"][:, 0]), 1)
    return confusion


def test_groups_are_found_on_other_examples_than_they_are_judged_by(thin):
    assert statistics_of(thin).num_examples == NUM_CLASSES * TRAIN
    of_val = statistics_of(thin, "val.npz")
    assert of_val.num_examples == NUM_CLASSES * VAL
    np.testing.assert_array_equal(of_val.confusion.toarray(), confusion_on_val(thin))
    log = thin.measure.path("log-0.txt").read_text()
    assert "val has 72 examples for 24 classes: groups are found by the predictions on train" in log


def test_every_figure_of_the_groups_is_of_val(thin):
    summary = read_json(thin.cluster.path("summary.json"))
    groups = ClassGroups.load(thin.cluster.path("groups.json"))
    confusion = confusion_on_val(thin)
    assert summary["split"] == judged_on(thin) == "val"
    assert (summary["captured"], summary["chance"]) == captured_confusion(groups, confusion)
    for row, classes in zip(summary["forecast"], groups.members, strict=True):
        inside = confusion[np.ix_(classes, classes)]
        errors = inside.sum() - np.trace(inside)
        assert row["examples"] == len(classes) * VAL
        assert row["errors_inside"] == errors
        assert row["gain"] == pytest.approx(errors / (NUM_CLASSES * VAL))
    assert summary["train_examples"] == [len(classes) * TRAIN for classes in groups.members]
    log = thin.cluster.path("log-0.txt").read_text()
    assert "of the generalist's errors on val (chance" in log and "on train" not in log
    assert "gain at most: a ceiling, the fraction of val that a perfect specialist" in log


def test_a_run_that_an_earlier_version_measured_says_train(thin, again):
    """It kept train's statistics alone. Its groups may be found anew."""
    thin_message = "val has 72 examples for 24 classes: predictions are measured on train"
    run = again()
    run.measure.path("val.npz").unlink()
    altered(run.measure)
    run.measure.path("log-0.txt").write_text(f"2026-01-01 00:00:00,000 {thin_message}\n")
    run = again()
    summary = read_json(run.cluster.path("summary.json"))
    assert summary["split"] == judged_on(run) == "train"
    assert summary["forecast"][0]["examples"] == summary["forecast"][0]["classes"] * TRAIN
    assert "errors on train (chance" in run.cluster.path("log-0.txt").read_text()
    del summary["split"]  # as that version wrote it
    run.cluster.path("summary.json").unlink()
    write_json(run.cluster.directory / "summary.json", summary)
    altered(run.cluster)
    assert judged_on(run) == "train" and judged_on(thin) == "val"


def test_examples_bound_groups(again):
    run = again("clusters.capacity_of=examples", "clusters.capacity=1.2")
    examples = read_json(run.cluster.path("summary.json"))["train_examples"]
    assert sum(examples) == NUM_CLASSES * TRAIN and max(examples) <= 1.2 * np.mean(examples)
    line = f"{min(examples)} to {max(examples)} training examples a group, 72 on average"
    assert line in run.cluster.path("log-0.txt").read_text()


def test_beyond_a_few_classes_the_covariance_is_gathered_for_who_reads_it(again, monkeypatch):
    monkeypatch.setattr(clustering.statistics, "EXPECTED_TOP_K", 5)
    exact = statistics_of(again(remeasure=True))
    monkeypatch.setattr(clustering.statistics, "EXACT_CLASSES", NUM_CLASSES - 1)
    kept = statistics_of(again(remeasure=True))
    assert exact.exact and kept.top_k == 5
    confusions = [each.expected_confusion.toarray() for each in (exact, kept)]
    np.testing.assert_array_equal(*confusions)
    assert statistics_of(again("clusters.method=correlation", remeasure=True)).exact
    assert statistics_of(again('clusters.top_k="all"', remeasure=True)).exact


def test_a_method_that_reads_the_covariance_refuses_statistics_without_it(again, monkeypatch):
    monkeypatch.setattr(clustering.statistics, "EXACT_CLASSES", NUM_CLASSES - 1)
    again(remeasure=True)
    message = "reads the exact covariance, and the predictions were measured for another method"
    with pytest.raises(UserError, match=message):
        again("clusters.method=correlation")


def test_a_covariance_above_the_limit_is_refused(again, monkeypatch):
    monkeypatch.setattr(clustering.statistics, "DENSE_BYTES", 8 * NUM_CLASSES**2 - 1)
    with pytest.raises(UserError, match='top_k = "all": the covariance of 24 classes is above'):
        again('clusters.top_k="all"', remeasure=True)
    assert statistics_of(again(remeasure=True)).top_k == 10


def test_of_a_large_train_a_seeded_part_of_each_class_is_measured_and_said(
    thin, tmp_path, monkeypatch
):
    shutil.copytree(thin.root, tmp_path / "run", symlinks=True)
    run = RunDirectory(tmp_path / "run", toy_config(thin.config.data.train, *OVERRIDES))
    most = 5 * NUM_CLASSES
    monkeypatch.setattr(scaling, "TRAIN_MEASURED", most)
    monkeypatch.setattr(scaling, "FEWEST_OF_CLASS", 1)
    counts = []
    with process_group(run.config.engine) as ranks:
        for _ in range(2):
            run.measure.clear()
            measure(Session(run, ranks), run.measure)
            counts.append(statistics_of(run))
        ids = grouping.train_ids(Session(run, ranks))
        labels = Session(run, ranks).shards("train").labels
        monkeypatch.setattr(scaling, "FEWEST_OF_CLASS", TRAIN)
        assert grouping.train_ids(Session(run, ranks)) is None  # no more than so many a class
    assert counts[0].num_examples == most == counts[1].num_examples
    assert (counts[0].confusion != counts[1].confusion).sum() == 0
    assert np.bincount(labels[ids]).tolist() == [5] * NUM_CLASSES
    log = next(run.measure.path("log-0.txt").parent.glob("log-0.txt")).read_text()
    assert (
        f"of train's {TRAIN * NUM_CLASSES} examples {most} are measured, 42 % of each class" in log
    )
