"""`referral shards glyphs`: characters of many fonts, merged, distorted and written as shards."""

import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from pipeline.config import UserError
from trainer.data.authoring import glyphs as g
from trainer.data.authoring.glyph_classes import (
    default_characters,
    draw_glyphs,
    merge_identical,
    merged_classes,
)
from trainer.data.authoring.glyph_command import glyphs, read_classes
from trainer.data.authoring.glyph_drawing import (
    bicubic_weights,
    distort,
    num_uniform,
    random_uniform,
)
from trainer.data.authoring.glyph_fonts import find_faces
from trainer.data.label_files import class_counts

STILL = g.Distortion().times(0)
SMALL = {"train": 3, "val": 2}


def samples(directory, split):
    """{key: (label, pixels)} of a split, read with tarfile and Pillow."""
    images = {}
    for shard in sorted(directory.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            files = {file.name: tar.extractfile(file).read() for file in tar}
        for name in files:
            key, extension = name.split(".")
            if extension == "png":
                image = Image.open(io.BytesIO(files[name]))
                assert image.mode == "L"
                images[key] = (int(files[f"{key}.cls"]), np.asarray(image))
    return images


def render(directory, **options):
    settings = {"classes": "ABCabc", "per_class": SMALL, "progress": False} | options
    return g.render_glyphs(directory, **settings)


@pytest.fixture(scope="module")
def default_glyphs():
    return draw_glyphs(find_faces(), default_characters(), 28, g.DEFAULT_MIN_FACES)


def test_the_default_faces_give_more_than_a_thousand_classes_of_five_faces_each(default_glyphs):
    assert len(default_glyphs.characters) >= 1000
    assert default_glyphs.count.min() >= 5 and default_glyphs.count.max() <= 12
    assert len(set(default_glyphs.class_names)) == len(default_glyphs.class_names)
    words = [name.split(" ") for name in default_glyphs.class_names]
    scripts = {each[2] for each in words if len(each) > 2}
    assert {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN"} <= scripts


def test_characters_that_look_the_same_in_every_face_are_one_class(default_glyphs):
    of = {character: group for group in default_glyphs.characters for character in group}
    assert of["A"] == "A\u0391"  # Alpha. Cyrillic A is drawn otherwise in DejaVu Serif
    assert set("O\u041e\u039f") <= set(of["O"])
    assert of["O"] != of["0"] and of["c"] != of["C"]
    entries = {entry["name"].split(" ")[0]: entry for entry in merged_classes(default_glyphs)}
    assert entries["B"]["name"].startswith("B U+0042")
    assert entries["B"]["characters"] == [
        "B U+0042 LATIN CAPITAL LETTER B",
        "\u0392 U+0392 GREEK CAPITAL LETTER BETA",
        "\u0412 U+0412 CYRILLIC CAPITAL LETTER VE",
    ]


def test_merging_needs_every_shared_face_to_agree_and_enough_of_them():
    looks = {
        1: {0: b"x", 1: b"y", 2: b"z"},
        2: {0: b"x", 1: b"y"},  # as 1 in both shared faces
        3: {0: b"x", 1: b"other", 2: b"z"},  # differs in one face
        4: {2: b"z", 3: b"w"},  # shares one face only
        5: {3: b"w"},  # drawn by one face
    }
    assert merge_identical(looks, 2) == [[1, 2], [3], [4]]
    assert merge_identical(looks, 1) == [[1, 2, 4, 5], [3]]


def test_shards_manifest_and_merge_list_agree(tmp_path):
    made = render(tmp_path / "out", classes="A\u0391B")
    assert made.characters == ["A\u0391", "B"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["classes"] == made.class_names
    assert made.class_names == [
        "A U+0041 LATIN CAPITAL LETTER A",
        "B U+0042 LATIN CAPITAL LETTER B",
    ]
    splits = manifest["splits"]
    assert {name: split["samples"] for name, split in splits.items()} == {"train": 6, "val": 4}
    assert class_counts(tmp_path / "out", manifest, "train").tolist() == [3, 3]
    assert manifest["made_by"]["distortion"]["rotation"] == g.Distortion().rotation
    merged = json.loads((tmp_path / "out" / "merged.json").read_text())
    assert [entry["class"] for entry in merged] == [0]
    images = samples(tmp_path / "out", "train")
    assert sorted(images) == [f"train-000{code}-0000{k}" for code in (41, 42) for k in range(3)]
    for key, (label, pixels) in images.items():
        assert label == int("-00042-" in key) and pixels.shape == (28, 28)


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(g, "WORTH_A_PROCESS", 1)
    monkeypatch.setattr(g, "PER_SHARD", 5)
    shards = [f"train-00000{number}.tar" for number in range(4)]  # 18 images

    def rendered(name, processes, seed):
        render(tmp_path / name, processes=processes, seed=seed)
        return [(tmp_path / name / shard).read_bytes() for shard in shards]

    assert rendered("one", 1, seed=3) == rendered("two", 2, seed=3) != rendered("other", 1, seed=4)
    assert not list((tmp_path / "two").glob(".*"))
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())["splits"]["train"]
    assert manifest["samples"] == 18 and [shard["name"] for shard in manifest["shards"]] == shards
    assert [shard["samples"] for shard in manifest["shards"]] == [5, 5, 5, 3]


def test_an_image_depends_only_on_seed_split_character_and_number(tmp_path):
    render(tmp_path / "few", classes="AC", per_class={"train": 2})
    render(tmp_path / "many", classes="ABCDE", per_class={"train": 5, "val": 5})
    few, many = samples(tmp_path / "few", "train"), samples(tmp_path / "many", "train")
    assert all(np.array_equal(few[key][1], many[key][1]) for key in few)
    val = samples(tmp_path / "many", "val")
    same = [np.array_equal(many[key][1], val[key.replace("train", "val")][1]) for key in many]
    assert not any(same)


def test_classes_are_mixed_within_a_split(tmp_path):
    render(tmp_path / "out", per_class={"train": 20})
    labels = [label for label, _ in samples(tmp_path / "out", "train").values()]
    assert labels != sorted(labels) and np.bincount(labels).tolist() == [20] * 6


def test_without_distortion_every_face_takes_its_turn_undistorted(tmp_path):
    made = render(tmp_path / "out", classes="AB", per_class={"train": 24}, distortion=STILL)
    images = [pixels for label, pixels in samples(tmp_path / "out", "train").values() if label == 0]
    different, counts = np.unique(np.stack(images), axis=0, return_counts=True)
    assert len(different) == made.count[0] == 12 and set(counts) == {2}


def distorted(drawing, uniform=0.5, **amplitudes):
    """One image of a drawing, distorted by these amplitudes alone.

    All its random numbers are `uniform`.
    """
    distortion = replace(STILL, **amplitudes)
    numbers = np.full((1, num_uniform(distortion)), uniform, np.float32)
    return distort(drawing[None], numbers, torch.zeros(1, 28, 28), 28, distortion)[0]


def test_shift_is_in_pixels():
    drawing = torch.zeros(28, 28, dtype=torch.uint8)
    drawing[10:14, 10:14] = 255
    assert torch.equal(distorted(drawing), drawing)
    assert torch.equal(distorted(drawing, 0.0, shift=2), drawing.roll((2, 2), (0, 1)))


def test_rotation_is_in_degrees():
    drawing = torch.zeros(28, 28, dtype=torch.uint8)
    drawing[4:10, 6:20] = 200
    turned = distorted(drawing, 0.0, rotation=90)
    assert torch.equal(turned, drawing.rot90(-1)) or torch.equal(turned, drawing.rot90(1))


def test_contrast_and_noise_are_fractions_of_full_ink(tmp_path):
    drawing = torch.zeros(28, 28, dtype=torch.uint8)
    drawing[:14] = 255
    image = distorted(drawing, 0.5, contrast=0.4)
    assert image[0, 0] == round(255 * 0.8) and image[-1, 0] == round(255 * 0.1)
    blank = torch.full((1, 28, 28), 128, dtype=torch.uint8)
    one_class = blank.numpy(), tmp_path, np.zeros(1, int), np.ones(1, int), np.array([65]), ["A"]
    renderer = g.ShardMaker(*one_class, 28, 0, replace(STILL, noise=0.04))
    images = renderer.images("train", np.zeros(2000, int), np.arange(2000))
    deviations = images.float()[:, 2:-2, 2:-2].std((1, 2)) / 255
    assert deviations.mean().item() == pytest.approx(0.04, rel=0.05)
    assert deviations.max().item() == pytest.approx(0.08, rel=0.1)


def test_elastic_displacements_have_the_stated_size_at_the_control_points():
    u = random_uniform(0, "train", np.arange(4000), np.zeros(4000), 8 + 2 * 25)[:, 8:]
    assert abs(u.mean() - 0.5) < 0.002 and abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.05
    normal = np.sqrt(-2 * np.log1p(-u[:, 0::2])) * np.cos(2 * np.pi * u[:, 1::2])
    assert normal.std() == pytest.approx(1, rel=0.01)
    weights = bicubic_weights(5, 29)  # every 7th pixel of 29 lies on a control point
    at_points = weights.view(25, 29, 29)[:, ::7, ::7].reshape(25, 25)
    assert torch.allclose(at_points, torch.eye(25), atol=1e-6)


def test_strength_multiplies_every_amplitude_and_not_the_grid():
    twice = g.Distortion().times(2)
    assert (twice.rotation, twice.noise, twice.grid) == (12.0, 0.08, 5)
    assert g.Distortion(contrast=0.8).times(2).contrast == 1
    with pytest.raises(UserError, match="strength = -1"):
        g.Distortion().times(-1)


@pytest.mark.parametrize("size", [16, 32, 40])
def test_other_sizes_are_whole_pngs(tmp_path, size):
    render(tmp_path / "out", size=size, classes="AB", per_class={"train": 2})
    images = samples(tmp_path / "out", "train")
    assert all(pixels.shape == (size, size) and pixels.max() > 150 for _, pixels in images.values())


def test_a_users_fonts_and_a_number_of_classes(tmp_path):
    font = find_faces()[0].path
    made = render(tmp_path / "out", fonts=[font], classes=30)
    assert len(made.characters) == 30 and made.characters[0] == "!" and set(made.count) == {1}
    with pytest.raises(UserError, match="classes = 1000000: at least 1 faces draw only"):
        render(tmp_path / "more", fonts=[font], classes=1_000_000)


def collection(path):
    """The first three DejaVu faces in one file."""
    from fontTools.ttLib import TTCollection, TTFont

    made = TTCollection()
    made.fonts = [TTFont(face.path) for face in find_faces()[:3]]
    made.save(path)
    return path


def test_a_face_of_a_collection_is_asked_for_by_its_number(tmp_path):
    fonts = collection(tmp_path / "three.ttc")
    assert find_faces([fonts]) == [(str(fonts), 0), (str(fonts), 1), (str(fonts), 2)]
    assert find_faces([f"{fonts}#1"]) == [(str(fonts), 1)]
    alone = render(tmp_path / "one", fonts=[f"{fonts}#1"], classes="AB")
    every = render(tmp_path / "all", fonts=[fonts], classes="AB")
    assert np.array_equal(alone.drawings, every.drawings[[1, 4]])


def test_a_face_that_a_collection_does_not_have_is_named(tmp_path):
    fonts = collection(tmp_path / "three.ttc")
    with pytest.raises(UserError, match="three.ttc#3: the file has 3 faces, 0 to 2"):
        find_faces([f"{fonts}#3"])
    with pytest.raises(UserError, match="no-font.ttc#0: no such font file"):
        find_faces([tmp_path / "no-font.ttc#0"])


def test_characters_that_no_face_draws_are_listed(tmp_path):
    assert render(tmp_path / "out", classes="AB\u4e00\n C").left_out == "\u4e00"
    with pytest.raises(UserError, match="of 2 characters 0 are drawn by at least 5"):
        render(tmp_path / "none", classes="\u4e00\u4e01")


def not_a_font(tmp_path):
    (tmp_path / "text.ttf").write_text("no font")
    return tmp_path / "text.ttf"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fonts": lambda tmp_path: ["/nowhere/a.ttf"]}, "/nowhere/a.ttf: no such font file"),
        ({"fonts": lambda tmp_path: [not_a_font(tmp_path)]}, "text.ttf: not a font"),
        ({"fonts": lambda tmp_path: [tmp_path]}, "no font files"),
        ({"per_class": {"train": 0}}, "train = 0 images per class: must be at least 1"),
        ({"per_class": {}}, "no split"),
        ({"per_class": {"a/b": 1}}, "split 'a/b'"),
        ({"size": 2}, "size = 2: must be from 8"),
        ({"processes": 0}, "processes = 0"),
        ({"classes": "A"}, "two classes are needed"),
    ],
)
def test_errors_are_named_and_leave_nothing_behind(tmp_path, options, message):
    if "fonts" in options:
        options = {"fonts": options["fonts"](tmp_path)}
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=re.escape(message)):
        render(tmp_path / "out", **options)
    assert set(tmp_path.iterdir()) == before


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(g, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    alive = tmp_path / f".out.unfinished-{platform.node()}-{os.getppid()}"
    dead = tmp_path / f".out.unfinished-{platform.node()}-{2**22 + 1}"
    alive.mkdir()
    dead.mkdir()
    render(tmp_path / "out", classes="AB")
    assert alive.exists() and not dead.exists()


def test_an_existing_directory_is_replaced_only_by_force_and_only_if_it_holds_shards(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    render(out, classes="AB")  # an empty directory is as good as none
    with pytest.raises(UserError, match="is not empty; give a new directory, or --overwrite"):
        render(out)
    render(out, classes="ABC", force=True)
    assert len(json.loads((out / "manifest.json").read_text())["classes"]) == 3
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("dear")
    with pytest.raises(UserError, match="holds no shards"):
        render(tmp_path / "thesis", force=True)
    with pytest.raises(UserError, match="is a file"):
        render(tmp_path / "thesis" / "chapter1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write_is_one_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission"):
        render(tmp_path / "out")


def test_a_path_that_cannot_hold_a_directory_is_one_error(tmp_path):
    with pytest.raises(UserError, match="/proc"):
        render("/proc/glyphs/out")


def command(*arguments):
    app = typer.Typer()
    app.command("glyphs")(glyphs)
    app.command("other")(lambda: None)
    return CliRunner().invoke(app, ["glyphs", *map(str, arguments)])


def test_the_command_takes_characters_files_and_distortions(tmp_path):
    (tmp_path / "classes.txt").write_text("A B C\nD")
    counts = ("--train", 2, "--val", 1, "--test", 1)
    distortion = ("--strength", 0.5, "--rotation", 20)
    classes = ("--classes", tmp_path / "classes.txt")
    result = command("--out", tmp_path / "out", *classes, *counts, *distortion)
    assert result.exit_code == 0, result.output
    assert "4 classes, 0 of several characters (merged.json); images: " in result.output
    assert "images: train 8, val 4, test 4" in result.output
    made_by = json.loads((tmp_path / "out" / "manifest.json").read_text())["made_by"]
    assert made_by["distortion"]["rotation"] == 10.0
    assert isinstance(command("--out", tmp_path / "out").exception, UserError)
    again = command("--out", tmp_path / "out", "--classes", "AB", "--train", 1, "--overwrite")
    assert again.exit_code == 0
    assert read_classes("12") == 12 and read_classes("AB") == "AB" and read_classes(None) is None
    assert read_classes("x" * 5000) == "x" * 5000
    for text in ("-3", "0", "1"):
        with pytest.raises(UserError, match=f"--classes {text}: at least 2 classes"):
            read_classes(text)
    with pytest.raises(UserError, match="no such file of characters"):
        read_classes(str(tmp_path / "absent.txt"))


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys\n"
        "from trainer.data.authoring import glyphs as g\n"
        "if __name__ == '__main__':\n"
        "    import numpy as np, pathlib\n"
        "    out = pathlib.Path(sys.argv[1])\n"
        "    drawings = np.zeros((1, 32, 32), np.uint8)\n"
        "    arrays = drawings, np.zeros(1, int), np.ones(1, int), np.array([65])\n"
        "    options = ['A'], 28, 0, g.Distortion()\n"
        "    with g._shard_makers(2, out, *arrays, *options) as make_all:\n"
        "        next(make_all([('train', 0, np.zeros(1, int), np.zeros(1, int))]))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The workers hold the pipe open: reading it to its end waits for the last of them.
    root = str(Path(g.__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, script, tmp_path]
    ended = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=60)
    assert ended.returncode == -9
