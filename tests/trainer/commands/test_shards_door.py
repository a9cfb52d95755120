"""`referral shards` at the door: what a user brings is what is written, or it is named."""

import bz2
import csv
import gzip
import json
import lzma
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from shards_command import counts_of, refusal, run
from shardsets import png, tar_files, write_tar

from pipeline.config import Data, load_config
from trainer.data import open_shards
from trainer.data.authoring.repeats import find_repeats


def labelled(labels) -> list[tuple[str, bytes]]:
    """Files of samples whose picture says the number of the sample."""
    files = []
    for number, label in enumerate(labels):
        content = label if isinstance(label, bytes) else label.encode()
        files += [
            (f"{number:05d}.cls", content),
            (f"{number:05d}.png", png(np.full((6, 5), number, np.uint8))),
        ]
    return files


def names_by_picture(directory, split="train") -> dict[int, str]:
    shards = open_shards(str(directory), Data(), split)
    values = shards.inputs(np.arange(len(shards)))[:, 0, 0, 0].tolist()
    names = [shards.class_names[c] for c in shards.labels]
    return dict(zip(values, names, strict=True))


def classes_of(directory) -> list[str]:
    return json.loads((directory / "manifest.json").read_text())["classes"]


def tree(root, classes, count=6):
    for number, name in enumerate(classes):
        directory = root / os.fsdecode(name)
        directory.mkdir(parents=True)
        for i in range(count):
            pixels = np.full((6, 5), 20 * number + i, np.uint8)
            (directory / f"{i}.png").write_bytes(png(pixels))
    return root


# Labels of tars

CODES = ["01", "02", "1A", "2B"]


def test_each_sample_keeps_the_class_that_its_label_names(tmp_path):
    write_tar(tmp_path / "x.tar", labelled(CODES))
    run("from-webdataset", tmp_path / "x.tar", "--out", tmp_path / "s")
    assert names_by_picture(tmp_path / "s") == dict(enumerate(CODES))
    (tmp_path / "names.txt").write_text("\n".join(CODES))
    options = ["--out", tmp_path / "t", "--classes", tmp_path / "names.txt"]
    run("from-webdataset", tmp_path / "x.tar", *options)
    assert names_by_picture(tmp_path / "t") == dict(enumerate(CODES))


def test_a_split_is_read_by_the_rule_of_the_whole_set(tmp_path):
    # Alone, the labels of val would be numbers.
    write_tar(tmp_path / "train-0.tar", labelled(CODES))
    write_tar(tmp_path / "val-0.tar", labelled(["02", "01"]))
    for _ in range(2):  # made, and made anew with the classes of the old manifest
        assert run("index", tmp_path) == 0
        assert names_by_picture(tmp_path, "val") == {0: "02", 1: "01"}
    assert run("validate", tmp_path) == 0


def test_names_that_are_numbers_in_another_order_are_names(tmp_path):
    write_tar(tmp_path / "train-0.tar", labelled(["2", "1"]))
    (tmp_path / "names.txt").write_text("1\n2\n")
    run("index", tmp_path, "--classes", tmp_path / "names.txt")
    assert names_by_picture(tmp_path) == {0: "2", 1: "1"}


def test_splits_that_are_rewritten_one_by_one_have_the_same_classes(tmp_path):
    write_tar(tmp_path / "train-0.tar", labelled(["a", "b", "c"]))
    write_tar(tmp_path / "val-0.tar", labelled(["c", "a"]))
    for name in ("train", "val"):
        run("from-webdataset", tmp_path / f"{name}-0.tar", "--out", tmp_path / "s")
    assert names_by_picture(tmp_path / "s", "val") == {0: "c", 1: "a"}


@pytest.mark.parametrize(
    "label, reason",
    [("", "has an empty label"), (" \n", "has an empty label"), (b"caf\xe9", "is not UTF-8")],
)
def test_a_label_that_is_none_is_corrupt(tmp_path, capsys, label, reason):
    write_tar(tmp_path / "train-0.tar", labelled(["a", label, "b"]))
    source = ["from-webdataset", tmp_path / "train-0.tar", "--out", tmp_path / "s"]
    for argv in (source, ["index", tmp_path]):
        assert reason in refusal(*argv)
        assert run(*argv, "--damage", "skip") == 0
        assert "train-0.tar: 00001 " in capsys.readouterr().err
    for directory in (tmp_path, tmp_path / "s"):
        assert names_by_picture(directory) == {0: "a", 2: "b"}


