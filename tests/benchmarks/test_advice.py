"""What benchmarks.advice reads from stored log-probabilities."""

import math

import numpy as np
import pytest

from benchmarks.advice import gains
from benchmarks.advice.sets import REAL, SETS
from benchmarks.advice.table import table_of
from pipeline.config import load_config


def log_p(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows, np.float32))


LABELS = np.array([0, 0, 1, 1])
GENERAL = log_p([0.6, 0.4], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2])  # right, wrong, right, wrong
OTHER = log_p([0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.1, 0.9])  # right, right, wrong, right


def test_a_gain_is_paired_over_examples():
    # Differences 0, 1, -1, 1: mean 1/4, variance (3 - 4/16) / 4 = 11/16.
    row = gains.gain(OTHER, GENERAL, LABELS)
    assert row["top1"] == 25
    assert row["se"] == pytest.approx(100 * math.sqrt(11 / 16) / 2, abs=1e-3)
    nats = [math.log(0.9 / 0.6), math.log(0.7 / 0.4), math.log(0.4 / 0.7), math.log(0.9 / 0.2)]
    assert row["nll"] == pytest.approx(np.mean(nats), abs=1e-4)


def test_joins_keep_one_network_at_either_end_of_the_weight():
    for each in gains.JOINS.values():
        np.testing.assert_allclose(each.join(GENERAL, OTHER, 0.0), GENERAL, atol=1e-6)
    for name in ("average", "geometric"):
        joined = gains.JOINS[name].join(GENERAL, OTHER, 1.0)
        np.testing.assert_allclose(joined, OTHER, atol=1e-6)


def test_a_shortlist_of_all_classes_is_the_geometric_mean():
    of_all = gains.on_shortlist(GENERAL, OTHER, 0.3)
    np.testing.assert_allclose(of_all, gains.geometric(GENERAL, OTHER, 0.3), atol=1e-6)


@pytest.mark.parametrize("name", gains.JOINS)
def test_losses_by_weight_are_those_of_what_is_joined(name, monkeypatch):
    monkeypatch.setattr(gains, "SHORTLIST", 3)  # of 6 classes, so that labels lie outside
    rng = np.random.default_rng(0)
    first, second = (gains.normalised(rng.normal(size=(50, 6)).astype("f4")) for _ in range(2))
    labels, join = rng.integers(0, 6, 50), gains.JOINS[name]
    expected = [gains.nll(join.join(first, second, weight), labels) for weight in gains.WEIGHTS]
    np.testing.assert_allclose(join.losses(first, second, labels), expected, rtol=1e-5)


def test_a_cross_fitted_weight_has_not_seen_what_it_joins():
    # On the even positions the other network is worthless, on the odd ones perfect.
    labels = np.zeros(4, int)
    general = log_p(*[[0.5, 0.5]] * 4)
    other = log_p([0.01, 0.99], [0.99, 0.01], [0.01, 0.99], [0.99, 0.01])
    joined = gains.cross_fitted(gains.JOINS["average"], general, other, labels)
    np.testing.assert_allclose(joined[::2], other[::2], atol=1e-6)  # fitted on the odd: 1
    np.testing.assert_allclose(joined[1::2], general[1::2], atol=1e-6)  # on the even: 0


def test_residuals_correlate_over_examples_and_classes():
    first, second = log_p([0.8, 0.2], [0.8, 0.2]), log_p([0.6, 0.4], [0.6, 0.4])
    # p - y of label 0: (-.2, .2) and (-.4, .4). Of label 1: (.8, -.8) and (.6, -.6).
    expected = (0.2 * 0.4 + 0.8 * 0.6) / math.sqrt((0.2**2 + 0.8**2) * (0.4**2 + 0.6**2))
    found = gains.residual_correlation(first, second, np.array([0, 1]))
    assert found == pytest.approx(expected, abs=1e-4)
    assert gains.residual_correlation(first, first, np.array([0, 1])) == 1


def test_the_ceiling_counts_errors_between_classes_of_one_group():
    # Favourites 0, 1, 2, 3 of the labels 0, 0, 3, 0. Groups {0, 1} and {1, 2, 3}.
    general = np.eye(4, dtype=np.float32)
    labels, members = np.array([0, 0, 3, 0]), [[0, 1], [1, 2, 3]]
    assert gains.ceiling(general, labels, members) == 50  # the second and the third


def test_every_set_is_a_config_that_the_product_takes():
    for name in REAL:
        one = SETS[name]
        for kind, specialists in (("copy", one.copies), ("branch", one.branches)):
            tables = {"clusters": one.clusters, "specialists": specialists | {"kind": kind}}
            assert load_config(None, [], one.config | tables).specialists.kind == kind


def test_the_table_means_over_seeds_and_leaves_out_what_a_set_has_not():
    def line(name: str, levers: dict[str, float]) -> dict:
        tops = {f"{split}_top1": 50.0 for split in ("train", "val", "test")}
        rows = {lever: {"test": {"top1": top1, "se": 0.5}} for lever, top1 in levers.items()}
        return {"set": name, "generalist": tops, "lever": rows}

    lines = [line("one", {"wider": 1.0, "rerank": 2.0}), line("one", {"wider": 3.0, "rerank": 2.0})]
    rows = table_of([*lines, line("two", {"wider": -1.0})]).splitlines()
    assert rows[2] == "| one | 2 | 50.0 / 50.0 / 50.0 | +2.00 ± 0.50 | +2.00 ± 0.50 |"
    assert rows[3] == "| two | 1 | 50.0 / 50.0 / 50.0 | -1.00 ± 0.50 |  |"
