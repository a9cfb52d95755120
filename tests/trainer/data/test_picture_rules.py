"""How pictures become arrays is settled for a whole set, written in its manifest, and kept."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from shards_command import refusal, run
from shardsets import write_tar

from networks import PictureRules
from pipeline.config import Data, UserError
from trainer.data import MeasuringStream, cache, open_shards
from trainer.data.routing import open_routed, route

RANDOM = np.random.default_rng(0)
PHOTO = RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def saved(picture, kind="png", **options) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def folder(root, files: dict[str, bytes]):
    for kind in ("x", "y"):
        (root / kind).mkdir(parents=True)
        for name, content in files.items():
            (root / kind / name).write_bytes(content)
    return root


def shards_of(root, out, *options):
    words = ["--out", out, "--val", 0, "--test", 0, "--overwrite", *options]
    assert run("folder", root, *words) == 0
    return open_shards(str(out), Data(), "train")


def members(shards) -> list[tuple[str, bytes]]:
    """(extension, content) of the inputs of class x."""
    count = int((shards.labels == 0).sum())
    return [
        next((extension, content) for extension, content in files.items() if extension != "cls")
        for files in shards.raw(np.arange(count))
    ]


def pictures_of(out) -> dict:
    return json.loads((out / "manifest.json").read_text())["inputs"]["pictures"]


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(PHOTO).transpose(Image.Transpose.ROTATE_90), exif=exif)


def test_pictures_that_need_no_change_are_copied_byte_for_byte(tmp_path, capsys):
    jpeg, webp = saved(PHOTO, "jpeg"), saved(PHOTO, "webp")
    files = {"0.jpg": jpeg, "1.webp": webp, "2.png": sideways(), "3.bmp": saved(PHOTO, "bmp")}
    shards = shards_of(folder(tmp_path / "d", files), tmp_path / "s")
    kept = members(shards)
    assert kept[0] == ("jpg", jpeg) and kept[1] == ("webp", webp)
    assert kept[2][0] == "png" and kept[3] == ("bmp", files["3.bmp"])
    assert (shards.inputs([2])[0] == PHOTO.transpose(2, 0, 1)).all()
    out = capsys.readouterr().out
    assert "pictures kept as they are: 6" in out
    assert "pictures turned upright by their EXIF orientation: 2" in out
    assert pictures_of(tmp_path / "s") == {
        "channels": 3,
        "crop": "center",
        "filter": "bicubic",
        "background": "white",
    }
    assert "gray made RGB" not in out
    assert members(shards_of(tmp_path / "d", tmp_path / "s", "--size", 6))[0][0] == "png"


def test_a_jpeg_of_the_size_that_is_asked_for_stays_a_jpeg(tmp_path):
    square = saved(PHOTO[:, :6], "jpeg")
    shards = shards_of(folder(tmp_path / "d", {"a.jpg": square}), tmp_path / "s", "--size", 6)
    assert members(shards) == [("jpg", square)]


@pytest.mark.parametrize(
    "options, rules",
    [
        (["--size", 4], PictureRules(size=(4, 4), channels=3)),
        (["--size", 4, "--gray"], PictureRules(size=(4, 4), channels=1)),
        (["--size", 4, "--crop", "none"], PictureRules(size=(4, 4), channels=3, crop="none")),
        (["--gray", "--background", "black"], PictureRules(channels=1, background="black")),
        (["--max-pixels", 50], PictureRules(channels=3, max_pixels=50)),
    ],
)
def test_the_options_are_the_rules_that_the_manifest_has(tmp_path, options, rules):
    alpha = np.dstack([PHOTO, np.full((6, 8), 100, np.uint8)])
    root = folder(tmp_path / "d", {"a.png": saved(alpha), "b.png": saved(PHOTO)})
    shards = shards_of(root, tmp_path / "s", *options)
    assert shards.pictures == rules and PictureRules.from_json(pictures_of(tmp_path / "s")) == rules
    assert len(shards.inputs([0, 1])) == 2


@pytest.mark.parametrize(
    "options, words",
    [
        (["--crop", "middle"], "--crop 'middle': must be one of center, none"),
        (["--background", "pink"], "--background 'pink': must be white, black, gray or #rrggbb"),
        (["--max-pixels", 47], "a picture of 8 x 6 = 48 pixels, above max_pixels = 47"),
        (
            ["--max-pixels", 47, "--size", 2],
            "47; --max-pixels 48 (max_pixels=48) allows it",
        ),
    ],
)
def test_what_the_rules_do_not_allow_is_one_line(tmp_path, options, words):
    root = folder(tmp_path / "d", {"a.png": saved(PHOTO)})
    assert words in refusal("folder", root, "--out", tmp_path / "s", *options)
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_upright_sizes_count_and_gray_in_any_container_is_gray(tmp_path):
    gray = PHOTO[:, :, 0]
    sixteen = saved(gray.astype(np.uint16) * 257)
    with_alpha = saved(Image.fromarray(gray).convert("LA"))
    files = {"a.png": saved(gray), "b.png": sixteen, "c.png": with_alpha}
    shards = shards_of(folder(tmp_path / "gray", files), tmp_path / "s")
    assert shards.input_shape == (1, 6, 8) and (shards.inputs(range(3)) == gray).all()
    upright = {"a.png": sideways(), "b.png": saved(PHOTO)}
    assert shards_of(folder(tmp_path / "d", upright), tmp_path / "t").input_shape == (3, 6, 8)
    mixed = folder(tmp_path / "mixed", {"a.png": saved(PHOTO), "b.png": sixteen})
    assert "differ in mode" in refusal("folder", mixed, "--out", tmp_path / "u")


def test_shards_that_others_made_are_read_by_the_same_rules(tmp_path, capsys):
    files = []
    for number, content in enumerate([sideways(), saved(PHOTO)]):
        files += [(f"{number}.cls", b"%d" % number), (f"{number}.png", content)]
    write_tar(tmp_path / "train-0.tar", files)
    assert run("index", tmp_path) == 0
    shards = open_shards(str(tmp_path), Data(), "train")
    assert shards.pictures is None
    assert (shards.inputs([0, 1]) == PHOTO.transpose(2, 0, 1)).all()
    assert run("from-webdataset", tmp_path / "train-0.tar", "--out", tmp_path / "s") == 0
    assert "pictures turned upright by their EXIF orientation: 1" in capsys.readouterr().out


def test_index_and_from_webdataset_keep_the_rules(tmp_path):
    root = folder(tmp_path / "d", {"a.png": saved(PHOTO)})
    rules = shards_of(root, tmp_path / "s", "--size", 4, "--background", "black").pictures
    assert run("from-webdataset", tmp_path / "s/train-000000.tar", "--out", tmp_path / "t") == 0
    assert open_shards(str(tmp_path / "t"), Data(), "train").pictures == rules
    assert run("index", tmp_path / "s") == 0
    assert open_shards(str(tmp_path / "s"), Data(), "train").pictures == rules


def test_a_limit_of_pixels_can_be_set_for_shards_of_others(tmp_path):
    large = saved(Image.new("1", (20000, 10000)))
    files = [("0.cls", b"0"), ("0.png", large), ("1.cls", b"1"), ("1.png", saved(PHOTO))]
    write_tar(tmp_path / "train-0.tar", files)
    source = ["from-webdataset", tmp_path / "train-0.tar", "--out", tmp_path / "s"]
    assert "0: a picture of 20000 x 10000 = 200000000 pixels" in refusal(*source)
    assert run("index", tmp_path, "--max-pixels", 200_000_000) == 0
    rules = open_shards(str(tmp_path), Data(), "train").pictures
    assert rules == PictureRules(max_pixels=200_000_000)
    assert run(*source, "--max-pixels", 100, "--damage", "skip") == 0
    assert open_shards(str(tmp_path / "s"), Data(), "train").pictures.max_pixels == 100


def test_routed_copies_and_the_cache_keep_the_rules(tmp_path):
    root = folder(tmp_path / "d", {"a.png": saved(PHOTO), "b.png": sideways()})
    shards = shards_of(root, tmp_path / "s", "--size", 4)
    route(shards, {0: np.array([0])}, tmp_path / "routed", "copy", say=lambda _: None)
    copied, _ = open_routed(tmp_path / "routed" / "000", shards)
    assert copied.pictures == shards.pictures
    data = Data(cache="decoded", workers=0)
    kept = cache.cached(shards, tmp_path / "cache", data)
    assert (kept.inputs(range(4)) == shards.inputs(range(4))).all()
    (batch,) = MeasuringStream(shards, 4).loader(workers=1)
    assert (batch.inputs.numpy() == shards.inputs(range(4))).all()


def test_rules_of_a_set_that_disagree_are_refused(tmp_path):
    root = folder(tmp_path / "d", {"a.png": saved(PHOTO)})
    shards_of(root, tmp_path / "s", "--size", 4)
    shards_of(root, tmp_path / "t", "--size", 4, "--crop", "none")
    with pytest.raises(UserError, match="made by different rules .*crop center.*crop none"):
        open_shards(f"{tmp_path}/s::{tmp_path}/t", Data(), "train")
    tars = f"{tmp_path}/s/train-000000.tar::{tmp_path}/t/train-000000.tar"
    assert "different rules" in refusal("from-webdataset", tars, "--out", tmp_path / "u")
    options = ["--out", tmp_path / "t", "--split", "val"]
    assert "made by different rules" in refusal(
        "from-webdataset", tmp_path / "s/train-000000.tar", *options
    )


def test_sets_of_before_there_were_rules_say_them_by_their_command(tmp_path):
    root = folder(tmp_path / "d", {"a.png": saved(PHOTO)})
    shards_of(root, tmp_path / "s", "--size", 4)
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["inputs"]
    for size, gray, rules in (
        (4, False, PictureRules(size=(4, 4), channels=3)),
        (4, True, PictureRules(size=(4, 4), channels=1)),
        (None, False, None),
    ):
        manifest["made_by"] |= {"size": size, "gray": gray}
        path.write_text(json.dumps(manifest))
        assert open_shards(str(tmp_path / "s"), Data(), "train").pictures == rules


def test_rules_that_cannot_be_are_named_with_the_manifest(tmp_path):
    root = folder(tmp_path / "d", {"a.png": saved(PHOTO)})
    shards_of(root, tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["inputs"]["pictures"]["crop"] = "left"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json: inputs.pictures.crop = 'left'"):
        open_shards(str(tmp_path / "s"), Data(), "train")


def test_a_decoder_of_the_users_own_is_used_as_it_is(tmp_path, monkeypatch):
    root = folder(tmp_path / "d", {"a.png": saved(PHOTO)})
    shards_of(root, tmp_path / "s", "--size", 4)
    own = Data(decoders={"png": "trainer.data.decoding:text"})
    monkeypatch.setattr("trainer.data.decoding.text", lambda content: np.zeros(2, np.float32))
    shards = open_shards(str(tmp_path / "s"), own, "train")
    assert shards.inputs([0]).tolist() == [[0, 0]] and shards.pictures is None
    assert shards.decoder_names == {"png": "trainer.data.decoding:text"}
    colour = Data(decoders={"png": "trainer.data.decoding:rgb"})
    assert open_shards(str(tmp_path / "s"), colour, "train").pictures.channels == 3
