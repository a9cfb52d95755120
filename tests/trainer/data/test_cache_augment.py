"""The decoded cache, and augmentation."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shardsets import write_split, write_tar

from pipeline.choices import AUGMENTATIONS
from pipeline.config import Data, UserError
from trainer.data import cached, open_shards
from trainer.data.augment import Augment, drop_ngrams, find_augment, flip_crop, shift
from trainer.data.decoding import rgb


@pytest.fixture(scope="module")
def shards(uneven):
    return open_shards(str(uneven), Data(), "train")


# The decoded cache


def test_the_cache_holds_the_same_samples_under_the_same_ids(shards, tmp_path):
    decoded = cached(shards, tmp_path / "train", Data())
    assert (decoded.inputs(np.arange(150)) == shards.inputs(np.arange(150))).all()
    assert decoded.fingerprint == shards.fingerprint and decoded.labels is shards.labels
    assert decoded.keys([3]) == shards.keys([3]) and decoded.raw([3]) == shards.raw([3])
    assert (decoded.input_shape, decoded.input_dtype) == (shards.input_shape, shards.input_dtype)


def test_the_second_process_decodes_nothing(shards, tmp_path, monkeypatch):
    cached(shards, tmp_path / "train", Data())
    monkeypatch.setattr("trainer.data.cache._write", lambda *_: pytest.fail("decoded again"))
    cached(shards, tmp_path / "train", Data())


def test_processes_that_race_for_the_cache_all_win(shards, tmp_path):
    def open_cached(_):
        return cached(open_like(shards), tmp_path / "train", Data())

    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(open_cached, range(4)))
    expected = shards.inputs([5, 149])
    assert all((each.inputs([5, 149]) == expected).all() for each in sets)
    assert len(list(tmp_path.iterdir())) == 2


def open_like(shards):
    return open_shards(os.path.dirname(shards.paths[0]), Data(), "train")


@pytest.mark.parametrize("file", [".npy", ".json"])
@pytest.mark.parametrize("version", ["today's", "an earlier one's"])
def test_a_cache_that_is_not_whole_is_decoded_again_and_said(
    shards, tmp_path, caplog, file, version
):
    caplog.set_level(logging.INFO, "referral")
    cached(shards, tmp_path / "train", Data())
    (array,), (header,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    content = json.loads(header.read_text())
    if version != "today's":
        header.write_text(json.dumps({name: content[name] for name in ("key", "unreadable")}))
    elif file == ".npy":
        pixels = bytearray(array.read_bytes())
        pixels[-1] ^= 1
        array.write_bytes(pixels)
    else:
        header.write_text(json.dumps(content | {"unreadable": {"3": "cannot be decoded"}}))
    again = cached(shards, tmp_path / "train", Data())
    assert (again.inputs(np.arange(150)) == shards.inputs(np.arange(150))).all()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{array} is decoded again, for it is not whole: ")


def test_a_cache_of_no_room_is_one_line_and_leaves_nothing(shards, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="the disk is full: .* are needed and .* are free"):
        cached(shards, tmp_path / "train", Data(cache="decoded"))
    assert cached(shards, tmp_path / "train", Data()) is shards
    assert not list(tmp_path.iterdir())


def test_other_shards_get_another_cache(shards, tmp_path):
    other = open_shards(str(write_split(tmp_path / "set", 12)), Data(), "train")
    first = cached(shards, tmp_path / "c/train", Data())
    second = cached(other, tmp_path / "c/train", Data())
    assert (first.num_samples, second.num_samples) == (150, 12)
    assert (second.inputs([3]) == other.inputs([3])).all()


def test_a_half_written_cache_is_made_again(shards, tmp_path):
    cached(shards, tmp_path / "train", Data())
    (array,) = tmp_path.glob("*.npy")
    array.write_bytes(array.read_bytes()[:1000])
    assert (cached(shards, tmp_path / "train", Data()).inputs([149]) == shards.inputs([149])).all()


def test_auto_caches_what_fits_and_decoded_refuses_what_does_not(shards, tmp_path):
    small = {"cache_bytes": 4499}  # 150 samples of 30 bytes are 4500
    assert cached(shards, tmp_path / "a", Data(cache="none")) is shards
    assert cached(shards, tmp_path / "a", Data(cache="auto", **small)) is shards
    with pytest.raises(UserError, match="takes 4500 bytes, more than data.cache_bytes = 4499"):
        cached(shards, tmp_path / "a", Data(cache="decoded", **small))
    assert not list(tmp_path.iterdir())
    assert cached(shards, tmp_path / "a", Data(cache="decoded", cache_bytes=4500)) is not shards


def test_inputs_of_several_shapes_are_not_cached(tmp_path):
    files = [("a.cls", b"0"), ("a.txt", b"one"), ("b.cls", b"0"), ("b.txt", b"three")]
    write_tar(tmp_path / "train-0.tar", files)
    shards = open_shards(str(tmp_path), Data(classes=2), "train")
    assert cached(shards, tmp_path / "cache/x", Data()) is shards
    with pytest.raises(UserError, match="bring all to one size"):
        cached(shards, tmp_path / "cache/x", Data(cache="decoded"))
    assert not list((tmp_path / "cache").iterdir())


# Augmentation


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 6),
    size=st.sampled_from([(8, 8), (28, 28), (9, 17), (3, 3)]),
)
def test_each_view_depends_on_its_own_picture_and_numbers_only(seed, n, size):
    rng = np.random.default_rng(seed)
    pictures, uniforms = rng.integers(0, 256, (n, 2, *size), dtype=np.uint8), rng.random((n, 3))
    for function in (shift, flip_crop):
        together = function(pictures, uniforms)
        assert together.shape == pictures.shape and together.dtype == np.uint8
        alone = [function(pictures[i : i + 1], uniforms[i : i + 1]) for i in range(n)]
        assert (together == np.concatenate(alone)).all()


def test_shift_moves_by_hand():
    # An eighth of 8 is 1: left or up, none, right or down.
    picture = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    assert (shift(picture, np.array([[0.5, 0.5]])) == picture).all()
    right = shift(picture, np.array([[0.5, 0.1]]))[0, 0]
    assert (right[:, 1:] == picture[0, 0, :, :-1]).all()
    assert (right[:, 0] == picture[0, 0, :, 0]).all()
    up = shift(picture, np.array([[0.9, 0.5]]))[0, 0]
    assert (up[:-1] == picture[0, 0, 1:]).all() and (up[-1] == picture[0, 0, -1]).all()


def test_flip_crop_mirrors_half():
    picture = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    assert (flip_crop(picture, np.array([[0.5, 0.5, 0.2]])) == picture[..., ::-1]).all()
    assert (flip_crop(picture, np.array([[0.5, 0.5, 0.7]])) == picture).all()


def test_every_augmentation_of_the_table_is_found():
    assert [name for name in AUGMENTATIONS if find_augment(name) is None] == ["none"]


def test_a_users_function_is_found_and_a_wrong_name_is_an_error():
    assert find_augment("none") is None and find_augment(None) is None
    assert find_augment("trainer.data.augment:shift") == find_augment("shift") == Augment(shift, 2)
    assert find_augment("trainer.data.decoding:rgb") == Augment(rgb, 8)  # says no number of its own
    with pytest.raises(UserError, match="none, shift, .*, rrc-randaugment, or module:function"):
        find_augment("flip")
    with pytest.raises(UserError, match="needs pictures"):
        shift(np.zeros((3, 5)), np.zeros((3, 2)))


def test_what_the_machine_raises_is_no_mistake_of_a_users_augmentation():
    def lost(inputs, uniforms):
        raise RuntimeError("this GPU has fallen off the bus")

    def wrong(inputs, uniforms):
        return inputs[:, 99]

    inputs, uniforms = np.zeros((2, 3)), np.zeros((2, 1))
    with pytest.raises(RuntimeError, match="off the bus"):
        Augment(lost, 1, "mine:lost")(inputs, uniforms)
    with pytest.raises(UserError, match="'mine:wrong' fails: IndexError"):
        Augment(wrong, 1, "mine:wrong")(inputs, uniforms)


def bags(*lengths, width=40):
    """int32 [n, width]: row i has lengths[i] indices 0, 1, 2, ..., then padding."""
    columns = np.arange(width)
    return np.where(columns < np.array(lengths)[:, None], columns, -1).astype(np.int32)


def test_ngrams_are_dropped_by_the_share_and_padding_stays():
    inputs = bags(*[40] * 2000, width=60)
    before = inputs.copy()
    views = drop_ngrams(inputs, np.random.default_rng(0).random((2000, 1)), share=0.2)
    assert (inputs == before).all() and views.dtype == np.int32
    assert ((views == inputs) | (views == -1)).all()
    dropped = (views[:, :40] == -1).mean(0)
    # 2,000 draws a column: a deviation of .009
    assert abs(dropped - 0.2).max() < 0.04 and abs(dropped.mean() - 0.2) < 0.006
    rows = (views[:, :40] == -1).sum(1)
    assert abs(rows.var() / (40 * 0.2 * 0.8) - 1) < 0.15  # each by itself


def test_a_dropped_bag_depends_on_its_own_number_alone():
    uniforms = np.array([[0.3], [0.9], [0.3], [0.0]])
    inputs = bags(10, 35, 10, 20)
    views = drop_ngrams(inputs, uniforms, share=0.5)
    assert (views[0] == views[2]).all() and (views[0] != views[3]).any()
    for row in range(4):
        alone = drop_ngrams(inputs[row : row + 1], uniforms[row : row + 1], share=0.5)
        assert (alone[0] == views[row]).all()


def test_a_bag_keeps_at_least_one_ngram_and_an_empty_one_stays_empty():
    uniforms = np.random.default_rng(1).random((500, 1))
    views = drop_ngrams(bags(*[2] * 500), uniforms, share=0.95)
    kept = (views >= 0).sum(1)
    assert (kept >= 1).all() and (kept == 1).mean() > 0.9
    assert set(np.unique(views[views >= 0])) == {0, 1}
    assert (drop_ngrams(bags(0), np.array([[0.5]])) == -1).all()
    whole = drop_ngrams(bags(7, 40), np.array([[0.1], [0.2]]), share=0.0)
    assert (whole == bags(7, 40)).all()


@pytest.mark.parametrize("inputs", [np.zeros((2, 5)), np.zeros((2, 1, 8, 8), np.int32)])
def test_ngrams_are_dropped_of_bags_alone(inputs):
    with pytest.raises(UserError, match='augment = "drop_ngrams" needs bags of indices'):
        drop_ngrams(inputs, np.zeros((2, 1)))


def test_the_share_is_the_configs():
    inputs, uniforms = bags(*[40] * 50), np.random.default_rng(2).random((50, 1))
    augment = find_augment("drop_ngrams", 0.7)
    assert augment is not None and augment.numbers == 1
    assert (augment(inputs, uniforms) == drop_ngrams(inputs, uniforms, share=0.7)).all()
    default = find_augment("drop_ngrams")
    assert (default(inputs, uniforms) == drop_ngrams(inputs, uniforms, share=0.2)).all()
