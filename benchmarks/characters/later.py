"""A hundred characters that come later: what adding them costs, what it forgets, and what training again gives.

    python -m benchmarks.characters.later --to runs/characters [--seeds 0 1 2] [--sixth] [--jobs 2] [--write] [--quick]

Of each seed a hundred characters are drawn, and three runs stand beside each other:

    seed-S-without   all characters but these, of the same shards: generalist, specialists, a student
    seed-S-later     takes it over ([extend]): rows for the hundred, one specialist, a student; the controls too
    seed-S           everything from scratch on all characters: the headline's run (benchmarks.characters.headline),
                     which is shared where it is done already, and otherwise done here

The new rows learn for 4,000 steps, and everything else as headline.toml says.  Nothing was
tuned here.  What is done is not done again.  --quick goes through all of it on 120 classes, ten of them later.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks.papers.lab import conditions, finished, shards, spread, table, write_section
from pipeline.store import read_json

from .data import write_part
from .headline import (
    PAGE,
    all_of,
    alone,
    config_of,
    drawn,
    main_runs,
    on_test,
    parsed,
    parser,
    reading,
)

TITLE = "A hundred characters that come later"
LATER, QUICK_LATER = 100, 10
ROWS_STEPS = 4000  # of the new rows' lesson, at most the generalist's
STUDENT = "same"
ANSWERS = {"generalist": "generalist", "ensemble": "ensemble", f"student, {STUDENT} size": STUDENT}
GOES_ON = "control_wall"  # the whole grown generalist, trained further for as many examples as the new specialist


# The runs


def left_out(names: list[str], seed: int, count: int) -> list[str]:
    """The characters that come later, in the order of `names`."""
    return [
        names[c]
        for c in np.sort(
            np.random.default_rng([seed, count]).choice(len(names), count, replace=False)
        )
    ]


def write_without(source: Path, out: Path, absent: list[str]) -> None:
    """The shards of `source` without the samples of some classes; the others are numbered anew, in the same order."""
    names = [
        name for name in read_json(source / "manifest.json")["classes"] if name not in set(absent)
    ]
    made_by = {"command": "benchmarks.characters.later", "without": absent}
    write_part(source, out, names, lambda split, labels: np.ones(len(labels), bool), made_by)


def without(config: dict, data: Path) -> dict:
    """The headline's config on the shards in `data`, with one student and no controls."""
    found = alone(config) | {"students": {STUDENT: config["students"][STUDENT]}}
    return reading(found, data)


def later(config: dict, old: Path) -> dict:
    """The headline's config, taking over the run `old`, with one student."""
    lesson = config["train"] | {"steps": min(ROWS_STEPS, config["train"]["steps"])}
    students = {STUDENT: config["students"][STUDENT]}
    return config | {"extend": {"run": str(old.resolve())}, "train": lesson, "students": students}


def runs_of(to: Path, data: Path, seed: int, config: dict, count: int) -> tuple[dict, dict]:
    """results.json of seed-S-without and seed-S-later."""
    absent = left_out(read_json(data / "seen" / "manifest.json")["classes"], seed, count)
    place = to / f"data-without-{seed}"
    filtered = shards(place, lambda out: write_without(data / "seen", out, absent))
    if read_json(filtered / "manifest.json")["made_by"]["without"] != absent:
        raise SystemExit(f"{place} is without other characters; remove it, or give another --to")
    old = to / f"seed-{seed}-without"
    before = finished(without(config, filtered), old)
    return before, finished(later(config, old), to / f"seed-{seed}-later")


# Figures


def top1_by_age(run: Path, name: str, absent: set[str]) -> tuple[float | None, float | None]:
    """Top-1 on the test examples of classes not in `absent`, and of those in it; None where there are none."""
    names = read_json(run / "generalist" / "model.json")["class_names"]
    labels, right = on_test(run, name)
    new = np.array([name in absent for name in names])[labels]
    return tuple(float(right[chosen].mean()) if chosen.any() else None for chosen in (~new, new))


