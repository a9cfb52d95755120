"""Specialists on 3,755 characters: ensemble, controls, rivals, students, and how bars are met.

    python -m benchmarks.characters.headline --to runs/characters [--seeds 0 1 2]
        [--write]
    python -m benchmarks.characters.headline --quick          seconds, no result

Of each seed one run (headline.toml): generalist, specialists, control_wall, control_compute,
students of one and two times the generalist's parameters, and one of two times that sees few of the
images, each beside a twin that learns the labels of the same images alone.  Beside it further runs,
which are copies of that one as far as they agree with it:

    longer   the generalist from scratch, the same weights at the start, for twice the
             examples: is it converged?
    wider    a generalist that spends as many multiplications on an image as the ensemble
             does (WIDER); one of the ensemble's 25 times the parameters would take a day,
             see tenfold
    deep     as many generalists as the specialists' examples buy, two at least, averaged
             (beside it stand, at no training of their own, means of the seeds'
             generalists)
    tenfold  a generalist of ten times the parameters, only where --further names it:
             which errors does it make too?

Data are rendered once for all seeds (benchmarks.characters.data, two minutes). DATA/unseen has the
fonts that nobody has seen.  What is done is not done again.  --sixth is the same trial on the first
sixth of the classes with short trainings: what questions and later are asked of. --both-levels is
the headline's on 6,763 classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from scipy.stats import spearmanr

from benchmarks.papers import lab
from benchmarks.papers.specialists import fewer_errors, listed, percents, sizes, specialists_asked
from pipeline.store import read_json

from . import runs
from .runs import HARD, STUDENTS

RIVALS = ("wider generalist", "deep ensemble", "ten times the parameters")
FURTHER_ROWS = {  # by name in the table: the run and its row
    "twice the examples": ("longer", "generalist"),
    "wider generalist": ("wider", "generalist"),
    "deep ensemble": ("deep", "ensemble"),
    "ten times the parameters": ("tenfold", "generalist"),
}
ENSEMBLE = "**ensemble**"  # its row in the table
WIDER = {"width": 8, "embedding": 16}  # 234 k multiplications an image, as three networks of 78 k
TENFOLD = {"width": 16, "embedding": 72}  # 371 k parameters

Networks = Mapping[str, tuple[float, float]]  # by row: parameters, multiplications an image


# The runs


def deep(config: dict, members: int) -> dict:
    """The same generalist among others from other seeds, and nothing else."""
    return runs.alone(config) | {"ensemble": {"kind": "deep", "members": members}}


def members_bought(results: dict) -> int:
    """Generalists that the examples of generalist and specialists train.

    Two at least, which favours them.
    """
    specialists = sum(row["cost"]["examples_seen"] for row in results["specialists"])
    return max(2, 1 + round(specialists / results["generalist"]["cost"]["examples_seen"]))


def longer(config: dict) -> dict:
    schedule = config["train"]
    twice = {key: 2 * schedule[key] for key in ("steps", "epochs") if key in schedule}
    return deep(config, 1) | {"train": schedule | twice}


def of_width(config: dict, model: dict) -> dict:
    return deep(config, 1) | {"model": config["model"] | model}


# By name, from the config and the results of a seed's run.
FURTHER: dict[str, Callable[[dict, dict], dict]] = {
    "longer": lambda config, results: longer(config),
    "wider": lambda config, results: of_width(config, WIDER),
    "deep": lambda config, results: deep(config, members_bought(results)),
    "tenfold": lambda config, results: of_width(config, TENFOLD),
}


# What was measured


def weighted_gains(results: dict) -> dict[int, float]:
    """By group, its specialist's gain as a fraction of all test examples: the forecast's unit.

    A gain is of the test examples of the group's classes, predictions restricted to them.
    """
    n = results["generalist"]["n"]
    return {row["index"]: row.get("gain", 0.0) * row["n"] / n for row in results["specialists"]}


def rank_correlations(forecast: list[dict], results: dict) -> tuple[float, float]:
    """Spearman's, over the groups, between the forecast on val and the gain on test.

    In fractions of all examples, and in fractions of the examples of the group's classes.
    """
    gains = weighted_gains(results)
    inside = {row["index"]: row.get("gain", 0.0) for row in results["specialists"]}
    own = [forecast[m]["errors_inside"] / max(1, forecast[m]["examples"]) for m in inside]
    whole = spearman([forecast[m]["gain"] for m in gains], list(gains.values()))
    return whole, spearman(own, list(inside.values()))


def spearman(first: list[float], second: list[float]) -> float:
    correlation, _ = spearmanr(first, second)
    return float(correlation)  # pyright: ignore[reportArgumentType] - scipy's stub says a tuple


def reached(results: dict) -> float:
    """The fraction of the ceiling that the ensemble reaches.

    Errors fewer than the generalist's, over those of its errors whose two classes share a group,
    which perfect specialists would fix.  A gate of 1 asks no other specialists.
    """
    return fewer_errors(results["ensemble"], results) / results["clusters"]["captured_confusion"]


def of_seed(to: Path, data: Path, seed: int, results: dict, further: dict[str, dict]) -> dict:
    """Everything that tables and verdicts need of one seed."""
    run = to / f"seed-{seed}"
    forecast = read_json(run / "clusters" / "summary.json")["forecast"]
    whole, own = rank_correlations(forecast, results)
    one = {
        "seed": seed,
        "main": results,
        **further,
        "unseen": runs.kept_metrics(run, results, data / "unseen", "test"),
        "whole": whole,
        "own": own,
        "seconds": lab.seconds(run),
    }
    if "tenfold" in further:
        one["still_wrong"] = runs.still_wrong(run, to / f"seed-{seed}-tenfold")
    return one


def of_all(to: Path, data: Path, results: dict[int, dict]) -> dict[int, list[dict]]:
    """{members: rows of generalists_together}: of each seed's with the next one's, and of all.

    Kept beside the runs. Empty of one seed.
    """
    seeds = list(results)

    def together(some: list[int]) -> dict:
        file = to / f"generalists-{'-'.join(map(str, some))}.json"
        rows = [results[seed]["generalist"] for seed in some]
        of = [rows, read_json(data / "seen" / "manifest.json")]
        paths = [to / f"seed-{seed}" for seed in some]
        return runs.kept(file, of, lambda: runs.generalists_together(paths, data / "seen"))

    sets: dict[int, list[list[int]]] = {}
    if len(seeds) > 1:
        nexts = seeds[1:] + seeds[:1]
        sets[2] = [[one, following] for one, following in zip(seeds, nexts, strict=True)]
    if len(seeds) > 2:
        sets[len(seeds)] = [seeds]
    return {count: [together(some)["together"] for some in each] for count, each in sets.items()}


# Tables


def students_in(results: dict) -> dict[str, str]:
    """Those of STUDENTS that the run has: none with --no-students."""
    return {name: size for name, size in STUDENTS.items() if name in results["students"]}


def rows_of(one: dict) -> dict[str, dict]:
    """One seed's rows, as results.json has them, under the names of the table."""
    main = one["main"]
    rows = {"generalist": main["generalist"]}
    rows |= {name: main["controls"][name] for name in ("control_wall", "control_compute")}
    rows |= {name: one[run][row] for name, (run, row) in FURTHER_ROWS.items() if run in one}
    rows[ENSEMBLE] = main["ensemble"]
    for name, size in students_in(main).items():
        rows[f"student, {size}"] = main["students"][name]
        rows[f"{size}, labels alone"] = main["students"][name + HARD]
    return rows


