"""Omniglot's 1,623 handwritten characters as one label set: generalist, specialists and controls.

    python -m benchmarks.characters.omniglot --to runs/omniglot [--seeds 0 1 2]
        [--jobs 2] [--write]
    python -m benchmarks.characters.omniglot --quick          seconds, no result

Of each character's 20 drawers the first 13 train, two are val and five are test.  Pictures are made
28 x 28, and training views turned, stretched and moved.  What is done is not done again.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from benchmarks.papers import lab
from benchmarks.papers.specialists import fewer_errors, percents
from trainer.data.authoring.arrays import write_arrays

from . import runs
from .headline import Verdict, fewer_than
from .runs import ROWS

SOURCE = lab.DATA / "omniglot"
CONFIG = Path(__file__).with_name("omniglot.toml")
DRAWERS = {"train": slice(0, 13), "val": slice(13, 15), "test": slice(15, 20)}
SIDE, ORIGINAL_SIDE = 28, 105
QUICK_CHARACTERS = 20
QUICK = [
    "train.steps=30",
    "train.batch_size=64",
    "train.validate_every=0",
    "clusters.num_groups=3",
    "specialists.steps=6",
    "specialists.batch_size=64",
    "specialists.validate_every=0",
    "controls.learning_rates=[3e-3]",
]


# The data


def pictures(source: Path = SOURCE) -> np.ndarray:
    """uint8 [C, 20, 28, 28], ink 255 on 0: background characters first."""
    parts = []
    for name in ("background", "evaluation"):
        with np.load(source / f"images_{name}.npz", allow_pickle=False) as file:
            parts.append(file["images"])
    ink = torch.from_numpy(~np.concatenate(parts)).flatten(0, 1)
    drawn = [
        F.interpolate(part[:, None].float(), (SIDE, SIDE), mode="area")[:, 0]
        for part in ink.split(2000)
    ]
    # A stroke is three pixels of 105 wide: the average over a cell is faint.
    small = (torch.cat(drawn) * 2.5).clamp_max(1) * 255
    return small.round().to(torch.uint8).numpy().reshape(-1, 20, SIDE, SIDE)


def make_up_pictures(source: Path, count: int) -> None:
    """A source like the shared one: characters of random strokes, unsteadily drawn."""
    source.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    strokes = rng.integers(15, ORIGINAL_SIDE - 15, (count, 1, 3, 4)) + rng.integers(
        -6, 7, (count, 20, 3, 4)
    )
    paper = np.ones((count, 20, ORIGINAL_SIDE, ORIGINAL_SIDE), bool)
    for label in range(count):
        for drawer in range(20):
            tile = Image.new("1", (ORIGINAL_SIDE, ORIGINAL_SIDE), 1)
            draw = ImageDraw.Draw(tile)
            for line in strokes[label, drawer].tolist():
                draw.line(line, fill=0, width=3)
            paper[label, drawer] = np.asarray(tile)
    half = count // 2
    np.savez(source / "images_background.npz", images=paper[:half])
    np.savez(source / "images_evaluation.npz", images=paper[half:])


def make(path: Path, source: Path = SOURCE) -> None:
    lab.require(source)
    drawn = pictures(source)
    inputs, labels = {}, {}
    for split, drawers in DRAWERS.items():
        part = drawn[:, drawers]
        inputs[split] = np.concatenate(part)
        labels[split] = np.repeat(np.arange(len(drawn)), part.shape[1])
    write_arrays(inputs, labels, path, {}, 0, {"command": "benchmarks.characters.omniglot"})


def make_quick(path: Path) -> None:
    source = path.with_name("drawings")
    make_up_pictures(source, QUICK_CHARACTERS)
    make(path, source)


def distort(inputs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Pictures [n, 1, H, W], turned by up to 20 degrees, stretched, sheared and moved.

    Stretched and sheared by up to a fifth, moved by up to a tenth.  uniforms: [n, 7].
    """
    return lab.affine(inputs, uniforms, turn=20, stretch=0.2, move=0.1)


distort.numbers = 7  # uniforms for each picture


# Tables


def table_of(results: list[dict]) -> str:
    lines = []
    for name in ROWS:
        own = [lab.named_rows(of_seed)[name] for of_seed in results]
        fewer = [fewer_errors(row, of_seed) for row, of_seed in zip(own, results, strict=True)]
        lines.append(
            [
                name,
                lab.spread([100 * row["top1"] for row in own], 2),
                lab.spread([row["nll"] for row in own], 4),
                lab.spread([100 * fraction for fraction in fewer], 1),
            ]
        )
    return lab.table(["", "top-1, %", "NLL", "errors fewer than the generalist's, %"], lines)


def verdicts(results: list[dict]) -> list[Verdict]:
    """The bars, each a mean over the seeds. control_compute stands beside without one."""
    lines = []
    for rival in ROWS[:-1]:
        lead = [
            fewer_than(of_seed["ensemble"], lab.named_rows(of_seed)[rival]) for of_seed in results
        ]
        bar = "(no bar) " if rival == "control_compute" else ""
        claim = f"{bar}the ensemble makes fewer errors than: {rival}"
        lines.append(Verdict(claim, mean(lead) > 0, percents(lead, 1)))
    return lines


def parse(words: list[str] | None) -> argparse.Namespace:
    options = lab.arguments(__doc__, page=runs.PAGE, to="runs/omniglot")
    runs.add_jobs(options)
    given = lab.parsed(options, words)
    if given.quick:
        given.set, given.jobs = [*QUICK, *given.set], 1
    return given


def main(words: list[str] | None = None) -> None:
    given = parse(words)
    command = lab.command_line("benchmarks.characters.omniglot", words)
    data = str(lab.shards(given.to / "shards", make_quick if given.quick else make))

    def task(seed: int) -> Callable[[], dict]:
        config = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
        config["seed"] = seed
        config["data"] |= dict.fromkeys(DRAWERS, data)
        path = given.to / f"seed{seed}"
        return lambda: lab.finished(config, path, given.set, in_process=given.quick)

    by_seed = runs.all_of({seed: task(seed) for seed in given.seeds}, given.jobs)
    results = list(by_seed.values())
    judged = list(map(str, verdicts(results)))
    text = "\n\n".join([table_of(results), "\n".join(judged)])
    print(text)
    if given.write:
        minutes = sum(lab.seconds(given.to / f"seed{seed}") for seed in given.seeds) / 60
        foot = (
            f"n = {results[0]['generalist']['n']:,}. {lab.conditions(given.seeds, command)} "
            f"{minutes:.0f} core-minutes."
        )
        lab.write_section("Omniglot", f"{text}\n\n{foot}", runs.PAGE)
    rows = {seed: lab.compared_rows(of_seed) for seed, of_seed in by_seed.items()}
    lab.print_json({"rows": rows, "verdicts": judged}, given, command)


if __name__ == "__main__":
    main()
