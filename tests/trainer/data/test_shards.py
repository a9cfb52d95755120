"""Shards on disk: what the writer promises, what opening checks, and what decoding gives."""

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from PIL import Image
from shardsets import (
    CLASSES,
    label_of,
    picture,
    png,
    sample,
    tar_files,
    write_split,
    write_tar,
    write_uneven,
)

from pipeline.config import Data, UserError
from trainer.data import ShardWriter, open_shards, write_manifest
from trainer.data.label_files import class_counts
from trainer.data.tars import index_path, load_index, save_index, scan_tar
from trainer.data.texts import Texts


def refusal(call, *arguments, **options) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def opened(directory, **data):
    return open_shards(str(directory), Data(**data), "train")


def refused(directory, **data) -> str:
    """The one line with which `opened` is refused."""
    return refusal(opened, directory, **data)


# Writing


def test_webdataset_reads_what_we_write(tmp_path):
    write_split(tmp_path, 25, per_shard=10)
    urls = str(tmp_path / "train-{000000..000002}.tar")
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [item["__key__"] for item in read] == [f"{n:05d}" for n in range(25)]
    for number, item in enumerate(read):
        assert item["png"] == sample(number)["png"] and int(item["cls"]) == label_of(number)


def test_the_manifest_counts_what_the_shards_hold(tmp_path):
    write_split(tmp_path, 25, per_shard=10)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    shards = manifest["splits"]["train"]["shards"]
    assert manifest["classes"] == CLASSES and manifest["splits"]["train"]["samples"] == 25
    assert [shard["samples"] for shard in shards] == [10, 10, 5]
    for shard in shards:
        assert shard["bytes"] == (tmp_path / shard["name"]).stat().st_size
    counts = class_counts(tmp_path, manifest, "train")
    assert counts.tolist() == np.bincount([label_of(n) for n in range(25)], minlength=7).tolist()


def test_the_same_samples_give_the_same_bytes(tmp_path):
    a, b = (write_split(tmp_path / name, 12) / "train-000000.tar" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_nothing_is_left_of_a_writer_that_fails(tmp_path):
    with pytest.raises(RuntimeError):
        with ShardWriter(tmp_path, "train", CLASSES, samples_per_shard=2) as writer:
            for number in range(5):
                writer.write(sample(number))
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_split_is_overwritten_only_with_overwrite(tmp_path):
    write_split(tmp_path, 25, per_shard=10)
    assert "already holds train shards" in refusal(ShardWriter, tmp_path, "train", CLASSES)
    with ShardWriter(tmp_path, "train", CLASSES, overwrite=True) as writer:
        writer.write(sample(0))
    names = sorted(file.name for file in tmp_path.glob("train-*"))
    assert names == ["train-000000.tar", "train-000000.tar.index.npz"]


def test_a_writer_refuses_labels_and_keys_that_no_reader_would_understand(tmp_path):
    with ShardWriter(tmp_path, "train", CLASSES) as writer:
        message = refusal(writer.write, {"__key__": "a", "cls": b"7", "png": b""})
        assert "class 7 is not in 0..6" in message
        with pytest.raises(ValueError, match="dots"):
            writer.write({"__key__": "a.b", "cls": b"0", "png": b""})


def test_splits_of_one_manifest_share_their_classes(tmp_path):
    write_split(tmp_path, 3)
    write_split(tmp_path, 3, "val", first=3)
    assert open_shards(str(tmp_path), Data(), "val").num_samples == 3
    with ShardWriter(tmp_path, "test", ["other"]) as writer:
        writer.write({"__key__": "a", "cls": b"0", "png": b"x"})
    message = refusal(write_manifest, tmp_path, ["other"], {"test": writer.facts})
    assert "with other classes" in message


def test_class_names_must_differ(tmp_path):
    assert "two classes are called 'a'" in refusal(write_manifest, tmp_path, ["a", "b", "a"], {})


# Opening


def test_a_shard_set_is_what_was_written(uneven):
    shards = opened(uneven)
    assert (shards.num_samples, shards.num_classes, shards.class_names) == (150, 7, CLASSES)
    assert shards.labels.tolist() == [label_of(n) for n in range(150)]
    assert shards.class_counts.tolist() == np.bincount(shards.labels, minlength=7).tolist()
    assert (shards.input_shape, shards.input_dtype) == ((1, 6, 5), np.uint8)
    ids = np.array([149, 0, 41, 41, 7])
    assert shards.keys(ids) == ["00149", "00000", "00041", "00041", "00007"]
    assert all((x[0] == picture(n)).all() for x, n in zip(shards.inputs(ids), ids, strict=True))
    assert shards.raw([41])[0] == {"png": sample(41)["png"], "cls": sample(41)["cls"]}


def test_patterns_that_mean_the_same_give_the_same_set(uneven):
    patterns = [
        f"{uneven}",
        f"{uneven}/",
        f"{uneven}/train-{{000000..000006}}.tar",
        f"{uneven}/train-*.tar",
        f"{uneven}/train-{{000000..000003}}.tar::{uneven}/train-00000[456].tar",
    ]
    labels = [open_shards(pattern, Data(), "train").labels.tolist() for pattern in patterns]
    assert all(each == labels[0] for each in labels)


def test_the_fingerprint_is_of_the_content_and_not_of_the_path(tmp_path):
    def fingerprint(name, count):
        return opened(write_split(tmp_path / name, count) / "train-000000.tar").fingerprint

    assert fingerprint("a", 9) == fingerprint("b", 9) != fingerprint("c", 10)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("", "data.train is empty"),
        ("{d}/nothing-*.tar", "no train shard matches"),
        ("{d}/nothing.tar", "no train shard matches"),
        ("{d}/absent", "no train shard matches"),
        ("{d}/train-{{000000..000009}}.tar", "no such shard"),
        ("{d}/train-000000.tar::{d}/train-*.tar", "2 times"),
        ("{d}/manifest.json", "is not a .tar"),
        ("{d}/train-{{0..", "the braces do not match"),
    ],
)
def test_a_wrong_pattern_gets_one_line(uneven, pattern, message):
    assert message in refusal(open_shards, pattern.format(d=uneven), Data(), "train")


