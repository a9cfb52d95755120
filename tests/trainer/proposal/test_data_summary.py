"""What a first config depends on is read from the shards as training reads them."""

import shlex

import numpy as np
import pytest
from shardsets import png, write_tar

from pipeline.config import UserError
from trainer.commands.shards import main as shards
from trainer.data.writing import read_manifest
from trainer.proposal.data_summary import (
    Shards,
    find_shards,
    is_drawn,
    is_gray,
    moments,
    scaled,
    summarise,
)


def summary_of(directory):
    return summarise(Shards(str(directory), read_manifest(directory)))


def array_shards(path, *options, **arrays):
    np.savez(path / "a.npz", **arrays)
    shards(["arrays", str(path / "a.npz"), "--out", str(path / "s"), *options])
    return path / "s"


def test_pictures_have_one_mean_and_std_per_channel_of_what_the_decoder_gives(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 9, 8, 3), dtype=np.uint8)
    pixels[..., 1] //= 4
    summary = summary_of(array_shards(tmp_path, x=pixels, y=np.arange(60) % 3))
    assert summary.kind == "pictures" and summary.shape == (3, 9, 8)
    assert summary.sampled == summary.examples["train"] == 48
    np.testing.assert_allclose(summary.mean, (0.5, 0.123, 0.5), atol=0.02)
    np.testing.assert_allclose(summary.std, (0.29, 0.072, 0.29), atol=0.02)


def test_columns_of_different_scales_have_their_own_mean_and_std_and_constant_ones_std_1():
    x = np.random.default_rng(0).normal([0, 1e6, 3], [1e-4, 1, 0], (500, 3)).astype(np.float32)
    mean, std, constant = moments(x, "numbers")
    assert constant == (2,) and std[2] == 1.0 and mean[2] == 3.0
    assert abs(mean[1] - 1e6) < 0.2 and 0.9 < std[1] < 1.1
    assert 0.9e-4 < std[0] < 1.1e-4


def test_columns_that_are_alike_share_one_mean_and_std():
    x = np.random.default_rng(0).normal(2, 3, (500, 40)).astype(np.float32)
    mean, std, constant = moments(x, "numbers")
    assert len(mean) == len(std) == 1 and not constant
    assert 1.9 < mean[0] < 2.1 and 2.9 < std[0] < 3.1


@pytest.mark.parametrize("shape", [(20, 5), (20, 2, 4), (20, 1, 4, 4)])
def test_inputs_that_are_all_the_same_are_refused(shape):
    kind = "pictures" if len(shape) == 4 else "numbers"
    with pytest.raises(UserError, match="one and the same"):
        moments(np.ones(shape, np.float32), kind)


