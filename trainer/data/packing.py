"""Compressed files, decompressed no further than content of their size goes.

A few megabytes may say that they are terabytes.  What is limited is content per byte of the file,
beside an amount that every file may have.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO, cast

from pipeline.config import UserError

from .bounds import GIB, open_regular

FREE_BYTES = GIB  # of content, whatever the file's size
RATIO = 100  # of content to the file's size, beyond that. Pictures and texts are below 20
PACKED: dict[bytes, Callable[[Path, str], IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,  # pyright: ignore
    b"BZh": bz2.open,  # pyright: ignore
    b"\xfd7zXZ": lzma.open,  # pyright: ignore
}


def is_packed(path: Path) -> bool:
    """Whether the file is compressed."""
    with open_regular(path) as file:
        return file.read(5).startswith(tuple(PACKED))


def unpacked(path: Path) -> BinaryIO:
    """The file's content as a binary stream, decompressed where it is gzip, bzip2 or xz.

    Reading it raises UserError where it goes beyond `most`.
    """
    with open_regular(path) as file:
        start = file.read(5)
    for magic, opener in PACKED.items():
        if start.startswith(magic):
            return cast(BinaryIO, Within(opener(path, "rb"), path))
    return open(path, "rb")


def most(packed_bytes: int) -> int:
    """How many bytes of content so many compressed ones may have."""
    return FREE_BYTES + RATIO * packed_bytes


def refusal(path: Path, packed_bytes: int) -> UserError:
    return UserError(
        f"{path}: its {packed_bytes} bytes unpack to more than {most(packed_bytes)}; "
        "if you trust it, unpack it yourself and name what comes out"
    )


class Within(io.BufferedIOBase):
    """A decompressed stream.  Raises UserError where there is more than `most` of it."""

    def __init__(self, content: IO[bytes], path: Path):
        self._content = content
        self._path = path
        self._packed = path.stat().st_size
        self._left = most(self._packed)

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        # One more than is left is enough to know.
        wanted = self._left + 1
        if size is not None and size >= 0:
            wanted = min(size, wanted)
        return self._counted(self._content.read(wanted))

    def read1(self, size: int = -1, /) -> bytes:
        return self._counted(cast(io.BufferedIOBase, self._content).read1(size))

    def close(self) -> None:
        self._content.close()
        super().close()

    def _counted(self, block: bytes) -> bytes:
        self._left -= len(block)
        if self._left < 0:
            raise refusal(self._path, self._packed)
        return block


def check_members(path: Path) -> None:
    """UserError for a zip, as an npz is, of a member that unpacks to more than `most`.

    zipfile reads no more of a member than the zip says.  What is no zip is left to its reader.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return
    packed = path.stat().st_size
    if sum(member.file_size for member in members) > most(packed):
        raise refusal(path, packed)
