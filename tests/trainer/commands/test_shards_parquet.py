"""`referral shards parquet`: what Hugging Face's datasets and others write becomes shards."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from shards_command import counts_of, refusal, run
from shardsets import png

from pipeline.config import Data
from trainer.commands.init import main as init
from trainer.data import open_shards
from trainer.data.authoring.parquet import parquet_files, split_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["oak", "elm", "yew"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def features(**columns) -> dict:
    """The schema's metadata, as `datasets` writes them."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


LABELLED = features(
    image={"_type": "Image"}, label={"names": NAMES, "_type": "ClassLabel"}, n={"dtype": "int64"}
)


def cell(number, side=6):
    pixels = np.full((side, 5), 10 * (number % 20), np.uint8)
    return {"bytes": png(pixels), "path": f"{number}.png"}


def write_images(path, labels, metadata=LABELLED, image=cell, group=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": pa.array([image(n) for n in range(len(labels))], IMAGE),
        "label": pa.array(labels, pa.int64()),
    }
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=group)
    return path


def write_columns(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return path


def labels_of(directory, split) -> list[str]:
    shards = open_shards(str(directory), Data(), split)
    return [shards.class_names[label] for label in shards.labels.tolist()]


# Pictures, as Hugging Face has them


def test_a_hugging_face_folder_becomes_its_splits_with_the_names_of_its_classes(tmp_path, capsys):
    labels = [n % 3 for n in range(60)]
    data = tmp_path / "set" / "data"
    write_images(data / "train-00000-of-00002.parquet", labels[:40])
    write_images(data / "train-00001-of-00002.parquet", labels[40:])
    write_images(data / "validation-00000-of-00001.parquet", [2, 0, 1])
    write_images(data / "test-00000-of-00001.parquet", [1, 1, 0, 2])
    assert run("parquet", tmp_path / "set", "--out", tmp_path / "s") == 0
    assert counts_of(tmp_path / "s") == {"train": 60, "val": 3, "test": 4}
    out = capsys.readouterr().out
    assert "Hugging Face's metadata name the 3 classes of label" in out
    assert labels_of(tmp_path / "s", "test") == ["elm", "elm", "oak", "yew"]
    assert labels_of(tmp_path / "s", "train") == [NAMES[label] for label in labels]
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    assert (shards.inputs(np.array([3, 41]))[:, 0, 0, 0] == [30, 10]).all()


def test_splits_that_are_absent_are_taken_from_train_of_each_class_alike(tmp_path):
    write_images(tmp_path / "a" / "0000.parquet", [n % 3 for n in range(60)])
    run("parquet", tmp_path / "a" / "0000.parquet", "--out", tmp_path / "s", "--val", 0.2)
    assert counts_of(tmp_path / "s") == {"train": 42, "val": 12, "test": 6}
    for split, each in (("train", 14), ("val", 4), ("test", 2)):
        assert sorted(labels_of(tmp_path / "s", split)) == sorted(NAMES * each)


def test_rows_without_labels_are_passed_over_and_counted(tmp_path, capsys):
    write_images(tmp_path / "a" / "train.parquet", [n % 3 for n in range(30)] + [-1] * 4)
    write_images(tmp_path / "a" / "test.parquet", [-1] * 5)
    run("parquet", tmp_path / "a", "--out", tmp_path / "s")
    out = capsys.readouterr().out
    assert "passed over: 2 files with rows without labels (-1)" in out
    assert "train.parquet, 4 rows" in out and "test.parquet, 5 rows" in out
    assert counts_of(tmp_path / "s") == {"train": 24, "val": 3, "test": 3}


def test_pictures_of_several_sizes_need_a_size_and_get_it(tmp_path):
    path = write_images(
        tmp_path / "train.parquet",
        [n % 3 for n in range(30)],
        image=lambda n: cell(n, side=6 + n % 2),
    )
    message = refusal("parquet", path, "--out", tmp_path / "s")
    assert "row 1 is [1, 7, 5], others [1, 6, 5]; --size N brings all to one" in message
    run("parquet", path, "--out", tmp_path / "s", "--size", 8)
    assert open_shards(str(tmp_path / "s"), Data(), "train").input_shape == (3, 8, 8)


@pytest.mark.parametrize(
    "cells, words",
    [
        ({4: None}, "row 4 has no input"),
        ({4: {"bytes": None, "path": "x/4.png"}}, "row 4 has no bytes of a picture: it names"),
        ({4: {"bytes": b"no picture", "path": ""}}, "row 4: cannot be decoded"),
        ({4: {"bytes": b"", "path": None}}, "row 4 has no bytes of a picture"),
    ],
)
def test_a_corrupt_cell_is_named_or_left_out(tmp_path, cells, words):
    path = write_images(
        tmp_path / "train.parquet",
        [n % 3 for n in range(30)],
        image=lambda n: cells.get(n, cell(n)),
    )
    message = refusal("parquet", path, "--out", tmp_path / "s")
    assert f"train.parquet, {words}" in message and "--damage skip" in message
    assert not list((tmp_path / "s").glob("*.tar"))
    run("parquet", path, "--out", tmp_path / "s", "--damage", "skip")
    assert sum(counts_of(tmp_path / "s").values()) == 29


def test_a_label_beyond_the_names_is_corrupt(tmp_path):
    path = write_images(tmp_path / "train.parquet", [n % 3 for n in range(30)] + [3])
    message = refusal("parquet", path, "--out", tmp_path / "s")
    assert "row 30 has label 3, which is none of the 3 classes" in message


def test_of_a_row_group_that_is_damaged_the_other_groups_are_kept(tmp_path):
    path = write_images(tmp_path / "train.parquet", [n % 3 for n in range(42)])
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    assert column.path_in_schema == "image.bytes"
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    message = refusal("parquet", path, "--out", tmp_path / "s")
    assert "cannot be read as parquet" in message and "leaves all 7 out" in message
    run("parquet", path, "--out", tmp_path / "s", "--damage", "skip")
    assert sum(counts_of(tmp_path / "s").values()) == 35


# Texts and numbers


def test_texts_and_names_as_labels_need_no_metadata(tmp_path):
    path = write_columns(
        tmp_path / "train.parquet",
        id=[*range(20)],
        text=[f"sentence {n}" for n in range(20)],
        category=["dog" if n % 2 else "cat" for n in range(20)],
    )
    run("parquet", path, "--out", tmp_path / "s")
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    assert shards.class_names == ["cat", "dog"] and shards.input_extensions == ["txt"]
    assert counts_of(tmp_path / "s") == {"train": 16, "val": 2, "test": 2}


@pytest.mark.parametrize(
    "column, shape, dtype",
    [
        (pa.array([[n, 1.5] for n in range(20)], pa.list_(pa.float32())), (2,), "float32"),
        (pa.array([[n, 1] for n in range(20)], pa.list_(pa.float64(), 2)), (2,), "float32"),
        (pa.array([[n, 1] for n in range(20)], pa.large_list(pa.int16())), (2,), "int16"),
        (
            pa.array([[[n, 1, 2], [0, 0, 9]] for n in range(20)], pa.list_(pa.list_(pa.uint8()))),
            (1, 2, 3),
            "uint8",
        ),
    ],
)
def test_lists_of_numbers_keep_their_type_and_bytes_are_pictures(tmp_path, column, shape, dtype):
    path = write_columns(tmp_path / "train.parquet", x=column, y=[n % 2 for n in range(20)])
    run("parquet", path, "--out", tmp_path / "s")
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    assert shards.input_shape == shape and str(shards.input_dtype) == dtype
    everything = np.concatenate(
        [
            opened.inputs(np.arange(len(opened))).reshape(len(opened), -1)[:, 0]
            for opened in (
                open_shards(str(tmp_path / "s"), Data(), s) for s in counts_of(tmp_path / "s")
            )
        ]
    )
    assert sorted(everything.tolist()) == list(range(20))


def test_columns_of_numbers_side_by_side_are_one_input(tmp_path):
    path = write_columns(
        tmp_path / "t.parquet",
        a=[float(n) for n in range(20)],
        b=[10 * n for n in range(20)],
        label=[n % 2 for n in range(20)],
    )
    run("parquet", path, "--out", tmp_path / "s", "--input", "b,a", "--val", 0, "--test", 0)
    inputs = open_shards(str(tmp_path / "s"), Data(), "train").inputs(np.arange(20))
    assert inputs.dtype == np.float32
    assert inputs.tolist() == [[10.0 * n, n] for n in range(20)]


@pytest.mark.parametrize(
    "value, words",
    [([1.0], "has shape [1], others [2]"), ([1.0, None], "holds NaN"), (None, "no input")],
)
def test_a_list_that_is_unlike_the_others_is_corrupt(tmp_path, value, words):
    cells = [[float(n), 1.0] for n in range(20)] + [value]
    path = write_columns(tmp_path / "t.parquet", x=cells, y=[n % 2 for n in range(21)])
    assert words in refusal("parquet", path, "--out", tmp_path / "s")


def test_nan_and_labels_that_are_none_are_corrupt(tmp_path):
    cells = [[float(n), 1.0] for n in range(20)]
    cells[7][0] = float("nan")
    path = write_columns(tmp_path / "t.parquet", x=cells, y=[n % 2 for n in range(20)])
    assert "row 7 holds NaN" in refusal("parquet", path, "--out", tmp_path / "s")
    cells[7][0] = 0.0
    path = write_columns(tmp_path / "t.parquet", x=cells, y=[None, *(n % 2 for n in range(19))])
    assert "row 0 has no label" in refusal("parquet", path, "--out", tmp_path / "s")
    path = write_columns(tmp_path / "t.parquet", x=cells, y=[0.5 * n for n in range(20)])
    assert "whole numbers or texts are needed" in refusal("parquet", path, "--out", tmp_path / "s")


# What cannot be told


def test_what_cannot_be_told_is_asked_for(tmp_path):
    text = ["a", "b"] * 10
    path = write_columns(tmp_path / "t.parquet", one=text, two=text, y=[0, 1] * 10)
    assert "choose the input with --input, of the columns one, two" in refusal(
        "parquet", path, "--out", tmp_path / "s"
    )
    assert "has no 'three'; its columns: one, two, y" in refusal(
        "parquet", path, "--out", tmp_path / "s", "--input", "three"
    )
    assert "an input is pictures, texts" in refusal(
        "parquet", path, "--out", tmp_path / "s", "--input", "one,two"
    )
    path = write_columns(tmp_path / "t.parquet", one=text, fine=[0, 1] * 10, coarse=[0, 1] * 10)
    assert "choose the label with --label, of the columns one, fine, coarse" in refusal(
        "parquet", path, "--out", tmp_path / "s"
    )
    run("parquet", path, "--out", tmp_path / "s", "--label", "fine", "--input", "one")


def test_files_that_do_not_agree_are_named(tmp_path):
    write_columns(tmp_path / "a" / "train.parquet", text=["a", "b"] * 5, label=[0, 1] * 5)
    write_columns(tmp_path / "a" / "test.parquet", text=["a", "b"], label=["x", "y"])
    message = refusal("parquet", tmp_path / "a", "--out", tmp_path / "s")
    assert "test.parquet has column label as string" in message


# Files


@pytest.mark.parametrize(
    "path, split",
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("default/validation/0000.parquet", "val"),
        ("test.parquet", "test"),
        ("part-0.parquet", None),
    ],
)
def test_a_files_name_says_its_split_else_its_directory(tmp_path, path, split):
    assert split_of(tmp_path / path) == split


