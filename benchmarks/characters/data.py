"""Chinese characters of ../shared/data/cjk_glyphs as webdataset shards, their distortions fixed by a seed.

    OMP_NUM_THREADS=1 python -m benchmarks.characters.data --out DIR [--classes 3755] [--seed 0] [--strength 1]

Two minutes on one core for 3,755 classes.  DIR/seen: train, val and test of seven fonts, every image a distortion of
its own.  DIR/unseen: a test split of UMing and BabelStone, which no other split shows.  What is complete is not made
again: a run that was interrupted goes on with the split that it was at.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np

from pipeline.config import Data
from trainer.data.authoring.glyphs import Distortion, ShardMaker, class_name, plan_shards
from trainer.data.shards import ShardWriter, open_shards
from trainer.data.writing import read_manifest, write_manifest

SHARED = Path(__file__).parents[3] / "shared" / "data"
SOURCE = Path(os.environ.get("REFERRAL_DATA", SHARED)) / "cjk_glyphs"
LEVEL_ONE, BOTH_LEVELS = (
    3755,
    6763,
)  # the first so many labels are level 1 of GB 2312, and all of it
ROWS, COLUMNS, SIDE = 83, 82, 48  # of a mosaic, and of a drawing in it
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
SIZE = 32
CHUNK = 10_000  # samples that write_part holds at a time
DISTORTION = Distortion()


@cache
def drawings(font: str, source: Path = SOURCE) -> np.ndarray:
    """uint8 [6763, 48, 48] of one font, ink 255 on 0, in the order of labels_gb2312.txt."""
    from PIL import Image

    mosaic = np.asarray(Image.open(source / f"{font}.webp").convert("L"))
    tiles = mosaic.reshape(ROWS, SIDE, COLUMNS, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)
    return tiles[: len(characters(source))]


def characters(source: Path = SOURCE) -> str:
    return (source / "labels_gb2312.txt").read_text(encoding="utf-8").strip()


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
    for part, fonts in (("seen", SEEN), ("unseen", UNSEEN)):
        # Drawings of a class are neighbours, as ShardMaker wants them: [C, fonts, side, side].
        drawn = np.stack([drawings(font, source)[:num_classes] for font in fonts], axis=1).reshape(
            -1, SIDE, SIDE
        )
        first = np.arange(num_classes) * len(fonts)
        count = np.full(num_classes, len(fonts))
        letters = characters(source)[:num_classes]
        names, codes = (
            [class_name(letter) for letter in letters],
            np.array([ord(letter) for letter in letters]),
        )
        made_by = {
            "command": "benchmarks.characters.data",
            "seed": seed,
            "size": SIZE,
            "fonts": list(fonts),
            "distortion": asdict(distortion),
            "per_class": per_class[part],
        }
        directory = out / part
        directory.mkdir(parents=True, exist_ok=True)
        old = read_manifest(directory)
        if old and (old["made_by"], old["classes"]) != (made_by, names):
            raise ValueError(
                f"{directory} was made with {old['made_by']}, not {made_by}; give another --out"
            )
        maker = ShardMaker(drawn, directory, first, count, codes, names, SIZE, seed, distortion)
        for split, images in per_class[part].items():
            if old and split in old["splits"]:
                continue
            for unfinished in directory.glob(f".{split}-*"):
                shutil.rmtree(unfinished)
            shards = [maker(*shard) for shard in plan_shards(split, num_classes, images, seed)]
            facts = {"samples": num_classes * images, "shards": shards}
            write_manifest(directory, names, {split: facts}, made_by)


def write_part(
    source: Path,
    out: Path,
    names: list[str],
    chosen: Callable[[str, np.ndarray], np.ndarray],
    made_by: dict,
) -> None:
    """Write OUT from the shards of `source`: of the classes `names` alone, numbered in that order, the samples that
    chosen(split, labels) says, bool [n] of the labels of those classes' samples; in the order that they have there.

    Raises ValueError if the source has no such class.
    """
    splits = {}
    for split in ("train", "val", "test"):
        opened = open_shards(str(source), Data(), split)
        if unknown := set(names) - set(opened.class_names):
            raise ValueError(f"{source} has no classes {', '.join(sorted(unknown))}")
        number = {name: label for label, name in enumerate(names)}
        label_of = np.array([number.get(name, -1) for name in opened.class_names])[opened.labels]
        ids = np.flatnonzero(label_of >= 0)
        ids = ids[chosen(split, label_of[ids])]
        with ShardWriter(out, split, names, overwrite=True) as writer:
            for start in range(0, len(ids), CHUNK):
                part = ids[start : start + CHUNK]
                samples = zip(
                    opened.keys(part), opened.raw(part), label_of[part].tolist(), strict=True
                )
                for key, members, label in samples:
                    writer.write(members | {"__key__": key, "cls": str(label).encode()})
        splits[split] = writer.facts
    write_manifest(out, names, splits, made_by)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=LEVEL_ONE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--strength", type=float, default=1.0, help="times every amplitude of the distortions"
    )
    args = parser.parse_args()
    make(args.out, args.classes, args.seed, DISTORTION.times(args.strength))


if __name__ == "__main__":
    main()
