"""Mapped files: a new .npy to write to, and the arrays of an uncompressed .npz to read.

Processes share their pages.
"""

from __future__ import annotations

import ast
import errno
import mmap
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from pipeline.failures import writing

from .bounds import open_regular

LOCAL_HEADER = 30  # bytes of a zip's local header before name and extra field
NPY_MAGIC = b"\x93NUMPY\x01\x00"


NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL)  # a file system that cannot promise blocks


def create_mapped(path: str | Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file of zeros, mapped to be written to, whose blocks the disk has given already.

    Where the disk fills up later, writing to a mapping without blocks is a SIGBUS.
    Raises OSError, with the bytes that are needed, where they are not there. Then there is no file.
    """
    needed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    try:
        with writing(path, needed):
            array = np.lib.format.open_memmap(path, "w+", dtype, shape)
            _allocate(path)
    except OSError:
        Path(path).unlink(missing_ok=True)
        raise
    return array


def _allocate(path: str | Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise


def map_npz(path: str | Path, check: bool = True) -> dict[str, np.ndarray]:
    """The arrays of a file that np.savez wrote, as views of one mapping.

    check: compare every array with its checksum, which touches all of them.

    Raises ValueError, OSError or zipfile.BadZipFile for a file that is no such one, among others.
    """
    arrays: dict[str, np.ndarray] = {}
    with open_regular(path) as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            start = _start(content, member)
            if check:
                with memoryview(content) as view, view[start : start + member.file_size] as part:
                    if len(part) != member.file_size or zlib.crc32(part) != member.CRC:
                        raise ValueError(f"{member.filename} has another checksum")
            name = member.filename.removesuffix(".npy")
            arrays[name] = _array(content, start, start + member.file_size)
    return arrays


def _start(content: mmap.mmap, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: the local header's name and extra field differ in length."""
    lengths = member.header_offset + 26
    name = int.from_bytes(content[lengths : lengths + 2], "little")
    extra = int.from_bytes(content[lengths + 2 : lengths + 4], "little")
    return member.header_offset + LOCAL_HEADER + name + extra


def _array(content: mmap.mmap, start: int, end: int) -> np.ndarray:
    """The .npy, of format 1.0, at content[start:end]."""
    if content[start : start + len(NPY_MAGIC)] != NPY_MAGIC:
        raise ValueError("not an array of format 1.0")
    behind = start + 10 + int.from_bytes(content[start + 8 : start + 10], "little")
    header = ast.literal_eval(content[start + 10 : behind].decode("latin-1"))
    dtype, shape = np.dtype(header["descr"]), header["shape"]
    count = int(np.prod(shape))
    if dtype.hasobject or behind + count * dtype.itemsize != end:
        raise ValueError("an array of objects, or of another length")
    array = np.frombuffer(content, dtype, count, behind) if count else np.zeros(0, dtype)
    return array.reshape(shape, order="F" if header["fortran_order"] else "C")
