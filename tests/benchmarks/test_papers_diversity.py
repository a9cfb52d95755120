"""The diversity table: its runs differ in what they should, and its arithmetic is right."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.papers import diversity
from benchmarks.papers.diversity import Predictions
from pipeline.config import load_config

needs_data = pytest.mark.skipif(
    not diversity.SOURCE.is_dir(), reason=f"{diversity.SOURCE} is absent"
)


def test_students_are_alike_in_all_but_what_moves_their_inputs():
    config = load_config(None, [], diversity.config_of(Path("data"), seed=3))
    others = [student.model_dump(exclude={"perturb"}) for student in config.students.values()]
    assert all(each == others[0] for each in others)
    kinds = [student.perturb for student in config.students.values()]
    assert kinds == ["none", "gaussian", "ods", "conf_ods"]
    assert config.is_deep and config.ensemble.members == 4 and config.seed == 3


def test_no_image_is_in_two_splits_and_each_class_is_in_all_alike():
    ids = diversity.parts(np.arange(51_000) % 10)
    counts = {"train": 2_500, "val": 5_000, "test": 10_000, "given": 1_000}
    assert {name: len(part) for name, part in ids.items()} == counts
    together = np.concatenate(list(ids.values()))
    assert len(np.unique(together)) == len(together)
    for part in ids.values():
        assert len(set(np.bincount(part % 10))) == 1
    assert (ids["given"] >= 50_000).all()
    assert (np.concatenate([ids["train"], ids["test"]]) < 50_000).all()


def predictions(labels, *probabilities):
    """Members [K, 1, 5] of (p_0, p_1, each of the rest), and their labels."""
    rows = [[p0, p1, rest, rest, rest] for p0, p1, rest in probabilities]
    return Predictions(torch.tensor(rows)[:, None].log(), torch.tensor(labels))


def test_a_row_is_of_the_mean_of_its_members():
    # Two members say (.7, .15, .05 ...) and (.1, .75, .05 ...).
    # Their mean is (.4, .45, .05 ...), and the label is 1.
    test = predictions([1], (0.7, 0.15, 0.05), (0.1, 0.75, 0.05))
    val = predictions([1], (0.2, 0.2, 0.2), (0.2, 0.2, 0.2))
    row = diversity.evaluate(val, test)
    assert row["top1"] == 1 and row["nll"] == pytest.approx(-math.log(0.45), abs=1e-6)
    assert row["brier"] == pytest.approx(0.4**2 + 0.55**2 + 3 * 0.05**2, abs=1e-6)
    # KL(first || second) = .7 ln 7 + .15 ln .2, and the other way .1 ln (1/7) + .75 ln 5.
    there = 0.7 * math.log(7) + 0.15 * math.log(0.2)
    back = 0.1 * math.log(1 / 7) + 0.75 * math.log(5)
    assert row["members"]["pairwise_kl"] == pytest.approx((there + back) / 2, abs=1e-6)


def test_calibrated_metrics_use_the_temperature_that_fits_val():
    # Of val's ten examples each prediction gives its label .9 of e^(z/T). Right 6 times in 10, so
    # that .9 is too sure.
    first = torch.tensor([0.9, 0.025, 0.025, 0.025, 0.025]).log()
    val = Predictions(first.expand(1, 10, 5), torch.tensor([0] * 6 + [1, 2, 3, 4]))
    row = diversity.evaluate(val, Predictions(first.expand(1, 2, 5), torch.tensor([0, 1])))
    # The fitted prediction is .6 and .1: ln 36 / T = ln 6.
    assert row["temperature"] == pytest.approx(math.log(36) / math.log(6), rel=1e-2)
    assert row["cnll"] == pytest.approx(-(math.log(0.6) + math.log(0.1)) / 2, rel=1e-2)
    assert row["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.025)) / 2, rel=1e-4)


def of_cnll(**cnlls):
    return {name: {"cnll": cnll} for name, cnll in cnlls.items()}


def test_equivalents_are_measured_in_the_ensembles_of_the_same_run():
    sizes = {"DE-1": 1.0, "DE-2": 0.8, "DE-3": 0.7, "DE-4": 0.65}
    rows = diversity.with_equivalents(of_cnll(**sizes, plain=0.9, ods=0.75, conf_ods=0.5))
    assert rows["plain"]["dee"] == pytest.approx(1.5) and rows["ods"]["dee"] == pytest.approx(2.5)
    assert rows["DE-1"]["dee"] == 1 and math.isinf(rows["conf_ods"]["dee"])


def test_equivalents_beyond_the_largest_ensemble_are_not_averaged():
    assert diversity.equivalents([2.5, None]) == "2.50, >4"
    assert diversity.equivalents([2.5, 3.5]) == "3.00 ± 0.71"


def test_the_verdict_counts_seeds():
    def seed(ods, dee):
        rows = of_cnll(plain=0.9, gaussian=0.9, ods=ods, conf_ods=0.95)
        worth = {"plain": 2.0, "gaussian": 2.0, "ods": dee, "conf_ods": 1.8}
        return {name: row | {"dee": worth[name]} for name, row in rows.items()}

    lines = diversity.verdicts([seed(0.8, None), seed(0.95, 1.9)])
    assert lines[0] == (
        "* ODS against BE-4 distilled: "
        "cNLL lower by 0.0250 ± 0.1061 (1 of 2 seeds), DEE higher at 1 of 2."
    )
    assert lines[3].endswith("cNLL lower by -0.0500 ± 0.0000 (0 of 2 seeds), DEE higher at 0 of 2.")


def test_confidence_bins_of_several_seeds_are_joined_by_their_examples():
    def seed(count, value):
        empty = [{"count": 0, "value": 0.0}] * 3
        bins = [{"count": count, "value": value}, *empty, {"count": 10, "value": 1.0}]
        return {"by_confidence": {name: bins for name in ("DE-4", *diversity.STUDENTS)}}

    lines = diversity.confidence_table([seed(10, 0.2), seed(30, 0.4)]).splitlines()
    cells = "0.350 (67%) | 0.000 (0%) | 0.000 (0%) | 0.000 (0%) | 1.000 (33%)"
    assert lines[2] == f"| DE-4 | {cells} |"


def test_metrics_that_results_json_contradicts_are_refused():
    row = dict.fromkeys(("top1", "nll", "brier", "ece", "cnll", "cbrier", "cece"), 0.5)
    results = {"generalist": row, "ensemble": row, "students": {"ods": row | {"cnll": 0.6}}}
    rows = {name: row for name in ("DE-1", "DE-4", "ods")}
    with pytest.raises(SystemExit, match=r"ods: cnll is 0\.6"):
        diversity.check_against(results, rows)


def test_mosaics_are_cut_into_their_tiles_row_by_row(tmp_path):
    diversity.make_up_pictures(tmp_path)
    images, labels = diversity.pictures(tmp_path)
    assert images.shape == (2_000, 32, 32, 3) and (np.bincount(labels) == 200).all()
    colours = np.stack([images[labels == c].mean((0, 1, 2)) for c in range(10)])
    nearest = np.abs(images.mean((1, 2))[:, None] - colours).sum(-1).argmin(1)
    assert (nearest == labels).mean() > 0.99


@pytest.mark.data
@needs_data
def test_the_labels_are_those_of_the_mosaics_tiles():
    images, labels = diversity.pictures()
    assert images.shape == (51_000, 32, 32, 3) and (np.bincount(labels[:50_000]) == 5_000).all()
    colour = np.stack([images[labels == c].mean((0, 1, 2)) for c in range(10)])
    blue = colour[:, 2] - colour[:, 0]
    assert {diversity.CLASSES[c] for c in np.argsort(blue)[-2:]} == {"airplane", "ship"}
