"""A long tail: the characters again, but of the rarest only a few images to learn from.  Where do specialists help?

    python -m benchmarks.characters.tails --to runs/characters [--seeds 0 1 2] [--sixth] [--jobs 2] [--write] [--quick]

Of the class that is the k-th most frequent of C, train and val keep MOST * RAREST ** (k / (C - 1)) images, an
exponential profile (Cao et al. 2019, section 4.1) in an order that the seed draws; test stays as it is, alike for all,
so that the rare can be seen.  Of each seed two runs, of the headline's config without students: every image as often as
it comes, and train.balance = .5, which shows the rare ones more often and carries the prior through the loss.  What is
done is not done again.  --quick goes through all of it on 120 classes.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np

from benchmarks.papers.lab import (
    conditions,
    finished,
    seconds,
    shards,
    spread,
    table,
    write_section,
)
from pipeline.results import named_rows
from pipeline.store import read_json

from .data import PER_CLASS, write_part
from .headline import FASTER, PAGE, ROWS, all_of, config_of, drawn, on_test, parsed, parser, reading

TITLE = "A long tail"
RAREST = 1 / 21  # of the most frequent class's images: 105 fall to 5
BALANCES = (0.0, 0.5)
THIRDS = ("frequent", "in between", "rare")


# The runs


def ranks(classes: int, seed: int) -> np.ndarray:
    """int [C]: how many classes are more frequent than each."""
    return np.random.default_rng([seed, classes]).permutation(classes)


def images_kept(rank: np.ndarray, most: int) -> np.ndarray:
    """int [C]: the images of each class, of `most` of the most frequent; one at least."""
    return np.maximum(1, np.rint(most * RAREST ** (rank / max(1, len(rank) - 1)))).astype(int)


def thinned(labels: np.ndarray, kept: np.ndarray, seed: int) -> np.ndarray:
    """bool [n]: of each class as many of its samples, drawn at random, as `kept` [C] says."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by class, at random in each
    counts = np.bincount(labels, minlength=len(kept))
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(labels), bool)
    chosen[ordered[place < kept[labels[ordered]]]] = True
    return chosen


def write_tail(source: Path, out: Path, seed: int) -> None:
    names = read_json(source / "manifest.json")["classes"]
    rank = ranks(len(names), seed)

    def chosen(split: str, labels: np.ndarray) -> np.ndarray:
        if split == "test":
            return np.ones(len(labels), bool)
        return thinned(labels, images_kept(rank, PER_CLASS["seen"][split]), seed)

    write_part(
        source,
        out,
        names,
        chosen,
        {"command": "benchmarks.characters.tails", "seed": seed, "rarest": RAREST},
    )


def tail_config(data: Path, seed: int, balance: float, settings: list[str]) -> dict:
    """The headline's without students, on the shards in `data`."""
    config = config_of(data, seed, [*FASTER, f"train.balance={balance}", *settings])
    return reading(config | {"students": {}}, data)


def runs_of(to: Path, data: Path, seed: int, settings: list[str]) -> dict[float, Path]:
    """Both finished runs of a seed, by balance."""
    place = shards(to / f"data-tail-{seed}", lambda out: write_tail(data / "seen", out, seed))
    runs = {balance: to / f"seed-{seed}-tail-{balance:g}" for balance in BALANCES}
    for balance, run in runs.items():
        finished(tail_config(place, seed, balance, settings), run)
    return runs


# Figures


def by_third(run: Path, seed: int) -> dict[str, list[float]]:
    """{row: top-1 on test of the frequent, the middling and the rare third of the classes}."""
    rank = ranks(len(read_json(run / "generalist" / "model.json")["class_names"]), seed)
    third_of, found = rank * len(THIRDS) // len(rank), {}
    for name in ROWS:
        labels, right = on_test(run, name)
        found[name] = [float(right[third_of[labels] == k].mean()) for k in range(len(THIRDS))]
    return found


def fewer_of(rows: dict[str, list[float]], name: str) -> list[float]:
    """By third: the share of the generalist's errors that a row does not make; 0 where it makes none."""
    pairs = zip(rows[name], rows["generalist"], strict=True)
    return [(own - first) / (1 - first) if first < 1 else 0.0 for own, first in pairs]


def tail_table(figures: list[dict[str, list[float]]], results: list[dict]) -> str:
    """figures: by_third of each seed; results: each seed's results.json."""
    rows = []
    for name in ROWS:
        whole = [named_rows(found)[name] for found in results]
        thirds = zip(
            *(seed[name] for seed in figures), strict=True
        )  # of each third every seed's figure
        fewer = zip(*(fewer_of(seed, name) for seed in figures), strict=True)
        rows.append(
            [
                name,
                spread([100 * row["top1"] for row in whole], 2),
                spread([row["nll"] for row in whole], 4),
                *(spread([100 * top1 for top1 in seeds], 2) for seeds in thirds),
                *(
                    "" if name == "generalist" else spread([100 * share for share in seeds], 1)
                    for seeds in fewer
                ),
            ]
        )
    columns = [
        *(f"{third}: top-1, %" for third in THIRDS),
        *(f"{third}: errors fewer, %" for third in THIRDS),
    ]
    return table(["", "top-1, %", "NLL", *columns], rows)


def main(words: list[str] | None = None) -> None:
    given = parsed(parser(__doc__), words)
    data = drawn(given.to, given.classes)
    places = all_of(
        {seed: lambda seed=seed: runs_of(given.to, data, seed, given.set) for seed in given.seeds},
        given.jobs,
    )
    parts = []
    for balance in BALANCES:
        runs = {seed: places[seed][balance] for seed in given.seeds}
        results = [read_json(run / "results.json") for run in runs.values()]
        figures = [by_third(run, seed) for seed, run in runs.items()]
        parts.append(f"`train.balance = {balance:g}`\n\n{tail_table(figures, results)}")
    text = "\n\n".join(parts)
    print(text)
    if given.write:
        command = shlex.join(
            ["python", "-m", "benchmarks.characters.tails", *(words or sys.argv[1:])]
        )
        kept = images_kept(ranks(given.classes, 0), PER_CLASS["seen"]["train"])
        spent = sum(seconds(run) for runs in places.values() for run in runs.values()) / 60
        foot = f"n = {results[0]['generalist']['n']:,} of {given.classes:,} classes, in thirds by how many images of a "
        foot += f"class are learnt from ({kept.max()} to {kept.min()}, {kept.sum():,} in all). "
        write_section(
            TITLE,
            f"{text}\n\n{foot}{conditions(given.seeds, command)} {spent:.0f} core-minutes.",
            PAGE,
        )


if __name__ == "__main__":
    main()
