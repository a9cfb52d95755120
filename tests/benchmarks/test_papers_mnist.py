"""MNIST's table: its configs are a user's, and its arithmetic is by hand."""

import math

import numpy as np
import pytest
import tomli_w
import torch

from benchmarks.papers import lab, mnist
from pipeline.config import Data, load_config
from pipeline.store import read_json
from trainer.data import open_shards

FILES = lab.DATA / "mnist"


def rows(errors: dict[str, int], nll: float = 0.1) -> dict:
    """results.json with so many errors of 10,000."""
    students = {name: row(count, nll) for name, count in errors.items()}
    return {
        "generalist": students.pop("generalist"),
        "ensemble": students.pop("ensemble", None),
        "students": students,
    }


def row(errors: int, nll: float) -> dict:
    return {"n": 10_000, "top1": 1 - errors / 10_000, "nll": nll}


def table_of(place, seed: int) -> dict:
    return mnist.table_config(place, seed, place / "ten")


def test_jitter_that_draws_the_middle_leaves_pictures_as_they_are():
    pictures = np.random.default_rng(0).integers(0, 256, (5, 1, 28, 28)).astype(np.uint8)
    np.testing.assert_array_equal(mnist.jitter(pictures, np.full((5, 7), 0.5)), pictures)


def test_jitter_moves_by_at_most_two_pixels_and_what_comes_in_is_black():
    full = np.full((1, 1, 28, 28), 255, np.uint8)
    right_and_down = np.array([[0.5] * 5 + [0.0, 0.0]])
    moved = mnist.jitter(full, right_and_down)[0, 0]
    assert (moved[:2] == 0).all() and (moved[:, :2] == 0).all() and (moved[2:, 2:] == 255).all()


def test_jitter_turns_by_at_most_twelve_degrees():
    line = np.zeros((1, 1, 28, 28), np.uint8)
    line[0, 0, 13:15] = 255  # level
    turned = mnist.jitter(line, np.array([[1.0] + [0.5] * 6]))[0, 0].astype(float)
    heights = (turned * np.arange(28)[:, None]).sum(0) / turned.sum(0)
    slope = np.polyfit(np.arange(6, 22), heights[6:22], 1)[0]
    assert abs(np.degrees(np.arctan(slope))) == pytest.approx(12, abs=0.7)


@pytest.mark.parametrize("kind", ["table", "ten"])
@pytest.mark.parametrize("change", [mnist.quick, lambda config: config])
def test_the_configs_are_what_a_user_may_write(kind, change, tmp_path):
    made = table_of(tmp_path, 2) if kind == "table" else mnist.ten_config(tmp_path, tmp_path, 2)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(change(made)))
    config = load_config(tmp_path / "run.toml")
    assert config.seed == 2 and config.is_deep and not config.controls.enabled


def test_students_have_no_regularisation_and_differ_from_hard_targets_in_nothing_but_these(
    tmp_path,
):
    students = load_config(None, [], table_of(tmp_path, 0)).students
    of_ten = students.pop("of_ten")
    assert of_ten.teacher == str(tmp_path / "ten") and of_ten.model["name"] == "convnet"
    for name, student in students.items():
        assert (student.augment, student.weight_decay) == ("none", 0.0), name
        assert student.start == "scratch", name
        assert student.model["dropout"] == 0 and student.model["options"] == {}, name
        assert student.hard_weight == 0 and student.teacher == "generalist", name
    for hard, soft in (("hard_30", "w30_T8"), ("hard_300", "w300_T2-5")):
        changed = different_keys(students[hard], students[soft])
        assert changed == {"method", "temperature"}, hard
    # Each at the rate that is better for it on val.
    for hard, soft in (("hard", "soft"), ("few_hard", "few_soft")):
        changed = different_keys(students[hard], students[soft])
        assert changed == {"method", "temperature", "learning_rate"}, hard
    assert math.isinf(students["w30_Tinf"].temperature)


def different_keys(one, other) -> set[str]:
    first, second = one.model_dump(), other.model_dump()
    return {key for key in first if first[key] != second[key]}


def test_table_5_trains_the_three_students_of_the_whole_table_and_no_other(tmp_path):
    whole = load_config(None, [], table_of(tmp_path, 0)).students
    few = load_config(None, [], mnist.table_5_config(tmp_path, 0)).students
    assert few == {name: whole[name] for name in ("hard", "few_hard", "few_soft")}


