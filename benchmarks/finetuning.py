"""A trunk that learned other characters against one drawn at random, at equal steps.

    OMP_NUM_THREADS=1 python -m benchmarks.finetuning --to runs/finetuning [--write]
    python -m benchmarks.finetuning --quick         seconds, made-up characters, no result

A network learns the first 626 characters.  Then generalists of the next 626 are trained, of few
images of each, by the same schedule. They start from scratch, and on that trunk with a fresh head
(generalist.head = "new"), whole or in part.  Every row of a number of steps sees the same examples
in the same order.  What is done is not done again.

Nothing was tuned on the second characters: rate, steps and network are those of the first ones' run
or round numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import tomli_w

from benchmarks.characters import data as drawings
from benchmarks.characters.runs import metrics_of
from benchmarks.papers import lab
from networks import load_classifier
from pipeline.store import read_json

TITLE = "Other characters on a trunk that knows 626"
PAGE = lab.ROOT / "docs" / "finetuning.md"
CLASSES, QUICK_CLASSES = 626, 12  # of each half
PER_CLASS = {"train": 56, "val": 7, "test": 14}
FEW = 14  # images of each class that the second half is learned from
STEPS = (100, 300, 1000)
IN_PART_STEPS = 300  # of the rows that train a trunk in part
QUICK_FIRST, QUICK_SECOND = 60, (20,)
BATCH = 128

BASE: dict[str, dict[str, Any]] = {
    "data": {"mean": [0.24], "std": [0.33]},
    "model": {"name": "convnet", "width": 8, "depth": 3, "embedding": 64},
    "train": {
        "steps": 2000,
        "batch_size": BATCH,
        "learning_rate": 5e-3,
        "beta2": 0.99,
        "validate_every": 0,
        "checkpoint_every": 100_000,
        "log_every": 100,
    },
    "controls": {"enabled": False},
    "engine": {"device": "cpu"},
}
# what trains of the trunk -> settings of the run
ROWS: dict[str, list[str]] = {
    "from scratch": [],
    "all": ["generalist.head=new"],
    "all, `layer_decay = 0.5`": ["generalist.head=new", "train.layer_decay=0.5"],
    "the last 2 blocks": ["generalist.head=new", "train.trainable=last-2-blocks"],
    "the head alone": ["generalist.head=new", "train.trainable=head"],
}
EVERYWHERE = ("from scratch", "all")  # rows of every number of steps


# The data


def halves(given: argparse.Namespace) -> tuple[Path, Path]:
    """The shards of the first characters, and of the next ones with few images to learn from."""
    count = classes_of(given)
    whole = lab.shards(given.to / "data" / "seen", lambda path: make_whole(path, given))
    names = read_json(whole / "manifest.json")["classes"]
    made_by = {"command": "benchmarks.finetuning", "few": FEW}

    def write(path: Path, own: list[str], most: int | None) -> None:
        def chosen(split: str, labels: np.ndarray) -> np.ndarray:
            if most is None or split != "train":
                return np.ones(len(labels), bool)
            return rank_in_class(labels) < most

        drawings.write_part(whole, path, own, chosen, made_by)

    first = lab.shards(given.to / "data" / "first", lambda path: write(path, names[:count], None))
    second = lab.shards(given.to / "data" / "second", lambda path: write(path, names[count:], FEW))
    return first, second


def make_whole(path: Path, given: argparse.Namespace) -> None:
    """Shards of both halves, beside made-up drawings of a quick look."""
    count, source, per_class = 2 * classes_of(given), drawings.SOURCE, PER_CLASS
    if given.quick:
        source, per_class = path.with_name("drawings"), drawings.QUICK_PER_CLASS["seen"]
        drawings.make_up_drawings(source, count)
    lab.require(source)
    letters = drawings.characters(source)[:count]
    made_by = {"command": "benchmarks.finetuning", "per_class": per_class}
    fonts, distortion = drawings.SEEN, drawings.DISTORTION
    drawings.make_part(path, fonts, letters, per_class, made_by, distortion, 0, source)


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """int64 [n]: how many of its class come before each example."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - first
    return ranks


def classes_of(given: argparse.Namespace) -> int:
    return QUICK_CLASSES if given.quick else CLASSES


# The runs


