"""Which `shards` command makes shards of what a user has, or why there is none."""

import numpy as np
import pytest
import userdata
from PIL import Image

from pipeline.config import UserError
from trainer.data.authoring.picture_sizes import suggested_size
from trainer.proposal.raw_data import shards_command


def command(place) -> list[str]:
    """Without the words that all have: --out s."""
    words = shards_command(str(place), "s")
    assert words[words.index("--out") + 1] == "s"
    return [word for word in words if word not in ("--out", "s")]


def picture(path, size, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def test_pictures_of_one_size_stay_as_they_are(tmp_path):
    for name in "ab":
        picture(tmp_path / name / "0.png", (9, 9))
    assert command(tmp_path) == ["folder", str(tmp_path)]


def test_pictures_of_many_sizes_are_brought_to_one_and_gray_ones_stay_gray(tmp_path):
    for mode, options in (("RGB", ["--size", "24"]), ("L", ["--size", "24", "--gray"])):
        root = tmp_path / mode
        for name, size in (("a", (30, 25)), ("b", (40, 90)), ("c", (25, 60))):
            picture(root / name / "0.jpg", size, mode)
        assert command(root) == ["folder", str(root), *options]


def test_gray_among_coloured_pictures_become_coloured(tmp_path):
    picture(tmp_path / "a" / "0.png", (16, 16), "L")
    picture(tmp_path / "b" / "0.png", (16, 16))
    assert command(tmp_path) == ["folder", str(tmp_path), "--size", "16"]


def test_pictures_below_splits_are_looked_at_and_a_list_beside_them_is_not_taken(tmp_path):
    for split in ("train", "Test"):
        picture(tmp_path / split / "a" / "0.png", (9, 9))
        picture(tmp_path / split / "b" / "0.png", (7, 9))
    (tmp_path / "labels.csv").write_text("file,label\n")
    assert command(tmp_path) == ["folder", str(tmp_path), "--size", "7"]


@pytest.mark.parametrize(
    "sizes, size",
    [
        ({(5, 6): 1, (8, 8): 1}, 5),
        ({(30, 40): 3, (500, 700): 2}, 24),
        ({(500, 700): 3, (30, 40): 2}, 64),
    ],
)
def test_the_suggested_size_is_the_median_shorter_side_up_to_64(sizes, size):
    assert suggested_size(sizes) == size


def test_arrays_are_taken_with_those_that_belong_to_them(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.eye(3), y=np.arange(3))
    assert command(tmp_path / "a.npz") == ["arrays", str(tmp_path / "a.npz")]
    root = userdata.idx_files(tmp_path / "idx")
    every = sorted(map(str, root.iterdir()))
    assert command(root) == ["arrays", *every]
    assert command(root / "train-images-idx3-ubyte.gz") == ["arrays", *every]


def test_tables_are_one_or_those_of_the_splits(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n")
    assert command(tmp_path) == ["table", str(tmp_path / "train.csv")]
    (tmp_path / "my_test.csv").write_text("text,label\n")
    words = ["table", str(tmp_path / "train.csv"), "--test", str(tmp_path / "my_test.csv")]
    assert command(tmp_path) == words
    (tmp_path / "other.csv").write_text("text,label\n")
    with pytest.raises(UserError, match="several tables"):
        command(tmp_path)


def test_tars_are_rewritten_with_the_field_that_holds_the_label(tmp_path):
    root = userdata.webdataset(tmp_path / "hf")
    words = ["from-webdataset", str(root), "--label", "json:label"]
    assert command(root) == words
    assert command(tmp_path) == ["from-webdataset", str(tmp_path), "--label", "json:label"]
    pattern = f"{root}/train-{{00000..00001}}-of-00002.tar"
    fractions = ["--val", "0.1", "--test", "0.1"]
    assert command(pattern) == ["from-webdataset", pattern, *fractions, "--label", "json:label"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("a.feather", "save it as parquet: `referral shards parquet`"),
        ("a.jsonl", "save it as a csv"),
        ("a.zip", "unpack it first"),
        ("a.h5", "npz with x and y"),
        ("a.exe", "such files are not read"),
        ("absent", "no such file or directory"),
    ],
)
def test_what_is_not_read_is_refused_with_what_helps(tmp_path, name, message):
    if name != "absent":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message) as error:
        command(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


def test_directories_without_data_are_refused_with_what_they_hold(tmp_path):
    with pytest.raises(UserError, match="holds nothing"):
        command(tmp_path)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds 1 .png: shards, a directory per class"):
        command(tmp_path)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "a.npz", x=np.eye(3))
    with pytest.raises(UserError, match=f"referral init {tmp_path}/data"):
        command(tmp_path)
    (tmp_path / "data" / "a.npz").rename(tmp_path / "data" / "a.feather")
    with pytest.raises(UserError, match="feather files are not read"):
        command(tmp_path)


def test_parquet_files_in_a_directory_or_one_below_belong_together(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a data set card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}-00000-of-00001.parquet").write_bytes(b"")
    for place in (tmp_path, tmp_path / "data", tmp_path / "data" / "test-00000-of-00001.parquet"):
        assert command(place) == ["parquet", str(place)]


@pytest.mark.parametrize("end", ["npy", "txt", "json"])
def test_classes_may_hold_other_inputs_than_pictures(tmp_path, end):
    for name in ("train/a", "train/b", "dev/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"0.{end}").write_text("1")
    assert command(tmp_path) == ["folder", str(tmp_path)]
