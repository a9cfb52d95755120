"""`referral predict --to FILE`: predictions as a table, under their keys."""

import csv
import json
import sys

import numpy as np
import pytest
from toy import encode_png, images

from ensemble import load_ensemble, prediction_columns
from trainer.__main__ import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A picture, and an npy of three."""
    directory = tmp_path_factory.mktemp("inputs")
    pixels = images(np.arange(4), seed=5)
    (directory / "one.png").write_bytes(encode_png(pixels[0]))
    np.save(directory / "three.npy", pixels[1:, None])
    return directory


def predict(capsys, *argv):
    code = main(["predict", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def rows_in(path):
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_every_kind_of_table_holds_what_json_prints(small_run, inputs, tmp_path, capsys, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"predictions.{suffix}"
    code, out, _ = predict(capsys, small_run.root, inputs, "--top", 3, "--to", path)
    assert (code, out) == (0, f"{path}: 4 predictions\n")
    printed = predict(capsys, small_run.root, inputs, "--top", 3, "--json")[1].splitlines()
    rows = rows_in(path)
    assert len(rows) == len(printed) == 4
    for row, line in zip(rows, map(json.loads, printed), strict=True):
        assert row["file"] == line["file"]
        assert row["key"] == str(line.get("index", line["file"]))
        for rank in range(3):
            assert int(row[f"class_{rank + 1}"]) == line["classes"][rank]
            assert row[f"name_{rank + 1}"] == line["names"][rank]
            probability = float(row[f"probability_{rank + 1}"])
            assert probability == pytest.approx(line["probabilities"][rank], rel=1e-6)
        assert row["specialists"] == " ".join(map(str, line["specialists"]))
        assert len(row) == 12 and list(row)[:3] == ["file", "key", "class_1"]


def test_a_table_that_is_there_is_replaced_by_force_alone(small_run, inputs, tmp_path, capsys):
    path = tmp_path / "predictions.csv"
    path.write_text("mine")
    code, _, err = predict(capsys, small_run.root, inputs, "--to", path)
    assert code == 2 and path.read_text() == "mine"
    assert err == f"error: --to {path} exists; --force replaces it, or name another file\n"
    assert predict(capsys, small_run.root, inputs, "--to", path, "--force")[0] == 0
    assert len(rows_in(path)) == 4
    assert [each.name for each in tmp_path.iterdir()] == ["predictions.csv"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("p.xlsx", "end it with .parquet, .csv, .jsonl"),
        ("absent/p.csv", "absent/p.csv: cannot be written: No such file or directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(
    small_run, inputs, tmp_path, capsys, name, words
):
    code, _, err = predict(capsys, small_run.root, inputs, "--to", tmp_path / name)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_without_pyarrow_parquet_is_one_line_with_the_remedy(
    small_run, inputs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = predict(capsys, small_run.root, inputs, "--to", tmp_path / "p.parquet")
    assert code == 2 and "pyarrow is not installed; pip install" in err
    assert len(err.splitlines()) == 1


def test_where_nothing_can_be_read_no_table_is_written(small_run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    code, _, err = predict(capsys, small_run.root, tmp_path / "in", "--to", tmp_path / "p.csv")
    assert code == 2 and "no input could be read" in err
    assert not (tmp_path / "p.csv").exists()


def test_columns_are_what_a_data_frame_takes(small_run):
    ensemble = load_ensemble(small_run.root)
    found = ensemble.predict(images(np.arange(3), seed=5)[:, None], top=2)
    columns = prediction_columns(found, ["a", "b", "c"])
    assert {len(values) for values in columns.values()} == {3}
    assert columns["key"] == ["a", "b", "c"]
    assert columns["name_2"] == [each["names"][1] for each in found]
    assert prediction_columns(found)["key"] == ["0", "1", "2"]
    assert prediction_columns([]) == {"key": [], "specialists": []}
    with pytest.raises(ValueError, match="3 predictions and 2 keys"):
        prediction_columns(found, ["a", "b"])
    with pytest.raises(ValueError, match="predictions of 1 to 2 classes are no one table"):
        prediction_columns([*found, *ensemble.predict(images(np.arange(1), 5)[:, None], top=1)])
