"""The plan of a split head at 64 ranks, by torch's fake process group: rows, shapes, bytes sent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import gloo_environment

PLAN = Path(__file__).with_name("plan_of_ranks.py")
RANKS, CLASSES, FEATURES, ROWS = 64, 100_003, 16, 8  # as the script has them
SOME = (0, 20, 21, 63)


@pytest.fixture(scope="module")
def plans():
    command = [sys.executable, str(PLAN), str(RANKS), *map(str, SOME)]
    ended = subprocess.run(
        command, env=gloo_environment(), capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(zip(SOME, map(json.loads, ended.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(
    "rank, first, end",
    # 100,003 / 64 is 1562 and 35 / 64: the j-th bound is floor(100,003 j / 64)
    [(0, 0, 1562), (20, 31250, 32813), (21, 32813, 34376), (63, 98440, 100003)],
)
def test_each_rank_has_the_rows_between_two_bounds_and_no_more(plans, rank, first, end):
    plan = plans[rank]
    assert plan["rows"] == {"head.weight": [first, end], "head.bias": [first, end]}
    heads = {name: shape for name, shape in plan["held"].items() if name.startswith("head.")}
    own = end - first
    assert heads == {"head.rows.weight": [own, FEATURES], "head.rows.bias": [own]}
    assert plan["averages"] == [own, FEATURES]  # Adam's
    assert plan["saved"] == {"head.rows.weight": CLASSES, "head.rows.bias": CLASSES}


@pytest.mark.parametrize("rank", SOME)
def test_what_is_sent_does_not_grow_with_the_classes(plans, rank):
    """Features and their gradients, 4 D bytes a row each, and 40 bytes a row of labels and sums.

    Gathered are a label (8), its weight (4), and the slopes of two sums (8). A maximum and a sum
    are all-reduced (2 x 8). A product is scattered (4).  Each rank says how many rows it has (8).
    """
    share = (RANKS - 1) / RANKS
    batch = ROWS * RANKS
    sent = plans[rank]["bytes"]
    assert sent["allgather_"] == share * (batch * (4 * FEATURES + 20) + 8 * RANKS)
    assert sent["_reduce_scatter_base_"] == share * batch * (4 * FEATURES + 4)
    assert sent["allreduce_"] == share * batch * 16
    assert sum(plans[rank]["calls"].values()) == 10
    replicated = 2 * share * 4 * CLASSES * FEATURES
    assert sum(sent.values()) < replicated / 100
