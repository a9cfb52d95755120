"""Classes that come later: a finished run of ten classes, and one of twelve that extends it."""

import shutil

import numpy as np
import pytest
import torch
from running import run_all
from torch.nn import functional as F
from toy import encode_png, images, toy_config

from clustering import ClassGroups
from networks import load_classifier, named_by, remap_specialist
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
    counts = {"train": 40, "val": 12, "test": 12}
    for seed, (split, count) in enumerate(counts.items(), start=1):
        labels = np.tile(np.arange(len(classes)), count)
        with ShardWriter(directory, split, names) as writer:
            for k, image in enumerate(images(np.array(classes)[labels], seed)):
                label = str(labels[k]).encode()
                writer.write({"__key__": f"{k:06d}", "png": encode_png(image), "cls": label})
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
    rows = [after.spec.class_names.index(name) for name in before.spec.class_names]
    weights = after.state_dict()
    for name, expected in before.state_dict().items():
        actual = weights[name]
        if name.startswith("head."):
            actual = actual[rows]
        assert torch.equal(expected, actual), name
    assert after.spec.num_classes == 12
    assert read_json(now.generalist.path("summary.json"))["steps"] == 150


def test_the_new_classes_are_learnt(now):
    """A guess is right once in twelve."""
    for name in ("generalist", "ensemble", "main"):
        row = read_json(now.evaluate.path(f"{name}.json"))["row"]
        assert row["new_classes"]["top1"] > 0.4, name


def named_groups(run):
    """The class names of every group."""
    names = np.array(network_of(run.generalist).spec.class_names)
    return [set(names[classes].tolist()) for classes in groups_of(run).members]


def test_old_groups_stay_and_new_classes_join_those_they_are_confused_with_in_one_more(old, now):
    before, after = named_groups(old), named_groups(now)
    assert after[:-1] == before and len(after) == len(now.specialists) == 4
    added = after[-1]
    assert set(NEW) < added
    assert len(added) == max(*map(len, before), 2 * len(NEW))
    alike = {f"class {c}" for c in (0, 1, 2, 8, 9, 10)}
    assert len(alike & added) >= len(added - set(NEW)) - 1


def groups_of(run):
    return ClassGroups.load(run.cluster.path("groups.json"))


def test_old_specialists_are_inherited_and_only_the_new_group_is_routed_and_trained(old, now, data):
    shards = open_shards(str(data["now"]), now.config.data, "val")
    raw = torch.from_numpy(shards.inputs(np.arange(40)))
    assert [each.kind.trains for each in now.specialists] == [False, False, False, True]
    for m in range(3):
        before, after = network_of(old.specialists[m]), network_of(now.specialists[m])
        theirs, ours = group_names(old, before), group_names(now, after)
        columns = [theirs.index(name) for name in ours]
        torch.testing.assert_close(after(raw)[:, :-1], before(raw)[:, columns])
        summary = summary_of(now.specialists[m])
        assert summary["taken_from"] == str(old.root / "specialists" / f"{m:03d}")
        assert (summary["seconds"], summary["examples_seen"]) == (0, 0)
        assert summary["temperature"] == summary_of(old.specialists[m])["temperature"]
        assert not now.route.path(f"{m:03d}").exists()
    assert now.route.path("003").is_dir()
    assert summary_of(now.specialists[3])["steps"] == 60


def group_names(run, specialist):
    """The names of the classes of its group, in the order of its columns."""
    names = network_of(run.generalist).spec.class_names
    return [names[c] for c in specialist.spec.head["members"]]


def summary_of(stage):
    return read_json(stage.path("summary.json"))


def test_an_inherited_specialist_predicts_new_classes_as_often_as_they_are_routed_to_it(
    old, now, data
):
    """On val, where the biases of its new rows are fitted: their mass is the new classes' fraction.

    The generalist's rows, unshifted, are further from it.
    """
    shards = open_shards(str(data["now"]), now.config.data, "val")
    raw = torch.from_numpy(shards.inputs(np.arange(len(shards))))
    labels = torch.from_numpy(shards.labels)
    new = torch.tensor([name in NEW for name in shards.class_names])
    generalist, num_shifted = network_of(now.generalist), 0
    top = generalist(raw).argmax(1)
    for m, classes in enumerate(groups_of(now).members[:-1]):
        network = network_of(now.specialists[m])
        before = network_of(old.specialists[m])
        before.spec = named_by(before.spec, network_of(old.generalist).spec)
        unshifted = remap_specialist(before, generalist)
        shift = summary_of(now.specialists[m])["new_rows_shift"]
        routed = torch.isin(top, torch.tensor(classes.tolist()))
        rows = new[network.head.row_classes]
        assert torch.equal(unshifted.head.weight, network.head.weight)
        expected = (shift or 0.0) * rows
        torch.testing.assert_close(network.head.bias - unshifted.head.bias, expected)
        if shift is None:
            assert not new[labels[routed]].any()
            continue
        num_shifted += 1
        features = network.trunk(network.preprocess(raw[routed]))
        mass = mean_mass(network.head, features, rows)
        fraction = float(new[labels[routed]].float().mean())
        assert mass == pytest.approx(fraction, abs=1e-3)
        assert abs(mean_mass(unshifted.head, features, rows) - fraction) > abs(mass - fraction)
    assert num_shifted


