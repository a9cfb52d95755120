"""What makes specialists pay?  Each question is a table, each row of it one change of the headline's config.

    python -m benchmarks.characters.questions --to runs/characters [--only QUESTION ...] [--sixth | --quick] [--write]

Of each seed there is one run of headline.toml, seed-SEED-asked, less students and controls, its specialists' lessons
cut to STEPS, so that all questions can be asked; it takes over what the headline's run
(benchmarks.characters.headline) has of it.  Every other row is a copy of that run less the stages that its settings
change: all begin with one generalist, rows of [specialists] share its groups too, and rows of [ensemble] its
specialists, so that only what is fitted on val and the figures on test are made anew.  (Specialists stop early, and
have their temperatures fitted, on the val examples that a gate of 1 refers to them.)  What is chosen for use is chosen
by the column of val: test is there to be reported.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
from pathlib import Path
from statistics import mean

from benchmarks.papers.lab import conditions, finished, spread, table, write_section
from benchmarks.papers.specialists import fewer_errors, specialists_asked
from pipeline.config import COMBINERS, Config, load_config

from .headline import (
    PAGE,
    SIXTH_CLASSES,
    all_of,
    alone,
    config_of,
    copied,
    drawn,
    kept_figures,
    own_seconds,
    parsed,
    parser,
)

STEPS = 400  # of each specialist, unless the row or --sixth says otherwise
VAL = 20_000  # examples of val, evenly over it
QUICK = ("dustbin", "gate")  # --quick asks these alone, unless --only names others


def questions(config: Config) -> dict[str, dict[str, dict]]:
    """{question: {row: {key of the config: value}}} beside the config that all rows begin with."""
    steps, groups = config.specialists.steps, config.clusters.num_groups
    plain = {}

    def full(soft_weight: float) -> dict:
        return {"specialists.dustbin": "full", "specialists.soft_weight": soft_weight}

    def many(count: int) -> dict:
        """Groups at the same number of steps in all."""
        return {"clusters.num_groups": count, "specialists.steps": round(steps * groups / count)}

    def rows(key: str, *values) -> dict[str, dict]:
        return {str(value): {key: value} for value in values}

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
            f"{share:g} x": {"specialists.steps": max(1, round(share * steps))}
            for share in (0.25, 0.5, 1, 2)
        },
        "gate": {f"n = {n}": {"ensemble.gate": n} for n in (1, 2, 5)},
        "combine": rows("ensemble.combine", *COMBINERS),
    }


ASKED = {
    "dustbin": "What stands for the classes that are not the specialist's own?",
    "soft targets": "Do the generalist's answers, learnt among the other classes, keep a specialist from forgetting?",
    "trainable": "How much of a specialist has to be its own?",
    "overlap": "How many groups does a class belong to?  (Each specialist takes as many steps.)",
    "number of groups": "Few large groups or many small ones?  (All specialists together take as many steps.)",
    "clustering": "Which clustering?",
    "hard negatives": "Should the other half of a batch hold the classes that are confused with the group?",
    "calibration": "Is it calibrated before it is combined?",
    "examples": "How many examples does a specialist need?  (Times the others' steps, the rate annealed over them.)",
    "gate": "Whose specialists are asked: those of the generalist's n most probable classes.",
    "combine": "How do opinions become one?",
}


def base_of(data: Path, seed: int, settings: list[str]) -> dict:
    """The headline's config with short specialists' lessons, without students and controls."""
    base = config_of(data, seed, [f"specialists.steps={STEPS}", *settings])
    return variant(alone(base), {})


def variant(base: dict, overrides: dict) -> dict:
    """The config that all rows begin with, and `overrides`."""
    settings = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return load_config(None, settings, copy.deepcopy(base)).dump()


def changes_nothing(base: dict, overrides: dict) -> bool:
    return variant(base, overrides) == variant(base, {})


def place_of(run: Path, overrides: dict) -> Path:
    """Where a variant of a seed's run lies: questions that share a row share its run."""
    words = "-".join(f"{key.partition('.')[2]}-{value}" for key, value in sorted(overrides.items()))
    return run.with_name(f"{run.name}-{re.sub(r'[^A-Za-z0-9._-]', '_', words)}")


def specialists_cost(results: dict) -> tuple[float, float]:
    """(examples, seconds) that all specialists of a run took to train."""
    costs = [row["cost"] for row in results["specialists"]]
    return tuple(sum(cost[key] for cost in costs) for key in ("examples_seen", "seconds"))


