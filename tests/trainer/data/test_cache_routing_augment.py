import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shardsets import write_split, write_tar

from trainer.config import Data, UserError
from trainer.data import cached, open_routed, open_shards, route
from trainer.data.augment import Augment, find_augment, flip_crop, shift


@pytest.fixture(scope="module")
def shards(uneven):
    return open_shards(str(uneven), Data(), "train")


# The decoded cache


def test_the_cache_holds_the_same_samples_under_the_same_ids(shards, tmp_path):
    kept = cached(shards, tmp_path / "train", Data())
    assert (kept.inputs(np.arange(150)) == shards.inputs(np.arange(150))).all()
    assert kept.fingerprint == shards.fingerprint and kept.labels is shards.labels
    assert kept.keys([3]) == shards.keys([3]) and kept.raw([3]) == shards.raw([3])
    assert (kept.input_shape, kept.input_dtype) == (shards.input_shape, shards.input_dtype)


def test_the_second_process_decodes_nothing(shards, tmp_path, monkeypatch):
    cached(shards, tmp_path / "train", Data())
    monkeypatch.setattr("trainer.data.cache._write", lambda *_: pytest.fail("decoded again"))
    cached(shards, tmp_path / "train", Data())


def test_processes_that_race_for_the_cache_all_win(shards, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: cached(open_like(shards), tmp_path / "train", Data()), range(4)))
    expected = shards.inputs([5, 149])
    assert all((each.inputs([5, 149]) == expected).all() for each in sets)
    assert len(list(tmp_path.iterdir())) == 2


def open_like(shards):
    return open_shards(os.path.dirname(shards.paths[0]), Data(), "train")


def test_other_shards_get_another_cache(shards, tmp_path):
    other = open_shards(str(write_split(tmp_path / "set", 12)), Data(), "train")
    first, second = cached(shards, tmp_path / "c/train", Data()), cached(other, tmp_path / "c/train", Data())
    assert (first.num_samples, second.num_samples) == (150, 12)
    assert (second.inputs([3]) == other.inputs([3])).all()


def test_a_half_written_cache_is_made_again(shards, tmp_path):
    cached(shards, tmp_path / "train", Data())
    (array,) = tmp_path.glob("*.npy")
    array.write_bytes(array.read_bytes()[:1000])
    assert (cached(shards, tmp_path / "train", Data()).inputs([149]) == shards.inputs([149])).all()


def test_none_auto_and_decoded(shards, tmp_path):
    small = {"cache_bytes": 4499}  # 150 samples of 30 bytes are 4500
    assert cached(shards, tmp_path / "a", Data(cache="none")) is shards
    assert cached(shards, tmp_path / "a", Data(cache="auto", **small)) is shards
    with pytest.raises(UserError, match="takes 4500 bytes, more than data.cache_bytes = 4499"):
        cached(shards, tmp_path / "a", Data(cache="decoded", **small))
    assert not list(tmp_path.iterdir())
    assert cached(shards, tmp_path / "a", Data(cache="decoded", cache_bytes=4500)) is not shards


def test_inputs_of_several_shapes_are_not_cached(tmp_path):
    write_tar(tmp_path / "train-0.tar", [("a.cls", b"0"), ("a.txt", b"one"), ("b.cls", b"0"), ("b.txt", b"three")])
    shards = open_shards(str(tmp_path), Data(classes=2), "train")
    assert cached(shards, tmp_path / "cache/x", Data()) is shards
    with pytest.raises(UserError, match="bring all to one size"):
        cached(shards, tmp_path / "cache/x", Data(cache="decoded"))
    assert not list((tmp_path / "cache").iterdir())


# Routing


@pytest.mark.parametrize("mode", ["index", "copy"])
def test_a_route_holds_every_sample_of_its_classes_once(shards, tmp_path, mode):
    facts = route(shards, [0, 2], tmp_path / "000", mode)
    routed, ids = open_routed(tmp_path / "000", shards)
    expected = np.flatnonzero(np.isin(shards.labels, [0, 2]))
    assert facts["samples"] == len(ids) == len(expected)
    assert facts["frequency"] == len(expected) / 150
    assert routed.labels[ids].tolist() == shards.labels[expected].tolist()
    assert (routed.inputs(ids) == shards.inputs(expected)).all()
    assert routed.class_names == shards.class_names
    assert [raw["png"] for raw in routed.raw(ids)] == [raw["png"] for raw in shards.raw(expected)]


