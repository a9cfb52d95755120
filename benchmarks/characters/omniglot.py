"""Omniglot's 1,623 handwritten characters as one label set: generalist, specialists and controls.

    python -m benchmarks.characters.omniglot --to runs/omniglot [--seeds 0 1 2] [--jobs 2] [--set KEY=VALUE] [--write]

Of each character's 20 drawers the first 13 train, two are val and five are test.  Pictures are made 28 x 28, and
training views turned, stretched and moved.  What is done is not done again.
"""

from __future__ import annotations

import os
import shlex
import sys
import tomllib
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.papers.lab import (
    DATA,
    affine,
    arguments,
    conditions,
    errors,
    finished,
    seconds,
    shards,
    spread,
    table,
    write_section,
)
from benchmarks.papers.specialists import fewer_errors, percents
from pipeline.results import named_rows
from trainer.data.authoring.arrays import write_arrays

from .headline import PAGE, ROWS, Verdict, all_of

SOURCE = DATA / "omniglot"
CONFIG = Path(__file__).with_name("omniglot.toml")
DRAWERS = {"train": slice(0, 13), "val": slice(13, 15), "test": slice(15, 20)}
SIDE = 28


def pictures(source: Path = SOURCE) -> np.ndarray:
    """uint8 [1623, 20, 28, 28], ink 255 on 0: background characters first."""
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


def make(place: Path, source: Path = SOURCE) -> None:
    drawn = pictures(source)
    inputs = {split: np.concatenate(drawn[:, drawers]) for split, drawers in DRAWERS.items()}
    labels = {
        split: np.repeat(np.arange(len(drawn)), drawn[:, drawers].shape[1])
        for split, drawers in DRAWERS.items()
    }
    write_arrays(inputs, labels, place, {}, 0, {"command": "benchmarks.characters.omniglot"})


def distort(inputs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Pictures [n, 1, H, W], turned by up to 20 degrees, stretched and sheared by up to a fifth, moved by up to a
    tenth.  uniforms: [n, 7]."""
    return affine(inputs, uniforms, turn=20, stretch=0.2, move=0.1)


distort.numbers = 7


def report(results: list[dict]) -> str:
    rows = []
    for name in ROWS:
        each = [named_rows(found)[name] for found in results]
        fewer = [fewer_errors(row, found) for row, found in zip(each, results, strict=True)]
        rows.append(
            [
                name,
                spread([100 * row["top1"] for row in each], 2),
                spread([row["nll"] for row in each], 4),
                spread([100 * share for share in fewer], 1),
            ]
        )
    return table(["", "top-1, %", "NLL", "errors fewer than the generalist's, %"], rows)


def verdicts(results: list[dict]) -> list[Verdict]:
    """The bars of the issue, each a mean over the seeds; control_compute stands beside without one."""
    lines = []
    for rival in (name for name in ROWS if name != "ensemble"):
        lead = [
            1 - errors(found["ensemble"]) / errors(named_rows(found)[rival]) for found in results
        ]
        bar = "" if rival != "control_compute" else "(no bar) "
        claim = f"{bar}the ensemble makes fewer errors than: {rival}"
        lines.append(Verdict(claim, mean(lead) > 0, percents(lead, 1)))
    return lines


def main(words: list[str] | None = None) -> None:
    options = arguments(__doc__, page=PAGE)
    options.set_defaults(to=Path("runs/omniglot"))
    options.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="runs side by side (all cores)",
    )
    given = options.parse_args(words)
    data = str(shards(given.to / "shards", make))

    def run(seed: int) -> dict:
        config = tomllib.loads(CONFIG.read_text(encoding="utf-8")) | {"seed": seed}
        config["data"] |= {split: data for split in DRAWERS}
        return finished(config, given.to / f"seed{seed}", given.set)

    results = list(
        all_of({seed: lambda seed=seed: run(seed) for seed in given.seeds}, given.jobs).values()
    )
    judged = "\n".join(map(str, verdicts(results)))
    text = f"{report(results)}\n\n{judged}"
    print(text)
    if given.write:
        command = shlex.join(
            ["python", "-m", "benchmarks.characters.omniglot", *(words or sys.argv[1:])]
        )
        spent = sum(seconds(given.to / f"seed{seed}") for seed in given.seeds) / 60
        foot = f"n = {results[0]['generalist']['n']:,}. {conditions(given.seeds, command)} {spent:.0f} core-minutes."
        write_section("Omniglot", f"{text}\n\n{foot}", PAGE)


if __name__ == "__main__":
    main()
