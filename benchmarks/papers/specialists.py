"""What students of a specialist ensemble keep, by their width, and specialists with a full softmax.

    python -m benchmarks.papers.specialists --to runs/papers/specialists --write
    python -m benchmarks.papers.specialists --quick  seconds, no result

Hinton, Vinyals & Dean 2015, section 8: "we have not yet shown" that specialists go back into one
network. Section 6.1: "currently exploring" specialists with a softmax over all classes.  The
setting is `referral demo`'s (docs/demo.md), its glyphs rendered once for all seeds.

One run for each seed: generalist, specialists, and students of one, one and a half and two times
the generalist's width, each beside a twin that learns the labels alone and is alike in all else
(start, batches, steps, learning rate).  Further runs of each seed begin with that one's generalist,
and so have its groups. Their specialists alone are others, trained with dustbin = "full".
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from torch.utils.flop_counter import FlopCounterMode

from launch.demo import DEMO, make_glyphs
from networks import load_classifier, parameter_count
from pipeline.store import read_json

from . import lab

TITLE = "Students of a specialist ensemble, and specialists with a full softmax"
# Of each width the demo's student that is nearest, whose schedule is taken, and [model]. The
# generalist's is 12 and 24.
WIDTHS = {
    "1": ("main", {}),
    "1.5": ("wide", {"width": 18, "embedding": 36}),
    "2": ("wide", {"width": 24, "embedding": 48}),
}
HARD = "_hard"  # ends the twin's name
# The paper's question as it stands, and the one of .1 and .3 that is better on val at seed 0.
SOFT_WEIGHTS = (1.0, 0.1)
# Ensembles by name, and what ends the name of the run that has their specialists.
ENSEMBLES = {'dustbin = "preserving"': ""} | {
    f'dustbin = "full", soft_weight = {weight:g}': f"-full-{weight:g}" for weight in SOFT_WEIGHTS
}
TRAINING = "its training: examples, seconds"
QUICK_GLYPHS = {"classes": 24, "train": 12, "val": 6, "test": 6}


def student_name(width: str) -> str:
    return f"width_{width.replace('.', '_')}"


STUDENTS = [student_name(width) + end for width in WIDTHS for end in ("", HARD)]


# The runs


def config_of(data: Path, seed: int) -> dict:
    """The demo's config with a student and its twin for each of WIDTHS."""
    config, students = tomllib.loads(DEMO), {}
    for width, (like, model) in WIDTHS.items():
        student = config["students"][like] | {"model": model}
        students[student_name(width)] = student
        students[student_name(width) + HARD] = student | {"method": "hard"}
    config["data"] |= {split: str(data) for split in ("train", "val", "test")}
    return config | {
        "seed": seed,
        "students": students,
        "controls": {"enabled": False},
        "launch": {"processes": 1, "pool": 1},
        "engine": {"device": "cpu"},
    }


def full_config_of(config: dict, run: Path, soft_weight: float) -> dict:
    """The same with a finished run's generalist, specialists of a full softmax, and no students."""
    return config | {
        "generalist": {"from": str(run.resolve())},
        "specialists": config["specialists"] | {"dustbin": "full", "soft_weight": soft_weight},
        "students": {},
    }


def quick(config: dict) -> dict:
    """The same stages in seconds."""
    short = {"steps": 4, "validate_every": 0}
    students = {name: student | short for name, student in config["students"].items()}
    return config | {
        "train": config["train"] | {"steps": 30, "batch_size": 64, "validate_every": 0},
        "clusters": {"num_groups": 3, "overlap": 2},
        "specialists": config["specialists"] | short,
        "students": students,
    }


def quick_glyphs(path: Path) -> None:
    words = [str(word) for key, value in QUICK_GLYPHS.items() for word in (f"--{key}", value)]
    lab.referral("shards", "glyphs", "--out", path.resolve(), *words)


def runs_of(options: argparse.Namespace, data: Path, seed: int) -> dict[str, dict]:
    """results.json of each of ENSEMBLES, the first one's with the students."""
    config, run = config_of(data, seed), options.to / f"seed-{seed}"
    if options.quick:
        config = quick(config)
    configs = [config, *(full_config_of(config, run, weight) for weight in SOFT_WEIGHTS)]
    results = {}
    for (name, end), of_run in zip(ENSEMBLES.items(), configs, strict=True):
        path = options.to / f"seed-{seed}{end}"
        results[name] = lab.finished(of_run, path, options.set, in_process=options.quick)
        check_groups(run, path)
    return results


def check_groups(first: Path, second: Path) -> None:
    """Raises SystemExit unless two runs have the same groups."""
    groups = [read_json(run / "clusters" / "groups.json") for run in (first, second)]
    if groups[0] != groups[1]:
        raise SystemExit(
            f"{first} and {second} have other groups: more than their specialists differs"
        )


