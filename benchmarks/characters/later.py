"""A hundred characters that come later: what adding costs and forgets, and training again instead.

    python -m benchmarks.characters.later --to runs/characters [--seeds 0 1 2]
        [--sixth] [--write]
    python -m benchmarks.characters.later --quick             seconds, no result

Of each seed a hundred characters are drawn, and three runs stand beside each other:

    seed-S-without   all characters but these, of the same shards: generalist,
                     specialists, student
    seed-S-later     takes it over ([extend]): rows for the hundred, one specialist, a
                     student; the controls too
    seed-S           everything from scratch on all characters: the headline's run
                     (benchmarks.characters.headline), which is shared where it is done
                     already, and otherwise done here

The new rows learn for 4,000 steps, and everything else as headline.toml says.  Nothing was tuned
here.  What is done is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks.papers import lab
from pipeline.store import read_json

from . import runs
from .data import write_part

TITLE = "A hundred characters that come later"
LATER, QUICK_LATER = 100, 4
ROWS_STEPS = 4000  # of the new rows, at most the generalist's
STUDENT = "same"
PREDICTORS = {
    "generalist": "generalist",
    "ensemble": "ensemble",
    f"student, {STUDENT} size": STUDENT,
}
# The whole grown generalist, trained further for as many examples as the new specialist.
FURTHER = "control_wall"


# The data and the runs


def left_out(names: list[str], seed: int, count: int) -> list[str]:
    """The characters that come later, in the order of `names`."""
    rng = np.random.default_rng([seed, count])
    return [names[c] for c in np.sort(rng.choice(len(names), count, replace=False))]


def write_without(source: Path, out: Path, absent: list[str]) -> None:
    """The shards of `source` without some classes. The others are numbered anew, in their order."""
    classes = read_json(source / "manifest.json")["classes"]
    names = [name for name in classes if name not in set(absent)]
    made_by = {"command": "benchmarks.characters.later", "without": absent}
    write_part(source, out, names, lambda split, labels: np.ones(len(labels), bool), made_by)


def without(config: dict, shards: Path) -> dict:
    """The headline's config on other shards, with one student and no controls."""
    student = {STUDENT: config["students"][STUDENT]}
    return runs.reading(runs.alone(config) | {"students": student}, shards)


def later(config: dict, old: Path) -> dict:
    """The headline's config, taking over the run `old`, with one student."""
    schedule = config["train"] | {"steps": min(ROWS_STEPS, config["train"]["steps"])}
    students = {STUDENT: config["students"][STUDENT]}
    extend = {"run": str(old.resolve())}
    return config | {"extend": extend, "train": schedule, "students": students}


def runs_of(given: argparse.Namespace, data: Path, seed: int, config: dict) -> tuple[dict, dict]:
    """results.json of seed-S-without and seed-S-later."""
    names = read_json(data / "seen" / "manifest.json")["classes"]
    absent = left_out(names, seed, count_of(given))
    path = given.to / f"data-without-{seed}"
    shards = lab.shards(path, lambda out: write_without(data / "seen", out, absent))
    if read_json(shards / "manifest.json")["made_by"]["without"] != absent:
        raise SystemExit(f"{path} is without other characters; remove it, or give another --to")
    old = given.to / f"seed-{seed}-without"
    before = lab.finished(without(config, shards), old, in_process=given.quick)
    grown = given.to / f"seed-{seed}-later"
    return before, lab.finished(later(config, old), grown, in_process=given.quick)


def count_of(given: argparse.Namespace) -> int:
    return QUICK_LATER if given.quick else LATER


# What was measured


def class_names(run: Path) -> list[str]:
    return read_json(run / "generalist" / "model.json")["class_names"]


def top1_by_age(run: Path, name: str, absent: set[str]) -> tuple[float | None, float | None]:
    """Top-1 on the test examples of classes not in `absent`, and of those in it.

    None where there are none.
    """
    labels, correct = runs.on_test(run, name)
    is_new = np.array([each in absent for each in class_names(run)])[labels]
    return mean_or_none(correct[~is_new]), mean_or_none(correct[is_new])


