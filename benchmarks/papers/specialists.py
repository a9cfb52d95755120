"""What students of a specialist ensemble keep, by their width; and specialists with a full softmax.

    python -m benchmarks.papers.specialists --to runs/papers/specialists --write

Hinton, Vinyals & Dean 2015, section 8: "we have not yet shown" that specialists go back into one network; section 6.1:
"currently exploring" specialists with a softmax over all classes.  The setting is `referral demo`'s (docs/demo.md),
its glyphs rendered once for all seeds.  One run for each seed: generalist, specialists, and students of one, one and a
half and two times the generalist's width, each beside a twin that learns the labels alone and is alike in all else
(start, batches, steps, learning rate).  A second run for each seed begins with the first one's generalist, and so has
its groups; its specialists alone are others, trained with dustbin = "full".
"""

from __future__ import annotations

import shlex
import sys
import tomllib
from pathlib import Path
from statistics import mean

from launch.demo import DEMO, make_glyphs
from trainer.report.results import errors, share_of_gain
from trainer.run_directory import read_json

from .lab import arguments, conditions, finished, seconds, shards, spread, table, write_section

TITLE = "Students of a specialist ensemble, and specialists with a full softmax"
# Of each width the demo's student that is nearest, whose lesson is taken, and [model]; the generalist's is 12 and 24.
WIDTHS = {
    "1": ("main", {}), "1.5": ("wide", {"width": 18, "embedding": 36}), "2": ("wide", {"width": 24, "embedding": 48}),
}  # fmt: skip
HARD = "_hard"  # ends the twin's name


PRESERVING, FULL = (f'ensemble, dustbin = "{kind}"' for kind in ("preserving", "full"))
TRAINING = "its training: examples, seconds"


def student_name(width: str) -> str:
    return f"width_{width.replace('.', '_')}"


STUDENTS = [student_name(width) + end for width in WIDTHS for end in ("", HARD)]


def config_of(data: Path, seed: int) -> dict:
    """The demo's config with a student and its twin for each of WIDTHS."""
    config, students = tomllib.loads(DEMO), {}
    for width, (like, model) in WIDTHS.items():
        lesson = config["students"][like] | {"model": model}
        students |= {student_name(width): lesson, student_name(width) + HARD: lesson | {"method": "hard"}}
    config["data"] |= {split: str(data) for split in ("train", "val", "test")}
    return config | {
        "seed": seed, "students": students, "controls": {"enabled": False}, "launch": {"processes": 1, "pool": 1},
        "engine": {"device": "cpu"},
    }  # fmt: skip


def full_config_of(config: dict, run: Path) -> dict:
    """The same with the generalist of a finished run and specialists that keep a full softmax; no students."""
    specialists = config["specialists"] | {"dustbin": "full"}
    return config | {"generalist": {"from": str(run.resolve())}, "specialists": specialists, "students": {}}


def nll_share(row: dict, results: dict) -> float | None:
    """(NLL of the generalist - NLL of row) / (NLL of the generalist - NLL of the ensemble)."""
    before, after = results["generalist"]["nll"], results["ensemble"]["nll"]
    return (before - row["nll"]) / (before - after) if after < before else None


def fewer_errors(row: dict, results: dict) -> float:
    """Share of the generalist's test errors that `row` does not make."""
    return 1 - errors(row) / errors(results["generalist"])


def same_groups(first: Path, second: Path) -> None:
    """Raises SystemExit unless two runs have the same groups."""
    if read_json(first / "clusters" / "groups.json") != read_json(second / "clusters" / "groups.json"):
        raise SystemExit(f"{first} and {second} have other groups: more than their specialists differs")


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
        return "no gain to keep: " + ", ".join("–" if share is None else f"{share:.{digits}%}" for share in shares)
    each = ", ".join(f"{100 * share:.{digits}f}" for share in shares)
    return f"**{100 * mean(shares):.{digits}f} %** ({each})"