def test_ids_with_holes_are_as_many_classes_as_there_are(tmp_path):
    ids = np.array([300000789, 100000123, 200000456])[np.arange(30) % 3]
    np.savez(tmp_path / "a.npz", x=np.zeros((30, 4, 4), np.uint8), y=ids)
    run("arrays", tmp_path / "a.npz", "--out", tmp_path / "s")
    assert classes_of(tmp_path / "s") == ["100000123", "200000456", "300000789"]
    write_tar(tmp_path / "train-0.tar", labelled([str(n) for n in ids.tolist()]))
    run("index", tmp_path)
    assert classes_of(tmp_path) == classes_of(tmp_path / "s")


def test_a_dot_in_a_key_is_named_as_the_reason(tmp_path):
    files = [(f"Track 2.0 v1.{end}", content) for end, content in (("png", b""), ("cls", b"a"))]
    write_tar(tmp_path / "x.tar", files)
    message = refusal("from-webdataset", tmp_path / "x.tar", "--out", tmp_path / "s")
    assert "a key ends at its first dot" in message and "rename the files" in message


def test_members_without_a_decoder_are_named_with_those_that_have_one(tmp_path):
    write_tar(tmp_path / "x.tar", [("0.mp4", b"ftyp"), ("0.cls", b"a")])
    message = refusal("from-webdataset", tmp_path / "x.tar", "--out", tmp_path / "s")
    assert "has the members mp4, and none has a decoder (known: bmp, gif," in message


def test_byte_order_marks_and_empty_lines_are_no_part_of_a_class(tmp_path):
    write_tar(tmp_path / "x.tar", labelled(["ant", "bee", "cat"]))
    write_tar(tmp_path / "n.tar", labelled(["0", "1", "2"]))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\r\ncat\r\n\r\n")
    for name in ("x", "n"):
        options = ["--out", tmp_path / name, "--classes", tmp_path / "c.txt"]
        run("from-webdataset", tmp_path / f"{name}.tar", *options)
        assert names_by_picture(tmp_path / name) == {0: "ant", 1: "bee", 2: "cat"}


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfseed = 3\r\n[data]\r\ntrain = 'a'\r\n")
    assert load_config(tmp_path / "c.toml").seed == 3


# Compressed tars


