"""The decoded cache, and augmentation."""

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
from trainer.data.augment import Augment, find_augment, flip_crop, shift
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
    with pytest.raises(UserError, match="none, shift, flip-crop, drop_ngrams, or module:function"):
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
