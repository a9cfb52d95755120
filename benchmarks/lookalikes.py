"""Do the groups hold what is known to look alike?  By Unicode's list of confusables, and by pixels.

    python -m benchmarks.lookalikes RUN --picture docs/pictures/NAME.webp
    python -m benchmarks.lookalikes --quick  seconds: a run of its own, 60 glyphs

RUN has `measure` done and classes named `A U+0041 ...`, as `referral shards glyphs` and
benchmarks.characters do.  Printed: the share of pairs whose two classes share a group, beside
chance (the same groups, the classes relabelled at random), for disjoint groups and for two and
three to a class. The groups are found anew, without labels and without the list.  Pairs: those that
Unicode lists (TR 39, two characters of one prototype), and each class with the class whose mean
image is nearest to its own.  The picture: the groups most worth a specialist, then the listed
pairs.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse import csr_array

from benchmarks.papers import lab
from clustering import (
    ClassGroups,
    PredictionStatistics,
    captured_confusion,
    forecast,
    group_classes,
)
from pipeline.graph import RunDirectory, open_run
from pipeline.store import read_json
from trainer.data.cache import cached
from trainer.data.shards import ShardSet, open_shards

LISTED = lab.DATA / "confusables" / "confusables-17.0.0.txt.gz"
CODE = re.compile(r"U\+([0-9A-F]{4,6})")
PER_CLASS = 8  # val images that a class's mean is of
GAP, COLUMNS = 3, 30  # of the picture: pixels between tiles, tiles in a row
CAPTION = 22  # pixels
OVERLAPS = (1, 2, 3)

Pair = tuple[int, int]


# Pairs


def prototypes(text: str) -> dict[str, str]:
    """Each character that the list maps to one character, and that one.

    Pairs of several characters are left out.
    """
    prototype_of = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.partition("#")[0].split(";")]
        if len(fields) >= 2 and " " not in fields[0] and " " not in fields[1]:
            prototype_of[chr(int(fields[0].removeprefix("\ufeff"), 16))] = chr(int(fields[1], 16))
    return prototype_of


def listed_pairs(prototype_of: dict[str, str], characters: list[str]) -> list[Pair]:
    """Pairs of classes, ascending, of which some two characters have one prototype.

    characters: of each class.
    """
    classes_of: dict[str, set[int]] = {}
    for label, together in enumerate(characters):
        for character in together:
            classes_of.setdefault(prototype_of.get(character, character), set()).add(label)
    pairs: set[Pair] = set()
    for classes in classes_of.values():
        pairs |= set(combinations(sorted(classes), 2))
    return sorted(pairs)


def nearest_pairs(means: np.ndarray) -> list[Pair]:
    """Each class with the class of the most similar mean image (cosine of the centred pixels).

    means: [C, pixels].
    """
    unit = means - means.mean(axis=1, keepdims=True)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-9)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = similarity.argmax(axis=1).tolist()
    return sorted({(min(i, j), max(i, j)) for i, j in enumerate(nearest)})


def together(groups: ClassGroups, pairs: list[Pair]) -> tuple[float, float]:
    """Share of the pairs whose two classes have a group in common, and its chance level."""
    rows, columns = np.array(pairs).T
    matrix = csr_array((np.ones(len(pairs)), (rows, columns)), shape=(groups.num_classes,) * 2)
    return captured_confusion(groups, matrix)


def characters_of(class_names: Sequence[str], merged: list[dict]) -> list[str]:
    """The characters of each class, by its name. Of several that were merged, by merged.json."""
    characters = ["".join(map(decoded, CODE.findall(name))) for name in class_names]
    for row in merged:
        codes = [CODE.findall(name)[0] for name in row["characters"]]
        characters[row["class"]] = "".join(map(decoded, codes))
    return characters


def decoded(code: str) -> str:
    return chr(int(code, 16))


def examples(shards: ShardSet) -> tuple[np.ndarray, np.ndarray]:
    """Of each class the mean of PER_CLASS images, and the image nearest to it.

    float32 [C, pixels] and uint8 [C, H, W].
    """
    means, typical = [], []
    for label in range(shards.num_classes):
        images = shards.inputs(np.flatnonzero(shards.labels == label)[:PER_CLASS])[:, 0]
        flat = images.reshape(len(images), -1).astype(np.float32)
        means.append(flat.mean(axis=0))
        typical.append(images[((flat - means[-1]) ** 2).sum(axis=1).argmin()])
    return np.array(means), np.array(typical)


# The picture


def family(expected: csr_array, classes: np.ndarray, count: int) -> list[int]:
    """`count` of a group's classes: the two most confused, then the most confused with those.

    expected: the predictions' expected confusion, [C, C].
    """
    inside = expected[classes][:, classes].toarray()
    inside += inside.T
    np.fill_diagonal(inside, 0)
    order = [int(inside.max(axis=1).argmax())]
    confused = inside[order[0]].copy()
    while len(order) < min(count, len(classes)):
        confused[order] = -1
        order.append(int(confused.argmax()))
        confused = np.maximum(confused, inside[order[-1]])
    return [int(classes[i]) for i in order]


class Band(NamedTuple):
    """A caption and tiles below it, each of one or more images side by side."""

    caption: str
    tiles: list[list[int]]


def picture(
    images: np.ndarray, rows: list[tuple[str, list[int]]], beside: list[tuple[str, list[Pair]]]
) -> Image.Image:
    """A contact sheet: a row of tiles for each of `rows`, and pairs for each of `beside`."""
    side = images.shape[1] + GAP
    of_pair = 2 * side + 2 * GAP
    pairs_in_a_row = side * COLUMNS // of_pair
    bands = []
    for caption, classes in rows:
        tiles = [[label] for label in classes]
        bands.append((Band(caption, tiles), COLUMNS, side, CAPTION + side))
    for caption, pairs in beside:
        height = CAPTION + side * -(-len(pairs) // pairs_in_a_row)
        tiles = [list(pair) for pair in pairs]
        bands.append((Band(caption, tiles), pairs_in_a_row, of_pair, height))
    total = sum(height + 8 for *_, height in bands)
    sheet = Image.new("L", (side * COLUMNS + GAP, total), 255)
    y = 0
    for band, in_a_row, width, height in bands:
        draw_band(sheet, images, band, y, in_a_row, width)
        y += height + 8
    return sheet


def draw_band(
    sheet: Image.Image, images: np.ndarray, band: Band, y: int, in_a_row: int, width: int
) -> None:
    size = images.shape[1]
    ImageDraw.Draw(sheet).text((GAP, y + 2), band.caption, 0, ImageFont.load_default(14))
    for index, labels in enumerate(band.tiles):
        left = GAP + index % in_a_row * width
        top = y + CAPTION + index // in_a_row * (size + GAP)
        for k, label in enumerate(labels):
            sheet.paste(Image.fromarray(255 - images[label]), (left + k * size, top))


def draw_groups(
    file: Path,
    images: np.ndarray,
    groups: ClassGroups,
    statistics: PredictionStatistics,
    listed: list[Pair],
    shown: int,
) -> None:
    """The groups most worth a specialist, then the listed pairs inside and across groups."""
    expected = forecast(groups, statistics)
    best = sorted(range(len(groups)), key=lambda g: -(expected[g]["gain"] or 0.0))[:shown]
    rows = []
    for g in best:
        inside = expected[g]["errors_inside"]
        caption = f"group {g}: {expected[g]['classes']} classes, {inside} val errors inside"
        labels = family(statistics.expected_confusion, groups.members[g], COLUMNS)
        rows.append((caption, labels))
    group_of = np.empty(groups.num_classes, int)
    for g, classes in enumerate(groups.members):
        group_of[classes] = g
    inside = [pair for pair in listed if group_of[pair[0]] == group_of[pair[1]]]
    across = [pair for pair in listed if group_of[pair[0]] != group_of[pair[1]]]
    beside = [
        (f"Unicode's pairs in one group ({len(inside)})", inside),
        (f"in different groups ({len(across)})", across),
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet = picture(images, rows, [(caption, pairs) for caption, pairs in beside if pairs])
    sheet.save(file, quality=60)


# The program


def shards_of(run: RunDirectory) -> ShardSet:
    data = run.config.data
    return cached(open_shards(data.val, data, "val"), run.root / "cache" / "val", data)


def merged_of(run: RunDirectory) -> list[dict]:
    file = Path(run.config.data.val) / "merged.json"
    return read_json(file) if file.exists() else []


def measure(
    groups: ClassGroups,
    statistics: PredictionStatistics,
    listed: list[Pair],
    nearest: list[Pair],
) -> dict[str, float]:
    """The shares of each kind of pairs that share a group."""
    share, chance = together(groups, listed)
    return {
        "listed": share,
        "chance": chance,
        "nearest": together(groups, nearest)[0],
        "val_errors": captured_confusion(groups, statistics.confusion)[0],
    }


def quick_run(path: Path) -> Path:
    """A generalist of the first glyphs, trained for a moment and measured."""
    data = path / "data"
    counts = {"classes": 60, "train": 12, "val": PER_CLASS, "test": 1}
    words = [str(word) for key, value in counts.items() for word in (f"--{key}", value)]
    lab.referral("shards", "glyphs", "--out", data.resolve(), *words)
    config = path / "run.toml"
    splits = "\n".join(f'{split} = "{data.resolve()}"' for split in ("train", "val", "test"))
    config.write_text(
        f'[data]\n{splits}\n[model]\nname = "mlp"\nwidth = 32\n[train]\nsteps = 60\n'
        '[clusters]\nnum_groups = 6\n[engine]\ndevice = "cpu"\n'
    )
    lab.run_in_process(config, path / "run", [], only=("generalist", "measure"))
    return path / "run"


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--method", default="kmeans")
    parser.add_argument("--shown", type=int, default=9, help="groups in the picture")
    parser.add_argument(
        "--quick", action="store_true", help="a run of its own, below runs/lookalikes/quick"
    )
    options = parser.parse_args(words)
    if not options.quick and (options.run is None or options.picture is None):
        parser.error("RUN and --picture are needed, or --quick")
    return options


def read_list(quick: bool) -> str:
    """Unicode's list. Of a quick look some of its lines, where the list is absent."""
    if quick and not LISTED.exists():
        return "0031 ; 006C ; MA\n0049 ; 006C ; MA\n006C ; 006C ; MA\n0030 ; 004F ; MA\n"
    lab.require(LISTED)
    with gzip.open(LISTED, "rt", encoding="utf-8-sig") as file:
        return file.read()


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    prototype_of = prototypes(read_list(options.quick))
    if options.quick:
        path = Path("runs/lookalikes/quick")
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        options.run, options.picture = quick_run(path), path / "groups.webp"
    run = open_run(options.run)
    config, shards = run.config, shards_of(run)
    means, images = examples(shards)
    listed = listed_pairs(prototype_of, characters_of(shards.class_names, merged_of(run)))
    nearest = nearest_pairs(means)
    statistics = PredictionStatistics.load(run.measure.path("statistics.npz"))
    num_groups = config.clusters.num_groups
    print(f"# {options.run}: {len(means)} classes, {num_groups} groups, {options.method}")
    print(
        f"# {len(listed)} pairs of classes that Unicode lists, "
        f"{len(nearest)} of nearest mean images"
    )
    print(
        "| memberships | Unicode's pairs in one group | chance | nearest images in one group "
        "| val errors |"
    )
    print("|---|---|---|---|---|")
    by_overlap, shares = {}, {}
    for overlap in OVERLAPS:
        groups = group_classes(
            statistics, num_groups, options.method, overlap=overlap, seed=config.seed
        )
        row = measure(groups, statistics, listed, nearest)
        by_overlap[overlap], shares[overlap] = groups, row
        count = round(row["listed"] * len(listed))
        print(
            f"| {overlap} | {count} of {len(listed)} = {row['listed']:.3f} | {row['chance']:.3f} "
            f"| {row['nearest']:.3f} | {row['val_errors']:.3f} |"
        )
    draw_groups(options.picture, images, by_overlap[1], statistics, listed, options.shown)
    print(f"# {options.picture}: {options.picture.stat().st_size / 1024:.0f} KiB")
    pairs = {"listed": len(listed), "nearest": len(nearest)}
    command = lab.command_line("benchmarks.lookalikes", words)
    lab.print_json({"pairs": pairs, "by_overlap": shares}, options, command)


if __name__ == "__main__":
    main()
