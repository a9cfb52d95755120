"""One function reads a picture: what its container does to it, and what the rules do."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from networks import InputSpec, ModelSpec, PictureRules, read_picture
from networks.pictures import encode_png, examine_picture, picture_shape

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
GRAY = PIXELS[:, :, 0]
COLOUR = Image.fromarray(PIXELS)
PLANES = PIXELS.transpose(2, 0, 1)


def saved(picture, kind="png", **options) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def changes_of(content, **rules) -> list[str]:
    return examine_picture(content, PictureRules(**rules))[1]


def refusal(content, **rules) -> str:
    with pytest.raises(ValueError) as error:
        read_picture(content, PictureRules(**rules))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "tiff", "ppm"])
def test_a_plain_picture_is_what_it_is_in_any_container(kind, tmp_path):
    options = {"lossless": True} if kind == "webp" else {}
    content = saved(PIXELS, kind, **options)
    (tmp_path / "a").write_bytes(content)
    for source in (content, tmp_path / "a", str(tmp_path / "a"), Image.open(tmp_path / "a")):
        assert (read_picture(source) == PLANES).all()
    assert changes_of(content) == [] and picture_shape(content) == (3, 6, 8)
    assert (read_picture(saved(GRAY, kind, **options))[0] == GRAY).all()


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "jpeg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(kind, orientation):
    # What the camera stores, for the scene that PIXELS shows: the inverse of what viewers do.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    scene = Image.fromarray(np.kron(PIXELS, np.ones((16, 16, 1), np.uint8)))
    stored = scene.transpose(undo[orientation]) if orientation > 1 else scene
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpeg": {"quality": 100, "subsampling": 0}}
    content = saved(stored, kind, exif=exif, **options.get(kind, {}))
    upright, changes = examine_picture(content)
    assert upright.shape == picture_shape(content) == (3, 96, 128)
    difference = np.abs(upright.astype(int) - np.asarray(scene).transpose(2, 0, 1))
    assert difference.max() <= (8 if kind == "jpeg" else 0)
    if kind != "tiff":  # which Pillow turns itself
        assert bool(changes) == (orientation > 1)


def test_an_orientation_that_is_set_in_memory_counts_and_broken_exif_does_not():
    picture = COLOUR.copy()
    picture.getexif()[0x0112] = 3
    assert (read_picture(picture) == PLANES[:, ::-1, ::-1]).all()
    content = saved(COLOUR, "png", exif=b"Exif\0\0MM\0*rubbish")
    assert (read_picture(content) == PLANES).all()


@pytest.mark.parametrize("factor", [256, 257])
@pytest.mark.parametrize("kind, dtype", [("png", "u2"), ("tiff", "<u2"), ("tiff", ">u2")])
def test_of_16_bits_the_high_byte_is_kept(factor, kind, dtype):
    content = saved((GRAY.astype(np.uint16) * factor).astype(dtype), kind)
    pixels, changes = examine_picture(content)
    assert (pixels[0] == GRAY).all() and picture_shape(content) == (1, 6, 8)
    assert changes == ["of 16 bits a channel scaled to 8 (the high byte)"]


def test_16_bits_of_colour_are_scaled_by_the_same_rule():
    import struct
    import zlib

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    lines = PIXELS.astype(">u2") * 257
    data = b"".join(b"\0" + line.astype(">u2").tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    pixels, changes = examine_picture(content)
    assert (pixels == PLANES).all() and "16 bits" in changes[0]


def test_16_bits_that_would_be_all_but_black_are_said_to_be():
    assert any("nearly black" in change for change in changes_of(saved(GRAY.astype(np.uint16))))


def test_integers_of_32_bits_are_16_bits_or_refused():
    in_memory = Image.fromarray(GRAY.astype(np.int32) * 257)
    assert (read_picture(in_memory)[0] == GRAY).all()
    for values in (GRAY.astype(np.int32), GRAY.astype(np.int32) * 1000, -GRAY.astype(np.int32)):
        assert "32 bits a channel" in refusal(Image.fromarray(values))
    assert "a picture of floats" in refusal(saved(GRAY.astype(np.float32), "tiff"))


def test_a_palette_is_looked_up():
    palette = COLOUR.quantize(16)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    for kind in ("png", "gif"):
        content = saved(palette, kind)
        assert (read_picture(content) == expected).all() and changes_of(content) == []


@pytest.mark.parametrize("background, value", [("white", 255), ("#102030", None)])
def test_transparency_is_laid_over_the_background(background, value):
    shape = np.zeros((6, 8, 4), np.uint8)
    shape[2:4, 2:6, 3] = 255
    inside = shape[:, :, 3] > 0
    colour = [0x10, 0x20, 0x30] if value is None else [value] * 3
    rgba = saved(shape)
    pixels, changes = examine_picture(rgba, PictureRules(background=background))
    assert changes == [f"transparent, laid over {background}"]
    assert (pixels[:, inside] == 0).all()
    assert (pixels[:, ~inside] == np.array(colour)[:, None]).all()
    palette = Image.fromarray(np.where(inside, 0, 1).astype(np.uint8))
    palette.putpalette([9, 9, 9, 200, 100, 50])
    content = saved(palette, transparency=1)
    outside = read_picture(content, PictureRules(background=background))[:, ~inside]
    assert (outside == np.array(colour)[:, None]).all()


@pytest.mark.parametrize("mode", ["LA", "La", "L", "1", "I;16"])
def test_gray_with_transparency_stays_gray(mode):
    alpha = np.where(GRAY > 128, 255, 0).astype(np.uint8)
    if mode in ("LA", "La"):
        picture = Image.merge("LA", [Image.new("L", (8, 6), 7), Image.fromarray(alpha)])
        source, expected = picture.convert(mode), np.where(alpha, 7, 255)
    elif mode == "L":
        source, expected = saved(GRAY, transparency=int(GRAY[0, 0])), GRAY.copy()
        expected[GRAY == GRAY[0, 0]] = 255
    elif mode == "1":
        source, expected = saved(Image.fromarray(alpha).convert("1"), transparency=0), alpha | 255
    else:
        source, expected = saved(GRAY.astype(np.uint16) * 257, transparency=257 * 7), GRAY
        expected = np.where(GRAY == 7, 255, GRAY)
    pixels = read_picture(source)
    assert pixels.shape == picture_shape(source) == (1, 6, 8)
    # Premultiplied gray loses what is under alpha 0, which nobody sees.
    assert (pixels[0] == expected).all()


def test_an_opaque_alpha_channel_changes_nothing():
    content = saved(COLOUR.convert("RGBA"))
    assert (read_picture(content) == PLANES).all() and changes_of(content) == []


def test_cmyk_is_converted_and_inverted_where_adobe_says_so():
    large = Image.fromarray(np.kron(PIXELS, np.ones((16, 16, 1), np.uint8)))
    content = saved(large.convert("CMYK"), "jpeg", quality=100)
    expected = read_picture(large).astype(int)
    pixels, changes = examine_picture(content)
    assert np.abs(pixels - expected).max() <= 8 and changes == ["of CMYK converted to RGB"]
    # The marker APP14 taken out: the same numbers now mean the inverse.
    start = content.index(b"\xff\xee")
    length = int.from_bytes(content[start + 2 : start + 4], "big")
    unmarked = content[:start] + content[start + 2 + length :]
    ink = np.asarray(Image.open(io.BytesIO(content))).astype(int)
    bare = 255 - ink
    stored = (255 - bare[:, :, :3]) * (255 - bare[:, :, 3:]) / 255
    assert np.abs(read_picture(unmarked).transpose(1, 2, 0) - stored).max() <= 2


def test_other_colour_models_become_rgb():
    lab = ImageCms.profileToProfile(
        COLOUR, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    for picture, tolerance in (
        (COLOUR.convert("YCbCr"), 3),
        (COLOUR.convert("HSV"), 8),
        (saved(lab, "tiff"), 24),
    ):
        difference = np.abs(read_picture(picture).astype(int) - PLANES)
        assert difference.max() <= tolerance
        assert "converted to RGB" in changes_of(picture)[0]


@pytest.mark.parametrize("kind", ["gif", "tiff", "png", "webp"])
def test_of_several_frames_the_first_is_taken_and_counted(kind):
    first, second = Image.fromarray(GRAY), Image.fromarray(255 - GRAY)
    options = {"lossless": True} if kind == "webp" else {}
    content = saved(first, kind, save_all=True, append_images=[second], **options)
    pixels, changes = examine_picture(content)
    assert (pixels[0] == GRAY).all() and "several frames" in changes[0]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty (0 bytes)"),
        (b"not a picture", "no picture of a kind that Pillow knows"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no picture of a kind that Pillow knows"),
        (saved(PIXELS)[:60], "truncated"),
        (saved(np.kron(PIXELS, np.ones((20, 20, 1), np.uint8)), "jpeg")[:900], "truncated"),
        (saved(PIXELS, "tiff")[:120], ""),
        (saved(PIXELS, "webp")[:40], "is truncated or damaged"),
        (saved(np.kron(GRAY, np.ones((20, 20), np.uint8)), "gif")[:1200], "truncated"),
        (saved(PIXELS, "bmp")[:80], "truncated"),
    ],
)
def test_what_is_no_whole_picture_is_refused_in_one_line(content, words, tmp_path):
    assert words in refusal(content)
    (tmp_path / "a.png").write_bytes(content)
    assert words in refusal(tmp_path / "a.png")


def test_a_bomb_is_refused_before_it_is_decoded_and_can_be_allowed():
    bomb = saved(Image.new("1", (20000, 10000)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refusal(bomb)
        assert "20000 x 10000 = 200000000 pixels, above max_pixels" in message
        assert "--max-pixels 200000000" in message
        assert "max_pixels" in refusal(saved(PIXELS), max_pixels=47)
        assert picture_shape(bomb, PictureRules(max_pixels=200_000_000)) == (1, 10000, 20000)
        assert read_picture(saved(PIXELS), PictureRules(max_pixels=48)).shape == (3, 6, 8)
    # What Pillow itself allows is as it was.
    assert Image.MAX_IMAGE_PIXELS is not None


def test_a_wide_canvas_is_cut_or_squeezed_as_the_rules_say():
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    cut = read_picture(saved(wide), PictureRules(size=(4, 4)))
    # Pillow's filter looks a little beyond the cut.
    assert cut.shape == (3, 4, 4) and np.abs(cut.astype(int) - 200).max() < 20
    squeezed = read_picture(saved(wide), PictureRules(size=(4, 4), crop="none", filter="nearest"))
    assert (squeezed[0, 0] == [0, 200, 200, 0]).all()
    assert changes_of(saved(wide), size=(4, 4)) == ["scaled to 4x4"]
    assert changes_of(saved(wide), size=(8, 16)) == []
    for size in ((1, 900), (900, 1)):
        assert read_picture(Image.new("L", size), PictureRules(size=(4, 4))).shape == (1, 4, 4)


def test_channels_are_left_or_made_one_or_three():
    assert (read_picture(saved(GRAY), PictureRules(channels=3)) == GRAY).all()
    luminance = np.asarray(COLOUR.convert("L"))
    assert (read_picture(saved(PIXELS), PictureRules(channels=1))[0] == luminance).all()
    assert changes_of(saved(PIXELS), channels=1) == ["of colours made gray"]
    assert changes_of(saved(GRAY), channels=3) == ["gray made RGB"]


def test_reading_leaves_a_picture_of_the_callers_as_it_is():
    palette = COLOUR.quantize(16)
    before = palette.tobytes()
    read_picture(palette, PictureRules(size=(3, 3), channels=1))
    assert palette.mode == "P" and palette.tobytes() == before


def test_a_png_that_was_written_reads_back_the_same():
    for pixels in (PLANES, GRAY[None]):
        assert (read_picture(encode_png(pixels)) == pixels).all()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"size": 3}, "pictures.size = 3"),
        ({"size": [3, 0]}, "pictures.size = [3, 0]"),
        ({"channels": 2}, "pictures.channels = 2: must be 1 or 3"),
        ({"crop": "middle"}, "pictures.crop = 'middle': must be one of center, none"),
        ({"filter": "box"}, "pictures.filter = 'box'"),
        ({"background": "pink"}, "pictures.background = 'pink': must be white"),
        ({"max_pixels": 0}, "pictures.max_pixels = 0"),
        ({"colour": 1}, "unknown key pictures.colour; valid are size, channels"),
        ([], "pictures = []: an object is needed"),
    ],
)
def test_rules_that_cannot_be_are_named(values, words):
    with pytest.raises(ValueError) as error:
        PictureRules.from_json(values)
    assert words in str(error.value)


def test_rules_travel_in_model_json_and_older_files_have_none():
    rules = PictureRules(size=(8, 8), channels=3, crop="none", max_pixels=10**9)
    spec = ModelSpec("mlp", 2, InputSpec((3, 8, 8), pictures=rules, decoders={"txt": "bytes"}))
    loaded = ModelSpec.from_json(spec.to_json()).input
    assert loaded.pictures == rules and loaded.decoders == {"txt": "bytes"}
    older = ModelSpec("mlp", 2, InputSpec((3, 8, 8)))
    assert "pictures" not in older.to_json() and "decoders" not in older.to_json()
    assert ModelSpec.from_json(older.to_json()).input.pictures is None
    with pytest.raises(ValueError, match="give other arrays than input.shape"):
        InputSpec((1, 8, 8), pictures=rules)
