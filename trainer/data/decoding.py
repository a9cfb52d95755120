"""Bytes to arrays: the functions behind `choices.DECODERS`, and how a user's own are found."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np

from networks.npy import read_npy
from networks.pictures import PLAIN, PictureRules, read_picture
from networks.texts import TEXTS, hashed_ngrams, ngram_bag
from networks.texts import utf8_bytes as text
from networks.user_code import blame
from pipeline.choices import resolve
from pipeline.config import UserError

from .choices import DECODERS

__all__ = [
    "Decoder",
    "built_in",
    "decode",
    "decoder_table",
    "find_decoder",
    "hashed_ngrams",
    "image",
    "import_function",
    "ngram_bag",
    "npy",
    "numbers",
    "picture_rules",
    "recorded_name",
    "rgb",
    "text",
    "with_rules",
]

RGB = replace(PLAIN, channels=3)

# The whole content of one file -> an array of numbers. See trainer.data.choices for the contract.
Decoder = Callable[[bytes], np.ndarray]


def image(content: bytes) -> np.ndarray:
    """uint8 [1 or 3, H, W] of a picture, by the rules of networks.pictures."""
    return read_picture(content)


def rgb(content: bytes) -> np.ndarray:
    """uint8 [3, H, W] whatever the picture's mode: for shards that mix gray and colour."""
    return read_picture(content, RGB)


def npy(content: bytes) -> np.ndarray:
    """The array of a .npy file, in this machine's order of bytes. Pickles are refused."""
    array = read_npy(content)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def numbers(content: bytes) -> np.ndarray:
    """float32: a json file that is a number or a nested list of them."""
    return np.asarray(json.loads(content), dtype=np.float32)


def import_function(name: str, key: str) -> Callable:
    """The function that the config's `key` names as module:function.

    Raises UserError, one line, for whatever the module does when it is imported.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise UserError(f"{key} = {name!r}: write module:function")
    # A user's module lies in the working directory.  Behind all others: what is installed is not to
    # be hidden by a file of the same name there.  It stays, for what the module imports later.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        source = import_module(module)
        imported = getattr(source, function, None)
    except (Exception, SystemExit) as error:
        raise UserError(f"{key} = {name!r}: {_import_failure(module, error)}") from None
    if not callable(imported):
        file = getattr(source, "__file__", None) or "built in"
        raise UserError(f"{key} = {name!r}: module {module} has no function {function} ({file})")
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


def picture_rules(decoder: Decoder, rules: PictureRules | None) -> PictureRules | None:
    """The rules by which a decoder reads pictures. None of another decoder, and of no rules.

    rules: those of the shards, if they record any.
    """
    if decoder is rgb:
        return replace(rules or PLAIN, channels=3)
    return rules if decoder is image else None


def with_rules(decoder: Decoder, rules: PictureRules | None) -> Decoder:
    """The decoder. Of pictures, one by those rules.  A user's own is used as it is."""
    applied = picture_rules(decoder, rules)
    return decoder if applied is None else partial(read_picture, rules=applied)


def recorded_name(decoder: Decoder, name: str) -> str | None:
    """What model.json calls the decoder that the config, or DECODERS, calls `name`.

    None of pictures and arrays.
    """
    if decoder in (image, rgb, npy, numbers):
        return None
    for known, function in TEXTS.items():
        if decoder is function:
            return known
    return name


def built_in() -> dict[str, Decoder]:
    """{extension: function} of DECODERS.  Imports the modules that they are in."""
    return {extension: resolve(name) for extension, name in DECODERS.items()}