# What was measured


def nll_share(row: dict, results: dict) -> float | None:
    """(NLL of the generalist - NLL of row) / (NLL of the generalist - NLL of the ensemble)."""
    before, after = results["generalist"]["nll"], results["ensemble"]["nll"]
    if after >= before:
        return None
    return (before - row["nll"]) / (before - after)


def fewer_errors(row: dict, results: dict) -> float:
    """The fraction of the generalist's test errors that `row` does not make."""
    return 1 - lab.errors(row) / max(1, lab.errors(results["generalist"]))


def sizes(path: Path) -> tuple[int, int]:
    """(parameters, multiplications of one example's forward pass) of a saved network."""
    network = load_classifier(path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *network.spec.input.shape, dtype=torch.uint8))
    return parameter_count(network), counter.get_total_flops() // 2


def specialists_asked(results: dict) -> float:
    """Specialists that run for one test example, on average."""
    return sum(row["routed"] for row in results["specialists"]) / results["generalist"]["n"]


def own_gain(results: dict) -> float:
    """What specialists gain in top-1 among their own classes' examples and names, their mean.

    One without test examples gains nothing.
    """
    return mean(row.get("gain", 0.0) for row in results["specialists"])


def costs_of(to: Path, seeds: list[int]) -> dict[str, list[dict]]:
    """{"seconds", "examples_seen", "temperature"} of training at each seed.

    Of a network by itself, and of all specialists together. Of these the temperature is the mean,
    fitted on val: above 1 they are surer than they should be.
    """

    def of(*stages: Path) -> dict:
        summaries = [read_json(stage / "summary.json") for stage in stages]
        temperatures = [summary.get("temperature", 1.0) for summary in summaries]
        return {
            "seconds": sum(summary["seconds"] for summary in summaries),
            "examples_seen": sum(summary["examples_seen"] for summary in summaries),
            "temperature": mean(temperatures),
        }

    runs = [to / f"seed-{seed}" for seed in seeds]
    places = {name: f"students/{name}" for name in STUDENTS} | {"generalist": "generalist"}
    costs = {name: [of(run / place) for run in runs] for name, place in places.items()}
    for name, end in ENSEMBLES.items():
        families = [to / f"{run.name}{end}" / "specialists" for run in runs]
        costs[name] = [of(*sorted(family.glob("[0-9]*"))) for family in families]
    return costs


# Tables


def percents(fractions: Sequence[float | None], digits: int = 0) -> str:
    """The mean, and each seed's."""
    known = [fraction for fraction in fractions if fraction is not None]
    if len(known) < len(fractions):
        return "no gain to keep: " + ", ".join(percent(each, digits) for each in fractions)
    each = ", ".join(f"{100 * fraction:.{digits}f}" for fraction in known)
    return f"**{100 * mean(known):.{digits}f} %** ({each})"


def percent(fraction: float | None, digits: int) -> str:
    return "–" if fraction is None else f"{fraction:.{digits}%}"


