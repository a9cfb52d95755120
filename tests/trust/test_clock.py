"""A machine whose clock is set back and forward by a day, all the time, does the same run."""

import random
import sys
import time
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from older import READERS
from small import command, figures, finished, hidden, in_child, small_config, small_data

from pipeline.failures import answer

DAY_S = 86400.0


def jumping(work) -> int:
    chance, real = random.Random(0), time.time
    time.time = lambda: real() + chance.choice([-DAY_S, 0.0, DAY_S])
    return work()


@pytest.mark.slow
def test_a_clock_that_jumps_by_days_changes_no_figure_and_no_command(tmp_path):
    config = small_config(small_data(tmp_path / "data"))
    expected = finished(tmp_path / "clean", config)
    root = tmp_path / "run"
    made = in_child(partial(jumping, partial(command, root, config)))
    assert made.code == 0, made.text
    assert figures(root) == expected and not hidden(root)
    for name in ("status", "status --json", "compare", "export", "evaluate"):
        reader = partial(READERS[name], root, config, tmp_path / "out")
        read = in_child(partial(jumping, partial(answer, reader)))
        assert read.code == 0, f"{name}: {read.text}"
        assert "-86" not in read.text and "-1 day" not in read.text, read.text
