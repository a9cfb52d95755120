"""The array of classes beside a manifest, and shards that stay closed until they are read."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shardsets import CLASSES, label_of, picture, sample, tar_files, write_split, write_tar
from shardsets import write_uneven as write

from pipeline.config import Data, UserError
from pipeline.identity import shard_identities
from trainer.data import ShardWriter, open_shards, opening, shards, write_manifest
from trainer.data.authoring.indexing import validate
from trainer.data.label_files import class_counts, count_classes, write_labels
from trainer.data.mapped import map_npz
from trainer.data.tars import index_path, is_fresh, load_index, save_index, scan_tar
from trainer.data.writing import shard_entry

SIZES = [1, 40, 7, 13]


def opened(place, split="train", **data):
    return open_shards(str(place), Data(**data), split)


def refused(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def manifest_of(directory) -> dict:
    return json.loads((directory / "manifest.json").read_text())


def as_schema_1(directory) -> None:
    """Rewrite a manifest as version 1 had it: every shard's counts by class name."""
    manifest = manifest_of(directory)
    manifest["schema"] = 1
    for split in manifest["splits"].values():
        labels = np.load(directory / split.pop("labels")["file"])
        for shard in split["shards"]:
            own, labels = labels[: shard["samples"]], labels[shard["samples"] :]
            numbers, counts = np.unique(own, return_counts=True)
            names = [CLASSES[number] for number in numbers]
            shard["class_counts"] = dict(zip(names, counts.tolist(), strict=True))
    for path in directory.glob("*.labels-*"):
        path.unlink()
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def both(tmp_path):
    """The same shards with a manifest of today and with one of schema 1."""
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", SIZES)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    as_schema_1(tmp_path / "old")
    return tmp_path / "new", tmp_path / "old"


