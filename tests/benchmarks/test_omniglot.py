"""benchmarks.characters.omniglot: its pictures, its views and its table."""

import numpy as np
import pytest

from benchmarks.characters.omniglot import (
    CONFIG,
    DRAWERS,
    SOURCE,
    distort,
    pictures,
    table_of,
    verdicts,
)
from pipeline.config import load_config
from trainer.data.augment import find_augment


def test_the_config_loads_and_names_the_views():
    config = load_config(CONFIG)
    augment = find_augment(config.data.augment)
    assert augment is not None and augment.numbers == distort.numbers == 7


def test_the_middle_of_every_range_leaves_a_picture_as_it_is_and_ends_do_not():
    inputs = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), dtype=np.uint8)
    assert np.array_equal(distort(inputs, np.full((3, 7), 0.5)), inputs)
    blob = np.zeros((1, 1, 28, 28), np.uint8)
    blob[0, 0, 13:15, 13:15] = 255
    moved = np.full((1, 7), 0.5)
    # Sampled a tenth of the side, 2.8 cells, to the right: the picture goes to the left.
    moved[0, 5] = 1
    weights = distort(blob, moved)[0, 0].sum(0) / 255
    assert (weights * np.arange(28)).sum() / weights.sum() == pytest.approx(13.5 - 2.8, abs=0.05)


def test_drawers_are_in_one_split_each():
    assert sorted(d for part in DRAWERS.values() for d in range(20)[part]) == list(range(20))


def test_the_table_counts_errors_against_each_seeds_own_generalist():
    def row(top1):
        return {"top1": top1, "nll": 1.0, "n": 100}

    tops = [(0.8, 0.85, 0.8, 0.82), (0.6, 0.8, 0.5, 0.6)]
    results = [
        {
            "generalist": row(g),
            "ensemble": row(e),
            "controls": {"control_wall": row(w), "control_compute": row(c)},
            "students": {},
        }
        for g, e, w, c in tops
    ]
    lines = table_of(results).splitlines()
    assert lines[2].startswith("| generalist | 70.00 ± 14.14 | 1.0000 ± 0.0000 | 0.0")
    # 25 % and 50 %.
    assert lines[5] == "| ensemble | 82.50 ± 3.54 | 1.0000 ± 0.0000 | 37.5 ± 17.7 |"
    against_generalist, against_wall, beside = verdicts(results)
    assert against_generalist.holds is True
    assert against_generalist.metrics == "**37.5 %** (25.0, 50.0)"
    assert against_wall.metrics == "**42.5 %** (25.0, 60.0)" and beside.claim.startswith("(no bar)")
    worse = [found | {"ensemble": row(0.4)} for found in results]
    assert not any(verdict.holds for verdict in verdicts(worse))


@pytest.mark.data
@pytest.mark.skipif(not SOURCE.is_dir(), reason=f"{SOURCE} is absent")
def test_pictures_are_ink_on_nothing():
    drawn = pictures()
    assert drawn.shape == (1623, 20, 28, 28) and drawn.dtype == np.uint8
    assert 0.1 < drawn.mean() / 255 < 0.14 and (drawn.max(axis=(2, 3)) > 100).all()
