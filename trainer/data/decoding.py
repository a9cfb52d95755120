"""Bytes to arrays: a table from a member's extension to a function.  The config's data.decoders adds to it."""

from __future__ import annotations

import io
import json
import sys
import zlib
from collections.abc import Callable
from importlib import import_module

import numpy as np

from pipeline.config import UserError

Decoder = Callable[[bytes], np.ndarray]


def image(content: bytes) -> np.ndarray:
    """uint8 [1 or 3, H, W]: gray pictures have one channel, all others become RGB.  ValueError for 16-bit pictures."""
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("no picture of a kind that Pillow knows") from None
    with opened as picture:
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"a picture of mode {picture.mode} has more than 8 bits per channel")
        if picture.mode != "L" and picture.mode != "RGB":
            picture = picture.convert("L" if picture.mode == "1" else "RGB")
        # Plane by plane: Pillow separates the channels faster than numpy turns [H, W, 3] into [3, H, W] afterwards.
        planes = b"".join([picture.tobytes("raw", band) for band in picture.getbands()])
        return np.frombuffer(planes, np.uint8).reshape(-1, picture.height, picture.width)


def rgb(content: bytes) -> np.ndarray:
    """uint8 [3, H, W] whatever the picture's mode: for shards that mix gray and colour."""
    pixels = image(content)
    return np.broadcast_to(pixels, (3, *pixels.shape[1:]))


def npy(content: bytes) -> np.ndarray:
    """The array of a .npy member; pickles are refused."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("holds several arrays, not one")
    return array


def text(content: bytes) -> np.ndarray:
    """uint8 [bytes]: the text itself; give data.decoders a function for anything of one length."""
    content.decode("utf-8")
    return np.frombuffer(content, np.uint8)


def numbers(content: bytes) -> np.ndarray:
    """float32: a json member that is a number or a nested list of them."""
    return np.asarray(json.loads(content), dtype=np.float32)


def hashed_ngrams(
    content: bytes, size: int = 2048, lengths: tuple[int, ...] = (2, 3, 4)
) -> np.ndarray:
    """float32 [size]: character n-grams of a lower-cased phrase, counted in hashed bins and scaled to length 1."""
    phrase = " " + " ".join(content.decode("utf-8").lower().split()) + " "
    grams = [phrase[start : start + n] for n in lengths for start in range(len(phrase) - n + 1)]
    counts = np.bincount(
        [zlib.crc32(gram.encode()) % size for gram in grams], minlength=size
    ).astype(np.float32)
    return counts / max(float(np.sqrt(counts @ counts)), 1.0)


BUILT_IN: dict[str, Decoder] = {
    "jpg": image,
    "jpeg": image,
    "png": image,
    "webp": image,
    "npy": npy,
    "txt": text,
    "json": numbers,
}


def import_function(name: str, key: str) -> Callable:
    """The function that the config's `key` names as module:function.  Raises UserError."""
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise UserError(f"{key} = {name!r}: write module:function")
    sys.path.insert(
        0, ""
    )  # a user's module lies in the working directory, as it would for `python -m`
    try:
        found = getattr(import_module(module), function, None)
    except ImportError as mistake:
        raise UserError(f"{key} = {name!r}: {mistake}") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise UserError(f"{key} = {name!r}: module {module} has no function {function}")
    return found


def decoder_table(decoders: dict[str, str]) -> dict[str, Decoder]:
    """The built-in table with the config's data.decoders on top."""
    named = {
        extension.lower().lstrip("."): import_function(name, f"data.decoders.{extension}")
        for extension, name in decoders.items()
    }
    return BUILT_IN | named


def decode(decoder: Decoder, content: bytes) -> np.ndarray:
    """What the decoder makes of a member.  Raises ValueError if that is no array of numbers, and what it raises."""
    array = decoder(content)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{decoder.__name__} gives {kind}; a numpy array of numbers is needed")
    return array


def find_decoder(table: dict[str, Decoder], extension: str) -> Decoder:
    """The decoder of a member, by its whole extension or its last part.  Raises UserError with the valid ones."""
    for candidate in (extension, extension.rpartition(".")[2]):
        if candidate in table:
            return table[candidate]
    known = ", ".join(sorted(table))
    raise UserError(
        f"no decoder for .{extension} members (known: {known}); name one as data.decoders.{extension}"
    )