def test_table_5_shows_train_beside_test():
    results = [rows({"generalist": 60, "hard": 150, "few_hard": 870, "few_soft": 430})]
    on_train = [{name: {"top1": 0.995, "n": 1_650} for name in mnist.TABLE_5}]
    lines = mnist.table_5(results, on_train).splitlines()
    assert lines[3].startswith("| 3 % of train, hard targets | 1,650 | 99.50 | 91.30 |")
    assert "| 99.50 | 95.70 | 65.4 | 57.0 |" in lines[4]


def test_each_left_out_class_is_one_of_mnists_and_its_bias_is_corrected(tmp_path):
    assert mnist.LEFT_OUT["only_7_8"] == list("01234569")
    students = table_of(tmp_path, 0)["students"]
    assert all(students[name]["leave_out"] == classes for name, classes in mnist.LEFT_OUT.items())
    assert all(students[name]["bias_correction"] for name in mnist.LEFT_OUT)


def test_before_its_correction_a_student_has_the_raised_biases_lowered_again(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "load_classifier", lambda place: None)
    monkeypatch.setattr(mnist, "shift_of", lambda run, name: 2.0)
    logits = torch.zeros(2, 10)
    # Without 2 more for 3 the first is called a 5.
    logits[0, 3], logits[0, 5] = 1.5, 1.0
    logits[1, 3] = 4.0
    monkeypatch.setattr(mnist, "logits_on_test", lambda *_: (logits, torch.tensor([3, 3])))
    found = mnist.before_correction(tmp_path / "run", "no_3", tmp_path)
    assert found == {"top1": 0.5, "n": 2, "threes": 0.5}


def test_the_share_of_the_gain_is_of_means_over_seeds():
    # Means 100, 50 and 60: 40 of a gain of 50, whatever the single seeds say.
    assert mnist.kept([90, 110], [40, 60], [70, 50]) == pytest.approx(0.8)


def test_soft_targets_recover_a_share_of_the_gap_between_few_and_all_data():
    results = [rows({"generalist": 70, "hard": 140, "few_hard": 640, "few_soft": 340})]
    assert mnist.recovered(results) == pytest.approx(300 / 500)


def test_threes_are_counted_right_among_threes_alone(tmp_path):
    (tmp_path / "evaluation").mkdir()
    top5 = np.array([[3, 1], [1, 3], [3, 0], [3, 5]])
    np.savez(tmp_path / "evaluation" / "no_3.npz", labels=np.array([3, 3, 3, 5]), top5=top5)
    assert mnist.read_digit(tmp_path, "no_3", 3) == (2, 3)


def test_the_verdicts_are_of_means_over_seeds():
    seed = {
        "generalist": 70,
        "hard": 140,
        "soft": 80,
        "only_7_8": 1400,
        "few_hard": 640,
        "few_soft": 400,
    }
    results = [rows(seed | {"soft": 80}), rows(seed | {"soft": 96, "hard": 150})]
    lines = mnist.verdicts(results, 0.979, 0.8)
    assert [line.rpartition(": ")[2] for line in lines] == [
        "yes (70.0).",
        "yes (145.0).",
        "no (88.0).",
        "no (97.9%).",
        "yes (14.0%).",
        "no (48%).",
        "yes (80%).",
    ]


def test_a_share_of_the_gain_of_ten_is_from_the_mean_of_each_alone():
    ten = [{"ensemble": row(200, 0.06), "students": {"twin": row(320, 0.2)}}]
    table = [{"students": {"of_ten": row(210, 0.07)}}]
    page = mnist.table_of_ten(mnist.of_ten(ten, [row(300, 0.1)], table))
    assert "| 210.0 | 210 | 0.0700 | 90% | 75% |" in page
    assert "| 320.0 | 320 | 0.2000 | -20% | -250% |" in page


needs_files = pytest.mark.skipif(not FILES.is_dir(), reason=f"{FILES} is absent")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    place = tmp_path_factory.mktemp("mnist") / "shards"
    lab.mnist(place)
    return place


@pytest.mark.data
@needs_files
def test_a_twelfth_of_the_training_examples_is_held_out_and_none_for_test(shards):
    splits = read_json(shards / "manifest.json")["splits"]
    assert {name: split["samples"] for name, split in splits.items()} == {
        "train": 54999,
        "val": 5001,
        "test": 10000,
    }


@pytest.mark.data
@needs_files
def test_the_ten_know_a_tenth_of_each_class_and_nothing_that_is_held_out(shards, tmp_path):
    mnist.write_labelled(tmp_path, shards)
    few, train = (open_shards(str(place), Data(), "train") for place in (tmp_path, shards))
    np.testing.assert_allclose(np.bincount(few.labels), np.bincount(train.labels) / 10, atol=1)
    known = {each.tobytes() for each in train.inputs(np.arange(len(train)))}
    assert all(each.tobytes() in known for each in few.inputs(np.arange(len(few))))
