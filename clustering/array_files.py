"""Files of arrays that somebody else may have made: no object, and no more than the file holds."""

from __future__ import annotations

import math
import os
import stat
import zipfile
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

Shape = tuple[Any, ...]  # of int, None, and ... at the end
FORM = (zipfile.BadZipFile, NotImplementedError, SyntaxError, OverflowError, RecursionError)
FORM += (ValueError, TypeError, LookupError, AttributeError, EOFError)  # what numpy raises


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file that np.savez wrote.

    Raises
    ------
    ValueError
        In one line without the path, for another file, compressed arrays (np.savez has none, and a
        few bytes of them may be gigabytes), objects, and headers that say more than follows.
    OSError
        Where it cannot be read.
    """
    check_regular(path)
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{member.filename} is compressed")
                with archive.open(member) as file:
                    arrays[member.filename.removesuffix(".npy")] = _read(file, member)
    except FORM as error:
        raise ValueError(" ".join(str(error).split())[:200] or "it ends too early") from None
    return arrays


def map_npy(path: str | os.PathLike[str], kinds: str, shape: Shape) -> np.ndarray:
    """The array of an .npy file, memory-mapped to be read.

    kinds: of numpy's dtypes, "iu" for whole numbers.  shape: None where any length will do, and at
    its end ... where any axes may follow.
    Raises as `read_npz`, and ValueError for an array of another kind or shape.
    """
    check_regular(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        check_form(array, kinds, shape)
    except FORM as error:
        raise ValueError(" ".join(str(error).split())[:200] or "it ends too early") from None
    return array


def check_form(array: np.ndarray, kinds: str, shape: Shape) -> None:
    """ValueError for an array of another kind or shape."""
    wanted = shape[:-1] + array.shape[len(shape) - 1 :] if shape[-1:] == (...,) else shape
    fits = len(array.shape) == len(wanted) and all(
        length in (None, own) for length, own in zip(wanted, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in kinds:
        words = {None: "any", ...: "..."}
        lengths = ", ".join(words.get(length, str(length)) for length in shape)
        raise ValueError(f"an array {array.dtype} {array.shape}, not {kinds} ({lengths})")


def check_regular(path: str | os.PathLike[str]) -> None:
    """ValueError for a pipe or a device, whose end may never come.  OSError."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError("it is a pipe or a device; only regular files are read")


def _read(file: IO[bytes], member: zipfile.ZipInfo) -> np.ndarray:
    version = npy.read_magic(file)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{member.filename} is of an unknown format")
    shape, in_columns, dtype = readers[version](file)
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or size != member.file_size - file.tell():
        raise ValueError(f"{member.filename} holds objects, or is of another length than it says")
    content = file.read()
    order = "F" if in_columns else "C"
    return np.frombuffer(bytearray(content), dtype).reshape(shape, order=order)
