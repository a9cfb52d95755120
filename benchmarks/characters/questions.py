"""What makes specialists pay?  Each question is a table, each row of it one change of the config.

    python -m benchmarks.characters.questions --to runs/characters
        [--only QUESTION ...] [--sixth]
    python -m benchmarks.characters.questions --quick         seconds, no result

Of each seed there is one run of headline.toml, seed-SEED-asked, less students and controls, its
specialists trained for STEPS alone, so that all questions can be asked. It takes over what the
headline's run (benchmarks.characters.headline) has of it.  Every other row is a copy of that run
less the stages that its settings change: all begin with one generalist, rows of [specialists] share
its groups too, and rows of [ensemble] its specialists, so that only what is fitted on val and the
metrics on test are made anew.  (Specialists stop early, and have their temperatures fitted, on the
val examples that a gate of 1 refers to them.)  What is chosen for use is chosen by the column of
val: test is there to be reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from benchmarks.papers import lab
from benchmarks.papers.specialists import fewer_errors, specialists_asked
from pipeline.choices import COMBINERS
from pipeline.config import Config, load_config

from . import runs

STEPS = 400  # of each specialist, unless the row or --sixth says otherwise
VAL = 20_000  # examples of val, evenly over it
QUICK = ("dustbin", "gate")  # --quick asks these alone, unless --only names others

ASKED = {
    "dustbin": "What stands for the classes that are not the specialist's own?",
    "soft targets": (
        "Do the generalist's answers, learnt among the other classes, keep a specialist from "
        "forgetting?"
    ),
    "trainable": "How much of a specialist has to be its own?",
    "overlap": "How many groups does a class belong to?  (Each specialist takes as many steps.)",
    "number of groups": (
        "Few large groups or many small ones?  (All specialists together take as many steps.)"
    ),
    "clustering": "Which clustering?",
    "hard negatives": (
        "Should the other half of a batch hold the classes that are confused with the group?"
    ),
    "calibration": "Is it calibrated before it is combined?",
    "examples": (
        "How many examples does a specialist need?  "
        "(Times the others' steps, the rate annealed over them.)"
    ),
    "gate": "Whose specialists are asked: those of the generalist's n most probable classes.",
    "combine": "How do opinions become one?",
}


def questions(config: Config) -> dict[str, dict[str, dict]]:
    """{question: {row: {key of the config: value}}} beside the config that all rows begin with."""
    steps, groups = steps_of(config), config.clusters.num_groups

    def full(soft_weight: float) -> dict:
        return {"specialists.dustbin": "full", "specialists.soft_weight": soft_weight}

    def many(count: int) -> dict:
        """Groups at the same number of steps in all."""
        return {"clusters.num_groups": count, "specialists.steps": round(steps * groups / count)}

    def rows(key: str, *values: object) -> dict[str, dict]:
        return {str(value): {key: value} for value in values}

    plain = {}
    return {
        "dustbin": {
            "preserving": plain,
            "fresh": {"specialists.dustbin": "fresh"},
            "full softmax": full(0.1),
        },
        "soft targets": {
            "no full softmax": plain,
            "full softmax, soft_weight 0": full(0),
            "full softmax, soft_weight .1": full(0.1),
            "full softmax, soft_weight 1": full(1),
        },
        "trainable": rows("specialists.trainable", "all", "last-2-blocks", "last-1-block", "head"),
        "overlap": rows("clusters.overlap", 1, 2, 3),
        "number of groups": {
            f"{count} groups": many(count) for count in (groups // 2, groups, 2 * groups)
        },
        "clustering": rows("clusters.method", "kmeans", "graph", "classifier", "raw", "random"),
        "hard negatives": rows("specialists.hard_negatives", 0.0, 0.25, 0.5),
        "calibration": {
            "temperatures and weight fitted": plain,
            "no temperatures": {"ensemble.temperatures": False},
            "weight 1": {"ensemble.fit_weight": False},
            "neither": {"ensemble.temperatures": False, "ensemble.fit_weight": False},
            "label smoothing .1 besides": {"specialists.label_smoothing": 0.1},
        },
        "examples": {
            f"{times:g} x": {"specialists.steps": max(1, round(times * steps))}
            for times in (0.25, 0.5, 1, 2)
        },
        "gate": {f"n = {n}": {"ensemble.gate": n} for n in (1, 2, 5)},
        "combine": rows("ensemble.combine", *COMBINERS),
    }


def steps_of(config: Config) -> int:
    """Of each specialist."""
    steps = config.specialists.steps
    assert steps is not None, "base_of sets specialists.steps"
    return steps


# Configs and runs


def base_of(data: Path, seed: int, settings: list[str]) -> dict:
    """The headline's config of short specialists, without students and controls."""
    base = runs.config_of(data, seed, [f"specialists.steps={STEPS}", *settings])
    return variant(runs.alone(base), {})


