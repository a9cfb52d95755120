"""Classes that come later: a finished run of ten classes, and one that takes it over and knows twelve."""

import shutil

import numpy as np
import pytest
import torch
from running import run_all
from torch.nn import functional as F
from toy import encode_png, images, toy_config

from clustering import ClassGroups
from networks import load_classifier, remap_specialist
from pipeline.config import UserError, load_config
from pipeline.results import classes_line, collect
from pipeline.store import read_json
from trainer.commands.check import check
from trainer.data.shards import ShardWriter, open_shards, write_manifest

OLD = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]  # of the toy's: look-alikes are 0 to 3, 4 to 7 and 8 to 11
NOW = [9, 3, 0, 7, 10, 6, 2, 11, 4, 1, 8, 5]  # 3 and 11 are new
NEW = ["class 3", "class 11"]
SMALL = (
    "controls.enabled=false",
    "clusters.num_groups=3",
    "train.steps=150",
    "specialists.steps=60",
    "students.main.steps=60",
)


def write_classes(directory, classes):
    """Shards of some of the toy's classes, numbered in this order."""
    names, splits = [f"class {c}" for c in classes], {}
    for number, (split, count) in enumerate({"train": 40, "val": 12, "test": 12}.items()):
        labels = np.tile(np.arange(len(classes)), count)
        with ShardWriter(directory, split, names) as writer:
            for k, image in enumerate(images(np.array(classes)[labels], number + 1)):
                writer.write(
                    {
                        "__key__": f"{k:06d}",
                        "png": encode_png(image),
                        "cls": str(labels[k]).encode(),
                    }
                )
        splits[split] = writer.facts
    write_manifest(directory, names, splits)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {"old": write_classes(root / "old", OLD), "now": write_classes(root / "now", NOW)}


@pytest.fixture(scope="module")
def old(data, tmp_path_factory):
    config = toy_config(data["old"], *SMALL, "students={}")
    return run_all(tmp_path_factory.mktemp("old"), config)


@pytest.fixture(scope="module")
def now(data, old, tmp_path_factory):
    config = toy_config(data["now"], *SMALL, f"extend.run={old.root}")
    return run_all(tmp_path_factory.mktemp("now"), config)


def network_of(stage):
    return load_classifier(stage.path("model.json").parent)


def test_the_old_classes_keep_their_rows_and_the_trunk_stays(old, now):
    before, after = network_of(old.generalist), network_of(now.generalist)
    places = [after.spec.class_names.index(name) for name in before.spec.class_names]
    for name, value in before.state_dict().items():
        found = after.state_dict()[name]
        assert torch.equal(value, found[places] if name.startswith("head.") else found), name
    assert (
        after.spec.num_classes == 12
        and read_json(now.generalist.path("summary.json"))["steps"] == 150
    )


def test_the_new_classes_are_learnt(now):
    """A guess is right once in twelve."""
    for name in ("generalist", "ensemble", "main"):
        assert read_json(now.evaluate.path(f"{name}.json"))["row"]["new_classes"]["top1"] > 0.4, (
            name
        )


def test_groups_are_the_old_ones_by_name_and_one_of_the_new_classes_with_those_they_are_confused_with(
    old, now
):
    names = {run: network_of(run.generalist).spec.class_names for run in (old, now)}
    called = {
        run: [{names[run][c] for c in members} for members in groups_of(run).members]
        for run in names
    }
    assert called[now][:-1] == called[old] and len(called[now]) == len(now.specialists) == 4
    added = called[now][-1]
    assert set(NEW) < added and len(added) == max(
        *(len(group) for group in called[old]), 2 * len(NEW)
    )
    alike = {f"class {c}" for c in (0, 1, 2, 8, 9, 10)}
    assert len(alike & added) >= len(added - set(NEW)) - 1


def groups_of(run):
    return ClassGroups.load(run.cluster.path("groups.json"))


def test_old_specialists_are_taken_over_and_only_the_new_group_is_routed_and_trained(
    old, now, data
):
    raw = torch.from_numpy(
        open_shards(str(data["now"]), now.config.data, "val").inputs(np.arange(40))
    )
    assert [each.kind.trains for each in now.specialists] == [False, False, False, True]
    for m in range(3):
        before, after = network_of(old.specialists[m]), network_of(now.specialists[m])
        names = [
            [spec.class_names[c] for c in spec.head["members"]]
            for spec in (before.spec, after.spec)
        ]
        columns = [names[0].index(name) for name in names[1]]
        torch.testing.assert_close(after(raw)[:, :-1], before(raw)[:, columns])
        summary, was = (read_json(run.specialists[m].path("summary.json")) for run in (now, old))
        assert summary["taken_from"] == str(old.root / "specialists" / f"{m:03d}")
        assert (summary["seconds"], summary["examples_seen"]) == (0, 0) and summary[
            "temperature"
        ] == was["temperature"]
        assert not now.route.path(f"{m:03d}").exists()
    assert (
        now.route.path("003").is_dir()
        and read_json(now.specialists[3].path("summary.json"))["steps"] == 60
    )


