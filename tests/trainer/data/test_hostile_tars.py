"""What a member of a tar may take, and what comes of hostile tars. `make soak` has sixty."""

import os

import pytest
from hostile_tars import HOSTILE, NO_FILES, judge, member, sample
from shardsets import tar_files, write_tar

from pipeline.config import Data, UserError
from trainer.data import open_shards
from trainer.data.bounds import KIB, LABEL_BYTES, NAME_BYTES
from trainer.data.tars import scan_tar

FAST = ["chain_of_pax", "large_label", "control_names", "lying_size", "pipe", "directory"]
BY_NAME = {each.__name__: each for each in HOSTILE + NO_FILES}


@pytest.mark.parametrize("name", FAST)
def test_a_hostile_tar_is_one_line_or_costs_its_own_samples(tmp_path, name):
    judge(tmp_path, 1, BY_NAME[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slow_pax", "sparse_by_pax", "many_members", "huge_picture"])
def test_a_hostile_tar_takes_little_memory_and_time(tmp_path, name):
    judge(tmp_path, 2, BY_NAME[name])


def damage(path) -> dict[str, str]:
    index = scan_tar(path)
    return dict(zip(index.damaged.decoded(), index.reasons.decoded(), strict=True))


@pytest.mark.parametrize(
    "hostile, key, reason",
    [
        (
            sample("a", b"7" * 65537),
            "a",
            "its label (.cls) has 65537 bytes, at most 65536 are read",
        ),
        (
            sample("a", **{f"e{n}": b"" for n in range(999)}),
            "a",
            "it has more than 1000 members",
        ),
        (
            member("././@LongLink", b"k" * 5000 + b".png\0", b"L") + sample("a"),
            "k" * 60 + "___ (5004 letters)",
            "its name has 5004 bytes, at most 4096 are read",
        ),
        (
            member("././@LongLink", b"k" * 1_100_000, b"L") + sample("a"),
            "",
            "a chain of pax and longname headers has 1100000 bytes, at most 1048576 are read",
        ),
        (
            member("././@LongLink", b"name.png\0", b"L") * 9 + sample("a"),
            "",
            "a chain of headers has 9 headers, at most 8 are read",
        ),
        (member("p", b"3 a3 a3 a", b"x") + sample("a"), "", "a pax header is broken"),
        (member("p", b"22 GNU.sparse.major=1\n", b"x") + sample("a"), "", "it is a sparse file"),
    ],
)
def test_what_exceeds_a_limit_is_damage_that_names_it(tmp_path, hostile, key, reason):
    path = tmp_path / "x-0.tar"
    path.write_bytes(hostile + sample("good") + bytes(10240))
    reasons = damage(path)
    assert any(found.startswith(key) and reason in why for found, why in reasons.items()), reasons
    assert list(scan_tar(path).keys)[-1:] == [b"good"] or key == ""


def test_what_is_just_within_a_limit_is_read(tmp_path):
    name = "k" * (NAME_BYTES - 4)
    long = member("././@LongLink", f"{name}.png".encode() + b"\0", b"L") + member("x", b"1")
    long += member("././@LongLink", f"{name}.cls".encode() + b"\0", b"L")
    long += member("x", b"7" * LABEL_BYTES)
    path = tmp_path / "x-0.tar"
    path.write_bytes(long + bytes(10240))
    index = scan_tar(path)
    assert not len(index.damaged) and list(index.keys) == [name.encode()]
    assert (NAME_BYTES, LABEL_BYTES) == (4 * KIB, 64 * KIB)


@pytest.mark.parametrize("name", ["pipe", "directory", "endless"])
def test_what_is_no_regular_file_is_refused_at_once_in_one_line(tmp_path, name):
    write_tar(tmp_path / "train-000000.tar", tar_files(range(3)))
    BY_NAME[name](tmp_path / "train-000001.tar")
    data = Data(classes=7, damage="skip", damage_share=0.9)
    with pytest.raises(UserError, match=r"000001.tar is a .*; only regular files are read"):
        open_shards(f"{tmp_path}/train-{{000000..000001}}.tar", data, "train")
    with pytest.raises(UserError, match=r"000001.tar is a .*; only regular files are read"):
        scan_tar(tmp_path / "train-000001.tar")


def test_a_manifest_that_is_a_pipe_is_refused_at_once(tmp_path):
    write_tar(tmp_path / "train-000000.tar", tar_files(range(3)))
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"manifest.json is a named pipe; only regular files"):
        open_shards(str(tmp_path), Data(classes=7), "train")