def test_hidden_files_and_links_out_of_the_directory_are_no_data(tmp_path):
    kept = write_columns(tmp_path / "in" / "train.parquet", text=["a"], label=[0])
    write_columns(tmp_path / "in" / ".cache" / "train.parquet", text=["a"], label=[0])
    other = write_columns(tmp_path / "out" / "secret.parquet", text=["a"], label=[0])
    os.symlink(other, tmp_path / "in" / "test.parquet")
    assert parquet_files(tmp_path / "in") == [kept]


def test_what_is_no_parquet_is_one_line(tmp_path):
    for name, content in (("a.parquet", b"PAR1"), ("b.parquet", b""), ("c.parquet", b"x" * 99)):
        (tmp_path / name).write_bytes(content)
        message = refusal("parquet", tmp_path / name, "--out", tmp_path / "s")
        assert f"{name}: cannot be read as parquet" in message
    whole = write_images(tmp_path / "d.parquet", [0, 1] * 20).read_bytes()
    torn = bytearray(whole)
    torn[20:400] = bytes(380)
    (tmp_path / "d.parquet").write_bytes(torn)
    assert "d.parquet: cannot be read as parquet" in refusal(
        "parquet", tmp_path / "d.parquet", "--out", tmp_path / "s"
    )
    os.mkfifo(tmp_path / "e.parquet")
    assert "is a named pipe" in refusal("parquet", tmp_path / "e.parquet", "--out", tmp_path / "s")
    (tmp_path / "empty").mkdir()
    assert "holds no .parquet file" in refusal(
        "parquet", tmp_path / "empty", "--out", tmp_path / "s"
    )