def mean_or_none(correct: np.ndarray) -> float | None:
    return float(correct.mean()) if len(correct) else None


def of_seed(to: Path, seed: int, before: dict, after: dict, scratch: dict) -> dict:
    """{answer: {"before", "old", "new", "again_old", "again_new"}} in top-1, and what each took."""
    old_run, new_run = to / f"seed-{seed}-without", to / f"seed-{seed}-later"
    again_run = to / f"seed-{seed}"
    absent = set(class_names(new_run)) - set(class_names(old_run))

    def row(name: str) -> dict:
        """A control of seed-S-later is compared with the generalist that it trains further."""
        was = "generalist" if name == FURTHER else name
        old, new = top1_by_age(new_run, name, absent)
        again_old, again_new = top1_by_age(again_run, was, absent)
        return {
            "before": top1_by_age(old_run, was, absent)[0],
            "old": old,
            "new": new,
            "again_old": again_old,
            "again_new": again_new,
        }

    predictors = PREDICTORS | {"the whole generalist goes on": FURTHER}
    costs = {
        "before: generalist and specialists": before["ensemble"]["cost"],
        "added: rows and one specialist": after["ensemble"]["cost"],
        "added: and the student": after["students"][STUDENT]["cost"],
        "trained again: generalist and specialists": scratch["ensemble"]["cost"],
        "trained again: and the student": scratch["students"][STUDENT]["cost"],
    }
    rows = {words: row(name) for words, name in predictors.items()}
    return {"seed": seed, "rows": rows, "costs": costs}


def predictors_table(by_seed: list[dict]) -> str:
    """by_seed: of_seed of each seed."""
    lines = []
    for words in by_seed[0]["rows"]:
        own = [one["rows"][words] for one in by_seed]
        before, old, new, again_old, again_new = (
            [100 * row[key] for row in own]
            for key in ("before", "old", "new", "again_old", "again_new")
        )
        forgotten = [was - now for was, now in zip(before, old, strict=True)]
        columns = [before, old, forgotten, new, again_old, again_new]
        lines.append([words, *(lab.spread(column, 2) for column in columns)])
    header = [
        "top-1, %",
        "old characters before",
        "old ones after",
        "forgotten, points",
        "new ones",
        "trained again: old",
        "trained again: new",
    ]
    return lab.table(header, lines)


def costs_table(by_seed: list[dict]) -> str:
    lines = []
    for words in by_seed[0]["costs"]:
        costs = [one["costs"][words] for one in by_seed]
        examples, seconds = (
            mean(cost[key] for cost in costs) for key in ("examples_seen", "seconds")
        )
        lines.append([words, f"{examples / 1e6:.2f} M", f"{seconds / 60:.1f}"])
    return lab.table(["training, one after the other", "examples", "minutes"], lines)


def main(words: list[str] | None = None) -> None:
    given = runs.parsed(runs.parser(__doc__), words)
    command = lab.command_line("benchmarks.characters.later", words)
    data = runs.drawn(given)
    configs = {seed: runs.config_of(data, seed, given.set) for seed in given.seeds}
    scratch = runs.main_runs(given, configs)
    tasks = {
        seed: lambda seed=seed: runs_of(given, data, seed, configs[seed]) for seed in given.seeds
    }
    both = runs.all_of(tasks, given.jobs)
    by_seed = [of_seed(given.to, seed, *both[seed], scratch[seed]) for seed in given.seeds]
    text = f"{predictors_table(by_seed)}\n\n{costs_table(by_seed)}"
    print(text)
    if given.write:
        generalist = both[given.seeds[0]][1]["generalist"]
        old, new = (generalist[f"{age}_classes"]["n"] for age in ("old", "new"))
        foot = (
            f"n = {old:,} test images of old characters, {new:,} of the {count_of(given)} new "
            f"ones, drawn by the seed. {lab.conditions(given.seeds, command)}"
        )
        lab.write_section(TITLE, f"{text}\n\n{foot}", runs.PAGE)
    measured = {"classes": given.classes, "new": count_of(given), "of_seeds": by_seed}
    lab.print_json(measured, given, command)


if __name__ == "__main__":
    main()
