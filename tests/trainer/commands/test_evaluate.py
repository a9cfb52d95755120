"""`referral evaluate RUN DATA`: the figures of the evaluate stage on any labelled data."""

import csv
import errno
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from toy import encode_png, images

from pipeline.store import read_json
from trainer.__main__ import main
from trainer.commands import evaluate as evaluating
from trainer.data.shards import open_shards


def evaluate(capsys, *argv):
    code = main(["evaluate-data", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def metrics_of(capsys, *argv):
    code, out, err = evaluate(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def test_arrays(small_run):
    """(uint8 [n, 8, 8], int64 [n]) of the run's test split."""
    data = small_run.config.data
    shards = open_shards(data.test, data, "test")
    return shards.inputs(np.arange(shards.num_samples))[:, 0], shards.labels


@pytest.fixture
def folder(test_arrays, tmp_path):
    """The test split as DIR/CLASS/FILE."""
    for number, (pixels, label) in enumerate(zip(*test_arrays, strict=True)):
        path = tmp_path / "pictures" / f"class {label}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels))
    return tmp_path / "pictures"


def assert_same_row(metrics, small_run, name):
    row = read_json(small_run.evaluate.path(f"{name}.json"))["row"]
    for key in ("n", "top1", "top5", "nll", "brier", "ece", "macro_top1"):
        assert metrics[key] == pytest.approx(row[key], abs=1e-5), key


@pytest.mark.parametrize(
    "row, options",
    [("ensemble", []), ("main", ["--student", "main"]), ("generalist", ["--generalist"])],
)
def test_shards_of_the_test_split_give_the_row_of_the_results(small_run, capsys, row, options):
    metrics = metrics_of(capsys, small_run.root, small_run.config.data.test, *options)
    assert_same_row(metrics, small_run, row)


def test_a_folder_gives_what_shards_give(small_run, folder, capsys):
    assert_same_row(metrics_of(capsys, small_run.root, folder), small_run, "ensemble")


def test_an_npz_gives_what_shards_give(small_run, test_arrays, tmp_path, capsys):
    x, y = test_arrays
    np.savez(tmp_path / "test.npz", x=x, y=y)
    code, out, err = evaluate(capsys, small_run.root, tmp_path / "test.npz", "--json")
    assert code == 0
    assert "labels are class indices: 0 is class 0" in err
    assert_same_row(json.loads(out), small_run, "ensemble")


def test_the_files_agree_with_the_figures(small_run, folder, tmp_path, capsys):
    out = tmp_path / "out"
    metrics = metrics_of(capsys, small_run.root, folder, "--out", out)
    assert read_json(out / "metrics.json") == metrics
    predictions = rows_of(out / "predictions.csv")
    assert [row["key"] for row in predictions] == sorted(map(str, folder.rglob("*.png")))
    right = [row["label"] == row["predicted"] for row in predictions]
    assert np.mean(right) == pytest.approx(metrics["top1"])
    classes = rows_of(out / "classes.csv")
    assert sum(int(row["examples"]) for row in classes) == metrics["n"]
    assert sum(int(row["correct"]) for row in classes) == sum(right)
    wrong = sum(int(row["count"]) for row in rows_of(out / "confused.csv"))
    assert wrong == metrics["n"] - sum(right)


def test_what_is_there_is_replaced_only_with_overwrite(small_run, folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "classes.csv").write_text("mine")
    code, _, err = evaluate(capsys, small_run.root, folder, "--out", tmp_path / "out")
    assert code == 2 and "holds classes.csv already; --overwrite" in err
    metrics_of(capsys, small_run.root, folder, "--out", tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "classes.csv").read_text() != "mine"


def test_unknown_labels_and_unreadable_files_are_left_out_and_named(small_run, folder, capsys):
    (folder / "wolf").mkdir()
    for number in range(2):
        shutil.copy(next((folder / "class 1").iterdir()), folder / "wolf" / f"{number}.png")
    (folder / "class 0" / "zz.png").write_bytes(b"\x89PNG no")
    code, out, err = evaluate(capsys, small_run.root, folder, "--json")
    metrics = json.loads(out)
    assert code == 1
    assert (metrics["unreadable"], metrics["unknown_labels"]) == (1, 2)
    assert 'left out: 2 inputs of 1 labels that are no class of the network: "wolf" (2)' in err
    assert "zz.png: cannot be decoded" in err
    assert_same_row(metrics, small_run, "ensemble")


def test_links_out_of_a_folder_are_no_examples_unless_they_are_asked_for(
    small_run, folder, tmp_path, capsys
):
    outside = tmp_path / "outside.png"
    shutil.copy(next((folder / "class 0").iterdir()), outside)
    (folder / "class 0" / "link.png").symlink_to(outside)
    plain = metrics_of(capsys, small_run.root, folder)
    _, _, err = evaluate(capsys, small_run.root, folder)
    assert "passed over: 1 links out of the directory (--follow-links takes them)" in err
    assert metrics_of(capsys, small_run.root, folder, "--follow-links")["n"] == plain["n"] + 1


def test_data_of_other_classes_is_refused(small_run, tmp_path, capsys):
    path = tmp_path / "pictures" / "wolf" / "a.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode_png(images(np.arange(1), 0)[0]))
    code, _, err = evaluate(capsys, small_run.root, tmp_path / "pictures")
    assert code == 2
    assert 'labels are like "wolf", its classes like "class 0", "class 1"' in err


@pytest.mark.parametrize("splits", [("train", "Test"), ("val", "eval")])
def test_of_several_splits_test_is_taken(small_run, folder, tmp_path, capsys, splits):
    other, test = splits
    shutil.copytree(folder, tmp_path / "data" / test)
    path = tmp_path / "data" / other / "class 0" / "a.png"
    path.parent.mkdir(parents=True)
    Image.new("L", (8, 8)).save(path)
    metrics = metrics_of(capsys, small_run.root, tmp_path / "data")
    assert_same_row(metrics, small_run, "ensemble")
    chosen = {"train": "train", "val": "val"}[other]
    assert metrics_of(capsys, small_run.root, tmp_path / "data", "--split", chosen)["n"] == 1
    code, _, err = evaluate(capsys, small_run.root, tmp_path / "data", "--split", "dev2")
    assert code == 2 and "--split dev2" in err


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda path: None, "no such file or directory"),
        (lambda path: path.write_text("a"), "labelled data is a directory of class directories"),
        (lambda path: path.mkdir(), "holds no class directory"),
    ],
)
def test_data_that_cannot_be_read_is_one_line(small_run, tmp_path, capsys, make, expected):
    make(tmp_path / "data")
    code, out, err = evaluate(capsys, small_run.root, tmp_path / "data")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert expected in err


