"""The characters benchmark: its data come again as they were, and its cases are measured once."""

import json
import shutil

import numpy as np
import pytest
from scipy.sparse import csr_array

from benchmarks.characters import data, groups
from clustering import PredictionStatistics
from pipeline.config import Data
from trainer.data import open_shards
from trainer.data.authoring.glyphs import Distortion

needs_drawings = pytest.mark.skipif(not data.SOURCE.is_dir(), reason=f"{data.SOURCE} is absent")
FEW = {"seen": {"train": 7, "val": 7}, "unseen": {"test": 2}}
STILL = Distortion(0, 0, 0, 0, 0, 5, 0, 0)


def files(directory):
    """What is the same however often it is written: a shard's index holds its time."""
    paths = [*directory.rglob("*.tar"), *directory.rglob("manifest.json")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@needs_drawings
def test_drawings_are_in_the_order_of_their_labels():
    assert len(data.characters()) == 6763
    one, mouth = (data.characters().index(letter) for letter in "一口")
    for font in data.SEEN + data.UNSEEN:
        ink = data.drawings(font) > 128
        rows = np.flatnonzero(ink[one].any(axis=1))
        # One stroke from left to right, and a box, empty in its middle.
        assert np.ptp(rows) < 16 and ink[one].any(axis=0).sum() > 28, font
        assert not ink[mouth][20:28, 20:28].any() and ink[mouth].sum() > 100, font


@needs_drawings
def test_every_font_is_either_seen_or_unseen():
    fonts = sorted(path.stem for path in data.SOURCE.glob("*.webp"))
    assert sorted(data.SEEN + data.UNSEEN) == fonts


@needs_drawings
def test_without_distortion_the_images_of_a_class_are_its_drawings_in_each_font(tmp_path):
    data.make(tmp_path, 3, 0, STILL, FEW)
    shards = open_shards(str(tmp_path / "seen"), Data(), "val")
    for label in range(3):
        found = shards.inputs(np.flatnonzero(shards.labels == label))[:, 0].astype(float)
        for font in data.SEEN:
            drawing = data.drawings(font)[label].astype(float)
            # Both at a third of the drawing's size.
            means = drawing.reshape(16, 3, 16, 3).mean((1, 3))
            apart = np.abs(found.reshape(-1, 16, 2, 16, 2).mean((2, 4)) - means).mean((1, 2))
            assert apart.min() < 5 < np.sort(apart)[1], (label, font, apart)


@needs_drawings
def test_an_interrupted_make_resumes_to_the_same_files(tmp_path):
    data.make(tmp_path / "whole", 3, 0, per_class=FEW)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    manifest = tmp_path / "half/seen/manifest.json"
    content = json.loads(manifest.read_text())
    del content["splits"]["val"]
    manifest.write_text(json.dumps(content))
    for path in tmp_path.glob("half/seen/val-*"):
        path.unlink()
    (tmp_path / "half/seen/.val-000000").mkdir()
    data.make(tmp_path / "half", 3, 0, per_class=FEW)
    assert files(tmp_path / "half") == files(tmp_path / "whole")
    with pytest.raises(ValueError, match="another --out"):
        data.make(tmp_path / "half", 3, 1, per_class=FEW)


def quartets(labelled):
    """2,000 examples of 16 classes in which 4 c ... 4 c + 3 are mistaken for each other."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 16, 2000)
    p = np.full((2000, 16), 0.002)
    p[np.arange(2000), labels] = 0.5
    p[np.arange(2000), labels ^ rng.integers(1, 4, 2000)] = rng.uniform(0.1, 0.6, 2000)
    found = PredictionStatistics(16)
    found.update(p / p.sum(axis=1, keepdims=True), labels=labels if labelled else None)
    return found


def test_groups_are_found_without_labels_and_judged_on_test():
    # Test errors between 0 and 1 (3 of them, in one quartet) and between 0 and 4 (1, in different
    # ones). 5 is right.
    test = csr_array(
        (np.array([3, 1, 9]), (np.array([0, 0, 5]), np.array([1, 4, 5]))), shape=(16, 16)
    )
    found = [
        groups.measure(quartets(labelled), None, test, 4, "kmeans", True, 1, 0)
        for labelled in (True, False)
    ]
    assert [case["test"] for case in found] == [0.75, 0.75]
    assert found[0]["val_unlabelled"] == found[1]["val_unlabelled"]
    assert found[0]["largest"] == 1.0 and found[0]["chance"] == pytest.approx(3 / 15)


def test_the_table_shows_means_over_seeds_best_method_first():
    metrics = dict.fromkeys(groups.METRICS, 1.0)
    rows = [
        {
            "method": method,
            "refine": True,
            "overlap": overlap,
            **metrics,
            "test": share + shift,
            "chance": 0.05,
        }
        for method, share in (("raw", 0.1), ("kmeans", 0.4))
        for overlap in groups.OVERLAPS
        for shift in (-0.01, 0.01)
    ]
    text = groups.table(groups.summary_of(rows)).splitlines()
    assert text[2].startswith("| `kmeans` | yes | 0.400 ± 0.014 | 0.400 ± 0.014 |")
    assert text[3].startswith("| `raw` | yes | 0.100 ± 0.014 |")
    assert text[4].startswith("| chance | | 0.050 | 0.050 |")