@pytest.mark.parametrize("pack, end", [(gzip, "gz"), (bz2, "bz2"), (lzma, "xz")])
def test_a_compressed_tar_that_breaks_off_is_saved_as_far_as_it_goes(tmp_path, capsys, pack, end):
    random = np.random.default_rng(0)
    files = []
    for number in range(60):
        pixels = random.integers(0, 256, (80, 80), np.uint8)
        files += [(f"{number:05d}.cls", b"%d" % (number % 2)), (f"{number:05d}.png", png(pixels))]
    tar = write_tar(tmp_path / "x.tar", files)
    content = pack.compress(tar.read_bytes())
    (tmp_path / f"x.tar.{end}").write_bytes(content[: len(content) * 2 // 3])
    source = ["from-webdataset", tmp_path / f"x.tar.{end}", "--out", tmp_path / "s"]
    if end == "bz2":  # its blocks are 900 kB. This one is cut in the first
        assert "its compression is corrupt" in refusal(*source)
        return
    assert "its compression is corrupt behind byte" in refusal(*source)
    assert run(*source, "--damage", "skip") == 0
    assert "left out: " in capsys.readouterr().err
    saved = open_shards(str(tmp_path / "s"), Data(), "train")
    assert 30 <= len(saved) <= 40
    assert saved.raw([7])[0]["png"] == dict(files)["00007.png"]


def test_rot_within_a_compressed_tar_is_no_traceback(tmp_path):
    content = bytearray(
        gzip.compress(write_tar(tmp_path / "x.tar", tar_files(range(30))).read_bytes())
    )
    content[len(content) // 2 : len(content) // 2 + 30] = bytes(range(200, 230))
    (tmp_path / "x.tar.gz").write_bytes(content)
    message = refusal("from-webdataset", tmp_path / "x.tar.gz", "--out", tmp_path / "s")
    assert "its compression is corrupt" in message


# Splits


@pytest.mark.parametrize(
    "directories, splits",
    [
        (("train", "valid", "test"), {"train": 12, "val": 12, "test": 12}),
        (("Training", "Test"), {"train": 12, "test": 12}),
        (("TRAIN", "dev", "Eval"), {"train": 12, "val": 12, "test": 12}),
        (("train", "validation", "testing"), {"train": 12, "val": 12, "test": 12}),
    ],
)
def test_split_directories_have_the_usual_names_in_any_case(tmp_path, directories, splits):
    for name in directories:
        tree(tmp_path / "d" / name, "ab")
    run("folder", tmp_path / "d", "--out", tmp_path / "s", "--val", 0, "--test", 0)
    assert counts_of(tmp_path / "s") == splits and classes_of(tmp_path / "s") == ["a", "b"]


@pytest.mark.parametrize(
    "directories, message",
    [
        (("cat/", "dog/", "test/"), "holds both splits (test) and other directories (cat, dog)"),
        (("train/a", "train/b", "extra/a"), "other directories (extra)"),
        (("val/a", "test/a"), "and no train"),
        (("train/a", "train/b", "val/a", "valid/a"), "are both the split val"),
        (("train/a", "train/b", "test/"), "and no class directory"),
        (("d/train/a", "d/train/b"), "has 1 class directories"),
    ],
)
def test_a_layout_that_cannot_be_told_is_refused(tmp_path, directories, message):
    for name in directories:
        tree(tmp_path / "d", [name.rstrip("/")])
    assert message in refusal("folder", tmp_path / "d", "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_directories_called_like_splits_can_be_classes(tmp_path):
    tree(tmp_path / "d", ["cat", "dev", "test"])
    run("folder", tmp_path / "d", "--out", tmp_path / "s", "--no-splits")
    assert classes_of(tmp_path / "s") == ["cat", "dev", "test"]


def test_tars_are_the_splits_that_they_are_called(tmp_path):
    for name in ("training-00", "imagenet-valid-01", "EVAL", "extra-3"):
        write_tar(tmp_path / f"{name}.tar", labelled(["a", "b"]))
    run("index", tmp_path)
    assert counts_of(tmp_path).keys() == {"train", "val", "test", "extra"}
    write_tar(tmp_path / "val-0.tar", labelled(["a", "b"]))
    assert "both are the split val" in refusal("index", tmp_path)
    pattern = f"{tmp_path}/training-00.tar::{tmp_path}/val-0.tar"
    message = refusal("from-webdataset", pattern, "--out", tmp_path / "s")
    assert "tars are of several splits (train, val)" in message


# Folders


def test_a_class_directory_that_is_not_utf8_is_named(tmp_path):
    tree(tmp_path / "d", ["good", b"caf\xe9"])
    message = refusal("folder", tmp_path / "d", "--out", tmp_path / "s")
    assert r"caf\udce9" in message and "not UTF-8" in message and "rename it" in message


def test_directories_of_one_name_in_two_unicode_forms_are_one_class(tmp_path, capsys):
    tree(tmp_path / "d", ["caf\u00e9", "cafe\u0301", "Cat", "cat"])
    run("folder", tmp_path / "d", "--out", tmp_path / "s")
    assert classes_of(tmp_path / "s") == ["Cat", "caf\u00e9", "cat"]
    out = capsys.readouterr().out
    assert "are one class: 'cafe\\u0301' = 'caf\\xe9'" in out
    assert "look alike stay apart: 'Cat' and 'cat'" in out


def test_directories_that_are_all_numbers_are_in_the_order_of_numbers(tmp_path):
    tree(tmp_path / "d", [str(number) for number in range(11)])
    run("folder", tmp_path / "d", "--out", tmp_path / "s")
    assert classes_of(tmp_path / "s") == [str(number) for number in range(11)]
    names = names_by_picture(tmp_path / "s")
    assert all(str(value // 20) == name for value, name in names.items())


def test_what_lies_beside_pictures_is_passed_over_and_said(tmp_path, capsys):
    directory = tree(tmp_path / "d", "ab")
    for name in ("a/0.txt", "b/0.json", "a/._0.png", "a/Thumbs.db", "readme.txt"):
        (directory / name).write_text("{}")
    (directory / "a/gone.png").symlink_to("nowhere")
    assert run("folder", directory, "--out", tmp_path / "s", "--val", 0, "--test", 0) == 0
    out = capsys.readouterr().out
    assert "12 train\n" in out and "classes: 2 (a, b)" in out and "png, uint8 [1, 6, 5]" in out
    for line in (
        "1 .txt files beside the inputs",
        "1 .json files beside the inputs",
        "1 hidden files",
        "1 .db files",
        "1 links that lead nowhere",
        "1 files outside of class directories",
    ):
        assert f"passed over: {line} ({directory}" in out


def test_inputs_of_two_kinds_are_refused_until_one_is_chosen(tmp_path):
    directory = tree(tmp_path / "d", "ab")
    for file in (directory / "b").iterdir():
        file.rename(file.with_suffix(".txt")).write_text("a text")
    (directory / "a/0.txt").write_text("a text")
    message = refusal("folder", directory, "--out", tmp_path / "s")
    assert "several kinds could be inputs: 7 .txt, 6 .png" in message
    run("folder", directory, "--out", tmp_path / "s", "--input", "txt", "--val", 0, "--test", 0)
    assert counts_of(tmp_path / "s") == {"train": 7}


def test_all_corrupt_files_are_listed_and_can_be_left_out(tmp_path, capsys):
    directory = tree(tmp_path / "d", "ab", count=30)
    for number in range(25):
        (directory / f"a/{number}.png").write_bytes(b"no picture")
    message = refusal("folder", directory, "--out", tmp_path / "s")
    assert "(and 24 more)" in message and "--damage skip" in message
    err = capsys.readouterr().err
    assert err.count("corrupt: ") == 21 and "25 in all; 5 are not shown" in err
    assert not list((tmp_path / "s").glob("*"))
    assert run("folder", directory, "--out", tmp_path / "s", "--damage", "skip") == 0
    assert sum(counts_of(tmp_path / "s").values()) == 35


def test_classes_that_a_split_lacks_are_said(tmp_path, capsys):
    tree(tmp_path / "d/train", "ab")
    tree(tmp_path / "d/val", "abz")
    run("folder", tmp_path / "d", "--out", tmp_path / "s", "--test", 0)
    out = capsys.readouterr().out
    assert "missing from train: 1 of 3 classes (z)" in out and "missing from val" not in out
    assert "train/ is the split train" in out


# Tables


def write_csv(path, rows, header=("text", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.mark.slow
def test_one_long_text_takes_no_more_memory_than_the_file(tmp_path):
    rows = [(f"a short text {i}", "abc"[i % 3]) for i in range(18_000)] + [("z" * 150_000, "a")]
    table = write_csv(tmp_path / "t.csv", rows)
    limit = 4 * 2**30
    subprocess.run(
        [sys.executable, "-P", "-m", "trainer", "shards", "table", table, "--out", tmp_path / "s"],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert sum(counts_of(tmp_path / "s").values()) == 18_001


def test_a_field_may_be_longer_than_csv_allows_by_itself(tmp_path):
    table = write_csv(tmp_path / "t.csv", [("z" * 200_000, "a"), ("short", "b")])
    run("table", table, "--out", tmp_path / "s")
    texts = [raw["txt"] for raw in open_shards(str(tmp_path / "s"), Data(), "train").raw([0, 1])]
    assert sorted(map(len, texts)) == [5, 200_000]


def test_columns_are_named_where_the_header_does_not_say_which(tmp_path):
    table = write_csv(tmp_path / "t.csv", [("x", "a", "t")], ("text", "label", "title"))
    message = refusal("table", table, "--out", tmp_path / "s")
    assert "has the columns text, label, title; choose one with --text" in message
    run("table", table, "--out", tmp_path / "s", "--text", "title")
    assert open_shards(str(tmp_path / "s"), Data(), "train").raw([0])[0]["txt"] == b"t"


def test_a_column_may_say_the_splits(tmp_path):
    rows = [(f"t{i}", "ab"[i % 2], ["Train", "dev", "test"][i % 3]) for i in range(30)]
    table = write_csv(tmp_path / "t.csv", rows, ("text", "label", "Split"))
    run("table", table, "--out", tmp_path / "s")
    assert counts_of(tmp_path / "s") == {"train": 10, "val": 10, "test": 10}
    write_csv(table, [*rows, ("x", "a", "fold 3")], ("text", "label", "Split"))
    assert "line 32: Split 'fold 3' is none of train" in refusal(
        "table", table, "--out", tmp_path / "t"
    )


def test_a_test_table_of_the_users_own(tmp_path):
    table = write_csv(tmp_path / "t.csv", [("x", "b"), ("y", "a")] * 4)
    test = write_csv(tmp_path / "u.csv", [("z", "c"), ("w", "a")])
    run("table", table, "--out", tmp_path / "s", "--test", test, "--val", 0.25)
    assert counts_of(tmp_path / "s") == {"train": 6, "test": 2, "val": 2}
    assert classes_of(tmp_path / "s") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("text,label\nx,a\ny,\n", "line 3: has an empty label"),
        ("text,label\nx,a\ny, \n", "line 3: has an empty label"),
        ("text,label\nx,y,a\n", "line 2: has 3 fields, the header 2"),
        ('text,label\n"x,a\ny,b\n', "line 2: a quote is opened and not closed"),
        ('text,label\n"x,a\n"y,b\nz,c\n', "line 2: a quote is opened and not closed"),
        ("text\nx\n", "no column is left for --label"),
        ("x,a\ny,a\nz,b\n", "is the first line a row?"),
        ("label,label\nx,a\n", "rename the others"),
        ('{"text": "x", "label": "a"}\n', "begins as JSON does"),
        ("", "is empty"),
        ("text,label\n", "has no row of the split train"),
    ],
)
def test_rows_that_would_be_lost_without_a_word_are_named(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    assert message in refusal("table", tmp_path / "t.csv", "--out", tmp_path / "s")


@pytest.mark.parametrize(
    "mark, name", [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")]
)
def test_columns_may_be_separated_by_other_marks(tmp_path, capsys, mark, name):
    lines = [f'"a, {i} ""{mark}"" b"{mark}{"xy"[i % 2]}\n' for i in range(8)]
    (tmp_path / "t.tsv").write_text(f"text{mark}label\n" + "".join(lines))
    run("table", tmp_path / "t.tsv", "--out", tmp_path / "s", "--val", 0, "--test", 0)
    assert f"columns are separated by {name}" in capsys.readouterr().out
    assert classes_of(tmp_path / "s") == ["x", "y"]
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    texts = {shards.input_file(i)[1].decode() for i in range(8)}
    assert texts == {f'a, {i} "{mark}" b' for i in range(8)}


@pytest.mark.parametrize(
    "encoding, message", [("utf-16", "--encoding utf-16"), ("utf-16-le", "--encoding utf-16-le")]
)
def test_a_table_of_wide_letters_names_its_encoding(tmp_path, encoding, message):
    (tmp_path / "t.csv").write_text("text,label\nx,a\ny,b\n", encoding=encoding)
    refused = refusal("table", tmp_path / "t.csv", "--out", tmp_path / "s")
    assert message in refused and "cp1252" not in refused
    run("table", tmp_path / "t.csv", "--out", tmp_path / "s", "--encoding", encoding)
    assert classes_of(tmp_path / "s") == ["a", "b"]


@pytest.mark.parametrize(
    "labels, message",
    [
        (["a", "nan", "b"], "a label that is missing: 'nan'"),
        (["0", "1", "-1"], "a label that is missing: '-1'"),
        (["a", "b", "a|b"], "several labels of one example: 'a|b'"),
        (["['a','b']", "['a']"], "several labels of one example"),
    ],
)
def test_labels_that_stand_for_none_or_for_several_are_said(tmp_path, capsys, labels, message):
    rows = [(f"t {i} {label}", label) for label in labels for i in range(3)]
    run("table", write_csv(tmp_path / "t.csv", rows), "--out", tmp_path / "s")
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("labels", [["a", "b", "c|d"], ["(other)", "x"], ["and/or", "and"]])
def test_names_that_only_hold_a_mark_are_not_doubted(tmp_path, capsys, labels):
    rows = [(f"t {i} {label}", label) for label in labels for i in range(3)]
    run("table", write_csv(tmp_path / "t.csv", rows), "--out", tmp_path / "s")
    assert "several labels" not in capsys.readouterr().out


def test_inputs_of_test_that_train_holds_are_counted(tmp_path, capsys):
    train = write_csv(tmp_path / "t.csv", [(f"text {i}", "ab"[i % 2]) for i in range(20)])
    again = [("text 0", "a"), ("text 7", "b"), ("new", "a"), ("text 3", "b")]
    test = write_csv(tmp_path / "u.csv", again)
    run("table", train, "--out", tmp_path / "s", "--val", 0.2, "--test", test)
    out = capsys.readouterr().out
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    texts = {shards.input_file(i)[1].decode() for i in range(len(shards))}
    count = sum(text in texts for text, _ in again)
    assert f"{count} of 4 inputs of test are in train, too" in out and "of val" not in out
    run("validate", tmp_path / "s")
    assert f"{count} of 4 inputs of test are in train, too" in capsys.readouterr().out


def test_inputs_with_several_labels_are_counted_and_others_are_not(tmp_path, capsys):
    rows = [("same", "a"), ("same", "b"), ("twice", "a"), ("twice", "a"), ("once", "b")]
    out = tmp_path / "s"
    run("table", write_csv(tmp_path / "t.csv", rows), "--out", out, "--val", 0, "--test", 0)
    assert "2 of 5 inputs of train are there with another label" in capsys.readouterr().out


def test_equal_checksums_of_other_contents_are_no_repeat():
    # The last number is the only one that both hold. -1 equals nothing.
    inputs = {"train": np.array([5, -1, 7, 7]), "test": np.array([-1, 6, 7])}
    found = find_repeats(inputs, np.array([0, 1, 0, 1]))
    assert found.in_train["test"].tolist() == [2]
    assert found.labelled_otherwise.tolist() == [2, 3]


def test_postal_codes_keep_their_zero(tmp_path):
    rows = [(f"t{i}", f"0213{i % 3}") for i in range(9)]
    run("table", write_csv(tmp_path / "t.csv", rows), "--out", tmp_path / "s")
    assert classes_of(tmp_path / "s") == ["02130", "02131", "02132"]


# Arrays

K = np.arange(60) % 3
X = np.zeros((60, 8, 8), np.uint8)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("xTrain", "yTrain", "xEval", "yEval"),
        ("Train_images", "Train_labels", "testing_images", "testing_labels"),
    ],
)
def test_arrays_are_the_splits_that_they_are_called(tmp_path, keys):
    arrays = dict(zip(keys, (X, K, X[:6], K[:6]), strict=True))
    run("arrays", npz(tmp_path / "a.npz", **arrays), "--out", tmp_path / "s", "--val", 0)
    assert counts_of(tmp_path / "s") == {"train": 60, "test": 6}


def test_a_split_of_the_users_own_is_a_file_or_arrays(tmp_path):
    train, test = npz(tmp_path / "a.npz", x=X, y=K), npz(tmp_path / "b.npz", x=X[:6], y=K[:6])
    run("arrays", train, "--out", tmp_path / "s", "--test", test, "--val", 0)
    assert counts_of(tmp_path / "s") == {"train": 60, "test": 6}
    both = npz(tmp_path / "c.npz", a=X, b=K, c=X[:6], d=K[:6])
    options = ["--train", "a,b", "--test", "c,d", "--val", 0]
    run("arrays", both, "--out", tmp_path / "t", *options)
    assert counts_of(tmp_path / "t") == {"train": 60, "test": 6}
    message = refusal("arrays", both, "--out", tmp_path / "u", "--train", "a,nix")
    assert "--train nix: no such file, and none of the arrays (b, c, d)" in message


def test_of_several_arrays_one_is_named(tmp_path, capsys):
    several = npz(tmp_path / "a.npz", x=X, fine_labels=K, coarse_labels=K % 2, mean=np.zeros(3))
    assert "choose one with --y" in refusal("arrays", several, "--out", tmp_path / "s")
    run("arrays", several, "--out", tmp_path / "s", "--y", "fine_labels")
    out = capsys.readouterr().out
    assert "passed over: 2 arrays (coarse_labels int64 [60], mean float64 [3])" in out
    doubtful = npz(tmp_path / "b.npz", rgb=X, depth=X, y=K)
    assert "choose one with --x" in refusal("arrays", doubtful, "--out", tmp_path / "t")
    assert run("arrays", doubtful, "--out", tmp_path / "t", "--x", "depth") == 0


@pytest.mark.parametrize(
    "shape, dtype, expected",
    [
        ((8, 9, 3), "u1", (3, 8, 9)),
        ((8, 9, 3), "f4", (3, 8, 9)),
        ((8, 9, 4), "u1", (4, 8, 9)),
        ((3, 8, 9), "f4", (3, 8, 9)),
        ((3, 8, 4), "u1", (3, 8, 4)),
        ((8, 9, 1), "f4", (1, 8, 9)),
        ((8, 9, 2), "f4", (8, 9, 2)),
    ],
)
def test_pictures_get_their_channels_first(tmp_path, capsys, shape, dtype, expected):
    values = np.arange(60 * np.prod(shape)).reshape(60, *shape).astype(dtype)
    run("arrays", npz(tmp_path / "a.npz", x=values, y=K), "--out", tmp_path / "s")
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    assert shards.input_shape == expected
    moved = shape != expected
    assert ("channels are last" in capsys.readouterr().out) == moved
    originals = np.moveaxis(values, 3, 1) if moved else values
    assert any((shards.inputs([0])[0] == original).all() for original in originals)


def test_channels_that_could_be_first_or_last_are_asked_for(tmp_path):
    values = np.zeros((60, 3, 9, 3), np.uint8)
    array = npz(tmp_path / "a.npz", x=values, y=K)
    assert "say which with --channels" in refusal("arrays", array, "--out", tmp_path / "s")
    for channels, expected in (("first", (3, 9, 3)), ("last", (3, 3, 9))):
        run("arrays", array, "--out", tmp_path / channels, "--channels", channels)
        assert open_shards(str(tmp_path / channels), Data(), "train").input_shape == expected


def test_nan_in_an_input_is_named_and_can_be_left_out(tmp_path):
    x = np.zeros((60, 4), np.float32)
    x[3, 1], x[7, 0] = np.nan, np.inf
    array = npz(tmp_path / "a.npz", x=x, y=K)
    message = refusal("arrays", array, "--out", tmp_path / "s")
    assert "train, sample 3 holds NaN or infinity (first at [1]) (and 1 more)" in message
    run("arrays", array, "--out", tmp_path / "s", "--damage", "skip")
    assert sum(counts_of(tmp_path / "s").values()) == 58


def test_validate_names_nan(tmp_path, capsys):
    files = [("0.json", b"[1, NaN]"), ("0.cls", b"0"), ("1.json", b"[1, 2]"), ("1.cls", b"1")]
    write_tar(tmp_path / "train-0.tar", files)
    assert run("index", tmp_path) == 0
    assert run("validate", tmp_path) == 1
    assert "0 holds NaN or infinity" in capsys.readouterr().err


def test_byte_strings_are_utf8_or_of_a_named_encoding(tmp_path):
    names = np.array([b"a", b"b", "caf\u00e9".encode()])
    run("arrays", npz(tmp_path / "a.npz", x=X, y=names[K]), "--out", tmp_path / "s")
    assert classes_of(tmp_path / "s") == ["a", "b", "caf\u00e9"]
    latin = npz(tmp_path / "b.npz", x=X, y=np.array([b"a", b"b", b"caf\xe9"])[K])
    message = refusal("arrays", latin, "--out", tmp_path / "t")
    assert "is not utf-8; say with --encoding" in message
    run("arrays", latin, "--out", tmp_path / "t", "--encoding", "latin-1")
    assert classes_of(tmp_path / "t") == ["a", "b", "caf\u00e9"]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"y": np.array(list("abc"), object)[K]}, "save texts as y.astype(str)"),
        ({"y": np.eye(3)[K]}, "of one-hot labels give y.argmax(1)"),
        ({"y": np.zeros(60, "M8[s]")}, "neither whole numbers nor names"),
        ({"y": np.where(K == 2, np.nan, K)}, "has an empty label (NaN)"),
        ({"y": np.array(["", "a", "b"])[K]}, "has an empty label"),
        ({"y": K, "x": np.zeros((60, 2), complex)}, "inputs of type complex128"),
    ],
)
def test_arrays_that_are_no_inputs_or_labels_are_refused(tmp_path, arrays, message):
    path = npz(tmp_path / "a.npz", **{"x": X, **arrays})
    assert message in refusal("arrays", path, "--out", tmp_path / "s")


# Names of the classes of arrays

PIXELS = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 6, 5), np.uint8)


def test_a_list_of_classes_names_the_labels_of_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", x=PIXELS, y=np.array([0, 1, 2, 0, 1, 2]))
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    options = ["--out", tmp_path / "s", "--classes", tmp_path / "names.txt", "--val", 0]
    run("arrays", tmp_path / "a.npz", *options, "--test", 0)
    assert names_by_picture(tmp_path / "s")[4] == "bee"


def test_an_array_of_class_names_names_the_labels(tmp_path, capsys):
    names = np.array([b"ant", b"bee", b"cow"])
    np.savez(tmp_path / "a.npz", x=PIXELS, y=np.array([0, 1, 1, 0, 1, 1]), label_names=names)
    run("arrays", tmp_path / "a.npz", "--out", tmp_path / "s", "--val", 0, "--test", 0)
    assert names_by_picture(tmp_path / "s")[4] == "bee"
    assert classes_of(tmp_path / "s") == ["ant", "bee", "cow"]
    out = capsys.readouterr().out
    assert "array label_names names the 3 classes" in out and "passed over" not in out


def test_class_names_that_do_not_fit_the_labels_are_passed_over(tmp_path, capsys):
    names = np.array(["ant", "bee"])
    np.savez(tmp_path / "a.npz", x=PIXELS, y=np.array([1, 2, 3, 1, 2, 3]), class_names=names)
    run("arrays", tmp_path / "a.npz", "--out", tmp_path / "s", "--val", 0, "--test", 0)
    assert classes_of(tmp_path / "s") == ["1", "2", "3"]
    assert "passed over: 1 arrays (class_names" in capsys.readouterr().out


def test_a_label_without_a_class_in_the_list_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=PIXELS, y=np.array([0, 1, 2, 0, 1, 2]))
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    options = ["--out", tmp_path / "s", "--classes", tmp_path / "names.txt"]
    said = refusal("arrays", tmp_path / "a.npz", *options)
    assert "has label 2, which is none of the 2 classes" in said