def values(pairs):
    labels, predicted = np.array(pairs).T
    return {"labels": labels, "top5": predicted[:, None]}


def test_class_rows_by_hand():
    # Class 0: 2 of 3 right, once taken for 1.  Class 1: 0 of 1, taken for 0.  Class 2: unseen,
    # predicted once, for class 0.  Class 3 neither occurs nor is predicted.
    rows = evaluating.class_rows(values([(0, 0), (0, 0), (0, 2), (1, 0)]), ["a", "b", "c", "d"])
    assert [row["name"] for row in rows] == ["b", "a", "c"]
    b, a, c = rows
    assert (b["accuracy"], b["precision"], b["mistaken_for"], b["times"]) == (0, None, "a", 1)
    assert a["accuracy"] == pytest.approx(2 / 3) and a["precision"] == pytest.approx(2 / 3)
    assert (c["examples"], c["accuracy"], c["precision"]) == (0, None, 0)


def test_confused_pairs_by_hand():
    pairs = evaluating.confused_pairs(values([(0, 1), (0, 1), (0, 0), (2, 0)]), ["a", "b", "c"])
    assert [(row["true"], row["predicted"], row["count"]) for row in pairs] == [
        ("a", "b", 2),
        ("c", "a", 1),
    ]
    assert pairs[0]["share_of_true"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "raw, names, classes",
    [
        (["ant", "bee "], ["ant", "bee"], [0, 1]),  # blanks do not count
        (["1", "0"], ["ant", "bee"], [1, 0]),  # indices
        (["77", "3"], ["3", "77", "1000"], [1, 0]),  # ids are names
        (["bee", "cow", ""], ["ant", "bee"], [1, -1, -1]),
        (["cafe\u0301"], ["bee", "caf\u00e9"], [1]),  # one text in two Unicode forms
    ],
)
def test_labels_are_read_as_the_whole_set_says(raw, names, classes):
    assert evaluating.read_labels(raw, names).classes.tolist() == classes


@pytest.mark.parametrize(
    "labels, names, said",
    [
        (["1", "2", "3"], ["0", "1", "2"], True),
        (["3"], ["0", "1", "2"], True),
        (["0", "3"], ["0", "1", "2"], False),
        (["1", "2"], ["0", "1", "2"], False),
        (["1", "2", "3"], ["1", "2", "3"], False),
    ],
)
def test_labels_that_count_from_one_are_doubted(labels, names, said):
    notes = evaluating.read_labels(labels, names).notes
    assert any("counted from 1" in note for note in notes) is said


def test_a_disk_that_fills_up_leaves_none_of_the_files(small_run, folder, tmp_path, monkeypatch):
    write = evaluating._write_csv

    def full(path, columns, rows):
        if "predictions" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, columns, rows)

    monkeypatch.setattr(evaluating, "_write_csv", full)
    words = ["evaluate-data", str(small_run.root), str(folder), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(evaluating, "_write_csv", write)
    assert main(words) == 0