def variant(base: dict, overrides: dict) -> dict:
    """The config that all rows begin with, and `overrides`."""
    settings = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return load_config(None, settings, copy.deepcopy(base)).dump()


def changes_nothing(base: dict, overrides: dict) -> bool:
    return variant(base, overrides) == variant(base, {})


def default_of(base: dict, rows: dict[str, dict]) -> str:
    """The one row that changes nothing.  Raises SystemExit unless there is one."""
    defaults = [name for name, overrides in rows.items() if changes_nothing(base, overrides)]
    if len(defaults) != 1:
        raise SystemExit(
            f"of the rows {', '.join(rows)} {len(defaults)} are the one that all begin with: "
            "one is needed"
        )
    return defaults[0]


def path_of(run: Path, overrides: dict) -> Path:
    """Where a variant of a seed's run lies: questions that share a row share its run."""
    words = "-".join(f"{key.partition('.')[2]}-{value}" for key, value in sorted(overrides.items()))
    return run.with_name(f"{run.name}-{re.sub(r'[^A-Za-z0-9._-]', '_', words)}")


class Answers(NamedTuple):
    """What was run.

    questions, defaults: by question its rows, and the one that changes nothing.
    bases: the results of the run that all begin with, by seed.
    variants: the results of every other run, by its path.
    """

    questions: dict[str, dict[str, dict]]
    defaults: dict[str, str]
    bases: dict[int, dict]
    variants: dict[Path, dict]
    to: Path

    def paths(self, question: str, row: str) -> list[Path]:
        overrides = self.questions[question][row]
        return [path_of(self.to / f"seed-{seed}-asked", overrides) for seed in self.bases]

    def results(self, question: str, row: str) -> list[dict]:
        """Of each seed."""
        if row == self.defaults[question]:
            return list(self.bases.values())
        return [self.variants[path] for path in self.paths(question, row)]

    def seconds(self, question: str) -> float:
        """What the runs of a question took, without the one that all begin with."""
        paths = [path for row in self.questions[question] for path in self.paths(question, row)]
        return sum(runs.own_seconds(path) for path in paths if path in self.variants)


def run_all(given: argparse.Namespace, data: Path) -> Answers:
    bases = {seed: base_of(data, seed, given.set) for seed in given.seeds}
    first = bases[given.seeds[0]]
    names = given.only or (QUICK if given.quick else ASKED)
    every = questions(load_config(None, [], first))
    asked = {name: rows for name, rows in every.items() if name in names}
    defaults = {name: default_of(first, rows) for name, rows in asked.items()}

    def with_val(results: dict, run: Path) -> dict:
        on_val = runs.kept_metrics(run, results, data / "seen", "val", VAL)
        return results | {"on_val": on_val}

    def begun(seed: int) -> dict:
        run, headline = given.to / f"seed-{seed}-asked", given.to / f"seed-{seed}"
        if (headline / "config.toml").exists():
            return with_val(runs.copied(bases[seed], run, headline, given.quick), run)
        return with_val(lab.finished(bases[seed], run, in_process=given.quick), run)

    def varied(seed: int, overrides: dict) -> dict:
        run = given.to / f"seed-{seed}-asked"
        path = path_of(run, overrides)
        config = variant(bases[seed], overrides)
        return with_val(runs.copied(config, path, run, given.quick), path)

    base_results = runs.all_of(
        {seed: lambda seed=seed: begun(seed) for seed in given.seeds}, given.jobs
    )
    changes = [
        overrides
        for name, rows in asked.items()
        for row, overrides in rows.items()
        if row != defaults[name]
    ]
    tasks = {}
    for overrides in changes:
        for seed in given.seeds:
            path = path_of(given.to / f"seed-{seed}-asked", overrides)
            tasks[path] = lambda seed=seed, overrides=overrides: varied(seed, overrides)
    return Answers(asked, defaults, base_results, runs.all_of(tasks, given.jobs), given.to)


