"""What students of a specialist ensemble keep, by their width; and specialists with a full softmax.

    python -m benchmarks.papers.specialists --to runs/papers/specialists --write

Hinton, Vinyals & Dean 2015, section 8: "we have not yet shown" that specialists go back into one network; section 6.1:
"currently exploring" specialists with a softmax over all classes.  The setting is `referral demo`'s (docs/demo.md),
its glyphs rendered once for all seeds.  One run for each seed: generalist, specialists, and students of one, one and a
half and two times the generalist's width, each beside a twin that learns the labels alone and is alike in all else
(start, batches, steps, learning rate).  Further runs of each seed begin with that one's generalist, and so have its
groups; their specialists alone are others, trained with dustbin = "full".
"""

from __future__ import annotations

import shlex
import sys
import tomllib
from pathlib import Path
from statistics import mean

from launch.demo import DEMO, make_glyphs
from pipeline.results import errors, share_of_gain
from pipeline.store import read_json

from .lab import arguments, conditions, finished, seconds, shards, spread, table, write_section

TITLE = "Students of a specialist ensemble, and specialists with a full softmax"
# Of each width the demo's student that is nearest, whose lesson is taken, and [model]; the generalist's is 12 and 24.
WIDTHS = {
    "1": ("main", {}),
    "1.5": ("wide", {"width": 18, "embedding": 36}),
    "2": ("wide", {"width": 24, "embedding": 48}),
}
HARD = "_hard"  # ends the twin's name
SOFT_WEIGHTS = (
    1.0,
    0.1,
)  # the paper's question as it stands, and the one of .1 and .3 that is better on val at seed 0
# Ensembles by name, and what ends the name of the run that has their specialists.
ENSEMBLES = {'dustbin = "preserving"': ""} | {
    f'dustbin = "full", soft_weight = {weight:g}': f"-full-{weight:g}" for weight in SOFT_WEIGHTS
}
TRAINING = "its training: examples, seconds"


def student_name(width: str) -> str:
    return f"width_{width.replace('.', '_')}"


STUDENTS = [student_name(width) + end for width in WIDTHS for end in ("", HARD)]


def config_of(data: Path, seed: int) -> dict:
    """The demo's config with a student and its twin for each of WIDTHS."""
    config, students = tomllib.loads(DEMO), {}
    for width, (like, model) in WIDTHS.items():
        lesson = config["students"][like] | {"model": model}
        students |= {
            student_name(width): lesson,
            student_name(width) + HARD: lesson | {"method": "hard"},
        }
    config["data"] |= {split: str(data) for split in ("train", "val", "test")}
    return config | {
        "seed": seed,
        "students": students,
        "controls": {"enabled": False},
        "launch": {"processes": 1, "pool": 1},
        "engine": {"device": "cpu"},
    }


def full_config_of(config: dict, run: Path, soft_weight: float) -> dict:
    """The same with the generalist of a finished run and specialists that keep a full softmax; no students."""
    specialists = config["specialists"] | {"dustbin": "full", "soft_weight": soft_weight}
    return config | {
        "generalist": {"from": str(run.resolve())},
        "specialists": specialists,
        "students": {},
    }


def nll_share(row: dict, results: dict) -> float | None:
    """(NLL of the generalist - NLL of row) / (NLL of the generalist - NLL of the ensemble)."""
    before, after = results["generalist"]["nll"], results["ensemble"]["nll"]
    return (before - row["nll"]) / (before - after) if after < before else None


def fewer_errors(row: dict, results: dict) -> float:
    """Share of the generalist's test errors that `row` does not make."""
    return 1 - errors(row) / errors(results["generalist"])


def same_groups(first: Path, second: Path) -> None:
    """Raises SystemExit unless two runs have the same groups."""
    if read_json(first / "clusters" / "groups.json") != read_json(
        second / "clusters" / "groups.json"
    ):
        raise SystemExit(
            f"{first} and {second} have other groups: more than their specialists differs"
        )


