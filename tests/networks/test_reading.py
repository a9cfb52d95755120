"""What people have, as raw inputs: one rule for each form, and no guess."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from networks import InputSpec, PictureRules, read_inputs
from networks.texts import hashed_ngrams

COLOUR = InputSpec((3, 6, 8), pictures=PictureRules(size=(6, 8), channels=3))
GRAY = InputSpec((1, 6, 8), pictures=PictureRules(size=(6, 8), channels=1))
UNRECORDED = InputSpec((3, 6, 8))
VECTOR = InputSpec((4,), dtype="float32")
PHOTO = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PLANES = PHOTO.transpose(2, 0, 1)


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def refusal(inputs, spec=COLOUR, **options) -> str:
    with pytest.raises(ValueError) as error:
        read_inputs(inputs, spec, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


FORMS = {
    "bytes": lambda path: path.read_bytes(),
    "a path": lambda path: path,
    "the name of a file": str,
    "a PIL image": Image.open,
    "[H, W, C]": lambda _: PHOTO,
    "[C, H, W]": lambda _: PLANES,
    "a batch of one": lambda _: PLANES[None],
    "a batch, channels last": lambda _: PHOTO[None],
    "a tensor": lambda _: torch.from_numpy(PLANES.copy()),
    "lists": lambda _: PHOTO.tolist(),
    "int64": lambda _: PLANES.astype(np.int64),
    "floats to 1": lambda _: torch.from_numpy(PLANES.copy()).float() / 255,
    "floats to 1, channels last": lambda _: PHOTO / 255,
    "half floats": lambda _: (torch.from_numpy(PLANES.copy()).float() / 255).half(),
    "whole floats to 255": lambda _: PLANES.astype(np.float64),
    "a list of one": lambda path: [path],
    ".npy": lambda path: path.with_name("a.npy"),
    "RGBA": lambda _: np.dstack([PHOTO, np.full((6, 8), 255, np.uint8)]),
}


@pytest.mark.parametrize("spec", [COLOUR, UNRECORDED])
@pytest.mark.parametrize("form", FORMS)
def test_a_picture_is_the_same_in_every_form(tmp_path, form, spec):
    (tmp_path / "a.png").write_bytes(png(PHOTO))
    np.save(tmp_path / "a.npy", PLANES)
    raw = read_inputs(FORMS[form](tmp_path / "a.png"), spec)
    assert raw.dtype == torch.uint8 and raw.shape == (1, 3, 6, 8)
    assert (raw[0].numpy() == PLANES).all()


def test_what_fits_already_is_not_copied():
    for spec, raw in (
        (COLOUR, torch.zeros(2, 3, 6, 8, dtype=torch.uint8)),
        (VECTOR, torch.zeros(2, 4)),
    ):
        assert read_inputs(raw, spec) is raw


def test_pictures_of_several_sizes_and_forms_are_one_batch():
    larger = np.kron(PHOTO, np.ones((3, 3, 1), np.uint8))
    wider = np.zeros((6, 30, 3), np.uint8)
    wider[:, 11:19] = PHOTO
    raw = read_inputs([Image.fromarray(larger), png(wider), PLANES, PHOTO / 255], COLOUR)
    assert raw.shape == (4, 3, 6, 8)
    assert (raw[2].numpy() == PLANES).all() and (raw[3].numpy() == PLANES).all()
    assert (raw[1].numpy().astype(int) - PLANES).max() < 140


def test_another_size_is_refused_where_no_rule_was_recorded_unless_asked_for():
    larger = np.kron(PHOTO, np.ones((3, 3, 1), np.uint8))
    for source in (png(larger), larger, Image.fromarray(larger)):
        message = refusal(source, UNRECORDED)
        assert "18, 24" in message and "the network reads [3, 6, 8]; --resize" in message
        assert read_inputs(source, UNRECORDED, resize=True).shape == (1, 3, 6, 8)


def test_channels_become_the_networks():
    assert (read_inputs(PHOTO[:, :, 0], COLOUR).numpy() == PHOTO[:, :, 0]).all()
    luminance = np.asarray(Image.fromarray(PHOTO).convert("L"))
    for source in (PHOTO, PLANES[None], png(PHOTO)):
        assert (read_inputs(source, GRAY)[0, 0].numpy() == luminance).all()
    many = np.stack([luminance] * 5)
    assert read_inputs(many, GRAY).shape == (5, 1, 6, 8)
    assert read_inputs(many[0], GRAY).shape == (1, 1, 6, 8)


@pytest.mark.parametrize(
    "shape, spec",
    [((3, 6, 8), GRAY), ((3, 20, 3), COLOUR), ((5, 3, 9, 3), COLOUR)],
)
def test_axes_that_could_be_taken_in_two_ways_are_asked_for(shape, spec):
    assert "has shape" in refusal(np.zeros(shape, np.uint8), spec)


def test_floats_are_settled_for_all_inputs_of_a_call():
    dark, bright = np.zeros((3, 6, 8)), PLANES.astype(float)
    dark[0, 0, 0] = 1
    assert read_inputs(dark, COLOUR)[0, 0, 0, 0] == 255
    # Beside floats to 255 it is one of them.
    assert read_inputs([dark, bright], COLOUR)[0, 0, 0, 0] == 1
    assert "input 1: holds float64" in refusal([bright, bright / 3])


@pytest.mark.parametrize(
    "inputs, words",
    [
        (PLANES > 3, "holds bool; the network reads uint8 [3, 6, 8], 0 to 255"),
        (PLANES * 1.5, "holds float64 from "),
        (np.full((3, 6, 8), -1), "holds int64 from -1 to -1; the network reads uint8 [3, 6, 8]"),
        (np.full((3, 6, 8), 256), "to 256; the network reads uint8 [3, 6, 8], 0 to 255"),
        (PLANES.astype(complex), "holds complex128"),
        (np.full((3, 6, 8), np.nan), "holds NaN or infinity"),
        (np.full((3, 6, 8), np.inf), "holds NaN or infinity"),
        (torch.full((2, 3, 6, 8), float("nan")), "holds NaN or infinity"),
        (np.zeros(5), "has shape [5]; the network reads [3, 6, 8]"),
        (np.zeros((2, 6, 8), np.uint8), "has shape [2, 6, 8]"),
        (np.zeros((2, 5, 6, 8), np.uint8), "has shape"),
        (np.array(["a"]), "has shape [1]"),
        (["a", 3], "input 0: a: No such file"),
        ([3, PHOTO], "input 0: an object of type int is no input"),
        ([PLANES[None].repeat(2, 0)], "input 0 holds 2 inputs"),
        ([[1, 2], [3]], "a list of list is no array"),
        ([], "no inputs are given"),
        (None, "an object of type NoneType is no input"),
        ({}, "an object of type dict is no input"),
        (3, "an object of type int is no input"),
        (b"", "cannot be decoded: is empty"),
        (b"rubbish", "cannot be decoded: no picture"),
        (png(PHOTO)[:50], "cannot be decoded: "),
        (Path("nowhere.png"), "nowhere.png: No such file"),
    ],
)
def test_anything_else_is_refused_with_what_the_network_reads(inputs, words):
    assert words in refusal(inputs)


def test_an_array_of_no_inputs_is_an_empty_batch():
    assert read_inputs(np.zeros((0, 3, 6, 8), np.uint8), COLOUR).shape == (0, 3, 6, 8)


def test_vectors_are_numbers_as_they_are():
    for source in ([1, 2, 3, 4], [[1, 2, 3, 4]], np.arange(1, 5), torch.arange(1.0, 5)):
        raw = read_inputs(source, VECTOR)
        assert raw.dtype == torch.float32 and raw.tolist() == [[1, 2, 3, 4]]
    assert "reads arrays, float32 [4]" in refusal(png(PHOTO), VECTOR)
    assert "'some text' is no file; the network reads float32 [4]" in refusal("some text", VECTOR)
    assert "is no file; the network reads float32 [4]" in refusal("long " * 9999, VECTOR)
    counts = InputSpec((4,))
    assert read_inputs(np.array([0.0, 1, 1, 0]), counts).tolist() == [[0, 1, 1, 0]]
    assert refusal(np.full(4, 0.5), counts).endswith("the network reads uint8 [4], 0 to 255")
    assert "too large for float32" in refusal(np.full(4, 1e300), VECTOR)
    floats = InputSpec((3, 6, 8), dtype="float32")
    assert "holds uint8; the network reads float32 [3, 6, 8]" in refusal(PLANES, floats)
    assert (read_inputs(PLANES / 255, floats)[0].numpy() == (PLANES / 255).astype("f4")).all()


def test_texts_are_read_where_the_network_reads_texts(tmp_path):
    spec = InputSpec((2048,), dtype="float32", decoders={"txt": "hashed_ngrams"})
    expected = hashed_ngrams(b"Soybean farming")
    (tmp_path / "a.txt").write_text("Soybean farming")
    for source in ("Soybean farming", ["Soybean farming"], tmp_path / "a.txt", b"Soybean farming"):
        assert (read_inputs(source, spec)[0].numpy() == expected).all()
    assert read_inputs(["one", "another text"], spec).shape == (2, 2048)
    assert read_inputs(expected, spec).shape == (1, 2048)


def test_a_decoder_of_the_users_own_is_needed_and_used():
    spec = InputSpec((2,), dtype="float32", decoders={"txt": "mine:lengths"})

    def lengths(content):
        return np.array([len(content), content.count(b" ")], np.float32)

    message = refusal("a b", spec)
    assert "'mine:lengths'" in message and "--builder mine:lengths" in message
    assert read_inputs("a b", spec, {"mine:lengths": lengths}).tolist() == [[3, 1]]
    assert "cannot be decoded: division" in refusal("a", spec, functions={"mine:lengths": _fails})
    pictures = InputSpec((3, 6, 8), decoders={"png": "mine:f"})
    assert "files that mine:f decodes" in refusal(Image.fromarray(PHOTO), pictures)


def _fails(content):
    return 1 / 0