def trained(given: argparse.Namespace, shards: Path, path: Path, settings: list[str]) -> Path:
    """A run of which the generalist alone is trained."""
    if not (path / "generalist" / "DONE").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        splits = dict.fromkeys(("train", "val", "test"), str(shards))
        file = path.with_name(f"{path.name}.toml")
        config = BASE | {"data": BASE["data"] | splits}
        file.write_text(tomli_w.dumps(config), encoding="utf-8")
        lab.run_in_process(file, path, [*settings, *given.set], only=["generalist"])
    return path


def runs_of(given: argparse.Namespace, seed: int) -> dict[tuple[str, int], dict]:
    """{(row, steps): metrics on test} of one seed. ("first", steps): of the run with the trunk."""
    first_shards, second_shards = halves(given)
    own = [f"seed={seed}"]
    first_steps = QUICK_FIRST if given.quick else BASE["train"]["steps"]
    steps = QUICK_SECOND if given.quick else STEPS
    in_part = steps[-1] if given.quick else IN_PART_STEPS
    place = given.to / f"seed-{seed}"
    first = trained(given, first_shards, place / "first", [*own, f"train.steps={first_steps}"])
    found = {("first", first_steps): measured(first, first_shards)}
    for row, settings in ROWS.items():
        for count in steps:
            if count != in_part and row not in EVERYWHERE:
                continue
            keys = [*own, f"train.steps={count}", *settings]
            if settings:
                keys.append(f"generalist.from={first}")
            name = "".join(letter if letter.isalnum() else "-" for letter in f"{row}-{count}")
            run = trained(given, second_shards, place / name, keys)
            found[row, count] = measured(run, second_shards)
    return found


def measured(run: Path, shards: Path) -> dict:
    """{"n", "top1", "nll"} on test, and the seconds that the training took."""
    network = load_classifier(run / "generalist").eval()
    names = read_json(run / "generalist" / "model.json")["class_names"]

    def predict(raw):
        return network(raw).float().softmax(1)

    row = metrics_of({"network": predict}, names, shards, "test")["network"]
    return row | {"seconds": read_json(run / "generalist" / "summary.json")["seconds"]}


# The table


def table(found: dict[int, dict[tuple[str, int], dict]]) -> str:
    """Top-1 on test of every row and number of steps, in %, mean and deviation over the seeds."""
    keys = [key for key in next(iter(found.values())) if key[0] != "first"]
    steps = sorted({count for _, count in keys})
    rows = []
    for row in ROWS:
        cells = [cell(found, (row, count)) for count in steps]
        rows.append([row, *cells])
    header = ["what trains of the trunk", *(f"{count:,} steps" for count in steps)]
    return lab.table(header, rows)


def cell(found: dict[int, dict[tuple[str, int], dict]], key: tuple[str, int]) -> str:
    of_seeds = [each[key] for each in found.values() if key in each]
    if not of_seeds:
        return ""
    return lab.spread((100 * each["top1"] for each in of_seeds), 1)


def section(found: dict[int, dict[tuple[str, int], dict]], classes: int, command: str) -> str:
    any_seed = next(iter(found.values()))
    first = next(key for key in any_seed if key[0] == "first")
    n = next(each["n"] for key, each in any_seed.items() if key != first)
    seconds = sum(each["seconds"] for of_seed in found.values() for each in of_seed.values())
    return (
        f"Top-1 on test, %, of {classes} characters that are learned from {FEW} images each. The "
        f"trunk comes from a run of {first[1]:,} steps on {classes} others, of which it knows "
        f"{cell(found, first)} %. A convnet of width 8, depth 3, 64 numbers. Batches of {BATCH}."
        "\n\n"
        f"{table(found)}\n\n"
        f"n = {n:,}. {lab.conditions(found, command)} {seconds / 60:.0f} minutes of training."
    )


def main(words: list[str] | None = None) -> None:
    parser = lab.arguments(__doc__, page=PAGE, to="runs/finetuning")
    given = lab.parsed(parser, words)
    given.to = given.to.resolve()
    found = {seed: runs_of(given, seed) for seed in given.seeds}
    command = lab.command_line("benchmarks.finetuning", words)
    text = section(found, classes_of(given), command)
    print(text)
    if given.write:
        lab.write_section(TITLE, text, PAGE)
    top1 = {
        f"{row}, {count} steps": mean(each[row, count]["top1"] for each in found.values())
        for row, count in next(iter(found.values()))
    }
    lab.print_json({"top1": top1}, given, command)


if __name__ == "__main__":
    main()