def test_a_split_that_the_manifest_lacks_is_named(uneven):
    assert "no split 'val' (it has train)" in refusal(open_shards, str(uneven), Data(), "val")


def test_a_shard_that_the_manifest_leaves_out_is_not_left_out_in_silence(tmp_path):
    write_uneven(tmp_path, [4, 5])
    write_tar(tmp_path / "train-000002.tar", tar_files(range(9, 12)))
    assert "train-000002.tar is not in" in refused(tmp_path)


def test_a_manifest_whose_total_is_not_that_of_its_shards_is_refused(tmp_path):
    write_uneven(tmp_path, [4, 5])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["splits"]["train"]["samples"] = 10
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert "split train has 10 samples, its shards 9" in refused(tmp_path)


def test_without_a_manifest_the_config_says_how_many_classes_there_are(tmp_path):
    write_tar(tmp_path / "train-0.tar", tar_files(range(9)))
    assert "set data.classes" in refused(tmp_path)
    assert opened(tmp_path, classes=9).num_classes == 9
    assert "label 4, which is none of the 3" in refused(tmp_path, classes=3)


def test_the_config_may_not_contradict_the_manifest(uneven):
    assert "has 7 classes" in refused(uneven, classes=8)


def test_directories_of_different_classes_do_not_mix(uneven, tmp_path):
    with ShardWriter(tmp_path, "train", ["a", "b"]) as writer:
        writer.write(sample(0))
    write_manifest(tmp_path, ["a", "b"], {"train": writer.facts})
    assert "different classes" in refused(f"{uneven}::{tmp_path}")


def with_json_label(number, value):
    """The files of a sample whose label is a field of a JSON file."""
    label = json.dumps({"label": value}).encode()
    return [(f"{number}.json", label), (f"{number}.png", sample(number)["png"])]


def test_labels_come_from_a_json_field(tmp_path):
    write_tar(tmp_path / "train-0.tar", with_json_label(0, 3) + with_json_label(1, 0))
    shards = opened(tmp_path, label="json:label", classes=7)
    assert shards.labels.tolist() == [3, 0] and shards.inputs([1]).shape == (1, 1, 6, 5)
    assert "no field 'x'" in refused(tmp_path, label="json:x", classes=7)