@pytest.mark.parametrize(
    "long, decoder, cut", [(0, "ngram_bag", 0), (4, "ngram_bag", 0.05), (20, "hashed_ngrams", 0)]
)
def test_texts_are_bags_unless_many_do_not_fit_into_one(tmp_path, long, decoder, cut):
    rows = [f"short text {n},{n % 2}" for n in range(100 - long)]
    rows += [f"{'a long text ' * 10}{n},{n % 2}" for n in range(long)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    shards(["table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "s")])
    summary = summary_of(tmp_path / "s")
    assert summary.decoders == {"txt": f"trainer.data.decoding:{decoder}"}
    assert summary.is_bags == (decoder == "ngram_bag")
    assert summary.cut == pytest.approx(cut, abs=0.04) and bool(summary.cut) == bool(cut)


def test_uint8_is_scaled_and_other_numbers_are_not():
    assert scaled(np.array([255], np.uint8)) == 1.0
    assert scaled(np.array([255.0])) == 255.0


def test_drawings_and_gray_pictures_are_told_from_colour_photographs():
    random = np.random.default_rng(0)
    photograph = random.integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    drawing = np.full((5, 1, 16, 16), 255, np.uint8)
    drawing[:, :, 4:8] = 0
    assert is_drawn(drawing) and not is_drawn(photograph)
    assert is_gray(drawing.repeat(3, axis=1)) and not is_gray(photograph)


def test_label_and_input_of_indexed_tars_are_read_from_the_manifest(tmp_path):
    for split in ("training", "dev", "eval"):
        files = []
        for number in range(12):
            files += [
                (f"{number}.png", png(np.full((6, 5), 20 * number, np.uint8))),
                (f"{number}.json", b'{"label": "%s"}' % b"ab"[number % 2 :][:1]),
            ]
        write_tar(tmp_path / f"{split}-0.tar", files)
    shards(["index", str(tmp_path), "--label", "json:label"])
    summary = summary_of(tmp_path)
    assert summary.label == "json:label" and summary.num_classes == 2
    assert summary.examples == {"train": 12, "val": 12, "test": 12}


def test_shards_are_found_by_directory_and_by_pattern(tmp_path):
    directory = array_shards(tmp_path, x=np.eye(30, dtype=np.float32), y=np.arange(30) % 2)
    for place in (directory, f"{directory}/", f"{directory}/train-{{000000..000000}}.tar"):
        assert find_shards(str(place)).place == str(directory)
    assert find_shards(str(tmp_path)) is None and find_shards(str(tmp_path / "a.npz")) is None


def test_a_missing_split_is_refused_with_a_command_that_makes_it(tmp_path):
    x = np.random.default_rng(0).normal(0, 1, (40, 3)).astype(np.float32)
    array_shards(tmp_path, "--val", "0", x=x, y=np.arange(40) % 2)
    with pytest.raises(UserError) as error:
        summary_of(tmp_path / "s")
    message = str(error.value)
    assert "has no val split (it has train, test)" in message
    command = message.split("`")[1].split()
    assert command[:2] == ["referral", "shards"]
    shards(command[2:])
    assert set(summary_of(tmp_path / "s").patterns) == {"train", "val", "test"}


def test_one_class_alone_is_refused(tmp_path):
    for split in ("train", "val", "test"):
        labels = [b"0"] if split == "train" else [b"0", b"1"]
        files = []
        for number in range(4):
            files += [
                (f"{number}.cls", labels[number % len(labels)]),
                (f"{number}.png", png(np.full((6, 5), 20 * number, np.uint8))),
            ]
        write_tar(tmp_path / f"{split}-0.tar", files)
    shards(["index", str(tmp_path)])
    with pytest.raises(UserError, match="examples of 1 class; at least 2"):
        summary_of(tmp_path)


def test_some_shards_of_train_are_taken_alone_and_a_mix_of_splits_is_refused(tmp_path):
    x = np.random.default_rng(0).normal(0, 1, (60, 3)).astype(np.float32)
    options = ("--samples-per-shard", "20")
    directory = array_shards(tmp_path, *options, x=x, y=np.arange(60) % 2)
    pattern = f"{directory}/train-{{000000..000001}}.tar"
    summary = summarise(find_shards(pattern))
    assert summary.patterns["train"] == pattern and summary.examples["train"] == 40
    assert summary.patterns["val"] == str(directory) and summary.examples["val"] == 6
    every = summarise(find_shards(f"{directory}/train-*.tar"))
    assert every.patterns["train"] == str(directory) and every.examples["train"] == 48
    with pytest.raises(UserError, match="shards of several splits"):
        summarise(find_shards(f"{directory}/*-000000.tar"))


def test_indexed_tars_without_val_are_split_by_the_command_that_is_proposed(tmp_path):
    (tmp_path / "d").mkdir()
    for split, first in (("train", 0), ("test", 40)):
        files = []
        for number in range(first, first + 40):
            files += [
                (f"{number}.jpg.png", png(np.full((6, 5), number, np.uint8))),
                (f"{number}.json", b'{"label": %d}' % (number % 2)),
            ]
        write_tar(tmp_path / "d" / f"{split}-0.tar", files)
    shards(["index", str(tmp_path / "d"), "--label", "json:label"])
    with pytest.raises(UserError, match="has no val split") as error:
        summary_of(tmp_path / "d")
    shards(shlex.split(str(error.value).split("`")[1])[2:])
    summary = summary_of(tmp_path / "d-split")
    assert summary.examples == {"train": 36, "val": 4, "test": 40}
