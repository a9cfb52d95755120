"""Specialists on 3,755 characters: the ensemble, its controls and rivals, its students, and how each bar is met.

    python -m benchmarks.characters.headline --to runs/characters [--seeds 0 1 2] [--jobs 2] [--write] [--quick]

Of each seed one run (headline.toml): generalist, specialists, control_wall, control_compute, students of one and two
times the generalist's parameters, and one of two times that sees few of the images, each beside a twin that learns the
labels of the same images alone.  Beside it further runs, which are copies of that one as far as they agree with it:

    longer   the generalist from scratch, the same weights at the start, for twice the examples: is it converged?
    wider    a generalist that spends as many multiplications on an image as the ensemble does (WIDER); one of the
             ensemble's 25 times the parameters would take a day, see tenfold
    deep     as many generalists as the specialists' examples buy, two at least, averaged (beside it stand, at no
             training of their own, means of the seeds' generalists)
    tenfold  a generalist of ten times the parameters, only where --further names it: which errors does nobody heal?

Data are rendered once for all seeds (benchmarks.characters.data, two minutes); DATA/unseen has the fonts that nobody
has seen.  What is done is not done again.  --sixth is the same trial on the first sixth of the classes with short
lessons: what questions and later are asked of; --both-levels is the headline's on 6,763 classes.  --quick goes through
all of it on 120 classes, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

from benchmarks.papers.lab import (
    arguments,
    conditions,
    finished,
    seconds,
    shards,
    spread,
    table,
    write_section,
)
from benchmarks.papers.specialists import fewer_errors, listed, percents, sizes, specialists_asked
from pipeline.config import Data, load_config
from pipeline.graph import RunDirectory
from pipeline.results import errors, share_of_gain
from pipeline.store import read_json, write_json

from . import data as drawings

CONFIG = Path(__file__).with_name("headline.toml")
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
HARD = "_hard"  # ends the twin's name
TAKEN = "taken.json"  # in a copy of a run: the stages that it took over
ROWS = (
    "generalist",
    "control_wall",
    "control_compute",
    "ensemble",
)  # of named_rows, where no students are asked about
RIVALS = (
    "wider generalist",
    "deep ensemble",
    "ten times the parameters",
)  # rows of the headline's table
STUDENTS = {
    "same": "1 x",
    "double": "2 x",
    "few": "2 x, few images",
}  # of the generalist's parameters
WIDER = {"width": 8, "embedding": 16}  # 234 k multiplications an image, as three networks of 78 k
TENFOLD = {"width": 16, "embedding": 72}  # 371 k parameters
SIXTH_CLASSES = 626
SIXTH = [  # the generalist was looked at on val of seed 100
    "model.embedding=6",
    "train.steps=4000",
    "train.validate_every=2000",
    "clusters.num_groups=12",
    "specialists.steps=170",
    "specialists.validate_every=85",
]
FASTER = ["engine.shard_head=true"]  # no logits held: students are 1.6 times as fast
QUICK_CLASSES = 120
QUICK = [
    "train.steps=150",
    "train.validate_every=0",
    "clusters.num_groups=4",
    "specialists.steps=30",
    "specialists.validate_every=0",
    "controls.learning_rates=[3e-3]",
    *(f"students.{name}{end}.steps=60" for name in STUDENTS for end in ("", HARD)),
]


# The runs


def parser(description: str) -> argparse.ArgumentParser:
    found = arguments(description, page=PAGE)
    found.set_defaults(to=Path("runs/characters"))
    found.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="runs side by side (all cores)",
    )
    size = found.add_mutually_exclusive_group()
    size.add_argument(
        "--sixth", action="store_true", help=f"{SIXTH_CLASSES:,} classes, below TO/sixth"
    )
    size.add_argument(
        "--both-levels",
        action="store_true",
        help=f"{drawings.BOTH_LEVELS:,} classes, below TO/both",
    )
    size.add_argument(
        "--quick", action="store_true", help="120 classes, few steps: a rehearsal, below TO/quick"
    )
    return found


def parsed(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """The arguments and the number of `classes`.  --sixth, --both-levels and --quick name another place; --sixth and
    --quick shorter lessons, too."""
    given = parser.parse_args(words)
    if given.quick and given.write:
        parser.error("--quick's figures mean nothing: leave out --write")
    given.classes = drawings.LEVEL_ONE
    if given.quick:
        given.to, given.set, given.classes = given.to / "quick", [*QUICK, *given.set], QUICK_CLASSES
    if given.both_levels:
        given.to, given.classes = given.to / "both", drawings.BOTH_LEVELS
    if given.sixth:
        given.to, given.set, given.classes = given.to / "sixth", [*SIXTH, *given.set], SIXTH_CLASSES
    given.to.mkdir(parents=True, exist_ok=True)
    return given


def drawn(to: Path, count: int) -> Path:
    """The directory of the shards of `count` classes, seen/ and unseen/; unseen/ is written last."""
    return shards(to / "data" / "unseen", lambda place: drawings.make(place.parent, count)).parent


def config_of(data: Path, seed: int, settings: list[str] = ()) -> dict:
    """headline.toml with data, seed, twins and `settings`, every default filled in."""
    config = tomllib.loads(CONFIG.read_text(encoding="utf-8")) | {"seed": seed}
    config = reading(config, data / "seen")
    config["students"] |= {
        name + HARD: config["students"][name] | {"method": "hard"} for name in STUDENTS
    }
    return load_config(None, settings, config).dump()


def reading(config: dict, place: Path) -> dict:
    """The config on the shards in `place`."""
    return config | {"data": config["data"] | dict.fromkeys(("train", "val", "test"), str(place))}


def alone(config: dict) -> dict:
    """The config without students and controls."""
    return config | {"students": {}, "controls": config.get("controls", {}) | {"enabled": False}}


def deep(config: dict, members: int) -> dict:
    """The same generalist among others from other seeds, and nothing else."""
    return alone(config) | {"ensemble": {"kind": "deep", "members": members}}


def members_bought(results: dict) -> int:
    """Generalists that the examples of generalist and specialists train; two at least, which favours them."""
    specialists = sum(row["cost"]["examples_seen"] for row in results["specialists"])
    return max(2, 1 + round(specialists / results["generalist"]["cost"]["examples_seen"]))


def longer(config: dict) -> dict:
    lesson = config["train"]
    return deep(config, 1) | {
        "train": lesson | {key: 2 * lesson[key] for key in ("steps", "epochs") if key in lesson}
    }


def of_width(config: dict, model: dict) -> dict:
    return deep(config, 1) | {"model": config["model"] | model}


# By name, from the config and the results of a seed's run.
FURTHER: dict[str, Callable[[dict, dict], dict]] = {
    "longer": lambda config, results: longer(config),
    "wider": lambda config, results: of_width(config, WIDER),
    "deep": lambda config, results: deep(config, members_bought(results)),
    "tenfold": lambda config, results: of_width(config, TENFOLD),
}


def begin(place: Path, config: dict, run: Path) -> None:
    """Where there is no `place` yet, make it a copy of the finished `run` as far as `config` agrees: the stages that
    both have, and the decoded inputs, as hard links, so that what is the same is neither done nor stored again."""
    if place.exists():
        return
    unfinished = place.with_name(f".{place.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    wanted = {
        stage.place: stage.key
        for stage in RunDirectory(place, load_config(None, [], config)).stages
    }
    taken = [
        stage
        for stage in RunDirectory(run, load_config(run / "config.toml")).stages
        if stage.is_done and wanted.get(stage.place) == stage.key
    ]
    for stage in taken:
        link(stage.directory, unfinished / stage.place, below=("attempts",))
    write_json(unfinished / TAKEN, [stage.place for stage in taken])
    if (run / "cache").is_dir():
        link(run / "cache", unfinished / "cache")
    shutil.copy(
        run / "config.toml", unfinished
    )  # what makes it a run; `referral run` writes its own
    unfinished.rename(place)


def link(source: Path, target: Path, below: tuple[str, ...] = ()) -> None:
    """Hard links of the files in `source`; of its directories those named `below` alone.  Symbolic links stay so."""

    def left_out(directory: str, names: list[str]) -> list[str]:
        here = Path(directory)
        if here != source:
            return []
        return [
            name
            for name in names
            if (here / name).is_dir() and not (here / name).is_symlink() and name not in below
        ]

    shutil.copytree(
        source, target, symlinks=True, copy_function=os.link, ignore=left_out, dirs_exist_ok=True
    )


def copied(config: dict, place: Path, run: Path) -> dict:
    """results.json of the run of `config` at `place`, which takes over from `run` what both have."""
    begin(place, config, run)
    return finished(config, place)


def all_of(tasks: dict, jobs: int) -> dict:
    """{key: what the task returned}, `jobs` of them side by side."""
    with ThreadPoolExecutor(jobs) as pool:
        found = {key: pool.submit(task) for key, task in tasks.items()}
        return {key: future.result() for key, future in found.items()}


def main_runs(to: Path, configs: dict[int, dict], jobs: int) -> dict[int, dict]:
    """results.json of each seed's run, to / "seed-SEED"."""
    return all_of(
        {seed: lambda seed=seed: finished(configs[seed], to / f"seed-{seed}") for seed in configs},
        jobs,
    )