def of_seed(to: Path, seed: int, before: dict, after: dict, scratch: dict) -> dict:
    """{answer: {"before", "old", "new", "again_old", "again_new"}} in top-1, and what each took."""
    runs = {
        name: to / f"seed-{seed}{end}"
        for name, end in (("before", "-without"), ("after", "-later"), ("again", ""))
    }
    known = set(read_json(runs["before"] / "generalist" / "model.json")["class_names"])
    absent = set(read_json(runs["after"] / "generalist" / "model.json")["class_names"]) - known

    def row(name: str) -> dict:
        """A control of seed-S-later is compared with the generalist that it goes on with."""
        was = "generalist" if name == GOES_ON else name
        old, new = top1_by_age(runs["after"], name, absent)
        again_old, again_new = top1_by_age(runs["again"], was, absent)
        return {
            "before": top1_by_age(runs["before"], was, absent)[0],
            "old": old,
            "new": new,
            "again_old": again_old,
            "again_new": again_new,
        }

    answers = ANSWERS | {"the whole generalist goes on": GOES_ON}
    costs = {
        "before: generalist and specialists": before["ensemble"]["cost"],
        "added: rows and one specialist": after["ensemble"]["cost"],
        "added: and the student": after["students"][STUDENT]["cost"],
        "trained again: generalist and specialists": scratch["ensemble"]["cost"],
        "trained again: and the student": scratch["students"][STUDENT]["cost"],
    }
    return {
        "seed": seed,
        "rows": {answer: row(name) for answer, name in answers.items()},
        "costs": costs,
    }


def answers_table(found: list[dict]) -> str:
    rows = []
    for answer in found[0]["rows"]:
        own = [one["rows"][answer] for one in found]
        columns = [[100 * row[key] for row in own] for key in ("before", "old")]
        columns.append([was - now for was, now in zip(*columns, strict=True)])
        columns += [[100 * row[key] for row in own] for key in ("new", "again_old", "again_new")]
        rows.append([answer, *(spread(column, 2) for column in columns)])
    return table(
        [
            "top-1, %",
            "old characters before",
            "old ones after",
            "forgotten, points",
            "new ones",
            "trained again: old",
            "trained again: new",
        ],
        rows,
    )


def costs_table(found: list[dict]) -> str:
    rows = []
    for name in found[0]["costs"]:
        cost = {
            key: mean(one["costs"][name][key] for one in found)
            for key in ("examples_seen", "seconds")
        }
        rows.append([name, f"{cost['examples_seen'] / 1e6:.2f} M", f"{cost['seconds'] / 60:.1f}"])
    return table(["training, one after the other", "examples", "minutes"], rows)


def main(words: list[str] | None = None) -> None:
    given = parsed(parser(__doc__), words)
    count = QUICK_LATER if given.quick else LATER
    data = drawn(given.to, given.classes)
    configs = {seed: config_of(data, seed, given.set) for seed in given.seeds}
    scratch = main_runs(given.to, configs, given.jobs)
    tasks = {
        seed: lambda seed=seed: runs_of(given.to, data, seed, configs[seed], count)
        for seed in given.seeds
    }
    both = all_of(tasks, given.jobs)
    found = [of_seed(given.to, seed, *both[seed], scratch[seed]) for seed in given.seeds]
    text = f"{answers_table(found)}\n\n{costs_table(found)}"
    print(text)
    if given.write:
        command = shlex.join(
            ["python", "-m", "benchmarks.characters.later", *(words or sys.argv[1:])]
        )
        n = [both[given.seeds[0]][1]["generalist"][f"{age}_classes"]["n"] for age in ("old", "new")]
        footnote = f"n = {n[0]:,} test images of old characters, {n[1]:,} of the {count} new ones, drawn by the seed."
        write_section(TITLE, f"{text}\n\n{footnote} {conditions(given.seeds, command)}", PAGE)


if __name__ == "__main__":
    main()