def test_a_text_in_a_json_field_is_a_class_name_even_if_it_looks_like_a_number(tmp_path):
    files = with_json_label(0, "1") + with_json_label(1, "0")
    path = write_tar(tmp_path / "train-1.tar", files)
    shard = {
        "name": "train-1.tar",
        "samples": 2,
        "bytes": 0,
        "sha256": scan_tar(path, "json:label").sha256,
        "class_counts": {"1": 1, "0": 1},
    }
    write_manifest(tmp_path, ["1", "0"], {"train": {"samples": 2, "shards": [shard]}})
    assert opened(tmp_path, label="json:label").labels.tolist() == [0, 1]
    assert "no field 'x'" in refused(path, label="json:x")


def test_the_input_is_named_where_there_are_several(tmp_path):
    files = []
    for number in range(3):
        files += tar_files([number]) + [(f"{number:05d}.txt", b"text")]
    write_tar(tmp_path / "train-0.tar", files)
    assert "members png, txt" in refused(tmp_path, classes=7)
    [text] = opened(tmp_path, classes=7, input="txt").inputs([0])
    assert text.tobytes() == b"text"
    assert "has no member .npy" in refused(tmp_path, classes=7, input="npy")


def test_an_unknown_extension_names_the_known_ones(tmp_path):
    write_tar(tmp_path / "train-0.tar", [("a.cls", b"0"), ("a.flac", b"")])
    message = refused(tmp_path, classes=2)
    assert "no decoder for .flac members (known: bmp, gif, jfif," in message


# The index


def test_an_index_is_made_once_and_then_used(tmp_path, monkeypatch):
    write_uneven(tmp_path, [4, 5], indexed=False)
    first = opened(tmp_path)
    monkeypatch.setattr("trainer.data.opening.scan_tar", lambda *_: pytest.fail("scanned again"))
    again = opened(tmp_path)
    assert again.fingerprint == first.fingerprint and (again.inputs([8]) == first.inputs([8])).all()


def test_a_touched_shard_is_recognised_and_a_changed_one_refused(tmp_path):
    shard = write_uneven(tmp_path, [4], manifest=False) / "train-000000.tar"
    os.utime(shard, (1, 1))
    assert not load_index(shard)[1]
    opened(tmp_path, classes=7)
    assert load_index(shard)[1]
    write_tar(shard, tar_files(range(10, 15)))
    assert "is not the shard that was indexed" in refused(tmp_path, classes=7)
    index_path(shard).unlink()
    assert opened(tmp_path, classes=7).num_samples == 5


def test_a_broken_index_is_rebuilt(tmp_path):
    shard = write_uneven(tmp_path, [4]) / "train-000000.tar"
    for content in (b"", b"rubbish", index_path(shard).read_bytes()[:200]):
        index_path(shard).write_bytes(content)
        assert opened(tmp_path).num_samples == 4


def rewritten(shard, **arrays):
    """The index file with some arrays others, as a program would write it that knows no digest."""
    with np.load(index_path(shard)) as file:
        values = dict(file) | arrays
    times = os.stat(index_path(shard))
    np.savez(index_path(shard), **values)
    os.utime(index_path(shard), ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "no manifest"])
def test_permuted_labels_of_an_index_are_found_and_the_shard_is_read_again(tmp_path, manifest):
    write_uneven(tmp_path, [60], manifest=manifest)
    shard = tmp_path / "train-000000.tar"
    data = Data() if manifest else Data(classes=7)
    expected = open_shards(str(tmp_path), data, "train").labels
    with np.load(index_path(shard)) as file:
        numbers, schema = file["label_number"], int(file["schema"])
    permuted = np.random.default_rng(0).permutation(numbers)
    assert schema == 3 and not np.array_equal(permuted, numbers)
    rewritten(shard, label_number=permuted)
    assert load_index(shard) is None
    shards = open_shards(str(tmp_path), data, "train")
    assert np.array_equal(shards.labels, expected) and len(shards.inputs([0]))
    assert load_index(shard)[1]


@pytest.mark.parametrize("blanks", ["", "\n", " \r\n"], ids=["bare", "line", "blanks"])
def test_labels_are_compared_with_their_members_even_where_a_digest_vouches_for_them(
    tmp_path, blanks
):
    files = [(f"{n:02d}.{ext}", text) for n in range(9) for ext, text in sample_of(n, blanks)]
    shard = write_tar(tmp_path / "train-0.tar", files)
    index = scan_tar(shard)
    save_index(shard, index)
    assert load_index(shard)[1]
    save_index(shard, replace(index, label_number=np.roll(index.label_number, 1)))
    assert load_index(shard) is None
    save_index(shard, replace(index, label_texts=Texts.of(reversed(list(index.label_texts)))))
    assert load_index(shard) is None