def networks_of(to: Path, one: dict) -> dict[str, tuple[float, float]]:
    """(parameters, multiplications an image) of each row."""
    run = to / f"seed-{one['seed']}"
    parameters, multiplications = sizes(run / "generalist")
    networks: dict[str, tuple[float, float]] = {}
    for name in rows_of(one):
        networks[name] = parameters, multiplications
    for name, end in (("wider generalist", "wider"), ("ten times the parameters", "tenfold")):
        if end in one:
            networks[name] = sizes(run.with_name(f"{run.name}-{end}") / "generalist")
    if "deep" in one:
        members = len(one["deep"]["sizes"])
        networks["deep ensemble"] = members * parameters, members * multiplications
    count = 1 + len(one["main"]["specialists"])
    running = 1 + specialists_asked(one["main"])
    networks[ENSEMBLE] = count * parameters, running * multiplications
    for name, size in students_in(one["main"]).items():
        of_student = sizes(run / "students" / name)
        networks[f"student, {size}"] = networks[f"{size}, labels alone"] = of_student
    return networks


def main_table(by_seed: list[dict], networks: Networks) -> str:
    """by_seed: of_seed of each seed."""
    lines = []
    for name in rows_of(by_seed[0]):
        own = [rows_of(one)[name] for one in by_seed]
        fewer = [fewer_errors(row, one["main"]) for row, one in zip(own, by_seed, strict=True)]
        parameters, multiplications = networks[name]
        examples = mean(row["cost"]["examples_seen"] for row in own)
        minutes = mean(row["cost"]["seconds"] for row in own) / 60
        lines.append(
            [
                name,
                lab.spread([100 * row["top1"] for row in own], 2),
                lab.spread([row["nll"] for row in own], 4),
                percents(fewer, 1) if name != "generalist" else "",
                lab.spread([row["cnll"] for row in own], 4),
                f"{parameters:,.0f}",
                f"{multiplications / 1e3:,.0f} k",
                f"{examples / 1e6:.1f} M, {minutes:.1f} min",
            ]
        )
    header = [
        "",
        "top-1, %",
        "NLL",
        "errors fewer than the generalist's",
        "calibrated NLL",
        "parameters",
        "multiplications an image",
        "training in all",
    ]
    return lab.table(header, lines)