def test_an_old_specialist_believes_in_new_classes_as_often_as_it_is_referred_them(old, now, data):
    """On val, where its rows of them are fitted: their mass is their share; untouched, the generalist's rows err."""
    shards = open_shards(str(data["now"]), now.config.data, "val")
    raw, labels = (
        torch.from_numpy(shards.inputs(np.arange(len(shards)))),
        torch.from_numpy(shards.labels),
    )
    new = torch.tensor([name in NEW for name in shards.class_names])
    generalist, shifted = network_of(now.generalist), 0
    top = generalist(raw).argmax(1)
    for m, members in enumerate(groups_of(now).members[:-1]):
        network, stage = network_of(now.specialists[m]), now.specialists[m]
        shift = read_json(stage.path("summary.json"))["new_rows_shift"]
        asked = torch.isin(top, torch.tensor(members.tolist()))
        rows = new[network.head.row_classes]
        taken = remap_specialist(network_of(old.specialists[m]), generalist)
        assert torch.equal(taken.head.weight, network.head.weight)
        expected = torch.zeros(12) if shift is None else shift * rows
        torch.testing.assert_close(network.head.bias - taken.head.bias, expected)
        if shift is None:
            assert not new[labels[asked]].any()
            continue
        shifted += 1
        features = network.trunk(network.preprocess(raw[asked]))
        mass, before = (
            F.linear(features, each.head.weight, each.head.bias)
            .softmax(1)[:, rows]
            .sum(1)
            .mean()
            .detach()
            for each in (network, taken)
        )
        share = float(new[labels[asked]].float().mean())
        assert float(mass) == pytest.approx(share, abs=1e-3) and abs(before - share) > abs(
            mass - share
        )
    assert shifted


def test_rows_tell_old_classes_from_new_ones_and_what_the_old_had_before(old, now, data):
    found = read_json(now.evaluate.path("generalist.json"))
    rows = [found["row"][f"{age}_classes"] for age in ("old", "new")]
    assert [row["n"] for row in rows] == [120, 24]
    assert sum(row["n"] * row["top1"] for row in rows) == pytest.approx(
        found["row"]["n"] * found["row"]["top1"]
    )
    test = open_shards(str(data["now"]), now.config.data, "test")
    names = [test.class_names[label] for label in test.labels]
    known = np.array([name not in NEW for name in names])
    before = network_of(old.generalist)
    said = before(torch.from_numpy(test.inputs(np.flatnonzero(known)))).argmax(1).tolist()
    right = [
        before.spec.class_names[c] == name
        for c, name in zip(said, np.array(names)[known], strict=True)
    ]
    assert found["added"] == {
        "run": str(old.root),
        "old": 10,
        "new": 2,
        "top1_before": pytest.approx(np.mean(right)),
    }


def test_the_report_has_one_line_of_old_and_new_classes(old, now):
    line = classes_line(collect(now))
    assert (
        line.startswith("Top-1 of 10 old classes (120 test examples): generalist ")
        and "\n" not in line
    )
    assert "; 2 new classes (24 test examples): generalist " in line and "student main" in line
    assert "10 old classes (120 test examples)" in now.report.path("report.html").read_text()
    assert classes_line(collect(old)) is None


def test_an_interrupted_lesson_of_new_rows_ends_where_it_would_have_ended(data, old, tmp_path):
    config = toy_config(
        data["now"], *SMALL, f"extend.run={old.root}", "train.steps=40", "train.ema=0.9"
    )
    whole, broken = (
        run_all(tmp_path / name, config, only={"generalist"}) for name in ("whole", "broken")
    )
    expected = network_of(whole.generalist).state_dict()
    (broken.generalist.directory / "DONE").unlink()
    [last] = broken.generalist.checkpoints.glob("step-*40")
    shutil.rmtree(last)
    again = run_all(tmp_path / "broken", config, only={"generalist"})
    torch.testing.assert_close(network_of(again.generalist).state_dict(), expected, rtol=0, atol=0)


def test_a_run_whose_classes_are_all_old_is_refused_before_it_is_made(data, old):
    config = toy_config(data["old"], *SMALL, f"extend.run={old.root}")
    with pytest.raises(
        UserError, match=f"extend.run = {old.root}: the network knows all 10 classes already"
    ):
        check(config, 1)


def test_an_old_class_that_the_data_lack_is_named(data, now):
    with pytest.raises(UserError, match="class 'class 3' is not among the 10 classes now"):
        check(toy_config(data["old"], *SMALL, f"extend.run={now.root}"), 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("generalist.from=other", "leave generalist.from out"),
        ("clusters.groups_file=mine.json", "leave clusters.groups_file out"),
        ("ensemble.kind=deep", 'ensemble.kind = "deep" has none'),
        ("engine.shard_head=true", "set it to false"),
    ],
)
def test_what_an_extended_run_brings_is_not_also_asked_of_another(setting, message):
    with pytest.raises(UserError, match=message):
        load_config(None, ["extend.run=old", setting])