def sample_of(number, blanks):
    return [("txt", b"%d" % number), ("cls", f"{number % 4}{blanks}".encode())]


@pytest.mark.parametrize("name", ["offset", "size", "crc", "member_start", "stat", "sha256"])
def test_an_index_of_which_any_array_differs_is_none(tmp_path, name):
    write_uneven(tmp_path, [8])
    shard = tmp_path / "train-000000.tar"
    with np.load(index_path(shard)) as file:
        array = file[name]
    rewritten(shard, **{name: np.array("f" * 64) if name == "sha256" else np.roll(array, 1)})
    assert load_index(shard) is None


def test_the_index_of_another_shard_of_the_same_size_is_not_this_ones(tmp_path):
    """Its time says so, and where a copy keeps times, the checksums of what is read."""
    write_uneven(tmp_path, [8, 8])
    one, other = (tmp_path / f"train-00000{n}.tar" for n in (0, 1))
    index_path(other).write_bytes(index_path(one).read_bytes())
    shards = open_shards(str(tmp_path), Data(), "train")
    assert shards.labels.tolist() == [label_of(number) for number in range(16)]


def test_an_index_of_schema_1_is_read(uneven, tmp_path, monkeypatch):
    shutil.copytree(uneven, tmp_path / "s")
    for shard in (tmp_path / "s").glob("*.tar"):
        index = scan_tar(shard)
        texts = index.label_texts.decoded()
        values = vars(index) | {
            "keys": np.array(list(index.keys), np.bytes_),
            "label_texts": np.array([texts[n] for n in index.label_number], np.bytes_),
            "damaged": np.array([], np.str_),
            "reasons": np.array([], np.str_),
        }
        del values["label_number"]
        times = [shard.stat().st_size, shard.stat().st_mtime_ns]
        np.savez(f"{shard}.index.npz", schema=1, stat=times, **values)
    monkeypatch.setattr("trainer.data.opening.scan_tar", None)  # no need to read the tars again
    old, new = (open_shards(str(path), Data(), "train") for path in (tmp_path / "s", uneven))
    assert old.labels.tolist() == new.labels.tolist()
    assert old.keys(np.arange(150)) == new.keys(np.arange(150))
    assert old.fingerprint == new.fingerprint


def test_a_long_key_or_label_takes_no_room_for_the_others(tmp_path):
    files = tar_files(range(200)) + [("z" * 90 + ".cls", b"x" * 50_000), ("z" * 90 + ".png", b"")]
    index = scan_tar(write_tar(tmp_path / "train-0.tar", files))
    save_index(tmp_path / "train-0.tar", index)
    stored, unchanged = load_index(tmp_path / "train-0.tar")
    assert unchanged and list(stored.label_texts) == list(index.label_texts)
    assert index.label_texts.buffer.nbytes < 51_000 and stored.keys[200] == b"z" * 90


