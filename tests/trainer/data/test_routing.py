"""Routing: each group's samples, as an index or a copy, in one bounded pass."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import webdataset
from shardsets import label_of, sample, write_split, write_tar, write_uneven

from pipeline.config import Data, UserError
from trainer.data import open_routed, open_shards, route
from trainer.data.label_files import class_counts
from trainer.data.tars import scan_tar

# No square is 3, 5 or 6 modulo 7.
GROUPS = {0: np.array([0, 1, 2]), 3: np.array([1, 2, 4]), 4: np.array([0, 1, 2, 4])}


@pytest.fixture(scope="module")
def shards(uneven):
    return open_shards(str(uneven), Data(), "train")


@pytest.mark.parametrize("mode", ["index", "copy"])
def test_every_group_holds_every_sample_of_its_classes_once(shards, tmp_path, mode):
    assert route(shards, GROUPS, tmp_path, mode) == {}
    for group, classes in GROUPS.items():
        header = json.loads((tmp_path / f"{group:03d}/routed.json").read_text())
        routed, ids = open_routed(tmp_path / f"{group:03d}", shards)
        expected = np.flatnonzero(np.isin(shards.labels, classes))
        assert header["samples"] == len(ids) == len(expected)
        assert header["frequency"] == len(expected) / 150
        assert routed.labels[ids].tolist() == shards.labels[expected].tolist()
        assert (routed.inputs(ids) == shards.inputs(expected)).all()
        assert routed.class_names == shards.class_names
        pictures = [raw["png"] for raw in routed.raw(ids)]
        assert pictures == [raw["png"] for raw in shards.raw(expected)]
        origins = [routed.where(sample) for sample in ids]
        assert origins == [shards.where(sample) for sample in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000", "003", "004"]


def test_one_pass_reads_each_sample_once_for_all_its_groups(shards, tmp_path, monkeypatch):
    read, order = Counter(), []
    raw = type(shards).read_raw

    def counting(self, ids):
        read.update(ids.tolist())
        order.extend(ids.tolist())
        return raw(self, ids)

    monkeypatch.setattr(type(shards), "read_raw", counting)
    monkeypatch.setattr("trainer.data.routing.CHUNK", 16)
    route(shards, GROUPS, tmp_path, "copy")
    # Every square belongs to one of the groups.
    assert set(read.values()) == {1} and len(read) == 150
    assert order == sorted(order)


def test_routed_copies_are_plain_webdatasets(shards, tmp_path):
    route(shards, GROUPS, tmp_path, "copy")
    numbers = [n for n in range(150) if label_of(n) in GROUPS[3]]
    pattern = f"{tmp_path}/003/routed-{{000000..000000}}.tar"
    read = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [int(item["__key__"]) for item in read] == numbers
    assert all(item["png"] == sample(n)["png"] for item, n in zip(read, numbers, strict=True))
    assert [int(item["cls"]) for item in read] == [label_of(n) for n in numbers]
    path = tmp_path / "003/routed-000000.tar"
    decoded = next(iter(webdataset.WebDataset(str(path), shardshuffle=False).decode("l8")))
    assert decoded["png"].shape == (6, 5)
    manifest = json.loads((tmp_path / "003/manifest.json").read_text())
    (entry,) = manifest["splits"]["routed"]["shards"]
    assert entry["sha256"] == scan_tar(path).sha256
    counts = class_counts(tmp_path / "003", manifest, "routed")
    assert counts.tolist() == np.bincount([label_of(n) for n in numbers], minlength=7).tolist()


def test_raw_members_keep_their_bytes_whatever_they_are(tmp_path):
    directory = tmp_path / "set"
    directory.mkdir()
    files = []
    for n in range(9):
        content = json.dumps({"label": n % 3, "note": f"sample {n}"}).encode()
        files += [(f"{n}.json", content), (f"{n}.seg.png", b"mask %d" % n)]
        files += [(f"{n}.png", sample(n)["png"])]
    write_tar(directory / "train-0.tar", files)
    shards = open_shards(str(directory), Data(label="json:label", input="png", classes=3), "train")
    route(shards, {0: np.array([1])}, tmp_path / "routed", "copy")
    routed, ids = open_routed(tmp_path / "routed/000", shards)
    assert [raw["seg.png"] for raw in routed.raw(ids)] == [b"mask 1", b"mask 4", b"mask 7"]
    assert routed.labels.tolist() == [1, 1, 1] and (routed.inputs([0]) == shards.inputs([1])).all()


@pytest.mark.parametrize("mode", ["index", "copy"])
def test_the_size_is_announced_beforehand_and_bounds_all_groups_together(shards, tmp_path, mode):
    lines = []
    route(shards, GROUPS, tmp_path / "a", mode, say=lines.append)
    headers = [json.loads(path.read_text()) for path in tmp_path.glob("a/*/routed.json")]
    total = sum(header["bytes"] for header in headers)
    samples = sum(np.isin(shards.labels, classes).sum() for classes in GROUPS.values())
    size = f"{total / 2**20:.1f} MiB"
    assert lines == [f"routing {samples} samples (of 150) to 3 groups by {mode}: {size}"]
    message = f"routing by {mode} takes {total} bytes, above route.max_bytes = {total - 1}"
    with pytest.raises(UserError, match=message):
        route(shards, GROUPS, tmp_path / "b", mode, total - 1, lines.append)
    assert len(lines) == 2 and not (tmp_path / "b").exists()
    route(shards, GROUPS, tmp_path / "b", mode, total, lines.append)


def test_the_announced_size_of_a_copy_is_the_size_on_disk(shards, tmp_path):
    route(shards, GROUPS, tmp_path, "copy")
    for directory in tmp_path.iterdir():
        header = json.loads((directory / "routed.json").read_text())
        (tar,) = directory.glob("*.tar")
        # Tar's end marks fill a record.
        assert 0 <= tar.stat().st_size + 8 * header["samples"] - header["bytes"] <= 10240


def test_more_groups_than_files_may_be_open_take_more_passes(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.routing.OPEN_WRITERS", 2)
    route(shards, GROUPS, tmp_path, "copy")
    for group, classes in GROUPS.items():
        _, ids = open_routed(tmp_path / f"{group:03d}", shards)
        assert len(ids) == np.isin(shards.labels, classes).sum()


def test_corrupt_samples_are_not_copied_but_counted(tmp_path):
    directory = tmp_path / "set"
    directory.mkdir()
    write_uneven(directory, [30, 30])
    lenient = open_shards(str(directory), Data(damage="skip"), "train")
    strict = open_shards(str(directory), Data(damage="strict"), "train")
    with tarfile.open(directory / "train-000000.tar") as tar:
        offset = tar.getmember("00011.png").offset_data
    with open(directory / "train-000000.tar", "r+b") as file:
        file.seek(offset + 40)
        file.write(b"\x00\xff\x00")
    lost = route(lenient, GROUPS, tmp_path / "a", "copy")
    assert list(lost) == [11] and "checksum" in lost[11]
    routed, ids = open_routed(tmp_path / "a/000", lenient)  # 11 * 11 % 7 is 2
    assert len(ids) == np.isin(lenient.labels, GROUPS[0]).sum() - 1
    assert lenient.where(11) not in {routed.where(sample) for sample in ids}
    with pytest.raises(UserError, match="sample 00011: its member .png has changed"):
        route(strict, GROUPS, tmp_path / "b", "copy")


def test_a_route_of_other_shards_is_refused(shards, tmp_path):
    route(shards, {0: np.array([0])}, tmp_path)
    other = open_shards(str(write_split(tmp_path / "set", 12)), Data(), "train")
    with pytest.raises(UserError, match="was routed from other shards"):
        open_routed(tmp_path / "000", other)
    with pytest.raises(UserError, match="holds no routed samples"):
        open_routed(tmp_path / "001", other)


def test_classes_without_samples_are_refused(shards, tmp_path):
    with pytest.raises(UserError, match="no sample of the 2 classes of group 1"):
        route(shards, {0: np.array([0]), 1: np.array([3, 5])}, tmp_path / "routed")
    assert not (tmp_path / "routed").exists()


def test_texts_and_arrays_are_routed_as_they_are(tmp_path):
    array = io.BytesIO()
    np.save(array, np.arange(4.0))
    directory = tmp_path / "set"
    directory.mkdir()
    files = []
    for n in range(4):
        files += [(f"{n}.cls", b"%d" % (n % 2)), (f"{n}.npy", array.getvalue())]
    write_tar(directory / "train-0.tar", files)
    shards = open_shards(str(directory), Data(classes=2), "train")
    route(shards, {0: np.array([1])}, tmp_path / "routed", "copy")
    routed, ids = open_routed(tmp_path / "routed/000", shards)
    assert routed.inputs(ids).tolist() == [[0.0, 1.0, 2.0, 3.0]] * 2
