"""The stage `route`: two modes, the same samples. A bounded size. A batch divided exactly."""

import logging
import math

import numpy as np
import pytest
from toy import toy_config, write_toy

from pipeline.config import UserError, save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_stage
from trainer.stages.grouping import groups_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 12, "test": 6})


def prepare(root, data, *overrides) -> RunDirectory:
    root.mkdir(parents=True, exist_ok=True)
    small = ("clusters.num_groups=3", "clusters.overlap=2", "train.steps=5", "specialists.steps=5")
    config = toy_config(data, *small, *overrides)
    save_config(config, root / "config.toml")
    return RunDirectory(root, config)


def play(run, *names) -> None:
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        for stage in run.stages:
            if stage.name in names:
                run_stage(session, stage)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """{mode: a run up to its specialists}, of groups that overlap."""
    root = tmp_path_factory.mktemp("runs")
    by_mode = {mode: prepare(root / mode, data, f"route.mode={mode}") for mode in ("index", "copy")}
    for run in by_mode.values():
        play(run, "generalist", "measure", "cluster", "route", "specialist")
    return by_mode


def test_both_modes_hold_the_same_samples_of_overlapping_groups(runs):
    groups = read_json(runs["copy"].cluster.path("groups.json"))["members"]
    assert sum(map(len, groups)) > 24
    for m, classes in enumerate(groups):
        routed = [read_json(run.route.path(f"{m:03d}/routed.json")) for run in runs.values()]
        assert [each["samples"] for each in routed] == [20 * len(classes)] * 2
        assert [each["mode"] for each in routed] == ["index", "copy"]
    assert not list(runs["index"].route.path("000").glob("*.tar"))
    assert list(runs["copy"].route.path("000").glob("routed-*.tar"))


def test_the_natural_frequency_gives_the_dustbins_shift(runs):
    groups = read_json(runs["copy"].cluster.path("groups.json"))["members"]
    for run in runs.values():
        for m, classes in enumerate(groups):
            natural = len(classes) / 24
            routed = read_json(run.route.path(f"{m:03d}/routed.json"))
            summary = read_json(run.specialists[m].path("summary.json"))
            assert summary["natural_share"] == routed["frequency"] == natural
            # S_m fills half the batch instead of its share p of the data:
            # the odds of the rest fall by p / (1 - p).
            assert math.isclose(summary["shift"], math.log((1 - natural) / natural))


@pytest.mark.parametrize("mode", ["index", "copy"])
@pytest.mark.parametrize("fraction, own", [(0.5, 48), (0.3, 29), (0.01, 1)])
def test_every_batch_of_a_specialist_is_divided_exactly(runs, mode, fraction, own, monkeypatch):
    run, streams = runs[mode], []

    class Enough(Exception):
        pass

    def train(session, attempt, task):
        streams.append(task.stream)
        raise Enough

    monkeypatch.setattr("trainer.stages.specialist.train_network", train)
    schedule = run.config.specialists.model_copy(update={"fraction": fraction})
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        session.config = run.config.model_copy(update={"specialists": schedule})
        classes = groups_of(session).members[1]
        with pytest.raises(Enough):
            run_stage(session, run.specialists[1])
    for step in range(25):  # several passes of the group's samples
        batch = streams[0].batch(step)
        inside = np.isin(batch.labels.numpy(), classes)
        assert inside.sum() == own and len(batch) == 96
        assert (batch.source.numpy() == np.where(inside, 0, 1)).all()


def test_the_size_is_logged_and_bounded_before_anything_is_written(data, runs, tmp_path, caplog):
    run = prepare(tmp_path, data, "route.mode=copy", "route.max_bytes=20000")
    refusal = (
        r"routing by copy takes \d+ bytes, above route.max_bytes = 20000; "
        r'route.mode = "index" writes only'
    )
    with caplog.at_level(logging.INFO, "referral"), pytest.raises(UserError, match=refusal):
        play(run, "generalist", "measure", "cluster", "route")
    messages = [record.message for record in caplog.records]
    [size] = [message for message in messages if "to 3 groups by copy: " in message]
    assert size.endswith(" MiB")
    assert not list(run.route.directory.glob("attempts/*/0*"))


def test_the_bound_is_no_part_of_a_stages_identity(data, tmp_path):
    a = prepare(tmp_path / "a", data)
    b = prepare(tmp_path / "b", data, "route.max_bytes=9")
    c = prepare(tmp_path / "c", data, "route.mode=copy")
    assert a.route.key == b.route.key != c.route.key
    assert [each.key for each in a.specialists] == [each.key for each in b.specialists]
