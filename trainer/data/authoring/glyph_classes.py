"""Which characters become classes: those that enough faces draw. Look-alikes become one."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config import UserError

from .glyph_fonts import Face, draw_face, is_symbol, names_of

# Latin, IPA, Greek, Cyrillic, Armenian, Georgian, currency signs, letterlike symbols and number
# forms, arrows.
DEFAULT_RANGES = [
    (0x21, 0x24F),
    (0x250, 0x2AF),
    (0x370, 0x3FF),
    (0x400, 0x52F),
    (0x531, 0x58F),
    (0x10A0, 0x10FF),
    (0x20A0, 0x20BF),
    (0x2100, 0x218F),
    (0x2190, 0x21FF),
]

# (what is done, how many are done, of how many)
Advance = Callable[[str, int, int], None]
# code -> {index of a face: (fingerprint, uint8 [side, side])}
Drawn = dict[int, dict[int, tuple[bytes, np.ndarray]]]


@dataclass
class Glyphs:
    """Drawings of classes.

    drawings: uint8 [N, S, S].  Class c has count[c] of them, from first[c] on, one per face that
    draws it.
    characters: those of each class, in order of code point.
    left_out: those asked for that too few faces draw.
    """

    drawings: np.ndarray
    first: np.ndarray
    count: np.ndarray
    characters: list[str]
    left_out: str

    @property
    def codes(self) -> np.ndarray:
        """int64 [C]: the code point that stands for each class."""
        return np.array([ord(characters[0]) for characters in self.characters])

    @property
    def class_names(self) -> list[str]:
        """C names, each of the class's first character."""
        return [class_name(characters[0]) for characters in self.characters]


def class_name(character: str) -> str:
    """`A U+0041 LATIN CAPITAL LETTER A`."""
    return f"{character} U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()


def default_characters() -> str:
    """The symbols of DEFAULT_RANGES."""
    codes: list[int] = []
    for low, high in DEFAULT_RANGES:
        codes += range(low, high + 1)
    return "".join(chr(code) for code in codes if is_symbol(code))


def merged_classes(glyphs: Glyphs) -> list[dict]:
    """[{"class": index, "name", "characters": [names of all]}] of classes of several characters."""
    return [
        {
            "class": index,
            "name": class_name(characters[0]),
            "characters": [class_name(character) for character in characters],
        }
        for index, characters in enumerate(glyphs.characters)
        if len(characters) > 1
    ]


def draw_glyphs(
    faces: Sequence[Face],
    characters: str | None,
    size: int,
    min_faces: int,
    limit: int | None = None,
    advance: Advance | None = None,
) -> Glyphs:
    """Draw characters with every face, and merge those that look the same.

    Two characters are one class if at least `min_faces` faces draw both, and all that do draw the
    same pixels.

    Parameters
    ----------
    faces : sequence of Face
    characters : str or None
        None: whatever the faces have.
    size : int
        Side of the images to be made. Drawings are larger by a margin.
    min_faces : int
        Characters that fewer faces draw are left out.
    limit : int, optional
        Keep the first so many classes.
    advance : callable, optional
        Told of the progress.

    Raises
    ------
    UserError
        If fewer than two classes are left, or fewer than `limit`.
    """
    codes = None
    if characters is not None:
        codes = sorted({ord(character) for character in characters if not character.isspace()})
    drawn = _draw(faces, codes, size, advance)
    fingerprints = {
        code: {face: fingerprint for face, (fingerprint, _) in drawings.items()}
        for code, drawings in drawn.items()
    }
    groups = merge_identical(fingerprints, min_faces)
    if limit is not None and len(groups) < limit:
        raise UserError(
            f"classes = {limit}: at least {min_faces} faces draw only {len(groups)} "
            "different glyphs"
        )
    groups = groups[:limit]
    if len(groups) < 2:
        asked = "their characters" if codes is None else f"{len(codes)} characters"
        raise UserError(
            f"{names_of(faces)}: of {asked} {len(groups)} are drawn by at least {min_faces} of "
            "these faces; two classes are needed"
        )
    return _collect(groups, drawn, codes or [])


def _draw(
    faces: Sequence[Face], codes: list[int] | None, size: int, advance: Advance | None
) -> Drawn:
    # As large as the image with a margin of 1/7: distortions then move little ink off the canvas.
    side = -(-size * 8 // 7)
    drawn: Drawn = {}
    for index, face in enumerate(faces):
        for code, fingerprint, drawing in draw_face(face, codes, side):
            drawn.setdefault(code, {})[index] = (fingerprint, drawing)
        if advance:
            advance("drawing", index + 1, len(faces))
    return drawn


def _collect(groups: list[list[int]], drawn: Drawn, codes: list[int]) -> Glyphs:
    """The drawings of each group of codes: of a face that draws several, the first code's."""
    drawings: list[np.ndarray] = []
    counts: list[int] = []
    for group in groups:
        by_face: dict[int, np.ndarray] = {}
        for code in reversed(group):
            by_face |= {face: drawing for face, (_, drawing) in drawn[code].items()}
        drawings += [by_face[face] for face in sorted(by_face)]
        counts.append(len(by_face))
    kept = set().union(*groups)
    count = np.array(counts)
    return Glyphs(
        drawings=np.stack(drawings),
        first=np.cumsum(count) - count,
        count=count,
        characters=["".join(map(chr, group)) for group in groups],
        left_out="".join(chr(code) for code in codes if code not in kept),
    )


def merge_identical(
    fingerprints: Mapping[int, Mapping[int, bytes]], min_faces: int
) -> list[list[int]]:
    """Groups of codes that look the same.  fingerprints[code][face]: of the code's drawing.

    Codes drawn by fewer than min_faces faces are left out.  Groups and their codes are in ascending
    order.
    """
    groups: list[list[int]] = []
    looks: list[dict[int, bytes]] = []  # of each group, over all faces that draw one of its codes
    with_drawing: dict[tuple[int, bytes], list[int]] = {}
    for code in sorted(fingerprints):
        own = fingerprints[code]
        if len(own) < min_faces:
            continue
        candidates: dict[int, None] = {}  # a set that keeps its order
        for drawing in own.items():
            candidates |= dict.fromkeys(with_drawing.get(drawing, ()))
        for group in candidates:
            shared = own.keys() & looks[group].keys()
            if len(shared) >= min_faces and all(own[face] == looks[group][face] for face in shared):
                break
        else:
            group = len(groups)
            groups.append([])
            looks.append({})
        groups[group].append(code)
        looks[group].update(own)
        for drawing in own.items():
            alike = with_drawing.setdefault(drawing, [])
            if group not in alike:
                alike.append(group)
    return groups
