"""What a user wants predicted, whatever holds it: keys, labels and the bytes of each input."""

import csv
import json

import numpy as np
import pytest
from toy import encode_png, images, write_toy, write_unlabelled

from pipeline.config import UserError
from trainer.data.authoring.reporting import Report
from trainer.data.sources import Options, is_shards, open_source


def write_csv(path, header, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def open_one(place, **options):
    return open_source([str(place)], Options(**options), Report())


def test_a_table_has_the_keys_of_its_column(tmp_path):
    path = write_csv(
        tmp_path / "a.csv", ["id", "text", "label"], ["x7", "one", "a"], ["x9", "two", "b"]
    )
    source = open_one(path)
    assert (source.keys, source.labels) == (["x7", "x9"], ["a", "b"])
    assert source.content(1) == ("txt", b"two")


def test_a_table_without_keys_has_its_lines(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["text", "label"], ["one\nmore", "a"], ["two", "b"])
    assert open_one(path).keys == ["line 2", "line 4"]


def test_an_unlabelled_table_needs_only_its_text(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["text"], ["one"])
    source = open_one(path, labelled=False)
    assert source.content(0) == ("txt", b"one")
    with pytest.raises(UserError, match="no column is left for --label"):
        open_one(path)


def test_the_test_rows_of_a_table_are_taken(tmp_path):
    path = write_csv(
        tmp_path / "a.csv", ["text", "label", "split"], ["a", "x", "train"], ["b", "x", "Eval"]
    )
    assert open_one(path).content(0) == ("txt", b"b")
    assert open_one(path, split="train").content(0) == ("txt", b"a")


def test_parquet_has_its_own_keys_and_the_names_of_its_classes(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pixels = images(np.arange(3), seed=1)
    pictures = [{"bytes": encode_png(each), "path": None} for each in pixels]
    features = {"label": {"_type": "ClassLabel", "names": ["oak", "elm"]}}
    table = pa.table({"id": ["a", "b", "c"], "image": pictures, "label": [1, 0, -1]})
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data" / "test-0.parquet")
    for place in (tmp_path, tmp_path / "data" / "test-0.parquet"):
        source = open_one(place)
        assert source.keys == ["a", "b", "c"] and source.labels == ["elm", "oak", ""]
        # Any order: what lies behind is read anew.
        for index in (2, 0, 1):
            assert source.content(index) == ("png", encode_png(pixels[index]))
    parquet.write_table(pa.table({"text": ["one", None]}), tmp_path / "b.parquet")
    source = open_one(tmp_path / "b.parquet", labelled=False)
    assert source.keys == ["0", "1"] and source.labels is None
    assert source.content(0) == ("txt", b"one")
    with pytest.raises(ValueError, match="row 1 has no input"):
        source.content(1)
    with pytest.raises(UserError, match="choose the label with --label"):
        open_one(tmp_path / "b.parquet")


def test_arrays_are_the_bytes_that_their_shards_would_hold(tmp_path):
    pixels = images(np.arange(3), seed=1)
    np.savez(tmp_path / "a.npz", x_test=pixels, y_test=np.array([2.0, 0.0, np.nan]))
    source = open_one(tmp_path / "a.npz")
    assert source.keys == ["0", "1", "2"]
    assert source.labels == ["2", "0", ""]
    assert source.content(2) == ("png", encode_png(pixels[2]))


def test_a_row_of_nan_is_named(tmp_path):
    x = np.zeros((2, 3), np.float32)
    x[1, 2] = np.nan
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(2))
    source = open_one(tmp_path / "a.npz")
    assert source.content(0)[0] == "npy"
    with pytest.raises(ValueError, match="NaN"):
        source.content(1)


def test_shards_have_their_keys_and_class_names(tmp_path):
    write_toy(tmp_path, {"train": 2, "test": 1})
    source = open_one(tmp_path)
    assert source.keys[:2] == ["000000", "000001"]
    assert source.labels[:2] == ["class 0", "class 1"]
    assert source.content(3) == ("png", encode_png(images(np.arange(24), seed=2)[3]))


def test_unlabelled_shards_without_a_manifest_are_read(tmp_path):
    write_unlabelled(tmp_path / "more", count=1)
    source = open_one(tmp_path / "more", labelled=False)
    assert source.labels is None and len(source.keys) == 24
    source = open_one(tmp_path / "more" / "transfer-000000.tar", labelled=False)
    assert len(source.keys) == 24


@pytest.mark.parametrize(
    "place, expected",
    [
        ("https://host/a.tar", True),
        ("a-{0..3}.tar", True),
        ("a.csv", False),
        ("a.tar.gz", True),
    ],
)
def test_what_is_taken_for_shards(place, expected):
    assert is_shards(place) == expected


def test_a_folder_may_have_one_class(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "a.png").write_bytes(encode_png(images(np.arange(1), 0)[0]))
    source = open_one(tmp_path)
    assert source.labels == ["ant"] and source.keys == [str(tmp_path / "ant" / "a.png")]


def test_labels_that_are_no_column_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3), np.float32), y=np.eye(4))
    with pytest.raises(UserError, match="do not belong together; of one-hot labels give y.argmax"):
        open_one(tmp_path / "a.npz")
    assert len(open_one(tmp_path / "a.npz", labelled=False).keys) == 4
