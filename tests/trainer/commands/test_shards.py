"""`referral shards`: pictures, arrays, tables and other people's tars become checked shards."""

import gzip
import json
import struct

import numpy as np
import pytest
from shardsets import (
    CLASSES,
    picture,
    png,
    sample,
    tar_files,
    write_split,
    write_tar,
    write_uneven,
)

from pipeline.config import Data, UserError
from trainer.commands.shards import main
from trainer.data import open_shards
from trainer.data.authoring.splitting import split_by_class


def refusal(*argv) -> str:
    with pytest.raises(UserError) as error:
        main([str(word) for word in argv])
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def run(*argv) -> int:
    return main([str(word) for word in argv])


def picture_folder(directory, sizes=((6, 5),), count=10, classes=("oak", "elm", "yew")):
    for c, name in enumerate(classes):
        (directory / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full(sizes[number % len(sizes)], 10 * c + number, np.uint8)
            (directory / name / f"{number}.png").write_bytes(png(pixels))
    return directory


def samples_of(directory, split="train") -> int:
    return open_shards(str(directory), Data(), split).num_samples


def test_who_made_shards_is_told_what_to_type_next(tmp_path, capsys):
    folder = picture_folder(tmp_path / "trees")
    assert run("folder", folder, "--out", tmp_path / "shards") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: referral init {tmp_path / 'shards'}"
    assert run("validate", tmp_path / "shards") == 0
    assert "next: " not in capsys.readouterr().out  # it made nothing


# Splits


def test_a_split_takes_its_fraction_of_every_class_and_each_sample_goes_to_one_split():
    labels = np.repeat([0, 1, 2], [20, 40, 3])
    splits = split_by_class(labels, {"val": 0.1, "test": 0.25}, seed=0)
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(63))
    assert np.bincount(labels[splits["val"]], minlength=3).tolist() == [2, 4, 0]
    assert np.bincount(labels[splits["test"]], minlength=3).tolist() == [5, 10, 1]
    assert (np.bincount(labels[splits["train"]]) >= 1).all()


def test_fractions_that_leave_nothing_to_train_are_refused():
    with pytest.raises(UserError, match="leave something to train"):
        split_by_class(np.zeros(4, int), {"val": 0.5, "test": 0.5}, 0)


# folder


def test_a_folder_becomes_three_splits(tmp_path, capsys):
    trees = picture_folder(tmp_path / "trees")
    assert run("folder", trees, "--out", tmp_path / "shards", "--val", 0.2) == 0
    assert "21 train, 6 val, 3 test" in capsys.readouterr().out
    for split, count in (("train", 21), ("val", 6), ("test", 3)):
        shards = open_shards(str(tmp_path / "shards"), Data(), split)
        assert shards.num_samples == count and shards.class_names == ["elm", "oak", "yew"]
        values = shards.inputs(np.arange(count))[:, 0, 0, 0]
        expected = np.array(["oak", "elm", "yew"])[values // 10]
        assert np.array(shards.class_names)[shards.labels].tolist() == expected.tolist()


def test_a_folder_with_splits_of_its_own_keeps_them(tmp_path):
    for split, count in (("train", 8), ("test", 2)):
        picture_folder(tmp_path / "trees" / split, count=count)
    run("folder", tmp_path / "trees", "--out", tmp_path / "shards", "--val", 0.25, "--test", 0.5)
    counts = [samples_of(tmp_path / "shards", split) for split in ("train", "val", "test")]
    assert counts == [18, 6, 6]


def test_pictures_of_several_sizes_are_refused_until_a_size_is_given(tmp_path):
    trees = picture_folder(tmp_path / "trees", sizes=((6, 5), (8, 8)))
    message = refusal("folder", trees, "--out", tmp_path / "shards")
    assert "differ in size (5x6, 8x8); --size N" in message
    run("folder", trees, "--out", tmp_path / "shards", "--size", 4, "--gray")
    assert open_shards(str(tmp_path / "shards"), Data(), "train").input_shape == (1, 4, 4)


def test_an_unreadable_picture_is_named_and_nothing_is_written(tmp_path):
    trees = picture_folder(tmp_path / "trees")
    (trees / "oak/3.png").write_bytes((trees / "oak/3.png").read_bytes()[:40])
    assert "oak/3.png: cannot be decoded" in refusal("folder", trees, "--out", tmp_path / "shards")
    assert not list((tmp_path / "shards").glob("*"))


@pytest.mark.parametrize(
    "classes, message", [((), "has 0 class directories"), (("oak",), "has 1 class directories")]
)
def test_a_folder_without_classes_is_refused(tmp_path, classes, message):
    (tmp_path / "trees").mkdir()
    picture_folder(tmp_path / "trees", classes=classes)
    assert message in refusal("folder", tmp_path / "trees", "--out", tmp_path / "shards")


def test_a_class_without_pictures_is_refused(tmp_path):
    trees = picture_folder(tmp_path / "trees")
    (trees / "fir").mkdir()
    message = refusal("folder", trees, "--out", tmp_path / "shards")
    assert "fir holds no file of a known kind" in message


# arrays and tables


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_files_as_mnist_has_them(tmp_path):
    pictures = np.stack([picture(number) for number in range(40)])
    labels = np.arange(40, dtype=np.uint8) % 4
    for name, part in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", pictures[part])
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels[part])
    assert run("arrays", *sorted(tmp_path.glob("*.gz")), "--out", tmp_path / "s", "--val", 0.2) == 0
    test = open_shards(str(tmp_path / "s"), Data(), "test")
    assert (test.inputs(np.arange(10))[:, 0] == pictures[30:]).all()
    assert test.labels.tolist() == labels[30:].tolist()
    assert samples_of(tmp_path / "s", "val") == 6