def test_groups_may_overlap(shards, tmp_path):
    for index, members in enumerate(([0, 1, 2], [1, 2, 4])):
        route(shards, members, tmp_path / f"{index:03d}", "copy")
    sizes = [open_routed(tmp_path / f"{index:03d}", shards)[0].num_samples for index in range(2)]
    assert sizes == [np.isin(shards.labels, members).sum() for members in ([0, 1, 2], [1, 2, 4])]


def test_the_size_is_printed_and_a_limit_holds_before_anything_is_written(shards, tmp_path, capsys):
    with pytest.raises(UserError, match="above specialists.route_max_bytes = 1000"):
        route(shards, [0, 2], tmp_path / "000", "copy", max_bytes=1000)
    assert "of 150 samples" in capsys.readouterr().out
    assert not (tmp_path / "000").exists()


def test_the_announced_size_of_a_copy_is_the_size_on_disk(shards, tmp_path):
    facts = route(shards, [0, 1, 2, 4], tmp_path / "000", "copy")
    (tar,) = (tmp_path / "000").glob("*.tar")
    assert 0 <= tar.stat().st_size + 8 * facts["samples"] - facts["bytes"] <= 10240  # tar's end marks fill a record


def test_a_route_of_other_shards_is_refused(shards, tmp_path):
    route(shards, [0], tmp_path / "000")
    other = open_shards(str(write_split(tmp_path / "set", 12)), Data(), "train")
    with pytest.raises(UserError, match="was routed from other shards"):
        open_routed(tmp_path / "000", other)
    with pytest.raises(UserError, match="holds no routed samples"):
        open_routed(tmp_path / "001", other)


def test_classes_without_samples_are_refused(shards, tmp_path):
    with pytest.raises(UserError, match="no sample of the 2 classes"):
        route(shards, [3, 5], tmp_path / "000")  # no square is 3 or 5 modulo 7


# Augmentation


@given(seed=st.integers(0, 1000), n=st.integers(1, 6), size=st.sampled_from([(8, 8), (28, 28), (9, 17), (3, 3)]))
def test_each_view_depends_on_its_own_picture_and_numbers_only(seed, n, size):
    rng = np.random.default_rng(seed)
    pictures, uniforms = rng.integers(0, 256, (n, 2, *size), dtype=np.uint8), rng.random((n, 3))
    for function in (shift, flip_crop):
        together = function(pictures, uniforms)
        assert together.shape == pictures.shape and together.dtype == np.uint8
        alone = np.concatenate([function(pictures[i : i + 1], uniforms[i : i + 1]) for i in range(n)])
        assert (together == alone).all()


def test_shift_moves_by_hand():
    picture = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)  # an eighth is 1: left or up, none, right or down
    assert (shift(picture, np.array([[0.5, 0.5]])) == picture).all()
    right = shift(picture, np.array([[0.5, 0.1]]))[0, 0]
    assert (right[:, 1:] == picture[0, 0, :, :-1]).all() and (right[:, 0] == picture[0, 0, :, 0]).all()
    up = shift(picture, np.array([[0.9, 0.5]]))[0, 0]
    assert (up[:-1] == picture[0, 0, 1:]).all() and (up[-1] == picture[0, 0, -1]).all()


def test_flip_crop_mirrors_half():
    picture = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    assert (flip_crop(picture, np.array([[0.5, 0.5, 0.2]])) == picture[..., ::-1]).all()
    assert (flip_crop(picture, np.array([[0.5, 0.5, 0.7]])) == picture).all()


def test_a_users_function_is_found_and_a_wrong_name_told():
    assert find_augment("none") is None and find_augment(None) is None
    assert find_augment("trainer.data.augment:shift") == Augment(shift, 8)
    with pytest.raises(UserError, match="none, shift, flip-crop, or module:function"):
        find_augment("flip")
    with pytest.raises(UserError, match="needs pictures"):
        shift(np.zeros((3, 5)), np.zeros((3, 2)))
