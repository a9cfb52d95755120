"""The long tail: how many images are kept, which, and the tables by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import encode_png

from benchmarks.characters import tails as script
from benchmarks.characters.data import PER_CLASS
from pipeline.config import Data, load_config
from pipeline.store import write_json
from trainer.data.shards import ShardWriter, open_shards, write_manifest


def test_the_profile_falls_from_the_most_frequent_to_a_twenty_first():
    # 105 * 21 ** (-k / 4).
    assert script.images_kept(np.arange(5), 105).tolist() == [105, 49, 23, 11, 5]
    assert script.images_kept(np.array([2, 0, 1]), 35).tolist() == [2, 35, 8]
    assert script.images_kept(np.arange(2), 10).tolist() == [10, 1]  # never none
    assert script.images_kept(np.arange(1), 10).tolist() == [10]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=6),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_of_each_class_as_many_samples_stay_as_asked_or_all(classes, seed):
    labels = np.random.default_rng(seed).permutation(
        np.repeat(np.arange(len(classes)), [n for n, _ in classes])
    )
    kept = np.array([k for _, k in classes])
    chosen = script.thinned(labels, kept, seed)
    counts = np.bincount(labels[chosen], minlength=len(kept)).tolist()
    assert counts == [min(n, k) for n, k in classes]


def test_which_samples_stay_is_the_seeds():
    labels, kept = np.repeat(np.arange(3), 40), np.array([20, 20, 20])
    first, again, other = (script.thinned(labels, kept, seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    assert sorted(script.ranks(30, 1)) == list(range(30))
    assert (script.ranks(30, 1) != script.ranks(30, 2)).any()


@pytest.fixture
def source(tmp_path):
    """Two classes of 105 images for train, 35 for val and 14 for test."""
    directory, splits = tmp_path / "source", {}
    for split, count in PER_CLASS["seen"].items():
        with ShardWriter(directory, split, ["a", "b"]) as writer:
            for k in range(2 * count):
                image = encode_png(np.full((2, 2), k, np.uint8))
                writer.write(
                    {"__key__": f"{split}-{k:03d}", "cls": str(k % 2).encode(), "png": image}
                )
        splits[split] = writer.facts
    write_manifest(directory, ["a", "b"], splits)
    return directory


def test_train_and_val_are_thinned_and_test_is_not(source, tmp_path):
    script.write_tail(source, tmp_path / "tail", 3)
    frequent = int(script.ranks(2, 3).argmin())
    for split, most, least in (("train", 105, 5), ("val", 35, 2), ("test", 14, 14)):
        whole, found = (
            open_shards(str(place), Data(), split) for place in (source, tmp_path / "tail")
        )
        counts = np.bincount(found.labels)
        assert found.class_names == ["a", "b"]
        assert counts[frequent] == most and counts[1 - frequent] == least
        assert set(found.keys(range(len(found)))) <= set(whole.keys(range(len(whole))))
    assert json.loads((tmp_path / "tail" / "manifest.json").read_text())["made_by"]["seed"] == 3


def test_both_runs_differ_in_the_balance_alone():
    plain, balanced = (
        script.tail_config(Path("data"), 1, balance, ["train.steps=7"])
        for balance in script.BALANCES
    )
    assert load_config(None, [], balanced).specialists.balance == 0.5
    assert plain["train"]["steps"] == 7
    assert plain["students"] == {} and plain["data"]["train"] == "data" and plain["seed"] == 1
    for section in ("train", "specialists", "rerank"):
        plain[section]["balance"] = 0.5
    assert plain == balanced


def test_thirds_by_hand(tmp_path, monkeypatch):
    """Three classes, the middle number the most frequent. Two test examples of each."""
    monkeypatch.setattr(script, "ranks", lambda classes, seed: np.array([2, 0, 1]))
    (tmp_path / "generalist").mkdir()
    write_json(tmp_path / "generalist" / "model.json", {"class_names": ["a", "b", "c"]})
    (tmp_path / "evaluation").mkdir()
    labels = np.array([0, 0, 1, 1, 2, 2])
    predicted = {
        "generalist": [1, 1, 1, 1, 2, 0],
        "control_wall": [1, 1, 1, 1, 2, 0],
        "control_compute": [1, 1, 1, 1, 2, 2],
        "ensemble": [0, 1, 1, 0, 2, 2],
    }
    for name, first in predicted.items():
        top5 = np.full((6, 5), -1)
        top5[:, 0] = first
        np.savez(tmp_path / "evaluation" / f"{name}.npz", labels=labels, top5=top5)
    found = script.by_third(tmp_path, 0)
    assert found["generalist"] == [1.0, 0.5, 0.0] and found["ensemble"] == [0.5, 1.0, 0.5]
    # Of the frequent there is no error to remove.
    assert script.fewer_of(found, "ensemble") == [0.0, 1.0, 0.5]
    assert script.fewer_of(found, "control_compute") == [0.0, 1.0, 0.0]


def test_the_table_by_hand():
    thirds = [{name: [0.8, 0.6, 0.2] for name in script.ROWS} | {"ensemble": [0.9, 0.7, 0.4]}]
    row = {"top1": 0.5, "nll": 2.0}
    controls = {"control_wall": row, "control_compute": row}
    results = [{"generalist": row, "ensemble": row, "controls": controls, "students": {}}]
    lines = script.tail_table(thirds, results).splitlines()
    assert lines[2] == "| generalist | 50.00 | 2.0000 | 80.00 | 60.00 | 20.00 |  |  |  |"
    assert lines[-1] == "| ensemble | 50.00 | 2.0000 | 90.00 | 70.00 | 40.00 | 50.0 | 25.0 | 25.0 |"
