"""Bytes to arrays: the functions behind `choices.DECODERS`, and how a user's own are found."""

from __future__ import annotations

import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module

import numpy as np

from networks.user_code import blame
from pipeline.config import UserError

from .choices import DECODERS

# The whole content of one file -> an array of numbers; see trainer.data.choices for the contract.
Decoder = Callable[[bytes], np.ndarray]


def image(content: bytes) -> np.ndarray:
    """uint8 [1 or 3, H, W]: gray pictures keep one channel, all others become RGB.

    Raises ValueError for pictures of 16 or more bits per channel.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("no picture of a kind that Pillow knows") from None
    with opened as picture:
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"a picture of mode {picture.mode} has more than 8 bits per channel")
        if picture.mode == "1":
            picture = picture.convert("L")
        elif picture.mode not in ("L", "RGB"):
            picture = picture.convert("RGB")
        # Plane by plane: Pillow separates the channels faster than numpy turns [H, W, 3] into
        # [3, H, W] afterwards.
        planes = b"".join([picture.tobytes("raw", band) for band in picture.getbands()])
        return np.frombuffer(planes, np.uint8).reshape(-1, picture.height, picture.width)


def rgb(content: bytes) -> np.ndarray:
    """uint8 [3, H, W] whatever the picture's mode: for shards that mix gray and colour."""
    pixels = image(content)
    return np.broadcast_to(pixels, (3, *pixels.shape[1:]))


def npy(content: bytes) -> np.ndarray:
    """The array of a .npy file; pickles are refused."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("holds several arrays, not one")
    return array


def text(content: bytes) -> np.ndarray:
    """uint8 [bytes]: the text itself; give data.decoders a function for anything of one length."""
    content.decode("utf-8")
    return np.frombuffer(content, np.uint8)


def numbers(content: bytes) -> np.ndarray:
    """float32: a json file that is a number or a nested list of them."""
    return np.asarray(json.loads(content), dtype=np.float32)


def hashed_ngrams(
    content: bytes, size: int = 2048, lengths: tuple[int, ...] = (2, 3, 4)
) -> np.ndarray:
    """float32 [size]: a phrase's character n-grams, counted in hashed bins and scaled to length 1.

    Case and spacing do not count.
    """
    phrase = " " + " ".join(content.decode("utf-8").lower().split()) + " "
    bins: list[int] = []
    for n in lengths:
        grams = [phrase[start : start + n] for start in range(len(phrase) - n + 1)]
        bins += [zlib.crc32(gram.encode()) % size for gram in grams]
    counts = np.bincount(bins, minlength=size).astype(np.float32)
    return counts / max(float(np.sqrt(counts @ counts)), 1.0)


def import_function(name: str, key: str) -> Callable:
    """The function that the config's `key` names as module:function.

    Raises UserError, one line, for whatever the module does when it is imported.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise UserError(f"{key} = {name!r}: write module:function")
    # A user's module lies in the working directory, as it would for `python -m`.
    sys.path.insert(0, "")
    try:
        imported = getattr(import_module(module), function, None)
    except (Exception, SystemExit) as error:
        raise UserError(f"{key} = {name!r}: {_import_failure(module, error)}") from None
    finally:
        sys.path.remove("")
    if not callable(imported):
        raise UserError(f"{key} = {name!r}: module {module} has no function {function}")
    return imported


def _import_failure(module: str, error: BaseException) -> str:
    """What went wrong, and in which line of the user's."""
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return f"{error}: it must lie in {os.getcwd()}, or be installed"
    return f"the import of {module} fails: {blame(error)}"


def decoder_table(decoders: dict[str, str]) -> dict[str, Decoder]:
    """{extension: function} of the built-in decoders, with the config's data.decoders on top."""
    table = built_in()
    for extension, name in decoders.items():
        function = import_function(name, f"data.decoders.{extension}")
        table[extension.lower().lstrip(".")] = function
    return table


def decode(decoder: Decoder, content: bytes) -> np.ndarray:
    """The decoder's array.  Raises ValueError if it is not one of numbers, and what it raises."""
    try:
        array = decoder(content)
    except SystemExit as error:  # of a user's own
        raise ValueError(f"it ended the program: {blame(error)}") from None
    if isinstance(array, np.ndarray) and array.dtype.kind in "biuf":
        return array
    kind = type(array).__name__
    if isinstance(array, np.ndarray):
        kind = array.dtype
    name = getattr(decoder, "__name__", repr(decoder))
    raise ValueError(f"{name} gives {kind}; a numpy array of numbers is needed")


def find_decoder(table: Mapping[str, Decoder], extension: str) -> Decoder:
    """The decoder of a file, by its whole extension or the last part of it.

    Raises UserError, with the known extensions.
    """
    for candidate in (extension, extension.rpartition(".")[2]):
        if candidate in table:
            return table[candidate]
    known = ", ".join(sorted(table))
    raise UserError(
        f"no decoder for .{extension} members (known: {known}); "
        f"name one as data.decoders.{extension}"
    )


def built_in() -> dict[str, Decoder]:
    """{extension: function} of DECODERS.  Imports the modules that they are in."""
    return {
        extension: import_function(name, f"DECODERS[{extension!r}]")
        for extension, name in DECODERS.items()
    }
