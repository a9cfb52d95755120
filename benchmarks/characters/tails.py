"""A long tail: the characters again, of the rarest only a few images.  Where do specialists help?

    python -m benchmarks.characters.tails --to runs/characters [--seeds 0 1 2]
        [--sixth] [--write]
    python -m benchmarks.characters.tails --quick             seconds, no result

Of the class that is the k-th most frequent of C, train and val keep MOST * RAREST ** (k / (C - 1))
images, an exponential profile (Cao et al. 2019, section 4.1) in an order that the seed draws. Test
stays as it is, alike for all, so that the rare can be seen.

Of each seed two runs, of the headline's config without students: every image as often as it comes,
and train.balance = .5, which shows the rare ones more often and carries the prior through the loss.
What is done is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.papers import lab
from pipeline.store import read_json

from . import runs
from .data import PER_CLASS, write_part
from .runs import ROWS

TITLE = "A long tail"
RAREST = 1 / 21  # of the most frequent class's images: 105 fall to 5
BALANCES = (0.0, 0.5)
THIRDS = ("frequent", "in between", "rare")


# The data and the runs


def ranks(classes: int, seed: int) -> np.ndarray:
    """int [C]: how many classes are more frequent than each."""
    return np.random.default_rng([seed, classes]).permutation(classes)


def images_kept(rank: np.ndarray, most: int) -> np.ndarray:
    """int [C]: the images of each class, of `most` of the most frequent. One at least."""
    return np.maximum(1, np.rint(most * RAREST ** (rank / max(1, len(rank) - 1)))).astype(int)


def thinned(labels: np.ndarray, kept: np.ndarray, seed: int) -> np.ndarray:
    """bool [n]: of each class as many of its samples, drawn at random, as `kept` [C] says."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]  # by class, at random in each
    counts = np.bincount(labels, minlength=len(kept))
    turn = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(labels), bool)
    chosen[ordered[turn < kept[labels[ordered]]]] = True
    return chosen


def write_tail(source: Path, out: Path, seed: int) -> None:
    """Shards of `source`, train and val thinned. There each class has as many samples."""
    names = read_json(source / "manifest.json")["classes"]
    rank = ranks(len(names), seed)

    def chosen(split: str, labels: np.ndarray) -> np.ndarray:
        if split == "test":
            return np.ones(len(labels), bool)
        most = int(np.bincount(labels).max())
        return thinned(labels, images_kept(rank, most), seed)

    made_by = {"command": "benchmarks.characters.tails", "seed": seed, "rarest": RAREST}
    write_part(source, out, names, chosen, made_by)


def tail_config(data: Path, seed: int, balance: float, settings: list[str]) -> dict:
    """The headline's without students, on the shards in `data`."""
    balanced = [*runs.FASTER, f"train.balance={balance}", *settings]
    return runs.reading(runs.config_of(data, seed, balanced) | {"students": {}}, data)


def runs_of(given: argparse.Namespace, data: Path, seed: int) -> dict[float, Path]:
    """Both finished runs of a seed, by balance."""
    shards = lab.shards(
        given.to / f"data-tail-{seed}", lambda out: write_tail(data / "seen", out, seed)
    )
    paths = {balance: given.to / f"seed-{seed}-tail-{balance:g}" for balance in BALANCES}
    for balance, path in paths.items():
        config = tail_config(shards, seed, balance, given.set)
        lab.finished(config, path, in_process=given.quick)
    return paths


# What was measured


def by_third(run: Path, seed: int) -> dict[str, list[float]]:
    """{row: top-1 on test of the frequent, the middling and the rare third of the classes}."""
    rank = ranks(len(read_json(run / "generalist" / "model.json")["class_names"]), seed)
    third_of = rank * len(THIRDS) // len(rank)
    top1 = {}
    for name in ROWS:
        labels, correct = runs.on_test(run, name)
        thirds = third_of[labels]
        top1[name] = [float(correct[thirds == k].mean()) for k in range(len(THIRDS))]
    return top1


def fewer_of(rows: dict[str, list[float]], name: str) -> list[float]:
    """By third: the fraction of the generalist's errors that a row does not make.

    0 where it makes none.
    """
    pairs = zip(rows[name], rows["generalist"], strict=True)
    return [(own - first) / (1 - first) if first < 1 else 0.0 for own, first in pairs]


def tail_table(thirds: list[dict[str, list[float]]], results: list[dict]) -> str:
    """thirds: by_third of each seed. results: each seed's results.json."""
    lines = []
    for name in ROWS:
        whole = [lab.named_rows(of_seed)[name] for of_seed in results]
        cells = [
            lab.spread([100 * row["top1"] for row in whole], 2),
            lab.spread([row["nll"] for row in whole], 4),
        ]
        for top1 in zip(*(of_seed[name] for of_seed in thirds), strict=True):
            cells.append(lab.spread([100 * each for each in top1], 2))
        for fewer in zip(*(fewer_of(of_seed, name) for of_seed in thirds), strict=True):
            cells.append(lab.spread([100 * each for each in fewer], 1))
        if name == "generalist":
            cells[-len(THIRDS) :] = [""] * len(THIRDS)
        lines.append([name, *cells])
    columns = [f"{third}: top-1, %" for third in THIRDS]
    columns += [f"{third}: errors fewer, %" for third in THIRDS]
    return lab.table(["", "top-1, %", "NLL", *columns], lines)


def footnote(given: argparse.Namespace, paths: list[Path], command: str) -> str:
    n = read_json(paths[0] / "results.json")["generalist"]["n"]
    kept = images_kept(ranks(given.classes, 0), PER_CLASS["seen"]["train"])
    minutes = sum(map(lab.seconds, paths)) / 60
    return (
        f"n = {n:,} of {given.classes:,} classes, in thirds by how many images of a class are "
        f"learnt from ({kept.max()} to {kept.min()}, {kept.sum():,} in all). "
        f"{lab.conditions(given.seeds, command)} {minutes:.0f} core-minutes."
    )


def main(words: list[str] | None = None) -> None:
    given = runs.parsed(runs.parser(__doc__), words)
    command = lab.command_line("benchmarks.characters.tails", words)
    data = runs.drawn(given)
    tasks = {seed: lambda seed=seed: runs_of(given, data, seed) for seed in given.seeds}
    paths = runs.all_of(tasks, given.jobs)
    parts, rows = [], {}
    for balance in BALANCES:
        of_balance = {seed: paths[seed][balance] for seed in given.seeds}
        results = [read_json(path / "results.json") for path in of_balance.values()]
        thirds = [by_third(path, seed) for seed, path in of_balance.items()]
        parts.append(f"`train.balance = {balance:g}`\n\n{tail_table(thirds, results)}")
        rows[f"{balance:g}"] = {
            "whole": list(map(lab.compared_rows, results)),
            "top1_by_third": thirds,
        }
    text = "\n\n".join(parts)
    print(text)
    if given.write:
        every = [path for of_seed in paths.values() for path in of_seed.values()]
        lab.write_section(TITLE, f"{text}\n\n{footnote(given, every, command)}", runs.PAGE)
    lab.print_json({"classes": given.classes, "by_balance": rows}, given, command)


if __name__ == "__main__":
    main()