# What results.json does not say


def kept_figures(
    run: Path, results: dict, place: Path, split: str, most: int | None = None
) -> dict[str, dict]:
    """figures_on, kept beside the run; measured anew where the run or the shards in `place` are others."""
    of = [results["generalist"], results["ensemble"], read_json(place / "manifest.json"), most]
    file = run.with_name(f"{run.name}-{place.name}-{split}.json")
    return kept(file, of, lambda: figures_on(run, place, split, most))


def kept(file: Path, of: list, measure: Callable[[], dict]) -> dict:
    """What `measure` found, kept in `file` with what it is `of`; measured anew where that has changed."""
    if not file.exists() or read_json(file)["of"] != of:
        write_json(file, {"of": of, "rows": measure()})
    return read_json(file)["rows"]


def figures_on(
    run: Path, place: Path, split: str = "test", most: int | None = None
) -> dict[str, dict]:
    """{"generalist": {"n", "top1", "nll"}, "ensemble": ...} of a run on a split in `place`, or on `most` of its
    examples, evenly over it."""
    from ensemble import SpecialistEnsemble

    ensemble = SpecialistEnsemble.load(run)
    answers = {
        "generalist": lambda inputs: ensemble.generalist(inputs).float().softmax(1),
        "ensemble": ensemble.probabilities,
    }
    return figures_of(answers, ensemble.class_names, place, split, most)