PATTERNS = [
    "{d}",
    "{d}/train-00000[12].tar",
    "{d}/train-000002.tar::{d}/train-000000.tar",
    "{d}/train-000001.tar::{d}/train-000003.tar",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_manifest_of_schema_1_gives_the_same_set(both, pattern):
    new, old = (opened(pattern.format(d=directory)) for directory in both)
    for attribute in (
        "class_names",
        "fingerprint",
        "extensions",
        "input_extensions",
        "input_shape",
    ):
        assert getattr(new, attribute) == getattr(old, attribute), attribute
    assert new.labels.dtype == old.labels.dtype == np.int32
    assert new.labels.tolist() == old.labels.tolist()
    assert new.class_counts.tolist() == old.class_counts.tolist()
    ids = np.arange(len(new))
    assert new.keys(ids) == old.keys(ids) and (new.inputs(ids) == old.inputs(ids)).all()
    assert new.raw(ids) == old.raw(ids) and new.raw_bytes(ids[::2]) == old.raw_bytes(ids[::2])


def test_both_manifests_count_the_same_classes(both):
    new, old = (class_counts(each, manifest_of(each), "train").tolist() for each in both)
    expected = np.bincount([label_of(n) for n in range(sum(SIZES))], minlength=7)
    assert new == old == expected.tolist()


def test_a_split_of_schema_1_stays_beside_a_new_one(both):
    _, old = both
    with ShardWriter(old, "val", CLASSES) as writer:
        writer.write(sample(3))
    write_manifest(old, CLASSES, {"val": writer.facts})
    assert manifest_of(old)["schema"] == 2
    assert opened(old, "val").labels.tolist() == [label_of(3)]
    assert opened(old).labels.tolist() == [label_of(n) for n in range(sum(SIZES))]


def test_an_array_goes_with_the_split_that_it_was_of(tmp_path):
    write_split(tmp_path, 9)
    write_split(tmp_path, 5, "val")
    (val,) = tmp_path.glob("val.labels-*")
    with ShardWriter(tmp_path, "train", CLASSES, overwrite=True) as writer:
        writer.write(sample(2))
    write_manifest(tmp_path, CLASSES, {"train": writer.facts})
    named = {split["labels"]["file"] for split in manifest_of(tmp_path)["splits"].values()}
    assert {path.name for path in tmp_path.glob("*.labels-*")} == named and val.name in named


# What the manifest vouches for


def relabelled(directory, place: int) -> None:
    """Give one sample another class, in the array and in what the manifest says of it."""
    manifest = manifest_of(directory)
    labels = np.load(directory / manifest["splits"]["train"]["labels"]["file"])
    labels[place] = (labels[place] + 1) % 7
    said = write_labels(directory, "train", [labels], "cls", ["cls", "png"])
    manifest["splits"]["train"]["labels"] = said
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_the_identity_of_data_covers_the_class_of_every_sample(tmp_path):
    write_split(tmp_path, 30)
    before = shard_identities(str(tmp_path))
    relabelled(tmp_path, 17)
    assert shard_identities(str(tmp_path)) != before


@pytest.mark.parametrize("change", ["bit", "end", "absent"])
def test_an_array_that_is_not_the_manifests_is_refused(tmp_path, change):
    write_split(tmp_path, 30)
    (path,) = tmp_path.glob("*.labels-*")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes({"bit": content, "end": content[:-4], "absent": b""}[change])
    if change == "absent":
        path.unlink()
    message = refused(opened, tmp_path)
    assert path.name in message and "`referral shards index`" in message


@pytest.mark.parametrize("touched", [True, False])
def test_classes_that_are_not_the_label_members_are_refused(tmp_path, touched):
    write(tmp_path, [9, 9])
    relabelled(tmp_path, 12)
    if touched:  # then opening compares the shard with its manifest, otherwise the first read
        os.utime(tmp_path / "train-000001.tar", (1, 1))
        message = refused(opened, tmp_path)
    else:
        message = refused(opened(tmp_path).inputs, [9])
    assert "train-000001.tar" in message and "makes the manifest anew" in message


def test_class_names_in_label_members_are_compared_as_well(tmp_path):
    names = ["b", "a", "10"]
    files = [(f"{n}.cls", names[n % 3].encode()) for n in range(6)]
    files = [each for n in range(6) for each in (files[n], (f"{n}.png", sample(n)["png"]))]
    path = write_tar(tmp_path / "train-0.tar", files)
    save_index(path, scan_tar(path))
    entry = named_entry(path, [0, 1, 2, 0, 1, 2])
    write_manifest(tmp_path, names, {"train": {"samples": 6, "shards": [entry]}})
    assert opened(tmp_path).keys([5]) == ["5"]
    wrong = named_entry(path, [0, 1, 2, 0, 2, 1])
    write_manifest(tmp_path, names, {"train": {"samples": 6, "shards": [wrong]}})
    assert "its labels are not those" in refused(opened(tmp_path).keys, [5])


def named_entry(path, labels) -> dict:
    return shard_entry(path.name, scan_tar(path), np.array(labels), "names")


# Lazily


@pytest.fixture
def loads(monkeypatch):
    """The shards whose index was mapped, in order. Scanning one fails."""
    names: list[str] = []

    def noted(shard, *arguments):
        names.append(os.path.basename(shard))
        return load_index(shard, *arguments)

    monkeypatch.setattr(opening, "load_index", noted)
    monkeypatch.setattr(opening, "scan_tar", lambda *_: pytest.fail("scanned"))
    return names


def test_opening_reads_no_shard_and_reading_only_the_one_that_is_meant(tmp_path, loads):
    write(tmp_path, SIZES)
    opened_set = opened(tmp_path)
    assert opened_set.class_counts.sum() == sum(SIZES) and loads == []
    assert (opened_set.read_into(np.empty((1, 1, 6, 5), np.uint8), np.arange(1), [45])) == {}
    # The first sample says what an input is.
    assert loads == ["train-000000.tar", "train-000002.tar"]
    opened_set.inputs([46, 0, 47])
    assert len(loads) == 2


def test_an_index_that_was_made_before_is_compared_once_and_then_trusted(tmp_path, loads):
    write(tmp_path, SIZES)
    for shard in tmp_path.glob("*.tar"):
        os.utime(index_path(shard))  # as an earlier version left it
        assert not is_fresh(shard, shard.stat().st_size)
    opened(tmp_path)
    assert len(loads) == len(SIZES)
    opened(tmp_path)
    assert len(loads) == len(SIZES)


def test_no_more_indexes_are_mapped_than_the_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_open_indexes", lambda: 2)
    all_of_them = opened(write(tmp_path, SIZES))
    ids = np.random.default_rng(0).permutation(sum(SIZES))
    pixels = all_of_them.inputs(ids)
    assert all((each[0] == picture(n)).all() for each, n in zip(pixels, ids, strict=True))
    assert len(all_of_them._opened) == 2


def test_labels_are_mapped_and_a_copy_in_another_process_maps_them_anew(tmp_path):
    original = opened(write(tmp_path, SIZES))
    state = pickle.dumps(original)
    assert len(state) < len(pickle.dumps(original.labels)) + 20_000 and b"labels-" in state
    copied = pickle.loads(state)
    assert copied.labels.tolist() == original.labels.tolist()
    assert not copied.labels.flags.owndata and not copied.labels.flags.writeable
    assert copied.keys([50]) == original.keys([50])


@pytest.mark.parametrize("policy", ["strict", "skip"])
def test_a_shard_that_is_another_by_the_time_it_is_read(tmp_path, policy):
    write(tmp_path, [4, 6, 5])
    data = {"damage": policy, "damage_share": 0.9}
    late = opened(tmp_path, **data)
    path = write_tar(tmp_path / "train-000001.tar", tar_files(range(40, 46)))
    save_index(path, scan_tar(path))
    if policy == "strict":
        assert "is not the shard that was indexed (sha256)" in refused(late.inputs, [5])
        return
    inputs, unreadable = late.read(np.arange(15))
    assert set(unreadable) == set(range(4, 10)) and "sha256" in unreadable[4]
    assert late.where(5) == f"{path}: sample number 1"
    assert all((inputs[n, 0] == picture(n)).all() for n in (0, 3, 10, 14))


def test_another_label_member_than_the_manifests_is_read_from_the_shards(tmp_path):
    files = []
    for n in range(6):
        label = json.dumps({"label": 6 - n}).encode()
        files += [(f"{n}.cls", b"%d" % n), (f"{n}.json", label), (f"{n}.png", sample(n)["png"])]
    path = write_tar(tmp_path / "train-0.tar", files)
    save_index(path, scan_tar(path))
    entry = shard_entry(path.name, scan_tar(path), np.arange(6))
    write_manifest(tmp_path, CLASSES, {"train": {"samples": 6, "shards": [entry]}})
    assert opened(tmp_path, input="png").labels.tolist() == list(range(6))
    message = refused(opened, tmp_path, input="png", label="json:label")
    assert "says 6 samples of 6 classes" in message


# Arrays


arrays = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.one_of(
        st.lists(st.integers(-(2**60), 2**60)).map(lambda v: np.array(v, np.int64)),
        st.lists(st.text(max_size=5), min_size=1).map(lambda v: np.array(v, np.str_)),
        st.lists(st.floats(width=32)).map(lambda v: np.array(v, np.float32).reshape(1, -1)),
        st.booleans().map(np.array),
    ),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(arrays)
def test_mapped_arrays_are_those_that_numpy_loads(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    np.savez(path, **values)
    mapped = map_npz(path)
    with np.load(path, allow_pickle=False) as loaded:
        assert mapped.keys() == set(loaded)
        for name in mapped:
            assert mapped[name].dtype == loaded[name].dtype
            assert mapped[name].shape == loaded[name].shape
            assert mapped[name].tobytes() == loaded[name].tobytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_of_an_array_is_found(tmp_path_factory, place, change):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    np.savez(path, a=np.arange(40), b=np.array("text"))
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= change
    path.write_bytes(content)
    try:
        mapped = map_npz(path)
    except Exception:
        return
    # Names, times and padding of the archive are no array's.
    known = {"a": np.arange(40), "b": np.array("text")}
    assert all(np.array_equal(mapped[name], known[name]) for name in mapped.keys() & known.keys())


def test_a_compressed_archive_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", a=np.arange(9))
    with pytest.raises(ValueError, match="is compressed"):
        map_npz(tmp_path / "x.npz")


@given(st.lists(st.integers(-1, 6), max_size=40))
def test_labels_below_0_count_for_no_class(labels):
    expected = [labels.count(c) for c in range(7)]
    assert count_classes(np.array(labels, np.int32), 7).tolist() == expected


# Manifests that somebody wrote to harm


def test_names_of_a_manifest_are_of_its_own_directory(tmp_path):
    write(tmp_path, SIZES)
    good = manifest_of(tmp_path)
    for name in ("../train-000000.tar", "/etc/passwd", "a\0b.tar", ""):
        manifest = json.loads(json.dumps(good))
        manifest["splits"]["train"]["shards"][0]["name"] = name
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert "splits.train.shards.0.name" in refused(opened, tmp_path)
    for split in ("../train", "a\0"):
        manifest = good | {"splits": good["splits"] | {split: good["splits"]["train"]}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert "is not a manifest of shards: splits" in refused(opened, tmp_path)


def test_validate_tells_a_size_that_is_not_the_shards(tmp_path):
    write(tmp_path, SIZES)
    manifest = manifest_of(tmp_path)
    size = manifest["splits"]["train"]["shards"][1]["bytes"]
    manifest["splits"]["train"]["shards"][1]["bytes"] = 2**63
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    findings = validate(str(tmp_path), Data(), "train")
    said = [str(corruption) for finding in findings for corruption in finding.corruption]
    assert len(said) == 1 and f"has {size} bytes, manifest.json says {2**63}" in said[0]