def question_table(rows: dict[str, list[dict]], default: str) -> str:
    """rows: by name the results of each seed, "on_val" among them.  Shares are of the same seed's generalist, so are
    their deviations."""
    lines = []
    for name, results in rows.items():
        ensembles = [found["ensemble"] for found in results]
        caught = [100 * found["clusters"]["captured_confusion"] for found in results]
        examples, seconds = map(mean, zip(*map(specialists_cost, results), strict=True))
        on_val = [fewer_errors(found["on_val"]["ensemble"], found["on_val"]) for found in results]
        lines.append(
            [
                f"**{name}**, the default" if name == default else name,
                spread([100 * row["top1"] for row in ensembles], 2),
                spread([row["nll"] for row in ensembles], 4),
                spread([100 * fewer_errors(found["ensemble"], found) for found in results], 1),
                spread([100 * share for share in on_val], 1),
                spread([row["cnll"] for row in ensembles], 4),
                spread(caught, 1),
                f"{mean(map(specialists_asked, results)):.2f}",
                f"{examples / 1e6:.2f} M, {seconds:.0f} s",
            ]
        )
    return table(
        [
            "",
            "top-1, %",
            "NLL",
            "errors fewer than the generalist's, %",
            "the same on val, %",
            "calibrated NLL",
            "captured errors, %",
            "specialists asked",
            "their training",
        ],
        lines,
    )


def default_of(base: dict, rows: dict[str, dict]) -> str:
    """The one row that changes nothing.  Raises SystemExit unless there is one."""
    found = [name for name, overrides in rows.items() if changes_nothing(base, overrides)]
    if len(found) != 1:
        raise SystemExit(
            f"of the rows {', '.join(rows)} {len(found)} are the one that all begin with: one is needed"
        )
    return found[0]


def title_of(name: str, classes: int) -> str:
    """The section of the page: questions are asked of SIXTH_CLASSES, unless it says otherwise."""
    return f"Question: {name}" + ("" if classes == SIXTH_CLASSES else f", of {classes:,} classes")


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=ASKED, help="these questions, and no others")
    given = parsed(options, words)
    data = drawn(given.to, given.classes)
    bases = {seed: base_of(data, seed, given.set) for seed in given.seeds}
    runs = {seed: given.to / f"seed-{seed}-asked" for seed in given.seeds}
    first = bases[given.seeds[0]]
    asked = {
        name: rows
        for name, rows in questions(load_config(None, [], first)).items()
        if name in (given.only or (QUICK if given.quick else ASKED))
    }
    defaults = {name: default_of(first, rows) for name, rows in asked.items()}

    def with_val(results: dict, run: Path) -> dict:
        return results | {"on_val": kept_figures(run, results, data / "seen", "val", VAL)}

    def begun(seed: int) -> dict:
        run, headline = runs[seed], given.to / f"seed-{seed}"
        known = (headline / "config.toml").exists()
        return with_val(
            copied(bases[seed], run, headline) if known else finished(bases[seed], run), run
        )

    base_results = all_of({seed: lambda seed=seed: begun(seed) for seed in given.seeds}, given.jobs)
    tasks = {}
    for name, rows in asked.items():
        for overrides in (rows[row] for row in rows if row != defaults[name]):
            for seed, base in bases.items():
                place, config = place_of(runs[seed], overrides), variant(base, overrides)
                tasks[place] = lambda place=place, config=config, run=runs[seed]: with_val(
                    copied(config, place, run), place
                )
    found = all_of(tasks, given.jobs)

    def results_of(name: str, row: str) -> list[dict]:
        if row == defaults[name]:
            return [base_results[seed] for seed in given.seeds]
        return [found[place_of(runs[seed], asked[name][row])] for seed in given.seeds]

    command = shlex.join(
        ["python", "-m", "benchmarks.characters.questions", *(words or sys.argv[1:])]
    )
    for name, rows in asked.items():
        text = f"{ASKED[name]}\n\n" + question_table(
            {row: results_of(name, row) for row in rows}, defaults[name]
        )
        print(f"\n{name}\n\n{text}")
        places = [
            place_of(runs[seed], overrides) for overrides in rows.values() for seed in given.seeds
        ]
        spent = sum(own_seconds(place) for place in places if place in found)
        if given.write:
            n = base_results[given.seeds[0]]["generalist"]["n"]
            foot = f"n = {n:,} of {given.classes:,} classes. {conditions(given.seeds, command)} {spent / 60:.0f} "
            foot += "core-minutes beside the runs that all begin with."
            write_section(title_of(name, given.classes), f"{text}\n\n{foot}", PAGE)
    print(
        f"\n{sum(map(own_seconds, found)) / 60:.1f} core-minutes in all, beside the runs that all begin with"
    )


if __name__ == "__main__":
    main()