def listed(values: Sequence[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def trained(costs: list[dict]) -> str:
    """Examples and seconds, means over the seeds."""
    examples, seconds = (mean(cost[key] for cost in costs) for key in ("examples_seen", "seconds"))
    return f"{examples / 1e6:.2f} M, {seconds:.0f} s"


def student_rows(
    results: list[dict], networks: dict[str, tuple[int, int]], costs: dict[str, list[dict]]
) -> list[list]:
    """Of each width the student and its twin.  results: of each seed.  networks: sizes, by name."""
    rows = []
    for width in WIDTHS:
        for end, words in (("", "distilled"), (HARD, "labels alone")):
            name = student_name(width) + end
            own = [of_seed["students"][name] for of_seed in results]
            pairs = list(zip(own, results, strict=True))
            parameters, multiplications = networks[name]
            rows.append(
                [
                    f"{width} x, {words}",
                    lab.spread([100 * row["top1"] for row in own], 2),
                    lab.spread([row["nll"] for row in own], 4),
                    percents([lab.share_of_gain(row, of_seed) for row, of_seed in pairs]),
                    percents([nll_share(row, of_seed) for row, of_seed in pairs]),
                    lab.spread([row["cnll"] for row in own], 4),
                    f"{parameters:,}",
                    f"{multiplications / 1e3:,.0f} k",
                    trained(costs[name]),
                ]
            )
    return rows


def ensemble_rows(
    results: dict[str, list[dict]],
    parameters: int,
    multiplications: int,
    costs: dict[str, list[dict]],
) -> list[list]:
    """The generalist and each of ENSEMBLES.

    results: of each seed, by name.  parameters, multiplications: of one network.  costs: costs_of.
    """

    def described(name: str, rows: list[dict], networks: int, run: float) -> list:
        return [
            name,
            lab.spread([100 * row["top1"] for row in rows], 2),
            lab.spread([row["nll"] for row in rows], 4),
            lab.spread([row["cnll"] for row in rows], 4),
            f"{networks * parameters:,}",
            f"{run * multiplications / 1e3:,.0f} k",
            trained(costs[name]),
        ]

    generalists = [of_seed["generalist"] for of_seed in next(iter(results.values()))]
    rows = [[*described("generalist", generalists, 1, 1), "", "", ""]]
    for name, of_seeds in results.items():
        own = [of_seed["ensemble"] for of_seed in of_seeds]
        run = 1 + mean(map(specialists_asked, of_seeds))
        count = 1 + len(of_seeds[0]["specialists"])
        fewer = [fewer_errors(of_seed["ensemble"], of_seed) for of_seed in of_seeds]
        rows.append(
            [
                *described(name, own, count, run),
                percents(fewer, 1),
                lab.spread([100 * own_gain(of_seed) for of_seed in of_seeds], 2),
                lab.spread([cost["temperature"] for cost in costs[name]], 2),
            ]
        )
    return rows


def verdicts(results: list[dict], least: float = 0.7) -> list[str]:
    """One line for each width: `least` of the gain in top-1 at every seed, a lead over the twin."""
    lines = []
    for width in WIDTHS:
        name = student_name(width)
        gains, fewer, lower = [], [], []
        for of_seed in results:
            student, twin = of_seed["students"][name], of_seed["students"][name + HARD]
            gains.append(lab.share_of_gain(student, of_seed) or 0)
            fewer.append(lab.errors(twin) - lab.errors(student))
            lower.append(twin["nll"] - student["nll"])
        kept = sum(gain >= least for gain in gains)
        lines.append(
            f"* {width} x: keeps at least {100 * least:.0f} % of the gain in top-1 at {kept} of "
            f"{len(results)} seeds, "
            f"fewer errors than its twin at {sum(lead > 0 for lead in fewer)} "
            f"(by {listed(fewer, 'd')}), "
            f"a lower NLL at {sum(lead > 0 for lead in lower)} (by {listed(lower, '.3f')})."
        )
    return lines


def text_of(to: Path, seeds: list[int], results: list[dict[str, dict]]) -> str:
    """Both tables and the verdicts.  results: runs_of each seed."""
    run, costs = to / f"seed-{seeds[0]}", costs_of(to, seeds)
    students = [next(iter(of_seed.values())) for of_seed in results]
    by_name = {name: [of_seed[name] for of_seed in results] for name in ENSEMBLES}
    networks = {name: sizes(run / "students" / name) for name in STUDENTS}
    columns = ["calibrated NLL", "parameters", "multiplications an image", TRAINING]
    of_ensembles = [
        "fewer errors than the generalist",
        "gain among their own classes, points",
        "their temperature",
    ]
    first = lab.table(
        ["", "top-1, %", "NLL", *columns, *of_ensembles],
        ensemble_rows(by_name, *sizes(run / "generalist"), costs),
    )
    second = lab.table(
        ["student", "top-1, %", "NLL", "gain kept, top-1", "gain kept, NLL", *columns],
        student_rows(students, networks, costs),
    )
    return "\n\n".join([first, second, "\n".join(verdicts(students))])


def main(words: list[str] | None = None) -> None:
    options = lab.parsed(lab.arguments(__doc__), words)
    command = lab.command_line("benchmarks.papers.specialists", words)

    def glyphs(path: Path) -> None:
        if options.quick:
            quick_glyphs(path)
        else:
            make_glyphs(path.parent, 0, quick=False)

    data = lab.shards(options.to.resolve() / "data", glyphs)
    results = [runs_of(options, data, seed) for seed in options.seeds]
    text = text_of(options.to, options.seeds, results)
    print(text)
    students = [next(iter(of_seed.values())) for of_seed in results]
    if options.write:
        ends = ENSEMBLES.values()
        runs = [options.to / f"seed-{seed}{end}" for seed in options.seeds for end in ends]
        minutes = sum(map(lab.seconds, runs)) / 60
        took = f"{minutes:.0f} minutes in all, one process at a time beside others' work."
        images = f"n = {students[0]['generalist']['n']:,} test images."
        foot = f"{images} {lab.conditions(options.seeds, command)} {took}"
        lab.write_section(TITLE, f"{text}\n\n{foot}")
    rows = [
        {name: lab.compared_rows(of_run) for name, of_run in of_seed.items()} for of_seed in results
    ]
    lab.print_json({"rows": rows, "verdicts": verdicts(students)}, options, command)


if __name__ == "__main__":
    main()