def generalists_together(runs: list[Path], place: Path) -> dict[str, dict]:
    """figures_on test of the plain mean of the generalists' probabilities, as "together": a deep ensemble
    (Lakshminarayanan et al. 2017) whose members are those runs' generalists."""
    from networks import load_classifier

    members = [load_classifier(run / "generalist").eval() for run in runs]
    names = read_json(runs[0] / "generalist" / "model.json")["class_names"]
    return figures_of(
        {
            "together": lambda inputs: (
                sum(member(inputs).float().softmax(1) for member in members) / len(members)
            )
        },
        names,
        place,
        "test",
    )


def figures_of(
    answers: dict[str, Callable], names: list[str], place: Path, split: str, most: int | None = None
) -> dict[str, dict]:
    """{name: {"n", "top1", "nll"}} of answers, each from raw inputs to probabilities [B, C] over `names`."""
    import torch

    from trainer.data import MeasuringStream, open_shards

    torch.set_num_threads(1)
    opened = open_shards(str(place), Data(), split)
    if opened.class_names != names:
        raise SystemExit(f"{place} has other classes than the run")
    n = len(opened) if most is None else min(most, len(opened))
    ids = np.linspace(0, len(opened) - 1, n).astype(np.int64)
    right, losses = dict.fromkeys(answers, 0), dict.fromkeys(answers, 0.0)
    with torch.inference_mode():
        for batch in MeasuringStream(opened, 512, ids).loader():
            for name, answer in answers.items():
                p = answer(batch.inputs)
                right[name] += int((p.argmax(1) == batch.labels).sum())
                of_label = p.gather(1, batch.labels[:, None]).double().clamp_min(1e-30)
                losses[name] -= float(of_label.log().sum())
    return {name: {"n": n, "top1": right[name] / n, "nll": losses[name] / n} for name in answers}