def test_labels_of_tars_in_another_encoding_are_read_where_it_is_said(tmp_path):
    write_tar(tmp_path / "x.tar", labelled([b"caf\xe9", b"bar"]))
    said = refusal("from-webdataset", tmp_path / "x.tar", "--out", tmp_path / "s")
    assert "which is not UTF-8" in said
    options = ["--out", tmp_path / "s", "--encoding", "latin-1"]
    run("from-webdataset", tmp_path / "x.tar", *options)
    assert names_by_picture(tmp_path / "s") == {0: "caf\xe9", 1: "bar"}
    options = ["--out", tmp_path / "t", "--encoding", "latin-9000"]
    assert "no such encoding" in refusal("from-webdataset", tmp_path / "x.tar", *options)


# What else a door says


@pytest.mark.parametrize("share", ["-0.1", "nan", "1"])
def test_shares_that_are_none_are_refused(tmp_path, share):
    tree(tmp_path / "in", ["a", "b"])
    refused = refusal("folder", tmp_path / "in", "--out", tmp_path / "s", "--val", share)
    assert "split fractions val" in refused
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize("end", ["ppm", "pgm", "jfif", "jpe"])
def test_portable_maps_and_other_ends_of_jpegs_are_pictures(tmp_path, end):
    kind = "jpeg" if end.startswith("j") else "ppm"
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.full((6, 5), 10 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{i}.{end}", kind)
    run("folder", tmp_path / "in", "--out", tmp_path / "s", "--val", 0, "--test", 0)
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    assert len(shards) == 10 and shards.input_shape == (1, 6, 5)


def test_pictures_with_colour_and_without_are_told_apart_by_it(tmp_path):
    tree(tmp_path / "in", ["a", "b"])
    colour = Image.new("RGB", (5, 6))
    colour.save(tmp_path / "in" / "a" / "z.png")
    assert "differ in mode (gray, colour)" in refusal(
        "folder", tmp_path / "in", "--out", tmp_path / "s"
    )


def test_numbers_of_the_other_byte_order_are_those_of_this_machine(tmp_path):
    x = np.arange(24, dtype=">f4").reshape(8, 3)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(8) % 2)
    run("arrays", tmp_path / "d.npz", "--out", tmp_path / "s", "--val", 0, "--test", 0)
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    assert shards.input_dtype == np.float32 and shards.input_dtype.isnative
    assert np.array_equal(np.sort(shards.inputs(np.arange(8)), axis=0), x)


def test_numbers_that_float32_cannot_hold_are_named(tmp_path):
    x = np.ones((8, 3))
    x[2, 1] = 1e300
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(8) % 2)
    refused = refusal("arrays", tmp_path / "d.npz", "--out", tmp_path / "s")
    assert "sample 2 holds numbers beyond float32 (first at [1])" in refused


def test_splits_within_classes_are_refused_unless_all_files_are_meant(tmp_path):
    for name in "ab":
        for split in ("train", "Test"):
            tree(tmp_path / "in" / name, [split])
    words = ("folder", tmp_path / "in", "--out", tmp_path / "s")
    assert "holds splits (Test, train), which belong in front" in refusal(*words)
    run(*words, "--no-splits")
    assert classes_of(tmp_path / "s") == ["a", "b"]
