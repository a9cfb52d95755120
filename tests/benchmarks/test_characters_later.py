"""Characters that come later: the data without them, the runs' configs, and the tables by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from toy import encode_png

from benchmarks.characters import later as script
from benchmarks.characters.runs import config_of
from pipeline.config import Data, load_config
from trainer.data.shards import ShardWriter, open_shards, write_manifest

NAMES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def source(tmp_path):
    """Five classes, three images each, of which each says its class and its number."""
    directory, splits = tmp_path / "source", {}
    for split in ("train", "val", "test"):
        with ShardWriter(directory, split, NAMES) as writer:
            for k in range(15):
                image = encode_png(np.full((4, 4), 10 * (k % 5) + k // 5, np.uint8))
                writer.write(
                    {"__key__": f"{split}-{k:02d}", "cls": str(k % 5).encode(), "png": image}
                )
        splits[split] = writer.facts
    write_manifest(directory, NAMES, splits)
    return directory


def test_the_characters_that_come_later_are_the_seeds_own():
    names = [str(c) for c in range(50)]
    first = script.left_out(names, 0, 10)
    assert first == script.left_out(names, 0, 10)
    assert len(set(first)) == 10 and set(first) <= set(names)
    assert first != script.left_out(names, 1, 10) and first == sorted(first, key=int)


def test_filtered_shards_have_the_other_classes_samples_byte_for_byte(source, tmp_path):
    for _ in range(2):  # an interrupted one is begun again
        script.write_without(source, tmp_path / "out", ["b", "d"])
    for split in ("train", "val", "test"):
        whole, found = (
            open_shards(str(place), Data(), split) for place in (source, tmp_path / "out")
        )
        assert found.class_names == ["a", "c", "e"] and len(found) == 9
        kept = [i for i, label in enumerate(whole.labels) if whole.class_names[label] not in "bd"]
        assert found.keys(range(9)) == whole.keys(kept)
        assert (found.inputs(np.arange(9)) == whole.inputs(np.array(kept))).all()
        named = [found.class_names[label] for label in found.labels]
        assert named == [whole.class_names[whole.labels[i]] for i in kept]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["made_by"]["without"] == ["b", "d"]


def test_the_runs_differ_from_the_headline_in_what_they_are_for(tmp_path):
    config = config_of(Path("data"), 3)
    before = load_config(None, [], script.without(config, Path("few")))
    after = load_config(None, [], script.later(config, tmp_path / "old"))
    whole = load_config(None, [], config)
    assert before.data.train == before.data.test == "few" and not before.controls.enabled
    assert after.data == whole.data and after.controls.enabled
    assert after.extend.run == str(tmp_path / "old")
    assert after.train == whole.train.model_copy(update={"steps": 4000})
    for run in (before, after):
        assert run.students == {"same": whole.students["same"]} and run.seed == 3
        for section in ("model", "specialists", "clusters"):
            assert getattr(run, section) == getattr(whole, section)
    assert before.train == whole.train


def leave(run, names, predictions):
    """What the metrics are of: labels and the first of the top five of each predictor."""
    (run / "generalist").mkdir(parents=True)
    (run / "evaluation").mkdir()
    (run / "generalist" / "model.json").write_text(json.dumps({"class_names": names}))
    for name, (labels, predicted) in predictions.items():
        top5 = np.full((len(predicted), 5), -1)
        top5[:, 0] = predicted
        np.savez(run / "evaluation" / f"{name}.npz", labels=np.array(labels), top5=top5)


def result(examples, seconds=60.0):
    row = {"cost": {"examples_seen": examples, "seconds": seconds}}
    student = {"cost": {"examples_seen": 2 * examples, "seconds": 2 * seconds}}
    return {"ensemble": row, "students": {"same": student}}


def test_what_is_forgotten_and_learnt_by_hand(tmp_path):
    """Of four old examples 4 were right, then 3. Of two new ones 1. Trained again 4 and 2."""
    labels = [0, 0, 2, 2, 1, 1]  # y is new
    leave(
        tmp_path / "seed-0-without",
        ["x", "z"],
        dict.fromkeys(["generalist", "ensemble", "same"], ([0, 0, 1, 1], [0, 0, 1, 1])),
    )
    after = dict.fromkeys(
        ["generalist", "ensemble", "same", "control_wall"], (labels, [0, 1, 2, 2, 1, 0])
    )
    leave(tmp_path / "seed-0-later", ["x", "y", "z"], after)
    again = dict.fromkeys(["generalist", "ensemble", "same"], (labels, labels))
    leave(tmp_path / "seed-0", ["x", "y", "z"], again)
    one = script.of_seed(tmp_path, 0, result(10_000_000), result(1_000_000, 6), result(20_000_000))
    expected = {"before": 1.0, "old": 0.75, "new": 0.5, "again_old": 1.0, "again_new": 1.0}
    assert set(one["rows"]) == {*script.PREDICTORS, "the whole generalist goes on"}
    assert all(row == expected for row in one["rows"].values())
    lines = script.predictors_table([one]).splitlines()
    assert lines[2] == "| generalist | 100.00 | 75.00 | 25.00 | 50.00 | 100.00 | 100.00 |"
    lines = script.costs_table([one]).splitlines()
    assert lines[3:5] == [
        "| added: rows and one specialist | 1.00 M | 0.1 |",
        "| added: and the student | 2.00 M | 0.2 |",
    ]