def on_test(run: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(labels [n], whether the answer is right [n]) of a row of results.json, a student by its own name."""
    with np.load(run / "evaluation" / f"{name}.npz", allow_pickle=False) as found:
        return found["labels"], found["top5"][:, 0] == found["labels"]


def still_wrong(run: Path, other: Path) -> float:
    """The share of the errors of run's generalist on test that other's generalist makes too."""
    first, second = (~on_test(place, "generalist")[1] for place in (run, other))
    return float(second[first].mean())


def healed(results: dict) -> dict[int, float]:
    """By group, what its specialist gained on the test examples of its classes, predictions restricted to them, as a
    share of all test examples: the unit of the forecast."""
    return {
        row["index"]: row.get("gain", 0.0) * row["n"] / results["generalist"]["n"]
        for row in results["specialists"]
    }


def rank_correlations(forecast: list[dict], results: dict) -> tuple[float, float]:
    """Spearman's, over the groups, between what was foretold on val and what was gained on test: in shares of all
    examples, and in shares of the examples of the group's classes."""
    from scipy.stats import spearmanr

    gained = healed(results)
    inside = {row["index"]: row.get("gain", 0.0) for row in results["specialists"]}
    whole = spearmanr([forecast[m]["gain"] for m in gained], list(gained.values()))
    own = [forecast[m]["errors_inside"] / max(1, forecast[m]["examples"]) for m in inside]
    return float(whole.statistic), float(spearmanr(own, list(inside.values())).statistic)


def reached(results: dict) -> float:
    """The share of the ceiling that the ensemble reaches: errors fewer than the generalist's, over those of its errors
    whose two classes share a group, which perfect specialists would heal.  A gate of 1 asks no other specialists."""
    return fewer_errors(results["ensemble"], results) / results["clusters"]["captured_confusion"]


def of_seed(to: Path, data: Path, seed: int, results: dict, further: dict[str, dict]) -> dict:
    """Everything that tables and verdicts need of one seed."""
    run = to / f"seed-{seed}"
    found = {
        "seed": seed,
        "main": results,
        **further,
        "unseen": kept_figures(run, results, data / "unseen", "test"),
    }
    forecast = read_json(run / "clusters" / "summary.json")["forecast"]
    found["whole"], found["own"] = rank_correlations(forecast, results)
    found["seconds"] = seconds(run)
    if "tenfold" in further:
        found["still_wrong"] = still_wrong(run, to / f"seed-{seed}-tenfold")
    return found


def of_all(to: Path, data: Path, results: dict[int, dict]) -> dict[int, list[dict]]:
    """{members: figures of generalists_together}: of each seed's with the next one's, and of all of them.  Kept beside
    the runs; empty of one seed."""
    seeds = list(results)

    def together(some: list[int]) -> dict:
        file = to / f"generalists-{'-'.join(map(str, some))}.json"
        of = [
            [results[seed]["generalist"] for seed in some],
            read_json(data / "seen" / "manifest.json"),
        ]
        return kept(
            file,
            of,
            lambda: generalists_together([to / f"seed-{seed}" for seed in some], data / "seen"),
        )

    sets = {
        2: [[a, b] for a, b in zip(seeds, seeds[1:] + seeds[:1], strict=True)]
        if len(seeds) > 1
        else []
    }
    sets |= {len(seeds): [seeds]} if len(seeds) > 2 else {}
    return {
        count: [together(some)["together"] for some in each] for count, each in sets.items() if each
    }


# Tables


def students_in(results: dict) -> dict[str, str]:
    """Those of STUDENTS that the run has: none with --no-students."""
    return {name: size for name, size in STUDENTS.items() if name in results["students"]}


def rows_of(one: dict) -> dict[str, dict]:
    """One seed's rows, as results.json has them, under the names of the table."""
    main, further = (
        one["main"],
        {
            "twice the examples": ("longer", "generalist"),
            "wider generalist": ("wider", "generalist"),
            "deep ensemble": ("deep", "ensemble"),
            "ten times the parameters": ("tenfold", "generalist"),
        },
    )
    rows = {"generalist": main["generalist"]}
    rows |= {name: main["controls"][name] for name in ("control_wall", "control_compute")}
    rows |= {name: one[run][row] for name, (run, row) in further.items() if run in one}
    rows["**ensemble**"] = main["ensemble"]
    for name, size in students_in(main).items():
        rows[f"student, {size}"] = main["students"][name]
        rows[f"{size}, labels alone"] = main["students"][name + HARD]
    return rows


def networks_of(to: Path, one: dict) -> dict[str, tuple[float, float]]:
    """(parameters, multiplications an image) of each row."""
    run = to / f"seed-{one['seed']}"
    single = sizes(run / "generalist")
    found = dict.fromkeys(rows_of(one), single)
    for name, end in (("wider generalist", "wider"), ("ten times the parameters", "tenfold")):
        if end in one:
            found[name] = sizes(run.with_name(f"{run.name}-{end}") / "generalist")
    if "deep" in one:
        found["deep ensemble"] = tuple(len(one["deep"]["sizes"]) * each for each in single)
    asked, count = specialists_asked(one["main"]), len(one["main"]["specialists"])
    found["**ensemble**"] = ((1 + count) * single[0], (1 + asked) * single[1])
    for name, size in students_in(one["main"]).items():
        found[f"student, {size}"] = found[f"{size}, labels alone"] = sizes(run / "students" / name)
    return found


def main_table(found: list[dict], networks: dict[str, tuple[float, float]]) -> str:
    rows = []
    for name in rows_of(found[0]):
        own = [rows_of(one)[name] for one in found]
        fewer = [fewer_errors(row, one["main"]) for row, one in zip(own, found, strict=True)]
        parameters, multiplications = networks[name]
        cost = {key: mean(row["cost"][key] for row in own) for key in ("examples_seen", "seconds")}
        rows.append(
            [
                name,
                spread([100 * row["top1"] for row in own], 2),
                spread([row["nll"] for row in own], 4),
                "" if name == "generalist" else percents(fewer, 1),
                spread([row["cnll"] for row in own], 4),
                f"{parameters:,.0f}",
                f"{multiplications / 1e3:,.0f} k",
                f"{cost['examples_seen'] / 1e6:.1f} M, {cost['seconds'] / 60:.1f} min",
            ]
        )
    return table(
        [
            "",
            "top-1, %",
            "NLL",
            "errors fewer than the generalist's",
            "calibrated NLL",
            "parameters",
            "multiplications an image",
            "training in all",
        ],
        rows,
    )


def seeds_table(found: list[dict]) -> str:
    """Of each seed: the ceiling, the unseen fonts, the forecast."""
    rows = []
    for one in found:
        groups, after = one["main"]["clusters"], one["unseen"]
        rows.append(
            [
                one["seed"],
                f"{groups['captured_confusion']:.3f} ({groups['chance']:.3f})",
                f"{reached(one['main']):.1%}",
                f"{one['still_wrong']:.1%}" if "still_wrong" in one else "not measured",
                " → ".join(
                    f"{100 * after[name]['top1']:.2f}" for name in ("generalist", "ensemble")
                ),
                " → ".join(f"{after[name]['nll']:.4f}" for name in ("generalist", "ensemble")),
                f"{one['whole']:.2f}",
                f"{one['own']:.2f}",
            ]
        )
    return table(
        [
            "seed",
            "errors that perfect specialists would heal (chance)",
            "share of them healed, net",
            "errors that ten times the parameters make too",
            "unseen fonts: top-1, %",
            "NLL",
            "forecast against gain, Spearman: shares of all",
            "shares of the group's own",
        ],
        rows,
    )


# Verdicts


class Verdict(NamedTuple):
    claim: str
    holds: bool | None  # None is no bar: a figure that stands beside
    figures: str

    def __str__(self) -> str:
        return f"* {'–' if self.holds is None else 'yes' if self.holds else '**no**'}: {self.claim}: {self.figures}."


def than(found: list[dict], row: str, rival: str) -> list[float]:
    """Of each seed the share of the rival's errors that the row does not make."""
    pairs = [(rows_of(one)[row], rows_of(one)[rival]) for one in found]
    return [1 - errors(own) / errors(other) for own, other in pairs]


def verdicts(
    found: list[dict],
    networks: dict[str, tuple[float, float]],
    together: dict[int, list[dict]] | None = None,
) -> list[Verdict]:
    """The bars of the issue, each a mean over the seeds, and what specialists lose against.

    together: of_all.
    """
    ensemble, results = "**ensemble**", [one["main"] for one in found]
    converged = than(found, "twice the examples", "generalist") if "longer" in found[0] else None
    fewer, wall, compute = (
        than(found, ensemble, rival) for rival in ("generalist", "control_wall", "control_compute")
    )
    lower = [one["generalist"]["nll"] - one["ensemble"]["nll"] for one in results]
    away = [one["unseen"] for one in found]
    fonts = [1 - errors(rows["ensemble"]) / errors(rows["generalist"]) for rows in away]
    fonts_nll = [rows["generalist"]["nll"] - rows["ensemble"]["nll"] for rows in away]
    whole = [one["whole"] for one in found]
    hours = sum(one["seconds"] for one in found) / 3600
    lines = []
    if converged is not None:
        lines.append(
            Verdict(
                "doubling the generalist's examples removes less than 10 % of its errors",
                mean(converged) < 0.1,
                percents(converged, 1),
            )
        )
    lines += [
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
        *(
            line
            for name in students_in(results[0])
            for line in student_verdicts(found, name, networks)
        ),
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
    return lines + rival_verdicts(found, together or {})


def rival_verdicts(found: list[dict], together: dict[int, list[dict]]) -> list[Verdict]:
    """Without a bar: what specialists lose against.  together: of_all."""
    rivals = {
        name: [rows_of(one)[name] for one in found] for name in RIVALS if name in rows_of(found[0])
    }
    for count, theirs in together.items():
        each = theirs if len(theirs) > 1 else theirs * len(found)
        rivals[f"the generalists of {count} seeds averaged"] = each
    lines = []
    for name, theirs in rivals.items():
        lead = [
            1 - errors(one["main"]["ensemble"]) / errors(row)
            for one, row in zip(found, theirs, strict=True)
        ]
        top1, nll = (mean(row[key] for row in theirs) for key in ("top1", "nll"))
        lines.append(
            Verdict(
                f"(no bar) the ensemble makes fewer errors than: {name}",
                mean(lead) > 0,
                f"{percents(lead, 1)}; theirs: top-1 {100 * top1:.2f} %, NLL {nll:.4f}",
            )
        )
    return lines


def student_verdicts(
    found: list[dict], name: str, networks: dict[str, tuple[float, float]]
) -> list[Verdict]:
    """Of two times the generalist's parameters at most, of all images or of few: 70 % of the gain, fewer errors than
    the twin; of its own size the same figures without a bar."""
    size, is_bar = STUDENTS[name], name != "same"
    times = networks[f"student, {size}"][0] / networks["generalist"][0]
    kept = [share_of_gain(one["main"]["students"][name], one["main"]) for one in found]
    lead = than(found, f"student, {size}", f"{size}, labels alone")
    less = ", of few images," if name == "few" else ""
    enough = None not in kept and mean(kept) >= 0.7 and times <= 2
    return [
        Verdict(
            f"the student of {times:.2f} times the generalist's parameters{less} keeps at least 70 % of the gain",
            enough if is_bar else None,
            percents(kept),
        ),
        Verdict(
            f"the student of {times:.2f} times{less} makes fewer errors than its twin on labels alone",
            mean(lead) > 0 if is_bar else None,
            percents(lead, 1),
        ),
    ]


def text_of(
    found: list[dict],
    networks: dict[str, tuple[float, float]],
    together: dict[int, list[dict]] | None = None,
) -> str:
    judged = "\n".join(map(str, verdicts(found, networks, together)))
    return "\n\n".join([main_table(found, networks), seeds_table(found), judged])


def main(words: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument(
        "--further", nargs="*", choices=FURTHER, default=["longer", "wider", "deep"]
    )
    options.add_argument(
        "--no-students", action="store_true", help="leave out students: a third of the time"
    )
    given = parsed(options, words)
    data = drawn(given.to, given.classes)
    configs = {seed: config_of(data, seed, [*FASTER, *given.set]) for seed in given.seeds}
    if given.no_students:
        configs = {seed: config | {"students": {}} for seed, config in configs.items()}
    results = main_runs(given.to, configs, given.jobs)

    def task(seed: int, name: str) -> Callable[[], dict]:
        run = given.to / f"seed-{seed}"
        config = FURTHER[name](configs[seed], results[seed])
        return lambda: copied(config, run.with_name(f"{run.name}-{name}"), run)

    further = all_of(
        {(seed, name): task(seed, name) for name in given.further for seed in given.seeds},
        given.jobs,
    )
    found = [
        of_seed(
            given.to,
            data,
            seed,
            results[seed],
            {name: further[seed, name] for name in given.further},
        )
        for seed in given.seeds
    ]
    text = text_of(found, networks_of(given.to, found[0]), of_all(given.to, data, results))
    print(text)
    if given.write:
        command = shlex.join(
            ["python", "-m", "benchmarks.characters.headline", *(words or sys.argv[1:])]
        )
        title, foot = (
            f"Specialists on {given.classes:,} characters",
            footnote(given, found, command),
        )
        write_section(title, f"{text}\n\n{foot}", PAGE)


def footnote(given: argparse.Namespace, found: list[dict], command: str) -> str:
    """What the figures are of, and what they took."""
    spent = sum(one["seconds"] for one in found)
    more = sum(
        own_seconds(given.to / f"seed-{one['seed']}-{name}")
        for one in found
        for name in given.further
    )
    n = found[0]["main"]["generalist"]["n"], found[0]["unseen"]["generalist"]["n"]
    return (
        f"n = {n[0]:,} test images, {n[1]:,} of unseen fonts. {conditions(given.seeds, command)} {spent / 60:.0f} "
        f"core-minutes for these runs, {more / 60:.0f} for {', '.join(given.further) or 'no others'}."
    )


def own_seconds(run: Path) -> float:
    """What the stages of a run took, but for those that it took over from another."""
    taken = read_json(run / TAKEN) if (run / TAKEN).exists() else []
    return seconds(run) - sum(read_json(run / place / "DONE")["seconds"] for place in taken)


if __name__ == "__main__":
    main()