# Tables


def specialists_cost(results: dict) -> tuple[int, float]:
    """(examples, seconds) that all specialists of a run took to train."""
    costs = [row["cost"] for row in results["specialists"]]
    return sum(cost["examples_seen"] for cost in costs), sum(cost["seconds"] for cost in costs)


def question_table(rows: dict[str, list[dict]], default: str) -> str:
    """rows: by name the results of each seed, "on_val" among them.

    Fractions are of the same seed's generalist, and so are their deviations.
    """
    header = [
        "",
        "top-1, %",
        "NLL",
        "errors fewer than the generalist's, %",
        "the same on val, %",
        "calibrated NLL",
        "captured errors, %",
        "specialists asked",
        "their training",
    ]
    lines = []
    for name, results in rows.items():
        words = f"**{name}**, the default" if name == default else name
        lines.append([words, *question_cells(results)])
    return lab.table(header, lines)


def question_cells(results: list[dict]) -> list[str]:
    """results: of each seed."""
    ensembles = [of_seed["ensemble"] for of_seed in results]
    fewer = [fewer_errors(of_seed["ensemble"], of_seed) for of_seed in results]
    on_val = [of_seed["on_val"] for of_seed in results]
    fewer_on_val = [fewer_errors(rows["ensemble"], rows) for rows in on_val]
    captured = [of_seed["clusters"]["captured_confusion"] for of_seed in results]
    examples, seconds = map(mean, zip(*map(specialists_cost, results), strict=True))
    return [
        lab.spread([100 * row["top1"] for row in ensembles], 2),
        lab.spread([row["nll"] for row in ensembles], 4),
        lab.spread([100 * fraction for fraction in fewer], 1),
        lab.spread([100 * fraction for fraction in fewer_on_val], 1),
        lab.spread([row["cnll"] for row in ensembles], 4),
        lab.spread([100 * fraction for fraction in captured], 1),
        f"{mean(map(specialists_asked, results)):.2f}",
        f"{examples / 1e6:.2f} M, {seconds:.0f} s",
    ]


def title_of(name: str, classes: int) -> str:
    """The section of the page: questions are asked of SIXTH_CLASSES, unless it says otherwise."""
    if classes == runs.SIXTH_CLASSES:
        return f"Question: {name}"
    return f"Question: {name}, of {classes:,} classes"


def main(words: list[str] | None = None) -> None:
    options = runs.parser(__doc__)
    options.add_argument("--only", nargs="+", choices=ASKED, help="these questions, and no others")
    given = runs.parsed(options, words)
    command = lab.command_line("benchmarks.characters.questions", words)
    answers = run_all(given, runs.drawn(given))
    measured: dict[str, dict] = {}
    for name, rows in answers.questions.items():
        results = {row: answers.results(name, row) for row in rows}
        text = f"{ASKED[name]}\n\n" + question_table(results, answers.defaults[name])
        print(f"\n{name}\n\n{text}")
        measured[name] = {
            row: [of_seed["ensemble"] for of_seed in of_row] for row, of_row in results.items()
        }
        if given.write:
            n = answers.bases[given.seeds[0]]["generalist"]["n"]
            foot = (
                f"n = {n:,} of {given.classes:,} classes. {lab.conditions(given.seeds, command)} "
                f"{answers.seconds(name) / 60:.0f} core-minutes beside the runs that all begin "
                "with."
            )
            lab.write_section(title_of(name, given.classes), f"{text}\n\n{foot}", runs.PAGE)
    minutes = sum(map(runs.own_seconds, answers.variants)) / 60
    print(f"\n{minutes:.1f} core-minutes in all, beside the runs that all begin with")
    lab.print_json({"classes": given.classes, "ensembles": measured}, given, command)


if __name__ == "__main__":
    main()