def test_metadata_of_another_form_name_no_classes(tmp_path):
    for metadata in ({b"huggingface": b"[]"}, {b"huggingface": b"{"}, features(label=3), None):
        path = write_images(tmp_path / "t.parquet", [n % 3 for n in range(30)], metadata)
        run("parquet", path, "--out", tmp_path / "s", "--overwrite")
        assert open_shards(str(tmp_path / "s"), Data(), "train").class_names == ["0", "1", "2"]


def test_without_pyarrow_it_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    path = write_columns(tmp_path / "t.parquet", text=["a", "b"], label=[0, 1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal("parquet", path, "--out", tmp_path / "s")
    assert message.startswith("parquet files: pyarrow is not installed; pip install")


def test_init_makes_shards_of_a_parquet_folder(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "hf" / "data" / "train-0.parquet", [n % 3 for n in range(90)])
    monkeypatch.chdir(tmp_path)
    assert init(["hf"]) == 0
    assert "referral shards parquet hf --out hf-shards" in capsys.readouterr().out
    assert (tmp_path / "config.toml").is_file()


PEAK = """
import resource, sys
from trainer.commands.shards import main
main(["parquet", sys.argv[1], "--out", sys.argv[2], "--val", "0", "--test", "0"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_holds_rows_and_not_files(tmp_path):
    """Seven further row groups of 20 MB take less than two."""
    peaks = []
    for groups in (1, 8):
        path = tmp_path / f"{groups}.parquet"
        schema = pa.schema([("text", pa.string()), ("label", pa.int64())])
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for group in range(groups):
                texts = [f"{group} {row} " + "x" * 100_000 for row in range(200)]
                table = pa.table([texts, pa.array(np.arange(200) % 2)], schema=schema)
                writer.write_table(table, row_group_size=200)
        command = [sys.executable, "-P", "-c", PEAK, str(path), str(tmp_path / f"s{groups}")]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(ran.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 40, peaks