@pytest.mark.parametrize(
    "x, extension",
    [
        (np.zeros((9, 4, 4), np.uint8), "png"),
        (np.zeros((9, 4, 4, 3), np.uint8), "png"),
        (np.zeros((9, 5), np.float32), "npy"),
        (np.array(["text"] * 9), "txt"),
    ],
)
def test_an_npz_of_pictures_vectors_or_texts(tmp_path, x, extension):
    np.savez(tmp_path / "a.npz", x=x, y=np.array(["b", "a", "b"] * 3))
    run("arrays", tmp_path / "a.npz", "--out", tmp_path / "s", "--val", 0, "--test", 0)
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    assert shards.class_names == ["a", "b"] and shards.class_counts.tolist() == [3, 6]
    assert shards.input_extensions == [extension] and shards.num_samples == 9


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": np.zeros((3, 2)), "y": np.zeros(4, int)}, "do not belong together"),
        ({"x": np.zeros((3, 2))}, "labels for none"),
        ({"x": np.zeros((3, 2)), "y": np.array([0, 1, -1])}, "label -1 is below 0"),
        ({"x": np.zeros((3, 2)), "y": np.array([0, 0.5, 1])}, "neither whole numbers nor names"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    assert message in refusal("arrays", tmp_path / "a.npz", "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_file_that_is_no_array_is_refused(tmp_path):
    (tmp_path / "x.gz").write_bytes(b"rubbish")
    message = refusal("arrays", tmp_path / "x.gz", "--out", tmp_path / "s")
    assert "cannot be read as npz, npy or idx" in message
    assert "no such file" in refusal("arrays", tmp_path / "y.gz", "--out", tmp_path / "s")


def test_a_table_becomes_texts(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("code,phrase\n11,Soy beans\n12,Rape\n11,\n12,Flax\n", encoding="utf-8")
    options = ["--text", "phrase", "--label", "code", "--val", 0, "--test", 0]
    run("table", table, "--out", tmp_path / "s", *options)
    shards = open_shards(str(tmp_path / "s"), Data(), "train")
    texts = [raw["txt"].decode() for raw in shards.raw([0, 1, 2])]
    names = [shards.class_names[c] for c in shards.labels]
    classes = dict(zip(texts, names, strict=True))
    assert classes == {"Soy beans": "11", "Rape": "12", "Flax": "12"}
    message = refusal("table", table, "--out", tmp_path / "u", "--text", "x", "--label", "code")
    assert "no column 'x'; it has code, phrase" in message
    assert run("table", table, "--out", tmp_path / "v", *options, "--drop", "11") == 0
    assert open_shards(str(tmp_path / "v"), Data(), "train").class_names == ["12"]
    message = refusal("table", table, "--out", tmp_path / "w", *options, "--drop", "13")
    assert "has no code '13' to leave out" in message


# index, validate, from-webdataset


def test_shards_without_a_manifest_get_one(tmp_path):
    for split, first in (("train", 0), ("val", 50)):
        for shard in range(2):
            numbers = range(first + 10 * shard, first + 10 * shard + 10)
            write_tar(tmp_path / f"{split}-{shard:03d}.tar", tar_files(numbers))
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    assert run("index", tmp_path, "--classes", tmp_path / "names.txt") == 0
    assert open_shards(str(tmp_path), Data(), "val").class_names == CLASSES
    assert samples_of(tmp_path) == 20
    (tmp_path / "manifest.json").unlink()
    run("index", tmp_path)
    # No sample has label 3: the numbers that occur are names, and there is no class without one.
    assert open_shards(str(tmp_path), Data(), "val").class_names == ["0", "1", "2", "4"]


def test_a_manifest_never_vouches_for_corruption(tmp_path):
    write_tar(tmp_path / "train-0.tar", tar_files(range(5))[:-1])
    assert "has only the member .cls" in refusal("index", tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert "holds no .tar" in refusal("index", tmp_path / "empty")


def test_index_accepts_a_change_that_was_meant(tmp_path):
    write_uneven(tmp_path, [5, 5])
    write_tar(tmp_path / "train-000001.tar", tar_files(range(20, 26)))
    with pytest.raises(UserError, match="is not the shard that was indexed"):
        open_shards(str(tmp_path), Data(), "train")
    run("index", tmp_path)
    assert samples_of(tmp_path) == 11


def test_validate_is_silent_about_good_shards_and_lists_corrupt_ones(tmp_path, capsys):
    write_uneven(tmp_path, [5, 8])
    assert run("validate", tmp_path) == 0
    files = dict(tar_files(range(5)))
    files["00003.png"] = files["00003.png"][:60]
    write_tar(tmp_path / "train-000000.tar", list(files.items()))
    assert run("validate", tmp_path) == 1
    err = capsys.readouterr().err
    assert "train-000000.tar: 00003 cannot be decoded" in err
    assert "train-000000.tar: is not the shard" in err
    assert "1 of 2 shards are corrupt" in err and "train-000001" not in err
    (tmp_path / "train-000001.tar").unlink()
    assert run("validate", tmp_path) == 1
    assert "train-000001.tar: is absent" in capsys.readouterr().err


def test_other_peoples_webdatasets_are_rewritten(tmp_path):
    files = []
    for number in range(12):
        label = json.dumps({"name": ["oak", "elm"][number % 2]}).encode()
        files += [(f"{number}.jpg.png", sample(number)["png"]), (f"{number}.json", label)]
    tar = write_tar(tmp_path / "x.tar", files)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    options = ["--label", "json:name", "--input", "jpg.png"]
    for source in (tar, tmp_path / "x.tar.gz"):
        out = tmp_path / f"out{source.suffix}"
        assert run("from-webdataset", source, "--out", out, *options) == 0
        shards = open_shards(str(out), Data(), "train")
        assert shards.class_names == ["elm", "oak"] and shards.num_samples == 12
        assert shards.inputs([5])[0].tobytes() == picture(5).tobytes()


def test_what_cannot_be_rewritten_is_refused_or_named(tmp_path, capsys):
    tar = write_tar(tmp_path / "x.tar", tar_files(range(20))[:-1])
    message = refusal("from-webdataset", tar, "--out", tmp_path / "out")
    assert "00019 has only the member .cls" in message
    assert not list((tmp_path / "out").glob("*"))
    assert run("from-webdataset", tar, "--out", tmp_path / "out", "--damage", "skip") == 0
    assert "left out: " in capsys.readouterr().err
    assert samples_of(tmp_path / "out") == 19


# The command line


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nothing"], "No such command"),
        (["folder"], "Missing"),
        (["index", "x", "--y"], "No such option"),
    ],
)
def test_a_wrong_command_line_gets_one_line(argv, message):
    assert message in refusal(*argv)


def test_no_command_prints_the_help(capsys):
    assert run("--help") == 0
    assert "from-webdataset" in capsys.readouterr().out


def test_an_unwritable_directory_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    trees = picture_folder(tmp_path / "trees")
    assert "cannot be made" in refusal("folder", trees, "--out", tmp_path / "file" / "shards")


def test_existing_shards_are_replaced_only_with_overwrite(tmp_path):
    trees = picture_folder(tmp_path / "trees")
    write_split(tmp_path / "s", 3)
    assert "already holds train shards" in refusal("folder", trees, "--out", tmp_path / "s")
    assert samples_of(tmp_path / "s") == 3
    assert run("folder", trees, "--out", tmp_path / "s", "--overwrite") == 0
    assert open_shards(str(tmp_path / "s"), Data(), "train").class_names == ["elm", "oak", "yew"]