def seeds_table(by_seed: list[dict]) -> str:
    """Of each seed: the ceiling, the unseen fonts, the forecast."""
    header = [
        "seed",
        "errors that perfect specialists would heal (chance)",
        "share of them healed, net",
        "errors that ten times the parameters make too",
        "unseen fonts: top-1, %",
        "NLL",
        "forecast against gain, Spearman: shares of all",
        "shares of the group's own",
    ]
    return lab.table(header, [seed_line(one) for one in by_seed])


def seed_line(one: dict) -> list:
    groups = one["main"]["clusters"]
    unseen = [one["unseen"][name] for name in ("generalist", "ensemble")]
    wrong_too = "not measured"
    if "still_wrong" in one:
        wrong_too = f"{one['still_wrong']:.1%}"
    return [
        one["seed"],
        f"{groups['captured_confusion']:.3f} ({groups['chance']:.3f})",
        f"{reached(one['main']):.1%}",
        wrong_too,
        " → ".join(f"{100 * row['top1']:.2f}" for row in unseen),
        " → ".join(f"{row['nll']:.4f}" for row in unseen),
        f"{one['whole']:.2f}",
        f"{one['own']:.2f}",
    ]


# Verdicts


class Verdict(NamedTuple):
    """holds: None is no bar, a metric that stands beside."""

    claim: str
    holds: bool | None
    metrics: str

    def __str__(self) -> str:
        word = {None: "–", True: "yes", False: "**no**"}[self.holds]
        return f"* {word}: {self.claim}: {self.metrics}."


def lead_over(by_seed: list[dict], row: str, rival: str) -> list[float]:
    """Of each seed the fraction of the rival's errors that the row does not make."""
    pairs = [(rows_of(one)[row], rows_of(one)[rival]) for one in by_seed]
    return [fewer_than(own, other) for own, other in pairs]


def fewer_than(row: dict, rival: dict) -> float:
    return 1 - lab.errors(row) / max(1, lab.errors(rival))