def sizes(place: Path) -> tuple[int, int]:
    """(parameters, multiplications of one example's forward pass) of a saved network."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from networks import load_classifier, parameter_count

    network = load_classifier(place)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *network.spec.input.shape, dtype=torch.uint8))
    return parameter_count(network), counter.get_total_flops() // 2


def specialists_asked(results: dict) -> float:
    """Specialists that run for one test example, on average."""
    return sum(row["routed"] for row in results["specialists"]) / results["generalist"]["n"]


def percents(shares: list[float | None], digits: int = 0) -> str:
    """The mean, and each seed's."""
    if None in shares:
        return "no gain to keep: " + ", ".join(
            "–" if share is None else f"{share:.{digits}%}" for share in shares
        )
    each = ", ".join(f"{100 * share:.{digits}f}" for share in shares)
    return f"**{100 * mean(shares):.{digits}f} %** ({each})"


def listed(values: list, form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def student_rows(found: list[dict], networks: dict, learnt: dict) -> list[list]:
    """Of each width the student and its twin.  found: results of each seed."""
    rows = []
    for width in WIDTHS:
        for name in (student_name(width), student_name(width) + HARD):
            own = [results["students"][name] for results in found]
            parameters, multiplications = networks[name]
            rows.append(
                [
                    f"{width} x, {'labels alone' if name.endswith(HARD) else 'distilled'}",
                    spread([100 * row["top1"] for row in own], 2),
                    spread([row["nll"] for row in own], 4),
                    percents(
                        [
                            share_of_gain(row, results)
                            for row, results in zip(own, found, strict=True)
                        ]
                    ),
                    percents(
                        [nll_share(row, results) for row, results in zip(own, found, strict=True)]
                    ),
                    spread([row["cnll"] for row in own], 4),
                    f"{parameters:,}",
                    f"{multiplications / 1e3:,.0f} k",
                    trained(learnt[name]),
                ]
            )
    return rows


def ensemble_rows(
    found: dict[str, list[dict]], parameters: int, multiplications: int, learnt: dict
) -> list[list]:
    """The generalist and each of ENSEMBLES.  found: results of each seed, by name.  learnt: what learnt_of says."""
    first = next(iter(found.values()))

    def described(name: str, rows: list[dict], networks: int, run: float) -> list:
        return [
            name,
            spread([100 * row["top1"] for row in rows], 2),
            spread([row["nll"] for row in rows], 4),
            spread([row["cnll"] for row in rows], 4),
            f"{networks * parameters:,}",
            f"{run * multiplications / 1e3:,.0f} k",
            trained(learnt[name]),
        ]

    rows = [
        [*described("generalist", [results["generalist"] for results in first], 1, 1), "", "", ""]
    ]
    for name, results_of in found.items():
        own = [results["ensemble"] for results in results_of]
        run, count = (
            1 + mean(map(specialists_asked, results_of)),
            1 + len(results_of[0]["specialists"]),
        )
        fewer = [fewer_errors(row, results) for row, results in zip(own, results_of, strict=True)]
        rows.append(
            [
                *described(name, own, count, run),
                percents(fewer, 1),
                spread([100 * own_gain(results) for results in results_of], 2),
                spread([each["temperature"] for each in learnt[name]], 2),
            ]
        )
    return rows


def own_gain(results: dict) -> float:
    """What specialists gain in top-1 among their own classes' test examples and names, a mean over the specialists."""
    return mean(row["gain"] for row in results["specialists"])


def verdicts(found: list[dict], least: float = 0.7) -> list[str]:
    """One line for each width: the bar is `least` of the gain in top-1 at every seed, and a lead over the twin."""
    lines = []
    for width in WIDTHS:
        name = student_name(width)
        pairs = [
            (results, results["students"][name], results["students"][name + HARD])
            for results in found
        ]
        kept = sum((share_of_gain(row, results) or 0) >= least for results, row, _ in pairs)
        fewer = [errors(twin) - errors(row) for _, row, twin in pairs]
        lower = [twin["nll"] - row["nll"] for _, row, twin in pairs]
        lines.append(
            f"* {width} x: keeps at least {100 * least:.0f} % of the gain in top-1 at {kept} of {len(found)} seeds; "
            f"fewer errors than its twin at {sum(lead > 0 for lead in fewer)} (by {listed(fewer, 'd')}), "
            f"a lower NLL at {sum(lead > 0 for lead in lower)} (by {listed(lower, '.3f')})."
        )
    return lines


def of_seed(to: Path, data: Path, seed: int, settings: list[str]) -> dict[str, dict]:
    """results.json of each of ENSEMBLES, the first one's with the students."""
    config, run = config_of(data, seed), to / f"seed-{seed}"
    configs = [config, *(full_config_of(config, run, weight) for weight in SOFT_WEIGHTS)]
    found = {}
    for (name, end), each in zip(ENSEMBLES.items(), configs, strict=True):
        found[name] = finished(each, to / f"seed-{seed}{end}", settings)
        same_groups(run, to / f"seed-{seed}{end}")
    return found


def learnt_of(to: Path, seeds: list[int]) -> dict[str, list[dict]]:
    """{"seconds", "examples_seen"} of training at each seed, of a network by itself and of all specialists together;
    of these the mean "temperature" too, fitted on val: above 1 they are surer than they should be."""

    def of(*places: Path) -> dict:
        summaries = [read_json(place / "summary.json") for place in places]
        found = {
            key: sum(summary[key] for summary in summaries) for key in ("seconds", "examples_seen")
        }
        return found | {
            "temperature": mean(summary.get("temperature", 1.0) for summary in summaries)
        }

    runs = [to / f"seed-{seed}" for seed in seeds]
    single = {name: f"students/{name}" for name in STUDENTS} | {"generalist": "generalist"}
    return {name: [of(run / place) for run in runs] for name, place in single.items()} | {
        name: [
            of(*sorted((to / f"{run.name}{end}" / "specialists").glob("[0-9]*"))) for run in runs
        ]
        for name, end in ENSEMBLES.items()
    }


def trained(costs: list[dict]) -> str:
    """Examples and seconds, means over the seeds."""
    examples, took = (mean(each[key] for each in costs) for key in ("examples_seen", "seconds"))
    return f"{examples / 1e6:.2f} M, {took:.0f} s"


def text_of(to: Path, seeds: list[int], found: list[dict[str, dict]]) -> str:
    """Both tables and the verdicts.  found: of_seed of each seed."""
    run, learnt = to / f"seed-{seeds[0]}", learnt_of(to, seeds)
    students = [next(iter(each.values())) for each in found]
    columns = ["calibrated NLL", "parameters", "multiplications an image", TRAINING]
    first = table(
        [
            "",
            "top-1, %",
            "NLL",
            *columns,
            "fewer errors than the generalist",
            "gain among their own classes, points",
            "their temperature",
        ],
        ensemble_rows(
            {name: [each[name] for each in found] for name in ENSEMBLES},
            *sizes(run / "generalist"),
            learnt,
        ),
    )
    second = table(
        ["student", "top-1, %", "NLL", "gain kept, top-1", "gain kept, NLL", *columns],
        student_rows(students, {name: sizes(run / "students" / name) for name in STUDENTS}, learnt),
    )
    return "\n\n".join([first, second, "\n".join(verdicts(students))])


def main(words: list[str] | None = None) -> None:
    given = arguments(__doc__).parse_args(words)
    given.to.mkdir(parents=True, exist_ok=True)
    data = shards(
        given.to.resolve() / "data", lambda place: make_glyphs(place.parent, 0, quick=False)
    )
    found = [of_seed(given.to, data, seed, given.set) for seed in given.seeds]
    text = text_of(given.to, given.seeds, found)
    print(text)
    if given.write:
        command = shlex.join(
            ["python", "-m", "benchmarks.papers.specialists", *(words or sys.argv[1:])]
        )
        runs = [
            given.to / f"seed-{seed}{end}" for seed in given.seeds for end in ENSEMBLES.values()
        ]
        took = f"{sum(map(seconds, runs)) / 60:.0f} minutes in all, one process at a time beside others' work."
        images = f"n = {next(iter(found[0].values()))['generalist']['n']:,} test images."
        write_section(TITLE, f"{text}\n\n{images} {conditions(given.seeds, command)} {took}")


if __name__ == "__main__":
    main()