def test_shards_are_read_where_no_index_can_be_written(tmp_path, monkeypatch):
    write_uneven(tmp_path, [4], indexed=False)

    def full(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(np, "savez", full)
    assert opened(tmp_path).num_samples == 4
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*"))


def test_a_member_that_changes_after_opening_is_caught_by_its_checksum(tmp_path):
    shards = opened(write_uneven(tmp_path, [4]))
    index, _ = load_index(tmp_path / "train-000000.tar")
    offset = index.offset[5]  # of sample 2 the second file, behind its label
    with open(tmp_path / "train-000000.tar", "r+b") as file:
        file.seek(int(offset) + 50)
        file.write(b"\0\1")
    assert "sample 00002: its member .png has changed" in refusal(shards.inputs, [2])
    assert shards.inputs([1]).shape == (1, 1, 6, 5)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_writers_are_read(tmp_path, format):
    long = "deep/" * 30 + "sample"
    files = {
        f"{long}.png": sample(0)["png"],
        f"{long}.cls": b"2",
        "é.png": sample(1)["png"],
        "é.cls": b"3",
        "__meta__": b"x",
        "README": b"x",
    }
    with tarfile.open(tmp_path / "train-0.tar", "w", format=format) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        archive.addfile(directory_entry("deep"))
    shards = opened(tmp_path, classes=7)
    assert shards.keys([0, 1]) == [long, "é"] and shards.labels.tolist() == [2, 3]


def directory_entry(name):
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE
    return entry


def test_a_refusal_names_shard_member_and_reason(tmp_path):
    write_tar(tmp_path / "train-0.tar", tar_files(range(3))[:-1])
    message = refused(tmp_path, classes=7)
    assert "train-0.tar: 00002 has only the member .cls" in message


# Decoding


def first_of(path, extension, content, **data):
    """The decoded input of a sample with this file."""
    write_tar(path / "train-0.tar", [("a.cls", b"0"), (f"a.{extension}", content)])
    return opened(path, classes=2, **data).inputs([0])[0]


FORMATS = [("png", "png"), ("webp", "webp"), ("jpg", "jpeg"), ("jpeg", "jpeg")]


@pytest.mark.parametrize("extension, format", FORMATS)
def test_pictures_become_channels_first(tmp_path, extension, format):
    pixels = np.zeros((8, 6, 3), np.uint8)
    pixels[..., 1] = 200
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, quality=95)
    pixels = first_of(tmp_path, extension, file.getvalue())
    assert pixels.shape == (3, 8, 6) and pixels.dtype == np.uint8
    assert abs(pixels.astype(int).mean((1, 2)) - [0, 200, 0]).max() < 6


def test_each_channel_is_a_plane_of_the_picture(tmp_path):
    shape = (70, 1001, 3)  # beyond Pillow's 64 KiB buffer
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(first_of(tmp_path, "png", png(pixels)), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "mode, channels", [("L", 1), ("1", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3)]
)
def test_modes_become_gray_or_rgb(tmp_path, mode, channels):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(file, "tiff")
    assert first_of(tmp_path, "png", file.getvalue()).shape == (channels, 4, 4)


def test_of_16_bits_the_high_byte_is_read_and_floats_are_refused(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(file, "png")
    assert (first_of(tmp_path, "png", file.getvalue()) == 40_000 // 256).all()
    (tmp_path / "train-0.tar.index.npz").unlink()
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(file, "tiff")
    assert "a picture of floats" in refusal(first_of, tmp_path, "tiff", file.getvalue())


def test_arrays_texts_and_numbers(tmp_path):
    file = io.BytesIO()
    np.save(file, np.arange(6, dtype=np.float32).reshape(2, 3))
    assert first_of(tmp_path, "npy", file.getvalue()).tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "train-0.tar.index.npz").unlink()
    assert first_of(tmp_path, "json", b"[1, 2.5]").tolist() == [1, 2.5]


def test_pickles_are_refused(tmp_path):
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    assert "cannot be decoded" in refusal(first_of, tmp_path, "npy", file.getvalue())


def test_the_config_names_a_decoder(tmp_path):
    name = "trainer.data.decoding:hashed_ngrams"
    array = first_of(tmp_path, "txt", b"Soybean farming", decoders={"txt": name})
    assert array.shape == (2048,) and abs(np.linalg.norm(array) - 1) < 1e-6
    wrong = {
        "no_such_module:f": "No module named",
        "json:nothing": "no function nothing",
        "x": "write",
    }
    for decoder, message in wrong.items():
        assert message in refused(tmp_path, classes=2, decoders={"txt": decoder})


def write_pictures(directory, first, second) -> None:
    """Two samples, a and b."""
    files = [("a.cls", b"0"), ("a.png", png(first)), ("b.cls", b"0"), ("b.png", png(second))]
    write_tar(directory / "train-0.tar", files)


def test_inputs_of_two_sizes_are_refused_with_the_remedy(tmp_path):
    write_pictures(tmp_path, np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8))
    message = refusal(opened(tmp_path, classes=2).inputs, [0, 1])
    assert "sample b: is uint8 [1, 4, 5], the first sample uint8 [1, 4, 4]" in message


def test_a_gray_picture_among_coloured_ones_gets_three_equal_channels(tmp_path):
    gray = np.arange(16, dtype=np.uint8).reshape(4, 4)
    write_pictures(tmp_path, np.zeros((4, 4, 3), np.uint8), gray)
    pixels = opened(tmp_path, classes=2).inputs([1])[0]
    assert (pixels == gray).all() and pixels.shape == (3, 4, 4)
