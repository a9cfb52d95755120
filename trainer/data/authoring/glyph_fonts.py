"""Faces of fonts: find them, list their characters, draw their glyphs."""

from __future__ import annotations

import hashlib
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.config import UserError

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
COLLECTIONS = (".ttc", ".otc")
# matplotlib's: the families, and what each calls its slanted style.
DEJAVU = {"Sans": "Oblique", "SansMono": "Oblique", "Serif": "Italic"}


class Face(NamedTuple):
    """One face of a font file.  index: its place within a collection, else 0."""

    path: str
    index: int


def find_faces(fonts: Sequence[str | Path] | None = None) -> list[Face]:
    """The faces in font files, in directories of them, and in collections.

    fonts: paths. `FILE#2` is face 2 of a collection alone, counted from 0.  None: matplotlib's
    DejaVu faces.  Raises UserError for a path that is absent or no font, and for a face that a
    collection does not have.
    """
    if fonts is None:
        from matplotlib import get_data_path

        directory = Path(get_data_path(), "fonts", "ttf")
        return [Face(str(directory / name), 0) for name in _dejavu_files()]
    faces: list[Face] = []
    for font in fonts:
        faces += _faces_of(Path(font))
    if not faces:
        raise UserError("no fonts: give font files or directories of them")
    return faces


def _faces_of(font: Path) -> list[Face]:
    """The faces of a directory or file, or the one that FILE#INDEX names."""
    if font.is_dir():
        return [face for path in _fonts_in(font) for face in _faces_in(path)]
    if font.exists():
        return _faces_in(font)
    file, mark, index = str(font).rpartition("#")
    if not (mark and index.isdecimal() and Path(file).is_file()):
        raise UserError(f"{font}: no such font file")
    faces = _faces_in(Path(file))
    if int(index) >= len(faces):
        raise UserError(f"{font}: the file has {len(faces)} faces, 0 to {len(faces) - 1}")
    return [faces[int(index)]]


def _faces_in(path: Path) -> list[Face]:
    return [Face(str(path), index) for index in range(_num_faces(path))]


def _dejavu_files() -> list[str]:
    files: list[str] = []
    for family, slanted in DEJAVU.items():
        styles = ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
        files += [f"DejaVu{family}{style}.ttf" for style in styles]
    return files


def _fonts_in(directory: Path) -> list[Path]:
    fonts = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not fonts:
        raise UserError(f"{directory}: no font files ({', '.join(SUFFIXES)}) in this directory")
    return fonts


def _num_faces(path: Path) -> int:
    from fontTools.ttLib import TTCollection, TTLibError

    try:
        if path.suffix.lower() in COLLECTIONS:
            return len(TTCollection(path, lazy=True).fonts)
        with _open_face(Face(str(path), 0)) as font:
            font.getBestCmap()
        return 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (TTLibError, KeyError, AssertionError, struct.error):
        raise UserError(f"{path}: not a font ({', '.join(SUFFIXES)})") from None


def _open_face(face: Face) -> TTFont:
    from fontTools.ttLib import TTFont

    if face.path.lower().endswith(COLLECTIONS):
        return TTFont(face.path, lazy=True, fontNumber=face.index)
    return TTFont(face.path, lazy=True, fontNumber=-1)


def names_of(faces: Sequence[Face]) -> str:
    """The file names of the first three fonts, for a message."""
    names = list(dict.fromkeys(Path(face.path).name for face in faces))
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"


def is_symbol(code: int) -> bool:
    """A letter, number, punctuation mark or symbol that stands alone.

    Nothing combining, modifying or invisible.
    """
    category = unicodedata.category(chr(code))
    return category[0] in "LNPS" and category != "Lm"


def draw_face(
    face: Face, codes: Sequence[int] | None, side: int
) -> Iterator[tuple[int, bytes, np.ndarray]]:
    """(code, fingerprint, uint8 [side, side]) of each code (None: all) that the face has ink for.

    Drawn at twice the size and averaged.  The baseline is at 0.7 of the height and the ink is
    centred, so c and C differ in size.
    """
    from PIL import Image, ImageDraw, ImageFont

    with _open_face(face) as font:
        available = set(font.getBestCmap() or ())
    if codes is None:
        codes = sorted(code for code in available if is_symbol(code))
    else:
        codes = [code for code in codes if code in available]
    large = 2 * side
    basic = ImageFont.Layout.BASIC  # the same with and without libraqm
    height = round(large * 0.72)
    try:
        pen = ImageFont.truetype(face.path, height, index=face.index, layout_engine=basic)
    except OSError:
        raise UserError(f"{face.path}: cannot be drawn; outline fonts are needed") from None
    for code in codes:
        left, top, right, bottom = pen.getbbox(chr(code), anchor="ls")
        if right <= left or bottom <= top:
            continue
        canvas = Image.new("L", (large, large))
        origin = ((large - left - right) / 2, round(large * 0.7))
        ImageDraw.Draw(canvas).text(origin, chr(code), fill=255, font=pen, anchor="ls")
        pixels = np.asarray(canvas)
        if pixels.max() < 128:
            continue
        drawing = pixels.reshape(side, 2, side, 2).mean((1, 3)).round().astype(np.uint8)
        yield code, hashlib.blake2b(pixels.tobytes(), digest_size=16).digest(), drawing
