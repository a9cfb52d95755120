"""One picture, one answer: from a file, from Python in any form, and from the shards of its split.

The run learned from `shards folder --size 8`, out of wide photos. Predict gets the photos.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from running import run_all
from toy import toy_config

from ensemble import SpecialistEnsemble, export_bundle
from networks import ModelSpec, PictureRules
from pipeline.config import Data
from trainer.__main__ import main
from trainer.data.authoring.folder import from_folder
from trainer.data.shards import open_shards

CLASSES, SIZE = 6, 8
RULES = PictureRules(size=(SIZE, SIZE), channels=3, crop="center")


def photo(kind: int, number: int) -> Image.Image:
    """24 x 16, its middle square smooth and of the class's colour, its sides at random."""
    random = np.random.default_rng([kind, number])
    pixels = np.full((16, 24, 3), random.integers(0, 256, 3), np.uint8)
    colour = np.random.default_rng(kind).integers(40, 216, 3) + random.integers(-30, 31, 3)
    pixels[:, 4:20] = colour
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 16), ("val", 10), ("test", 4)):
        for kind in range(CLASSES):
            directory = root / split / f"kind {kind}"
            directory.mkdir(parents=True)
            for number in range(count):
                photo(kind, number + 100 * len(split)).save(directory / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    shards = tmp_path_factory.mktemp("shards")
    from_folder(photos, shards, {}, PictureRules(size=(SIZE, SIZE)))
    config = toy_config(
        shards,
        "controls.enabled=false",
        "clusters.num_groups=2",
        "train.steps=30",
        "specialists.steps=10",
        "students.main.steps=10",
    )
    return run_all(tmp_path_factory.mktemp("same") / "run", config)


@pytest.fixture(scope="module")
def ensemble(run):
    return SpecialistEnsemble.load(run.root)


def answers(capsys, *argv) -> dict[str, np.ndarray]:
    """{file: probabilities of all classes, in order}."""
    words = [str(word) for word in (*argv, "--json", "--top", CLASSES)]
    assert main(["predict", *words]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {row["file"]: np.array(row["probabilities"])[np.argsort(row["classes"])] for row in rows}


def saved(picture, kind="png", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_the_manifest_and_every_model_say_the_rules(run):
    assert open_shards(run.config.data.train, Data(), "train").pictures == RULES
    for name in ("generalist", "specialists/000", "students/main"):
        assert ModelSpec.load(run.root / name / "model.json").input.pictures == RULES


@pytest.mark.parametrize(
    "row, options",
    [("ensemble", []), ("generalist", ["--generalist"]), ("main", ["--student", "main"])],
)
def test_photos_are_answered_as_evaluate_answered_the_shards(run, photos, capsys, row, options):
    of_files = answers(capsys, run.root, photos / "test", *options)
    with np.load(run.evaluate.path(f"{row}.npz"), allow_pickle=False) as file:
        expected = dict(file)
    files = sorted((photos / "test").rglob("*.png"))
    assert len(files) == len(expected["labels"]) == len(of_files)
    for file, label, probability in zip(
        files, expected["labels"], expected["label_probability"], strict=True
    ):
        assert of_files[str(file)][label] == pytest.approx(probability, abs=1e-3)


def test_a_picture_has_one_answer_in_five_forms(ensemble, photos, capsys, run):
    path = photos / "test" / "kind 1" / "0.png"
    pixels = np.asarray(Image.open(path))
    expected = answers(capsys, run.root, path)[str(path)]
    forms = {
        "file": path,
        "bytes": path.read_bytes(),
        "PIL": Image.open(path),
        "uint8": pixels,
        "float": torch.from_numpy(pixels / 255).permute(2, 0, 1),
    }
    for form in forms.values():
        (row,) = ensemble.probabilities(form).numpy()
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-3)
    mixed = ensemble.probabilities(list(forms.values())).numpy()
    np.testing.assert_allclose(mixed, np.stack([expected] * 5), rtol=0, atol=1e-3)


def test_a_picture_has_one_answer_in_every_container(run, photos, tmp_path, capsys):
    path = photos / "test" / "kind 2" / "1.png"
    picture = Image.open(path).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    canvas = Image.new("RGB", (64, 16))
    canvas.paste(picture, (20, 0))
    large = picture.resize((24 * 8, 16 * 8), Image.Resampling.NEAREST)
    containers = {
        "palette.png": saved(picture.quantize(16)),
        "turned.png": saved(picture.transpose(Image.Transpose.ROTATE_90), exif=exif),
        "canvas.png": saved(canvas),
        "alpha.png": saved(picture.convert("RGBA")),
        "a.gif": saved(picture.quantize(16), "gif"),
        "a.webp": saved(picture, "webp", lossless=True),
        "a.tiff": saved(picture, "tiff"),
        "cmyk.jpg": saved(large.convert("CMYK"), "jpeg", quality=98),
    }
    for name, content in containers.items():
        (tmp_path / name).write_bytes(content)
    (expected,) = answers(capsys, run.root, path).values()
    for file, row in answers(capsys, run.root, tmp_path).items():
        tolerance = 0.03 if file.endswith("cmyk.jpg") else 1e-3
        np.testing.assert_allclose(row, expected, rtol=0, atol=tolerance, err_msg=file)


def test_16_bits_of_gray_have_the_answer_of_8(run, tmp_path, capsys):
    gray = np.asarray(photo(3, 0).convert("L"))
    Image.fromarray(gray).save(tmp_path / "8.png")
    for factor in (256, 257):
        Image.fromarray(gray.astype(np.uint16) * factor).save(tmp_path / f"{factor}.png")
    eight, *sixteen = answers(capsys, run.root, *sorted(tmp_path.iterdir())[::-1]).values()
    for row in sixteen:
        np.testing.assert_allclose(row, eight, rtol=0, atol=1e-6)


def test_a_bundle_keeps_the_rules(ensemble, photos, tmp_path, capsys, run):
    export_bundle(ensemble, tmp_path / "bundle")
    ours = answers(capsys, run.root, photos / "test" / "kind 0")
    theirs = answers(capsys, tmp_path / "bundle", photos / "test" / "kind 0")
    assert ours.keys() == theirs.keys()
    for file, row in ours.items():
        np.testing.assert_allclose(theirs[file], row, rtol=0, atol=1e-6)


def test_max_pixels_allows_a_picture_that_is_meant(run, tmp_path, capsys):
    photo(0, 0).save(tmp_path / "a.png")
    assert main(["predict", str(run.root), str(tmp_path), "--max-pixels", "383"]) == 1
    assert "a picture of 24 x 16 = 384 pixels, above max_pixels = 383" in capsys.readouterr().err
    assert main(["predict", str(run.root), str(tmp_path), "--max-pixels", "384"]) == 0


def test_an_ensemble_says_what_it_is_and_whether_its_run_is_finished(ensemble, run, tmp_path):
    assert repr(ensemble) == (
        "SpecialistEnsemble(6 classes, 2 of 2 specialists, of a finished run)"
    )
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    for name in ("generalist", "clusters", "specialists"):
        (unfinished / name).symlink_to(run.root / name)
    with pytest.warns(UserWarning, match="the run is not finished, it has no ensemble.json"):
        loaded = SpecialistEnsemble.load(unfinished)
    assert "of a run that is not finished" in repr(loaded)
    assert ensemble.read([photo(0, 0), photo(0, 1)]).shape == (2, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match="holds bool; the network reads uint8"):
        ensemble.predict(np.zeros((3, 8, 8), bool))
