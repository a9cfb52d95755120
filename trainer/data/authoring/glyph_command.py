"""`referral shards glyphs`: the options of render_glyphs on the command line."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Annotated

from typer import Option

from pipeline.config import UserError

from .glyph_classes import Glyphs
from .glyph_drawing import SIDE, Distortion
from .glyphs import IMAGES_PER_CLASS, render_glyphs

DEFAULT = Distortion()


def glyphs(
    out: Annotated[Path, Option(metavar="DIR", help="the new directory")],
    fonts: Annotated[
        list[Path] | None,
        Option(
            help="font file, FILE#2 (its face 2) or directory of fonts; repeat for more [DejaVu]",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        str | None, Option(help="the characters, a text file of them, or N: the first N")
    ] = None,
    size: Annotated[int, Option(help="side of the images in pixels")] = SIDE,
    train: Annotated[int, Option(help="images per class of the train split")] = IMAGES_PER_CLASS[
        "train"
    ],
    val: Annotated[int, Option(help="the same for val")] = IMAGES_PER_CLASS["val"],
    test: Annotated[int, Option(help="the same for test")] = IMAGES_PER_CLASS["test"],
    min_faces: Annotated[
        int | None, Option(help="faces that must draw a character [5; with --fonts 1]")
    ] = None,
    strength: Annotated[float, Option(help="multiplies all the distortions that follow")] = 1.0,
    rotation: Annotated[float, Option(help="degrees")] = DEFAULT.rotation,
    shear: Annotated[float, Option(help="the tangent of its angle")] = DEFAULT.shear,
    scale: Annotated[float, Option(help="share by which the size varies")] = DEFAULT.scale,
    shift: Annotated[float, Option(help="pixels of a 28 x 28 image")] = DEFAULT.shift,
    elastic: Annotated[
        float, Option(help="pixels by which parts of a 28 x 28 image move")
    ] = DEFAULT.elastic,
    contrast: Annotated[float, Option(help="share by which it varies")] = DEFAULT.contrast,
    noise: Annotated[float, Option(help="its deviation, of a range of 1")] = DEFAULT.noise,
    seed: Annotated[int, Option(min=0, help="of all that is drawn")] = 0,
    processes: Annotated[int | None, Option(help="that render [one per core]")] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", "--force", help="replace the shards in --out")
    ] = False,
) -> None:
    """Render a labelled data set of glyph images from fonts: shards, manifest.json, merged.json."""
    distortion = Distortion(
        rotation, shear, scale, shift, elastic, DEFAULT.grid, contrast, noise
    ).times(strength)
    per_class = {"train": train, "val": val, "test": test}
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    rendered = render_glyphs(
        out,
        fonts,
        read_classes(classes),
        size,
        per_class,
        seed,
        distortion,
        min_faces,
        processes,
        force=overwrite,
    )
    _print_summary(out, rendered, per_class)


def _print_summary(out: Path, rendered: Glyphs, per_class: dict[str, int]) -> None:
    num_classes = len(rendered.characters)
    several = sum(len(characters) > 1 for characters in rendered.characters)
    images = ", ".join(f"{split} {count * num_classes:,}" for split, count in per_class.items())
    print(
        f"{out}: {num_classes} classes, {several} of several characters (merged.json); "
        f"images: {images}"
    )
    left_out = rendered.left_out
    if left_out:
        shown = left_out if len(left_out) <= 40 else f"{left_out[:40]}..."
        print(f"left out, because too few faces draw them: {len(left_out)} characters: {shown}")


def read_classes(text: str | None) -> int | str | None:
    """--classes: a number, the characters of a text file, or the characters themselves."""
    if text is None:
        return None
    if re.fullmatch(r"[+-]?[0-9]+", text):
        if int(text) < 2:
            raise UserError(f"--classes {text}: at least 2 classes are needed")
        return int(text)
    try:
        if Path(text).is_file():
            return Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{text}: not a UTF-8 text file") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise UserError(f"{text}: cannot be read: {error.strerror}") from None
    if text.endswith(".txt"):
        raise UserError(f"{text}: no such file of characters")
    return text