def verdicts(
    by_seed: list[dict], networks: Networks, together: dict[int, list[dict]] | None = None
) -> list[Verdict]:
    """The bars, each a mean over the seeds, and what specialists lose against.

    together: of_all.
    """
    lines = []
    if "longer" in by_seed[0]:
        converged = lead_over(by_seed, "twice the examples", "generalist")
        claim = "doubling the generalist's examples removes less than 10 % of its errors"
        lines.append(Verdict(claim, mean(converged) < 0.1, percents(converged, 1)))
    lines += ensemble_verdicts(by_seed)
    for name in students_in(by_seed[0]["main"]):
        lines += student_verdicts(by_seed, name, networks)
    lines += forecast_verdicts(by_seed)
    return lines + rival_verdicts(by_seed, together or {})


def ensemble_verdicts(by_seed: list[dict]) -> list[Verdict]:
    """Against generalist and controls, and on unseen fonts."""
    fewer, wall, compute = (
        lead_over(by_seed, ENSEMBLE, rival)
        for rival in ("generalist", "control_wall", "control_compute")
    )
    lower = [nll_lead(one["main"]) for one in by_seed]
    fonts = [fewer_than(one["unseen"]["ensemble"], one["unseen"]["generalist"]) for one in by_seed]
    fonts_nll = [nll_lead(one["unseen"]) for one in by_seed]
    return [
        Verdict(
            "the ensemble removes at least 30 % of the generalist's errors",
            mean(fewer) >= 0.3,
            percents(fewer, 1),
        ),
        Verdict("it lowers NLL", mean(lower) > 0, f"by {listed(lower, '.4f')}"),
        Verdict(
            "it makes at least 20 % fewer errors than control_wall",
            mean(wall) >= 0.2,
            percents(wall, 1),
        ),
        Verdict(
            "it makes fewer errors than control_compute", mean(compute) > 0, percents(compute, 1)
        ),
        Verdict(
            "on unseen fonts it makes no more errors than the generalist",
            mean(fonts) >= 0,
            f"fewer by {percents(fonts, 1)}",
        ),
        Verdict(
            "on unseen fonts its NLL is no higher",
            mean(fonts_nll) >= 0,
            f"lower by {listed(fonts_nll, '.4f')}",
        ),
    ]


def nll_lead(rows: dict) -> float:
    return rows["generalist"]["nll"] - rows["ensemble"]["nll"]


def forecast_verdicts(by_seed: list[dict]) -> list[Verdict]:
    whole = [one["whole"] for one in by_seed]
    hours = sum(one["seconds"] for one in by_seed) / 3600
    return [
        Verdict(
            "the forecast ranks the groups by gain, Spearman at least .6",
            mean(whole) >= 0.6,
            f"{mean(whole):.2f} ({listed(whole, '.2f')})",
        ),
        Verdict(
            "these runs take at most 3 hours on 2 cores",
            hours / 2 <= 3,
            f"{hours:.1f} core-hours in stages, half of that where both cores are busy",
        ),
    ]


def student_verdicts(by_seed: list[dict], name: str, networks: Networks) -> list[Verdict]:
    """70 % of the gain, and fewer errors than the twin.

    Of two times the generalist's parameters at most, of all images or of few. Of its own size the
    same metrics without a bar.
    """
    size, is_bar = STUDENTS[name], name != "same"
    times = networks[f"student, {size}"][0] / networks["generalist"][0]
    of_few = ", of few images," if name == "few" else ""
    gains = [lab.share_of_gain(one["main"]["students"][name], one["main"]) for one in by_seed]
    known = [gain for gain in gains if gain is not None]
    enough = len(known) == len(gains) and mean(known) >= 0.7 and times <= 2
    lead = lead_over(by_seed, f"student, {size}", f"{size}, labels alone")
    return [
        Verdict(
            f"the student of {times:.2f} times the generalist's parameters{of_few} keeps at least "
            "70 % of the gain",
            enough if is_bar else None,
            percents(gains),
        ),
        Verdict(
            f"the student of {times:.2f} times{of_few} makes fewer errors than its twin on labels "
            "alone",
            mean(lead) > 0 if is_bar else None,
            percents(lead, 1),
        ),
    ]


