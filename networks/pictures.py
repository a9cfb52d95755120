"""One function reads a picture, wherever it comes from, and its rules travel with data and model.

The rules that are not a choice:

* A picture is turned upright by its EXIF orientation, as every viewer shows it.
* Of 16 bits a channel the high byte is kept: 65535 and 65280 both become 255.  Integers of 32 bits
  are read as 16 where they fit. Floats are refused.
* Gray pictures (1 bit, gray with alpha, 16 bits) have one channel, all others become RGB: palettes,
  CMYK, YCbCr, HSV and LAB.  Colour profiles are not applied.  CMYK in a JPEG is inverted where
  Adobe's marker says so.
* What is transparent is laid over `PictureRules.background`.
* Of several frames or pages the first is taken.

No torch here, and Pillow is imported when a picture is read.
"""

from __future__ import annotations

import io
import os
import re
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Picture: TypeAlias = "Image.Image"
Source: TypeAlias = "bytes | str | os.PathLike[str] | Image.Image"

# What Pillow may open, by a file's first bytes: not the kinds that start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
# How a picture of other proportions gets to `size`: its middle is cut out, or all is squeezed.
CROPS = ("center", "none")
FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")
COLOURS = {"white": "#ffffff", "black": "#000000", "gray": "#808080"}
# 8,192 x 8,192: decoding takes up to 15 bytes for each, so about 1 GB.
MAX_PIXELS = 1 << 26

