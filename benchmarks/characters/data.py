"""Chinese characters of shared/data/cjk_glyphs as webdataset shards, distorted by a seed.

    OMP_NUM_THREADS=1 python -m benchmarks.characters.data --out DIR [--classes 3755]
        [--strength 1]
    python -m benchmarks.characters.data --quick  seconds: 24 made-up characters

Two minutes on one core for 3,755 classes.  DIR/seen: train, val and test of seven fonts, every
image a distortion of its own.  DIR/unseen: a test split of UMing and BabelStone, which no other
split shows.  What is complete is not made again: an interrupted run resumes with its split.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.papers import lab
from pipeline.config import Data
from trainer.data.authoring.glyphs import Distortion, ShardMaker, class_name, plan_shards
from trainer.data.shards import ShardSet, ShardWriter, open_shards
from trainer.data.writing import read_manifest, write_manifest

SOURCE = lab.DATA / "cjk_glyphs"
# The first so many labels are level 1 of GB 2312, and all of it.
LEVEL_ONE, BOTH_LEVELS = 3755, 6763
DRAWING = 48  # pixels of a drawing's side, in a mosaic of them
SEEN = (
    "HanaMinA",
    "NotoSansSC-Bold",
    "NotoSansSC-Regular",
    "NotoSerifSC-Bold",
    "NotoSerifSC-Regular",
    "WQYMicroHei",
    "WQYZenHei",
)
UNSEEN = ("ARPLUMingCN", "BabelStoneHan")  # close to each other, so both are held out
# Images of a class: multiples of the number of fonts, so that each font has its share.
PER_CLASS = {"seen": {"train": 105, "val": 35, "test": 14}, "unseen": {"test": 14}}
QUICK_CLASSES = 24
QUICK_PER_CLASS = {"seen": {"train": 14, "val": 7, "test": 7}, "unseen": {"test": 4}}
SIZE = 32
CHUNK = 10_000  # samples that write_part holds at a time
DISTORTION = Distortion()


# Drawings


@cache
def drawings(font: str, source: Path = SOURCE) -> np.ndarray:
    """uint8 [C, 48, 48] of one font, ink 255 on 0, in the order of labels_gb2312.txt."""
    mosaic = np.asarray(Image.open(source / f"{font}.webp").convert("L"))
    height, width = mosaic.shape
    tiles = mosaic.reshape(height // DRAWING, DRAWING, width // DRAWING, DRAWING).swapaxes(1, 2)
    return tiles.reshape(-1, DRAWING, DRAWING)[: len(characters(source))]


def characters(source: Path = SOURCE) -> str:
    return (source / "labels_gb2312.txt").read_text(encoding="utf-8").strip()


def make_up_drawings(source: Path, count: int) -> None:
    """A source like the shared one: characters of random strokes, drawn anew for each font."""
    source.mkdir(parents=True, exist_ok=True)
    letters = "".join(chr(0x4E00 + index) for index in range(count))
    (source / "labels_gb2312.txt").write_text(letters, encoding="utf-8")
    rng = np.random.default_rng(0)
    strokes = rng.integers(6, DRAWING - 6, (count, 5, 4))  # lines from (x, y) to (x, y)
    for index, font in enumerate((*SEEN, *UNSEEN)):
        mosaic = Image.new("L", (count * DRAWING, DRAWING))
        for label, lines in enumerate(strokes + rng.integers(-2, 3, strokes.shape)):
            tile = Image.new("L", (DRAWING, DRAWING))
            draw = ImageDraw.Draw(tile)
            for line in lines.tolist():
                draw.line(line, fill=255, width=2 + index % 3)
            mosaic.paste(tile, (label * DRAWING, 0))
        mosaic.save(source / f"{font}.webp", lossless=True, method=0)


# Shards


def make(
    out: Path,
    num_classes: int = LEVEL_ONE,
    seed: int = 0,
    distortion: Distortion = DISTORTION,
    per_class: dict[str, dict[str, int]] = PER_CLASS,
    source: Path = SOURCE,
) -> None:
    """Write OUT/seen and OUT/unseen, except for the splits that are there already.

    Raises ValueError if OUT holds splits that were made with other arguments.
    """
    lab.require(source)
    for part, fonts in (("seen", SEEN), ("unseen", UNSEEN)):
        made_by = {
            "command": "benchmarks.characters.data",
            "seed": seed,
            "size": SIZE,
            "fonts": list(fonts),
            "distortion": asdict(distortion),
            "per_class": per_class[part],
        }
        letters = characters(source)[:num_classes]
        make_part(out / part, fonts, letters, per_class[part], made_by, distortion, seed, source)


def make_part(
    out: Path,
    fonts: tuple[str, ...],
    letters: str,
    per_class: dict[str, int],
    made_by: dict,
    distortion: Distortion,
    seed: int,
    source: Path,
) -> None:
    """The splits of some fonts. See make."""
    count, names = len(letters), [class_name(letter) for letter in letters]
    out.mkdir(parents=True, exist_ok=True)
    old = read_manifest(out)
    if old and (old["made_by"], old["classes"]) != (made_by, names):
        raise ValueError(f"{out} was made with {old['made_by']}, not {made_by}; give another --out")
    # Drawings of a class are neighbours, as ShardMaker wants them: [C, fonts, side, side].
    of_fonts = np.stack([drawings(font, source)[:count] for font in fonts], axis=1)
    maker = ShardMaker(
        of_fonts.reshape(-1, DRAWING, DRAWING),
        out,
        np.arange(count) * len(fonts),
        np.full(count, len(fonts)),
        np.array([ord(letter) for letter in letters]),
        names,
        SIZE,
        seed,
        distortion,
    )
    for split, images in per_class.items():
        if old and split in old["splits"]:
            continue
        for unfinished in out.glob(f".{split}-*"):
            shutil.rmtree(unfinished)
        shards = [maker(*shard) for shard in plan_shards(split, count, images, seed)]
        write_manifest(out, names, {split: {"samples": count * images, "shards": shards}}, made_by)


def make_quick(out: Path) -> None:
    """Shards of a few made-up characters."""
    source = out.with_name(f"{out.name}-drawings")
    make_up_drawings(source, QUICK_CLASSES)
    make(out, QUICK_CLASSES, per_class=QUICK_PER_CLASS, source=source)


def write_part(
    source: Path,
    out: Path,
    names: list[str],
    chosen: Callable[[str, np.ndarray], np.ndarray],
    made_by: dict,
) -> None:
    """Write OUT from the shards of `source`: of the classes `names` alone, numbered in that order.

    chosen(split, labels): bool [n], which samples of those classes, given the new labels of all.
    They stay in their order.  Raises ValueError if the source has no such class.
    """
    splits = {}
    for split in ("train", "val", "test"):
        shards = open_shards(str(source), Data(), split)
        labels = renumbered(shards, names, source)
        ids = np.flatnonzero(labels >= 0)
        ids = ids[chosen(split, labels[ids])]
        with ShardWriter(out, split, names, overwrite=True) as writer:
            for start in range(0, len(ids), CHUNK):
                copy_samples(shards, ids[start : start + CHUNK], labels, writer)
        splits[split] = writer.facts
    write_manifest(out, names, splits, made_by)


def renumbered(shards: ShardSet, names: list[str], source: Path) -> np.ndarray:
    """int64 [N]: the place in `names` of each sample's class, -1 for a class that is not there."""
    unknown = set(names) - set(shards.class_names)
    if unknown:
        raise ValueError(f"{source} has no classes {', '.join(sorted(unknown))}")
    label_of = {name: label for label, name in enumerate(names)}
    return np.array([label_of.get(name, -1) for name in shards.class_names])[shards.labels]


def copy_samples(
    shards: ShardSet, ids: np.ndarray, labels: np.ndarray, writer: ShardWriter
) -> None:
    samples = zip(shards.keys(ids), shards.raw(ids), labels[ids].tolist(), strict=True)
    for key, files, label in samples:
        writer.write(files | {"__key__": key, "cls": str(label).encode()})


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("characters"), help="(characters)")
    parser.add_argument("--classes", type=int, default=LEVEL_ONE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--strength", type=float, default=1.0, help="times every amplitude of the distortions"
    )
    parser.add_argument("--quick", action="store_true", help="made-up characters, below OUT/quick")
    options = parser.parse_args(words)
    began = time.perf_counter()
    if options.quick:
        options.out = options.out / "quick"
        make_quick(options.out)
    else:
        make(options.out, options.classes, options.seed, DISTORTION.times(options.strength))
    seconds = round(time.perf_counter() - began, 1)
    images = {}
    for part in ("seen", "unseen"):
        splits = (read_manifest(options.out / part) or {})["splits"]
        images[part] = {split: each["samples"] for split, each in splits.items()}
    command = lab.command_line("benchmarks.characters.data", words)
    lab.print_json({"images": images, "seconds": seconds}, options, command)


if __name__ == "__main__":
    main()