def mean_mass(head, features, rows):
    """The mean probability that a head's softmax gives some of its rows."""
    p = F.linear(features, head.weight, head.bias).softmax(1)
    return float(p[:, rows].sum(1).mean().detach())


def test_rows_tell_old_classes_from_new_ones_and_give_the_top1_before(old, now, data):
    content = read_json(now.evaluate.path("generalist.json"))
    metrics = content["row"]
    rows = [metrics[f"{age}_classes"] for age in ("old", "new")]
    assert [row["n"] for row in rows] == [120, 24]
    correct = sum(row["n"] * row["top1"] for row in rows)
    assert correct == pytest.approx(metrics["n"] * metrics["top1"])
    test = open_shards(str(data["now"]), now.config.data, "test")
    names = np.array(test.class_names)[test.labels]
    known = np.flatnonzero(~np.isin(names, NEW))
    before = network_of(old.generalist)
    top = before(torch.from_numpy(test.inputs(known))).argmax(1).numpy()
    predicted = np.array(before.spec.class_names)[top]
    assert content["added"] == {
        "run": str(old.root),
        "old": 10,
        "new": 2,
        "top1_before": pytest.approx(np.mean(predicted == names[known])),
    }


def test_the_report_has_one_line_of_old_and_new_classes(old, now):
    line = classes_line(collect(now))
    assert "\n" not in line
    assert line.startswith("Top-1 of 10 old classes (120 test examples): generalist ")
    assert "; 2 new classes (24 test examples): generalist " in line and "student main" in line
    assert "10 old classes (120 test examples)" in now.report.path("report.html").read_text()
    assert classes_line(collect(old)) is None


def test_an_interrupted_training_of_new_rows_ends_with_the_same_weights(data, old, tmp_path):
    settings = (f"extend.run={old.root}", "train.steps=40", "train.ema=0.9")
    config = toy_config(data["now"], *SMALL, *settings)
    whole = run_all(tmp_path / "whole", config, only={"generalist"})
    interrupted = run_all(tmp_path / "interrupted", config, only={"generalist"})
    (interrupted.generalist.directory / "DONE").unlink()
    [last] = interrupted.generalist.checkpoints.glob("step-*40")
    shutil.rmtree(last)
    again = run_all(tmp_path / "interrupted", config, only={"generalist"})
    weights = network_of(again.generalist).state_dict()
    expected = network_of(whole.generalist).state_dict()
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_a_run_whose_classes_are_all_old_is_refused_before_it_is_made(data, old):
    config = toy_config(data["old"], *SMALL, f"extend.run={old.root}")
    message = f"extend.run = {old.root}: the network knows all 10 classes already"
    with pytest.raises(UserError, match=message):
        check(config, 1)


def test_an_old_class_that_the_data_lack_is_named(data, now):
    with pytest.raises(UserError, match="class 'class 3' is not among the 10 classes now"):
        check(toy_config(data["old"], *SMALL, f"extend.run={now.root}"), 1)


def test_new_rows_learn_in_blocks_what_they_learn_in_a_whole_head(data, old, now, tmp_path):
    words = (*SMALL, f"extend.run={old.root}", "engine.shard_head=true", "train.ema=0.0")
    run = run_all(tmp_path / "blocks", toy_config(data["now"], *words), ["generalist"])
    expected = network_of(now.generalist).state_dict()
    for name, value in network_of(run.generalist).state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("generalist.from=other", "leave generalist.from out"),
        ("clusters.groups_file=mine.json", "leave clusters.groups_file out"),
        ("ensemble.kind=deep", 'ensemble.kind = "deep" has none'),
    ],
)
def test_settings_that_the_extended_run_decides_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        load_config(None, ["extend.run=old", setting])
