"""Do the groups hold what is known to look alike?  Against Unicode's list of confusables, and against the pixels.

    python -m benchmarks.lookalikes RUN --picture docs/pictures/NAME.webp

RUN has `measure` done and classes named `A U+0041 ...`, as `referral shards glyphs` and benchmarks.characters do.
Printed: the share of pairs whose two classes share a group, beside chance (the same groups, the classes relabelled at
random), for disjoint groups and for two and three to a class; the groups are found anew, without labels and without
the list.  Pairs: those that Unicode lists (TR 39, two characters of one prototype), and each class with the class
whose mean image is nearest to its own.  The picture: the groups most worth a specialist, then the listed pairs.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from clustering import (
    ClassGroups,
    PredictionStatistics,
    captured_confusion,
    forecast,
    group_classes,
)

SHARED = Path(os.environ.get("REFERRAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
LISTED = SHARED / "confusables" / "confusables-17.0.0.txt.gz"
CODE = re.compile(r"U\+([0-9A-F]{4,6})")
PER_CLASS = 8  # val images that a class's mean is of
GAP, COLUMNS = 3, 30  # of the picture: pixels between tiles, tiles in a row


def prototypes(text: str) -> dict[str, str]:
    """Each character that the list maps to one character, and that one; pairs of several characters are left out."""
    found = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.partition("#")[0].split(";")]
        if len(fields) >= 2 and " " not in fields[0] and " " not in fields[1]:
            found[chr(int(fields[0].removeprefix("\ufeff"), 16))] = chr(int(fields[1], 16))
    return found


def listed_pairs(prototype_of: dict[str, str], characters: list[str]) -> list[tuple[int, int]]:
    """Pairs of classes, ascending, of which some two characters have one prototype.  characters: of each class."""
    classes_of: dict[str, set[int]] = {}
    for number, together in enumerate(characters):
        for character in together:
            classes_of.setdefault(prototype_of.get(character, character), set()).add(number)
    return sorted(
        {pair for classes in classes_of.values() for pair in combinations(sorted(classes), 2)}
    )


def nearest_pairs(means: np.ndarray) -> list[tuple[int, int]]:
    """Each class with the class of the most similar mean image (cosine of the centred pixels).  means: [C, pixels]."""
    unit = means - means.mean(axis=1, keepdims=True)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-9)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return sorted({tuple(sorted((i, int(j)))) for i, j in enumerate(similarity.argmax(axis=1))})


def together(groups: ClassGroups, pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """Share of the pairs whose two classes have a group in common, and its chance level."""
    rows, columns = np.array(pairs).T
    matrix = csr_array((np.ones(len(pairs)), (rows, columns)), shape=(groups.num_classes,) * 2)
    return captured_confusion(groups, matrix)


def characters_of(shards, merged: list[dict]) -> list[str]:
    """The characters of each class, by its name and, where classes of several were merged, by merged.json."""
    found = [
        "".join(chr(int(code, 16)) for code in CODE.findall(name)) for name in shards.class_names
    ]
    for row in merged:
        found[row["class"]] = "".join(
            chr(int(CODE.search(name)[1], 16)) for name in row["characters"]
        )
    return found


def examples(shards) -> tuple[np.ndarray, np.ndarray]:
    """Of each class the mean of PER_CLASS images, float32 [C, pixels], and the image nearest to it, uint8 [C, H, W]."""
    means, typical = [], []
    for label in range(shards.num_classes):
        images = shards.inputs(np.flatnonzero(shards.labels == label)[:PER_CLASS])[:, 0]
        flat = images.reshape(len(images), -1).astype(np.float32)
        means.append(flat.mean(axis=0))
        typical.append(images[((flat - means[-1]) ** 2).sum(axis=1).argmin()])
    return np.array(means), np.array(typical)


def family(expected: csr_array, members: np.ndarray, count: int) -> list[int]:
    """`count` of a group's classes: the two most confused first, then each that is most confused with those before.

    expected: the predictions' expected confusion, [C, C].
    """
    inside = expected[members][:, members].toarray()
    inside += inside.T
    np.fill_diagonal(inside, 0)
    order = [int(inside.max(axis=1).argmax())]
    met = inside[order[0]].copy()
    while len(order) < min(count, len(members)):
        met[order] = -1
        order.append(int(met.argmax()))
        met = np.maximum(met, inside[order[-1]])
    return [int(members[i]) for i in order]


def picture(
    images: np.ndarray,
    rows: list[tuple[str, list[int]]],
    beside: list[tuple[str, list[tuple[int, int]]]],
):
    """A contact sheet: a caption and a row of tiles for each of `rows`, a caption and pairs for each of `beside`."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    side = images.shape[1] + GAP
    of_pair = 2 * side + 2 * GAP
    per_row = side * COLUMNS // of_pair
    heights = [22 + side] * len(rows) + [
        22 + side * -(-len(pairs) // per_row) for _, pairs in beside
    ]
    sheet = Image.new("L", (side * COLUMNS + GAP, sum(heights) + 8 * len(heights)), 255)
    draw = ImageDraw.Draw(sheet)
    y = 0
    tiled = [(caption, [[one] for one in classes], COLUMNS, side) for caption, classes in rows]
    tiled += [
        (caption, [list(pair) for pair in pairs], per_row, of_pair) for caption, pairs in beside
    ]
    for (caption, tiles, in_a_row, width), height in zip(tiled, heights, strict=True):
        draw.text((GAP, y + 2), caption, 0, font)
        for number, classes in enumerate(tiles):
            for k, one in enumerate(classes):
                place = (
                    GAP + number % in_a_row * width + k * (side - GAP),
                    y + 22 + number // in_a_row * side,
                )
                sheet.paste(Image.fromarray(255 - images[one]), place)
        y += height + 8
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--method", default="kmeans")
    parser.add_argument("--shown", type=int, default=9, help="groups in the picture")
    options = parser.parse_args()
    if not LISTED.exists():
        raise SystemExit(
            f"skipped: {LISTED} is not there; REFERRAL_DATA names the directory that holds confusables/"
        )

    from pipeline.graph import open_run
    from pipeline.store import read_json
    from trainer.data.cache import cached
    from trainer.data.shards import open_shards

    run = open_run(options.run)
    config, place = run.config, Path(run.config.data.val)
    shards = cached(
        open_shards(config.data.val, config.data, "val"), run.root / "cache" / "val", config.data
    )
    merged = read_json(place / "merged.json") if (place / "merged.json").exists() else []
    means, images = examples(shards)
    with gzip.open(LISTED, "rt", encoding="utf-8-sig") as file:
        listed = listed_pairs(prototypes(file.read()), characters_of(shards, merged))
    nearest = nearest_pairs(means)
    statistics = PredictionStatistics.load(run.measure.path("statistics.npz"))
    print(
        f"# {options.run}: {shards.num_classes} classes, {config.clusters.num_groups} groups, {options.method}"
    )
    print(
        f"# {len(listed)} pairs of classes that Unicode lists, {len(nearest)} of nearest mean images"
    )
    print(
        "| memberships | Unicode's pairs in one group | chance | nearest images in one group | val errors |"
    )
    print("|---|---|---|---|---|")
    by_overlap = {}
    for overlap in (1, 2, 3):
        groups = group_classes(
            statistics,
            config.clusters.num_groups,
            options.method,
            overlap=overlap,
            seed=config.seed,
        )
        by_overlap[overlap] = groups
        share, chance = together(groups, listed)
        looks, errors = (
            together(groups, nearest)[0],
            captured_confusion(groups, statistics.confusion)[0],
        )
        print(
            f"| {overlap} | {round(share * len(listed))} of {len(listed)} = {share:.3f} | {chance:.3f} | {looks:.3f} "
            f"| {errors:.3f} |"
        )
    groups = by_overlap[1]
    foretold = forecast(groups, statistics)
    best = sorted(range(len(groups)), key=lambda g: -foretold[g]["gain"])[: options.shown]
    rows = [
        (
            f"group {g}: {foretold[g]['classes']} classes, {foretold[g]['errors_inside']} val errors inside",
            family(statistics.expected_confusion, groups.members[g], COLUMNS),
        )
        for g in best
    ]
    of_class = np.concatenate(
        [np.full(len(members), g) for g, members in enumerate(groups.members)]
    )
    of_class = of_class[np.argsort(np.concatenate(groups.members))]
    met = [pair for pair in listed if of_class[pair[0]] == of_class[pair[1]]]
    apart = [pair for pair in listed if of_class[pair[0]] != of_class[pair[1]]]
    beside = [
        (f"Unicode's pairs in one group ({len(met)})", met),
        (f"in different groups ({len(apart)})", apart),
    ]
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    picture(images, rows, [(caption, pairs) for caption, pairs in beside if pairs]).save(
        options.picture, quality=60
    )
    print(f"# {options.picture}: {options.picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