def listed(values: list, form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def student_rows(found: list[dict], networks: dict, cost: dict) -> list[list]:
    """Of each width the student and its twin.  found: results of each seed."""
    rows = []
    for width in WIDTHS:
        for name in (student_name(width), student_name(width) + HARD):
            own = [results["students"][name] for results in found]
            parameters, multiplications = networks[name]
            rows.append([
                f"{width} x, {'labels alone' if name.endswith(HARD) else 'distilled'}",
                spread([100 * row["top1"] for row in own], 2), spread([row["nll"] for row in own], 4),
                percents([share_of_gain(row, results) for row, results in zip(own, found, strict=True)]),
                percents([nll_share(row, results) for row, results in zip(own, found, strict=True)]),
                spread([row["cnll"] for row in own], 4),
                f"{parameters:,}", f"{multiplications / 1e3:,.0f} k", trained(cost[name]),
            ])  # fmt: skip
    return rows


def ensemble_rows(found: list[dict], full: list[dict], networks: dict, cost: dict) -> list[list]:
    """Generalist, ensemble, and the ensemble whose specialists were trained with a full softmax."""
    parameters, multiplications = networks["generalist"]
    rows = []
    for name, results_of, key in (
        ("generalist", found, "generalist"), (PRESERVING, found, "ensemble"), (FULL, full, "ensemble"),
    ):  # fmt: skip
        own = [results[key] for results in results_of]
        count = 1 + (len(results_of[0]["specialists"]) if key == "ensemble" else 0)
        asked = 1 + (mean(map(specialists_asked, results_of)) if key == "ensemble" else 0)
        rows.append([
            name, spread([100 * row["top1"] for row in own], 2), spread([row["nll"] for row in own], 4),
            "" if key == "generalist" else percents(
                [fewer_errors(row, results) for row, results in zip(own, results_of, strict=True)], 1),
            spread([row["cnll"] for row in own], 4), f"{count * parameters:,}",
            f"{asked * multiplications / 1e3:,.0f} k", trained(cost[name]),
        ])  # fmt: skip
    return rows


def verdicts(found: list[dict], least: float = 0.7) -> list[str]:
    """One line for each width: the bar is `least` of the gain in top-1 at every seed, and a lead over the twin."""
    lines = []
    for width in WIDTHS:
        name = student_name(width)
        pairs = [(results, results["students"][name], results["students"][name + HARD]) for results in found]
        kept = sum((share_of_gain(row, results) or 0) >= least for results, row, _ in pairs)
        fewer = [errors(twin) - errors(row) for _, row, twin in pairs]
        lower = [twin["nll"] - row["nll"] for _, row, twin in pairs]
        lines.append(
            f"* {width} x: keeps at least {100 * least:.0f} % of the gain in top-1 at {kept} of {len(found)} seeds; "
            f"fewer errors than its twin at {sum(lead > 0 for lead in fewer)} (by {listed(fewer, 'd')}), "
            f"a lower NLL at {sum(lead > 0 for lead in lower)} (by {listed(lower, '.3f')})."
        )
    return lines


def of_seed(to: Path, data: Path, seed: int, settings: list[str]) -> tuple[dict, dict]:
    """results.json of the run and of that with a full softmax."""
    config, run, full = config_of(data, seed), to / f"seed-{seed}", to / f"seed-{seed}-full"
    found = finished(config, run, settings), finished(full_config_of(config, run), full, settings)
    same_groups(run, full)
    return found


def costs_of(to: Path, seeds: list[int]) -> dict[str, list[dict]]:
    """{"seconds", "examples_seen"} of training at each seed, of a network by itself and of all specialists together."""

    def of(*places: Path) -> dict:
        summaries = [read_json(place / "summary.json") for place in places]
        return {key: sum(summary[key] for summary in summaries) for key in ("seconds", "examples_seen")}

    def of_specialists(run: Path) -> dict:
        return of(*sorted((run / "specialists").glob("[0-9]*")))

    runs, full = [to / f"seed-{seed}" for seed in seeds], [to / f"seed-{seed}-full" for seed in seeds]
    return {name: [of(run / "students" / name) for run in runs] for name in STUDENTS} | {
        "generalist": [of(run / "generalist") for run in runs],
        PRESERVING: [of_specialists(run) for run in runs], FULL: [of_specialists(run) for run in full],
    }  # fmt: skip


def trained(costs: list[dict]) -> str:
    """Examples and seconds, means over the seeds."""
    examples, took = (mean(each[key] for each in costs) for key in ("examples_seen", "seconds"))
    return f"{examples / 1e6:.2f} M, {took:.0f} s"


def text_of(to: Path, seeds: list[int], found: list[dict], full: list[dict]) -> str:
    networks = {name: sizes(to / f"seed-{seeds[0]}" / "students" / name) for name in STUDENTS}
    networks["generalist"] = sizes(to / f"seed-{seeds[0]}" / "generalist")
    cost = costs_of(to, seeds)
    first = table(
        ["", "top-1, %", "NLL", "fewer errors than the generalist", "calibrated NLL", "parameters",
         "multiplications an image", TRAINING],
        ensemble_rows(found, full, networks, cost),
    )  # fmt: skip
    second = table(
        ["student", "top-1, %", "NLL", "gain kept, top-1", "gain kept, NLL", "calibrated NLL", "parameters",
         "multiplications an image", TRAINING],
        student_rows(found, networks, cost),
    )  # fmt: skip
    return "\n\n".join([first, second, "\n".join(verdicts(found))])


def main(words: list[str] | None = None) -> None:
    given = arguments(__doc__).parse_args(words)
    given.to.mkdir(parents=True, exist_ok=True)
    data = shards(given.to.resolve() / "data", lambda place: make_glyphs(place.parent, 0, quick=False))
    both = [of_seed(given.to, data, seed, given.set) for seed in given.seeds]
    found, full = [pair[0] for pair in both], [pair[1] for pair in both]
    text = text_of(given.to, given.seeds, found, full)
    print(text)
    if given.write:
        command = shlex.join(["python", "-m", "benchmarks.papers.specialists", *(words or sys.argv[1:])])
        minutes = sum(seconds(given.to / f"seed-{seed}{end}") for seed in given.seeds for end in ("", "-full")) / 60
        took = f"{minutes:.0f} minutes in all, one process at a time beside others' work."
        images = f"n = {found[0]['generalist']['n']:,} test images."
        write_section(TITLE, f"{text}\n\n{images} {conditions(given.seeds, command)} {took}")


if __name__ == "__main__":
    main()
