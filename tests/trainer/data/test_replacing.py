"""`--overwrite` replaces the old set only once the new one stands. Links lead nowhere else."""

import os

import numpy as np
import pytest
from PIL import Image
from shardsets import CLASSES, label_of, picture, sample, write_split

from networks.pictures import MAX_PIXELS, PictureRules, read_picture
from pipeline.config import Data, UserError
from trainer.commands.shards import main
from trainer.data import ShardWriter, open_shards
from trainer.data.authoring import splitting
from trainer.data.replacing import OLD, Replacement, recover


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_anew(directory, numbers):
    """All splits of `directory` anew, as every `shards` command makes them."""

    def made(number):
        content = sample(number)
        return {"png": content["png"], "cls": b"%d" % label_of(number)}

    splits = {"train": list(numbers), "val": list(numbers)[:3]}
    made_by = {"command": "test"}
    return splitting.write_splits(directory, CLASSES, splits, made, made_by, 4, overwrite=True)


@pytest.mark.parametrize("failing", ["write_manifest", "rename"])
def test_an_error_while_the_new_set_gets_its_names_leaves_the_old_one(
    tmp_path, monkeypatch, failing
):
    write_anew(tmp_path, range(9))
    before = files(tmp_path)
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == 7 and failing == "rename":
            raise OSError(28, "No space left on device")
        real(source, target)

    def no_manifest(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(os, "rename", rename)
    if failing == "write_manifest":
        monkeypatch.setattr(splitting, "write_manifest", no_manifest)
    with pytest.raises((UserError, OSError)):
        write_anew(tmp_path, range(20, 40))
    monkeypatch.undo()
    assert {name: before[name] for name in before} == files(tmp_path)
    shards = open_shards(str(tmp_path), Data(cache="none"), "train")
    assert (shards.inputs([8])[0, 0] == picture(8)).all()


def test_a_set_that_is_written_anew_leaves_nothing_of_the_old_one(tmp_path):
    write_anew(tmp_path, range(30))
    write_anew(tmp_path, range(40, 45))
    shards = open_shards(str(tmp_path), Data(cache="none"), "train")
    assert len(shards) == 5 and (shards.inputs([4])[0, 0] == picture(44)).all()
    assert not [name for name in files(tmp_path) if name.startswith(".")]
    assert len(list(tmp_path.glob("train-*.tar"))) == 2


def test_a_corrupt_sample_leaves_the_old_set(tmp_path):
    write_split(tmp_path, 4)
    before = files(tmp_path)

    def broken(number):
        raise UserError(f"sample {number} is corrupt")

    with pytest.raises(UserError, match="--damage skip leaves it out"):
        splitting.write_splits(tmp_path, CLASSES, {"train": [0]}, broken, {}, overwrite=True)
    assert files(tmp_path) == before


def test_what_was_ended_between_the_names_is_undone_by_the_next(tmp_path):
    write_split(tmp_path, 4)
    os.rename(tmp_path / "train-000000.tar", tmp_path / f".train-000000.tar.12345678{OLD}")
    recover(tmp_path)
    assert len(open_shards(str(tmp_path), Data(), "train")) == 4
    (tmp_path / f".train-000000.tar.12345678{OLD}").write_bytes(b"old")
    with ShardWriter(tmp_path, "val", CLASSES) as writer:
        writer.write(sample(1))
    assert not list(tmp_path.glob(f".*{OLD}"))


def test_what_is_not_committed_is_deleted(tmp_path):
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    with Replacement() as replacement:
        replacement.put(tmp_path / "new", tmp_path / "old")
        replacement.retire([tmp_path / "old"])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# Links out of a directory


@pytest.fixture
def photos(tmp_path):
    """Two classes of four pictures. Links out of it to a picture and to a class, one within."""
    outside = tmp_path / "outside"
    for name in ("photos/a", "photos/b", "outside/c"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(picture(number)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "photos/a/secret.png").symlink_to(outside / "c/0.png")
    (tmp_path / "photos/c").symlink_to(outside / "c")
    (tmp_path / "photos/b/within.png").symlink_to(tmp_path / "photos/a/1.png")
    return tmp_path / "photos"


def test_links_out_of_a_folder_are_counted_and_not_followed(photos, tmp_path, capsys):
    assert main(["folder", str(photos), "--out", str(tmp_path / "s"), "--val", "0"]) == 0
    said = capsys.readouterr().out
    assert "classes: 2 (a, b)" in said
    assert "passed over: 2 links out of the directory (--follow-links takes them)" in said
    manifest = open_shards(str(tmp_path / "s"), Data(cache="none"), "train")
    assert manifest.class_names == ["a", "b"]


def test_links_out_of_a_folder_are_taken_where_the_user_says_so(photos, tmp_path, capsys):
    arguments = ["folder", str(photos), "--out", str(tmp_path / "s"), "--follow-links"]
    assert main([*arguments, "--val", "0", "--test", "0"]) == 0
    assert "classes: 3 (a, b, c)" in capsys.readouterr().out
    assert len(open_shards(str(tmp_path / "s"), Data(cache="none"), "train")) == 14


# Pictures


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"


@pytest.mark.parametrize(
    "content", [EPS, b"%PDF-1.4\n", b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(99)]
)
def test_a_picture_of_another_format_is_refused_whatever_it_is_called(
    tmp_path, monkeypatch, content
):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, tmp_path / "a.png"):
        with pytest.raises(
            ValueError, match="no picture of a kind that Pillow knows, of PNG, JPEG"
        ):
            read_picture(source)


def test_a_picture_above_the_limit_is_refused_before_it_is_decoded(tmp_path):
    assert MAX_PIXELS == 8192 * 8192
    Image.new("1", (8193, 8192)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="8193 x 8192 = 67117056 pixels, above max_pixels"):
        read_picture(tmp_path / "large.png")
    small = PictureRules(max_pixels=30)
    assert read_picture(Image.fromarray(np.zeros((6, 5), np.uint8)), small).shape == (1, 6, 5)
    with pytest.raises(ValueError, match=r"\(max_pixels=36\) allows it"):
        read_picture(Image.fromarray(np.zeros((6, 6), np.uint8)), small)
