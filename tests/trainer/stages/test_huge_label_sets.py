"""Stages that hold no row of C numbers say what those say that do."""

import io

import numpy as np
import pytest
from running import run_all

from clustering import ClassGroups
from ensemble import specialist_ensemble as module
from pipeline.config import load_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.data.shards import ShardWriter, write_manifest
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import calibrate, run_stage
from trainer.stages.calibrate import LOGITS_IN_MEMORY
from trainer.stages.stored_targets import Stored, rows_by_mass

CLASSES, NUMBERS, GROUPS = 3755, 16, 16
EXAMPLES = {"train": 2 * CLASSES, "val": 400, "test": 400}


def write_shards(directory):
    """Classes around points of a plane of 16 numbers, so near that neighbours are confused."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(CLASSES, NUMBERS)).astype(np.float32)
    names = [f"class {c}" for c in range(CLASSES)]
    splits = {}
    for split, count in EXAMPLES.items():
        labels = random.permutation(np.arange(count) * (1 if split == "train" else 5) % CLASSES)
        with ShardWriter(directory, split, names) as writer:
            for k, label in enumerate(labels):
                content = io.BytesIO()
                np.save(content, centres[label] + 0.6 * random.normal(size=NUMBERS).astype("f4"))
                cls = str(label).encode()
                writer.write({"__key__": f"{k:06d}", "npy": content.getvalue(), "cls": cls})
        splits[split] = writer.facts
    write_manifest(directory, names, splits)
    orders = np.argsort(centres[:, :2], axis=0)  # neighbours along the first two axes
    groups = [part for axis in (0, 1) for part in np.array_split(orders[:, axis], GROUPS // 2)]
    ClassGroups(groups, CLASSES).save(directory / "groups.json")
    return directory


def config_of(data, *overrides):
    schedule = {"batch_size": 256, "learning_rate": 0.02, "log_every": 50}
    base = {
        "data": {split: str(data) for split in EXAMPLES},
        "model": {"name": "mlp", "width": 32, "depth": 1},
        "train": {"steps": 60, **schedule},
        "clusters": {"groups_file": str(data / "groups.json"), "top_k": 10},
        "specialists": {"steps": 3, "batch_size": 32, "learning_rate": 0.01, "dustbin_rows": 50},
        "controls": {"enabled": False},
        "students": {"main": {"steps": 1, "batch_size": 64, "answers_mass": 0.5}},
        "launch": {"processes": 1, "pool": 1},
        "engine": {"device": "cpu"},
    }
    return load_config(None, list(overrides), base)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    data = write_shards(tmp_path_factory.mktemp("huge"))
    return run_all(tmp_path_factory.mktemp("dense"), config_of(data))


@pytest.fixture
def sparsely(monkeypatch):
    """A function that runs stages of a run again, from whom all classes are too many."""

    def again(run, *stages):
        monkeypatch.setattr(module, "SPARSE_FROM", 1)
        monkeypatch.setattr(calibrate, "FEWEST_EXAMPLES", LOGITS_IN_MEMORY // CLASSES)
        monkeypatch.setattr(calibrate, "LOGITS_IN_MEMORY", 1)
        with process_group(run.config.engine) as ranks:
            for stage in stages:
                stage.clear()
                run_stage(Session(RunDirectory(run.root, run.config), ranks), stage)

    return again


def close(mine, theirs, path="", within=1e-6):
    """Numbers within 1e-6, but for what was timed. All else equal."""
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys(), path
        for key in theirs.keys() - {"latency_ms", "softmax_ms", "seconds", "cpu_seconds"}:
            close(mine[key], theirs[key], f"{path}.{key}", within)
    elif isinstance(theirs, list):
        assert len(mine) == len(theirs), path
        for index, pair in enumerate(zip(mine, theirs, strict=True)):
            close(*pair, f"{path}[{index}]", within)
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, rel=within, abs=within), path
    else:
        assert mine == theirs, path


def test_the_stages_give_the_same_metrics_to_a_millionth(finished, sparsely):
    place = finished.ensemble.path("ensemble.json")
    settings = read_json(place)
    rows = {
        name: read_json(finished.evaluate.path(f"{name}.json"))
        for name in ("generalist", "ensemble")
    }
    with np.load(finished.evaluate.path("ensemble.npz")) as arrays:
        examples = dict(arrays)
    assert rows["ensemble"]["row"] != rows["generalist"]["row"]
    sparsely(finished, finished.ensemble, finished.evaluate)
    # A loss that is the same to 1e-9 has its minimum at the same place to the root of that.
    close(read_json(finished.ensemble.path("ensemble.json")), settings, within=3e-5)
    for name, row in rows.items():
        close(read_json(finished.evaluate.path(f"{name}.json")), row, name)
    with np.load(finished.evaluate.path("ensemble.npz")) as arrays:
        assert arrays["asked"].shape[1] == 2 and arrays["active"].shape == (
            EXAMPLES["test"],
            GROUPS,
        )
        for key, value in examples.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(arrays[key], value, rtol=1e-5, atol=1e-7)
            elif key != "top5":  # of ties either comes first
                np.testing.assert_array_equal(arrays[key], value)


def test_a_teacher_of_listed_classes_stores_the_same_answers(finished, sparsely):
    stage = finished.targets_for("main")

    def stored():
        place = stage.path("train")
        rows = np.arange(EXAMPLES["train"])
        read = rows_by_mass(place, CLASSES, 1, len(rows))(rows)
        return read_json(place / "answers.json"), Stored(*map(np.copy, read))

    notes, rows = stored()
    assert 40 < notes["mean_classes"] < 0.9 * CLASSES
    sparsely(finished, stage)
    again, others = stored()
    for key in ("num_classes", "mass", "temperature", "most", "samples", "fingerprint", "measured"):
        assert again[key] == notes[key], key
    for key in ("mean_classes", "mean_tail", "max_tail", "entropy"):
        assert again[key] == pytest.approx(notes[key], rel=1e-3), key
    assert again["truncation_kl"] == pytest.approx(notes["truncation_kl"], rel=1e-3)
    # Where a sum is next to the mass that is kept, rounding decides about a class.
    same = others.counts == rows.counts
    assert same.mean() > 0.99 and abs(others.counts - rows.counts).max() <= 1
    width = min(rows.indices.shape[2], others.indices.shape[2])
    alike = (others.indices[..., :width] == rows.indices[..., :width])[same]
    assert alike.mean() > 0.98
    np.testing.assert_allclose(others.log_tail[same], rows.log_tail[same], rtol=2e-3)