def rival_verdicts(by_seed: list[dict], together: dict[int, list[dict]]) -> list[Verdict]:
    """Without a bar: what specialists lose against.  together: of_all."""
    rivals = {}
    for name in RIVALS:
        if name in rows_of(by_seed[0]):
            rivals[name] = [rows_of(one)[name] for one in by_seed]
    for count, rows in together.items():
        each = rows if len(rows) > 1 else rows * len(by_seed)
        rivals[f"the generalists of {count} seeds averaged"] = each
    lines = []
    for name, rows in rivals.items():
        pairs = zip(by_seed, rows, strict=True)
        lead = [fewer_than(one["main"]["ensemble"], row) for one, row in pairs]
        top1, nll = (mean(row[key] for row in rows) for key in ("top1", "nll"))
        lines.append(
            Verdict(
                f"(no bar) the ensemble makes fewer errors than: {name}",
                mean(lead) > 0,
                f"{percents(lead, 1)}, theirs: top-1 {100 * top1:.2f} %, NLL {nll:.4f}",
            )
        )
    return lines


# The program


def parse(words: list[str] | None) -> argparse.Namespace:
    options = runs.parser(__doc__)
    options.add_argument(
        "--further", nargs="*", choices=FURTHER, default=["longer", "wider", "deep"]
    )
    options.add_argument(
        "--no-students", action="store_true", help="leave out students: a third of the time"
    )
    return runs.parsed(options, words)


def run_all(given: argparse.Namespace, data: Path) -> tuple[dict[int, dict], list[dict]]:
    """results.json of each seed's run, and of_seed of each."""
    configs = {}
    for seed in given.seeds:
        configs[seed] = runs.config_of(data, seed, [*runs.FASTER, *given.set])
        if given.no_students:
            configs[seed]["students"] = {}
    results = runs.main_runs(given, configs)

    def task(seed: int, name: str) -> Callable[[], dict]:
        run = given.to / f"seed-{seed}"
        path = run.with_name(f"{run.name}-{name}")
        config = FURTHER[name](configs[seed], results[seed])
        return lambda: runs.copied(config, path, run, given.quick)

    pairs = [(seed, name) for name in given.further for seed in given.seeds]
    further = runs.all_of({pair: task(*pair) for pair in pairs}, given.jobs)
    by_seed = []
    for seed in given.seeds:
        own = {name: further[seed, name] for name in given.further}
        by_seed.append(of_seed(given.to, data, seed, results[seed], own))
    return results, by_seed


def footnote(given: argparse.Namespace, by_seed: list[dict], command: str) -> str:
    """What the metrics are of, and what they took."""
    minutes = sum(one["seconds"] for one in by_seed) / 60
    further = [given.to / f"seed-{one['seed']}-{name}" for one in by_seed for name in given.further]
    more = sum(map(runs.own_seconds, further)) / 60
    seen, unseen = by_seed[0]["main"]["generalist"]["n"], by_seed[0]["unseen"]["generalist"]["n"]
    names = ", ".join(given.further) or "no others"
    return (
        f"n = {seen:,} test images, {unseen:,} of unseen fonts. "
        f"{lab.conditions(given.seeds, command)} {minutes:.0f} core-minutes for these runs, "
        f"{more:.0f} for {names}."
    )


def main(words: list[str] | None = None) -> None:
    given = parse(words)
    command = lab.command_line("benchmarks.characters.headline", words)
    data = runs.drawn(given)
    results, by_seed = run_all(given, data)
    networks = networks_of(given.to, by_seed[0])
    judged = list(map(str, verdicts(by_seed, networks, of_all(given.to, data, results))))
    text = "\n\n".join([main_table(by_seed, networks), seeds_table(by_seed), "\n".join(judged)])
    print(text)
    if given.write:
        title = f"Specialists on {given.classes:,} characters"
        lab.write_section(title, f"{text}\n\n{footnote(given, by_seed, command)}", runs.PAGE)
    rows = {one["seed"]: rows_of(one) for one in by_seed}
    measured = {"classes": given.classes, "rows": rows, "networks": networks, "verdicts": judged}
    lab.print_json(measured, given, command)


if __name__ == "__main__":
    main()