GRAY_MODES = frozenset(("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"))
ALPHA_MODES = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
# Keys of Pillow's `info` that may hold an orientation.
EXIF_KEYS = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))
UNUSUAL_KEYS = EXIF_KEYS | {"transparency"}
ORIENTATION = 0x0112
WHITE_IS_ZERO = 0x0106  # TIFF's tag PhotometricInterpretation. Of value 0
# Below this a picture of 16 bits is all but black in 8.
DARK = 4096
DEEP = "of 16 bits a channel scaled to 8 (the high byte)"
TOO_DARK = f"of 16 bits without a value of {DARK} or more: nearly black in 8, scale them before"


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class PictureRules:
    """How pictures become arrays.

    Parameters
    ----------
    size : (int, int), optional
        Height and width that every picture is brought to.  None leaves the size.
    channels : {1, 3}, optional
        1 makes all gray (luminance), 3 all RGB.  None leaves gray pictures gray and others RGB.
    crop : {"center", "none"}
        "center" cuts the largest middle part with the proportions of `size`, "none" squeezes.
    filter : str
        Of the scaling: one of FILTERS.
    background : str
        What transparent pictures are laid over: white, black, gray or #rrggbb.
    max_pixels : int
        Larger pictures are refused before they are decoded.

    Raises
    ------
    ValueError
        For an invalid value, which the message names.
    """

    size: tuple[int, int] | None = None
    channels: int | None = None
    crop: str = "center"
    filter: str = "bicubic"
    background: str = "white"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.size is not None:
            size = tuple(self.size) if isinstance(self.size, (list, tuple)) else ()
            if len(size) != 2 or not all(map(_is_positive, size)):
                raise ValueError(f"pictures.size = {self.size!r}: [height, width] is needed")
            object.__setattr__(self, "size", size)
        if self.channels not in (None, 1, 3):
            raise ValueError(f"pictures.channels = {self.channels!r}: must be 1 or 3")
        for name, known in (("crop", CROPS), ("filter", FILTERS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"pictures.{name} = {value!r}: must be one of {', '.join(known)}")
        if not _is_positive(self.max_pixels):
            raise ValueError(f"pictures.max_pixels = {self.max_pixels!r}: must be at least 1")
        _ = self.background_colour

    @property
    def background_colour(self) -> tuple[int, int, int]:
        """Red, green and blue.  Raises ValueError for what is no colour."""
        colour = str(self.background).lower()
        digits = COLOURS.get(colour, colour)
        if not re.fullmatch("#[0-9a-f]{6}", digits):
            known = ", ".join(COLOURS)
            raise ValueError(
                f"pictures.background = {self.background!r}: must be {known} or #rrggbb"
            )
        return int(digits[1:3], 16), int(digits[3:5], 16), int(digits[5:7], 16)

    def same_pixels(self, other: PictureRules) -> bool:
        """Whether both make the same of a picture that both allow."""
        return replace(self, max_pixels=other.max_pixels) == other

    def joined(self, other: PictureRules) -> PictureRules | None:
        """The rules of both, with the larger limit. None where they make different pixels."""
        if not self.same_pixels(other):
            return None
        return replace(self, max_pixels=max(self.max_pixels, other.max_pixels))

    def as_json(self) -> dict[str, Any]:
        """The keys that say something, for manifest.json and model.json."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if self.size is not None:
            values["size"] = list(self.size)
        if self.max_pixels == MAX_PIXELS:
            del values["max_pixels"]
        return values

    @classmethod
    def from_json(cls, values: object) -> PictureRules:
        """Raises ValueError for what is no object and for unknown keys and values."""
        if not isinstance(values, dict):
            raise ValueError(f"pictures = {values!r}: an object is needed")
        valid = [each.name for each in fields(cls)]
        for key in values:
            if key not in valid:
                raise ValueError(f"unknown key pictures.{key}; valid are {', '.join(valid)}")
        return cls(**cast(dict[str, Any], values))


PLAIN = PictureRules()


def read_picture(source: Source, rules: PictureRules = PLAIN) -> np.ndarray:
    """A picture as the networks read it.

    Parameters
    ----------
    source : bytes, path or PIL.Image.Image
        bytes are the content of a file.
    rules : PictureRules

    Returns
    -------
    uint8 [1 or 3, H, W]

    Raises
    ------
    ValueError
        If it is no picture, is truncated, is too large, or has a format without a rule. The message
        says why, and does not name the file.
    OSError, MemoryError
        Where the machine cannot read it.
    """
    return _read(source, rules, None)


def examine_picture(source: Source, rules: PictureRules = PLAIN) -> tuple[np.ndarray, list[str]]:
    """(what read_picture gives, what the rules changed).

    Changes complete "pictures ...".  There are none where a decoder alone gives the same pixels.
    """
    changes: list[str] = []
    pixels = _read(source, rules, changes)
    return pixels, changes


def picture_shape(source: Source, rules: PictureRules = PLAIN) -> tuple[int, int, int]:
    """[C, H, W] of what read_picture gives, by the file's header.  Raises ValueError as it does."""
    with _opened(source) as picture:
        _check_pixels(picture, rules)
        height, width = picture.height, picture.width
        if _orientation(picture) >= 5:
            height, width = width, height
        channels = rules.channels or _channels(picture, _raw_mode(picture))
        return channels, *(rules.size or (height, width))


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 [1 or 3, H, W]. read_picture gives the same pixels."""
    file = io.BytesIO()
    _as_picture(pixels).save(file, "png")
    return file.getvalue()


def _as_picture(pixels: np.ndarray) -> Picture:
    from PIL import Image

    if len(pixels) == 1:
        return Image.fromarray(np.ascontiguousarray(pixels[0]))
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


# Opening


_pillows_limit = threading.Lock()


def _opened(source: Source) -> AbstractContextManager[Picture]:
    """The picture as Pillow opens it, not yet decoded.  What the caller has opened stays open."""
    if isinstance(source, (bytes, str, os.PathLike, bytearray, memoryview)):
        return _open(source)
    return nullcontext(source)


def _open(source: Any) -> Picture:
    from PIL import Image, UnidentifiedImageError

    file = source
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise ValueError("is empty (0 bytes)")
        file = io.BytesIO(source)
    try:
        # The limit is ours, max_pixels: Pillow's is one for the whole process, and warns besides.
        with _pillows_limit:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(file, formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except UnidentifiedImageError:
        if not isinstance(file, io.BytesIO) and os.path.getsize(file) == 0:
            raise ValueError("is empty (0 bytes)") from None
        raise ValueError(
            f"no picture of a kind that Pillow knows, of {', '.join(FORMATS)}"
        ) from None
    except OSError as error:
        if error.errno and not isinstance(error, FileNotFoundError | IsADirectoryError):
            raise  # the machine's
        raise ValueError(error.strerror or _one_line(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # plugins raise what they like about a broken header
        raise ValueError(_one_line(error)) from None


def _check_pixels(picture: Picture, rules: PictureRules) -> None:
    pixels = picture.width * picture.height
    if pixels > rules.max_pixels:
        raise ValueError(
            f"a picture of {picture.width} x {picture.height} = {pixels} pixels, above max_pixels "
            f"= {rules.max_pixels}; --max-pixels {pixels} (max_pixels={pixels}) allows it"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # What libwebp says of a file that ends too early.
    return text.replace("could not create decoder object", "is truncated or damaged")


# Reading


def _read(source: Source, rules: PictureRules, changes: list[str] | None) -> np.ndarray:
    with _opened(source) as opened:
        _check_pixels(opened, rules)
        picture = _decoded(opened, rules, changes)
        picture = _with_channels(picture, rules, changes)
        picture = _with_size(picture, rules, changes)
        if picture.mode == "L":
            planes = picture.tobytes()
        else:
            # Plane by plane: Pillow separates the channels faster than numpy turns [H, W, 3] into
            # [3, H, W] afterwards.
            planes = b"".join([picture.tobytes("raw", band) for band in "RGB"])
        return np.frombuffer(planes, np.uint8).reshape(-1, picture.height, picture.width)


def _decoded(opened: Picture, rules: PictureRules, changes: list[str] | None) -> Picture:
    """Mode L or RGB, upright and opaque.  ValueError for what cannot be decoded."""
    raw_mode = _raw_mode(opened)
    if changes is not None and _has_frames(opened):
        changes.append("of several frames, of which the first is taken")
    try:
        opened.load()
        if opened.mode in ("L", "RGB") and UNUSUAL_KEYS.isdisjoint(opened.info):
            if changes is None and getattr(opened, "_exif", None) is None:
                return opened  # most are like this, and training waits for each
        picture = _upright(opened, changes)
        picture = _eight_bits(picture, opened, raw_mode, changes)
        picture = _opaque(picture, rules, raw_mode, changes)
        return _gray_or_rgb(picture, opened, changes)
    except ValueError:
        raise
    except MemoryError:  # the machine's, and no fault of the picture
        size = f"{opened.width} x {opened.height}"
        raise MemoryError(f"a picture of {size} does not fit into memory") from None
    except Exception as error:  # Pillow raises what it likes about broken files
        raise ValueError(_one_line(error)) from None


def _raw_mode(picture: Picture) -> str:
    """How the file holds the samples, as Pillow calls it. "" where it is decoded already."""
    tiles = getattr(picture, "tile", ())
    if not tiles:
        return ""
    arguments = tiles[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _has_frames(picture: Picture) -> bool:
    # A phone's JPEG with a preview or a gain map is an MPO of several. The first is the photo.
    if picture.format not in ("GIF", "TIFF", "WEBP", "PNG"):
        return False
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # a later frame is broken: the first is what counts
        return True


def _note(changes: list[str] | None, change: str) -> None:
    if changes is not None:
        changes.append(change)


def _upright(picture: Picture, changes: list[str] | None) -> Picture:
    """Turn a picture as its EXIF orientation says."""
    orientation = _orientation(picture)
    if orientation == 1:
        return picture
    from PIL import Image

    methods = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    _note(changes, "turned upright by their EXIF orientation")
    turned = picture.transpose(methods[orientation])
    turned.info = picture.info
    return turned


def _orientation(picture: Picture) -> int:
    """1 (upright) to 8. 1 where none is said."""
    # Pillow turns a TIFF itself.  It reads EXIF slowly, so it is asked only where there is some.
    edited = getattr(picture, "_exif", None) is not None
    if picture.format == "TIFF" or not (edited or EXIF_KEYS & picture.info.keys()):
        return 1
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing, and viewers show such a picture as it is
        return 1
    return orientation if orientation in range(1, 9) else 1


def _eight_bits(
    picture: Picture, opened: Picture, raw_mode: str, changes: list[str] | None
) -> Picture:
    """The high byte of 16 bits a channel.  ValueError for floats and for 32 bits."""
    if "16" in raw_mode and not picture.mode.startswith("I"):
        _note(changes, DEEP)  # Pillow has kept the high byte already
        return picture
    if picture.mode == "F":
        raise ValueError(
            "a picture of floats (mode F), and no rule says which are black and white: "
            "save it as 8 or 16 bits, or as .npy"
        )
    if not picture.mode.startswith("I"):
        return picture
    from PIL import Image

    values = np.asarray(picture)
    if raw_mode == "I;12":
        values = values << 4
    if picture.mode == "I" and opened.format not in ("PNG", "PPM"):
        _check_sixteen_bits(values)
    if picture.format == "TIFF" and getattr(picture, "tag_v2", {}).get(WHITE_IS_ZERO) == 0:
        values = 65535 - values
    _note(changes, DEEP)
    if values.size and values.max() < DARK:
        _note(changes, TOO_DARK)
    scaled = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _check_sixteen_bits(values: np.ndarray) -> None:
    """Integers of 32 bits: ValueError unless they can only be 16 bits."""
    lowest, highest = int(values.min(initial=0)), int(values.max(initial=0))
    if lowest < 0 or not 255 < highest < 65536:
        raise ValueError(
            f"a picture of 32 bits a channel (mode I) with values {lowest} to {highest}; "
            "read are 16 bits, of which some exceed 255: save it as 8 or 16 bits"
        )


def _opaque(
    picture: Picture, rules: PictureRules, raw_mode: str, changes: list[str] | None
) -> Picture:
    """Laid over the background where it is transparent."""
    has_alpha = picture.mode in ALPHA_MODES
    if not has_alpha and "transparency" not in picture.info:
        return picture
    from PIL import Image

    is_gray = picture.mode in GRAY_MODES or raw_mode.startswith("LA")
    with_alpha = picture
    if picture.mode == "RGBa":
        with_alpha = picture.convert("RGBA")
    elif picture.mode in ("La", "1", "L"):
        with_alpha = picture.convert("LA")
    elif picture.mode not in ("RGBA", "LA"):
        with_alpha = picture.convert("RGBA")
    alpha = with_alpha.getchannel("A")
    mode = "L" if is_gray else "RGB"
    plain = with_alpha.convert(mode)
    # What stays in `info` would be taken for a transparent colour.
    plain.info = {}
    if alpha.getextrema()[0] == 255:
        return plain
    _note(changes, f"transparent, laid over {rules.background}")
    background = Image.new("RGB", picture.size, rules.background_colour).convert(mode)
    background.paste(plain, mask=alpha)
    return background


def _gray_or_rgb(picture: Picture, opened: Picture, changes: list[str] | None) -> Picture:
    """Mode L of gray pictures, RGB of all others."""
    if picture.mode in ("L", "RGB"):
        return picture
    if picture.mode == "1":
        return picture.convert("L")
    if picture.mode == "P":
        return picture.convert("RGB")
    _note(changes, f"of {picture.mode} converted to RGB")
    if picture.mode == "LAB":
        return _lab_to_rgb(picture)
    if picture.mode == "CMYK" and opened.format in ("JPEG", "MPO") and "adobe" not in opened.info:
        from PIL import ImageChops

        # Pillow inverts all of them, but only Adobe's are stored inverted.
        picture = ImageChops.invert(picture)
    return picture.convert("RGB")


def _lab_to_rgb(picture: Picture) -> Picture:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _channels(picture: Picture, raw_mode: str) -> int:
    return 1 if picture.mode in GRAY_MODES or raw_mode.startswith("LA") else 3


def _with_channels(picture: Picture, rules: PictureRules, changes: list[str] | None) -> Picture:
    if rules.channels == 1 and picture.mode != "L":
        _note(changes, "of colours made gray")
        return picture.convert("L")
    if rules.channels == 3 and picture.mode != "RGB":
        _note(changes, "gray made RGB")
        return picture.convert("RGB")
    return picture


def _with_size(picture: Picture, rules: PictureRules, changes: list[str] | None) -> Picture:
    if rules.size is None or rules.size == (picture.height, picture.width):
        return picture
    from PIL import Image, ImageOps

    height, width = rules.size
    method = Image.Resampling[rules.filter.upper()]
    _note(changes, f"scaled to {width}x{height}")
    if rules.crop == "none":
        return picture.resize((width, height), method)
    return ImageOps.fit(picture, (width, height), method)
