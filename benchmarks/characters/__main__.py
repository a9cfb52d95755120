"""Branches on thousands of characters, beside everything that costs no more: the issue's rows.

    python -m benchmarks.characters --classes 3755 [--seed N] [--rows NAME ...] [--to DIR]
    python -m benchmarks.characters --classes 20902   needs Debian's fonts; see `han`
    python -m benchmarks.characters --quick           seconds: 24 made-up characters

Each row is of a run of its own, TO/RUN-SEED, which begins as a copy of what it shares with the run
before. What is done is not done again, and what was interrupted goes on.

    generalist         of headline.toml: an embedding of 8 numbers (20,902 characters: 16)
    control_wall       trained on for as long as one branch
    control_compute    trained on for as many examples as all branches
    train_on           trained on for as long again, from a third of the peak rate
    wider              its embedding as wide as the multiplications of `branches` allow
    wider_parameters   as wide as their parameters allow
    average            two generalists (the second is the next seed's), probabilities
                       averaged
    geometric          the same two, the geometric mean
    shortlist          the second one asked about the likeliest classes alone
    shortlist_4        three further ones asked
    copies             24 copies of the generalist, joined by eq. 5
    copies_other       24 copies of the next seed's, which learn the same groups
    branches           branches of the same groups
    student            the generalist's network, taught by `branches`
    student_hard       its twin on labels alone

average and shortlist have the temperatures and weights that fit val best, as branches have.  The
last line is one JSON object: the rows, and what training the specialists took.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks import rows
from benchmarks.papers import lab
from ensemble import ShortlistEnsemble, SpecialistEnsemble
from networks import load_classifier, multiplications, parameter_count
from networks.branches import Branch
from pipeline.config import load_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json

from . import data, han, runs

HAN = 20_902
# Chosen on val of seed 0: docs/results.md.
BRANCHES = {
    "kind": "branch",
    "model": {"embedding": 64},
    "steps": 340,
    "learning_rate": 6e-3,
    "validate_every": 0,
}
STUDENT = {"steps": 2000, "temperature": 1.0, "soft_weight": 0.5, "hard_weight": 0.5}
SETTINGS: dict[int, list[str]] = {
    data.LEVEL_ONE: [],
    # 384 k multiplications. 48 numbers for 327 classes are 28 k, and one branch is asked.
    HAN: [
        "model.embedding=16",
        "clusters.num_groups=128",
        "specialists.model.embedding=48",
        "specialists.steps=250",
        "ensemble.max_specialists=1",
    ],
}
QUICK_STEPS = 6  # of students


@dataclass(frozen=True)
class Study:
    """One seed's runs, below `to`, all of `config`, headline.toml with the settings."""

    to: Path
    seed: int
    config: dict
    quick: bool

    def path(self, name: str, seed: int | None = None) -> Path:
        return self.to / f"{name}-{self.seed if seed is None else seed}"

    def further(self, count: int) -> range:
        """The next seeds."""
        return range(self.seed + 1, self.seed + 1 + count)

    def finished(self, name: str, config: dict, base: str = "generalist") -> dict:
        """results.json of the run `name`, begun as a copy of the run `base`."""
        return runs.copied(config, self.path(name), self.path(base), self.quick)

    def generalist(self, seed: int | None = None) -> dict:
        """results.json of a seed's generalist alone. Of this seed, if none is given."""
        config = alone(self.config)
        if seed is not None:
            config = config | {"seed": seed}
        return lab.finished(config, self.path("generalist", seed), in_process=self.quick)

    @cached_property
    def branches(self) -> dict:
        self.generalist()
        return self.finished("branches", self.config)

    def branch_cost(self) -> rows.Cost:
        return cost_of_specialists(self.path("branches"))


def alone(config: dict, **sections: dict) -> dict:
    """The generalist by itself, or with other sections of the config."""
    single = {"kind": "deep", "members": 1}
    return runs.alone(config) | {"ensemble": single, "specialists": {}} | sections


# The runs


def copied_specialists(study: Study) -> dict:
    """[specialists] as headline.toml has them."""
    kind = runs.config_of(study.to / "data", study.seed)["specialists"]
    if study.quick:
        kind = kind | {key: study.config["specialists"][key] for key in ("steps", "batch_size")}
    return kind


def copies(study: Study) -> dict:
    config = runs.alone(study.config) | {"specialists": copied_specialists(study)}
    return study.finished("copies", config)


def copies_other(study: Study) -> dict:
    """Copies of the next seed's generalist, asked by this one."""
    study.generalist(study.seed + 1)
    other = str(study.path("generalist", study.seed + 1).resolve())
    specialists = copied_specialists(study) | {"from": other}
    return study.finished("copies_other", runs.alone(study.config) | {"specialists": specialists})


def train_on(study: Study) -> dict:
    schedule = study.config["train"]
    rate = schedule["learning_rate"] / 3
    student = {"method": "hard", "steps": schedule["steps"], "learning_rate": rate}
    return study.finished("train_on", alone(study.config, students={"train_on": student}))


def students(study: Study) -> dict:
    student = STUDENT | ({"steps": QUICK_STEPS} if study.quick else {})
    # Its twin is a control.
    return study.finished("students", study.config | {"students": {"main": student}}, "branches")


def wider_of(study: Study, share: Callable[[rows.Cost], int]) -> int:
    """Numbers of the widest embedding at which a generalist costs no more than the branches.

    Another number costs as much as the last one did.  share: which cost.
    """
    assert study.branches
    classes = len(read_json(study.path("generalist") / "generalist/model.json")["class_names"])
    own = study.config["model"]["embedding"]
    spare = share(study.branch_cost()) - share(generalist_cost(study))
    return own + spare // (classes + features_of(study))


def features_of(study: Study) -> int:
    """What the embedding reads."""
    network = load_classifier(study.path("generalist") / "generalist")
    trunk = [m for m in network.trunk.modules() if isinstance(m, torch.nn.Linear)]
    return trunk[-1].in_features


def wider(study: Study) -> dict:
    return of_embedding(study, "wider", wider_of(study, lambda cost: cost.multiplications))


def wider_parameters(study: Study) -> dict:
    return of_embedding(study, "wider_parameters", wider_of(study, lambda cost: cost.parameters))


def of_embedding(study: Study, name: str, numbers: int) -> dict:
    model = study.config["model"] | {"embedding": numbers}
    return study.finished(name, alone(study.config, model=model))


def opinions(
    name: str, order: float = 0.0, shortlist: int | None = None
) -> Callable[[Study], dict]:
    """A run that asks generalists of the next seeds.

    shortlist: None is chosen on val, 0 has every class.
    """

    def finished(study: Study) -> dict:
        networks = []
        for seed in study.further(OTHERS[name]):
            study.generalist(seed)
            networks.append(str(study.path("generalist", seed).resolve()))
        ensemble = {"kind": "shortlist", "members": 1, "networks": networks, "order": order}
        if shortlist == 0:
            ensemble["shortlist"] = len(names_of(study))
        return study.finished(name, alone(study.config, ensemble=ensemble))

    return finished


OPINIONS = ("average", "geometric", "shortlist", "shortlist_4")
# Generalists of the next seeds that a run takes part of its networks from.
OTHERS = {"average": 1, "geometric": 1, "shortlist": 1, "shortlist_4": 3, "copies_other": 1}
RUNS: dict[str, Callable[[Study], dict]] = {
    "generalist": Study.generalist,
    "branches": lambda study: study.branches,
    "copies": copies,
    "copies_other": copies_other,
    "train_on": train_on,
    "students": students,
    "wider": wider,
    "wider_parameters": wider_parameters,
    "average": opinions("average", order=1.0, shortlist=0),
    "geometric": opinions("geometric", shortlist=0),
    "shortlist": opinions("shortlist"),
    "shortlist_4": opinions("shortlist_4"),
}
# Row -> the run, and its row of results.json.
ROWS: dict[str, tuple[str, str]] = {
    "generalist": ("generalist", "generalist"),
    "control_wall": ("branches", "control_wall"),
    "control_compute": ("branches", "control_compute"),
    "branches": ("branches", "ensemble"),
    "wider": ("wider", "generalist"),
    "average": ("average", "ensemble"),
    "geometric": ("geometric", "ensemble"),
    "shortlist": ("shortlist", "ensemble"),
    "shortlist_4": ("shortlist_4", "ensemble"),
    "copies": ("copies", "ensemble"),
    "copies_other": ("copies_other", "ensemble"),
    "train_on": ("train_on", "student train_on"),
    "student": ("students", "student main"),
    "student_hard": ("students", "student_hard"),
    "wider_parameters": ("wider_parameters", "generalist"),
}


# What they cost


def names_of(study: Study) -> list[str]:
    return read_json(study.path("generalist") / "generalist/model.json")["class_names"]


def generalist_cost(study: Study) -> rows.Cost:
    return rows.cost_of_network(study.path("generalist") / "generalist")


def cost_of_specialists(run: Path) -> rows.Cost:
    """Generalist and specialists. Multiplications are those that test examples ask for."""
    ensemble = SpecialistEnsemble.load(run)
    with np.load(run / "evaluation" / "ensemble.npz", allow_pickle=False) as arrays:
        active = torch.from_numpy(arrays["active"].astype(bool))
    networks = [ensemble.generalist, *(ensemble.specialists[m] for m in ensemble.specialists)]
    return rows.Cost(round(ensemble.multiplications(active)), sum(map(parameter_count, networks)))


def cost_of_opinions(study: Study, name: str, further: int) -> rows.Cost:
    """The generalist, and the trunks and the rows of those that are asked."""
    shortlist = ShortlistEnsemble.load(study.path(name)).shortlist
    total = generalist_cost(study)
    for seed in study.further(further):
        total += rows.cost_of_opinion(study.path("generalist", seed) / "generalist", shortlist)
    return total


def cost_of(study: Study, run: str, name: str) -> rows.Cost:
    if run in OPINIONS:
        return cost_of_opinions(study, run, OTHERS[run])
    if name == "ensemble":
        return cost_of_specialists(study.path(run))
    kind, _, student = name.partition(" ")
    # A control is the generalist, trained on.
    folder = f"students/{student}" if kind == "student" else "generalist"
    return rows.cost_of_network(study.path(run) / folder)


def row(study: Study, name: str) -> dict:
    """The row, with what it needs run first."""
    run, own = ROWS[name]
    results = RUNS[run](study)
    measured = rows.row_of(lab.named_rows(results)[own], cost_of(study, run, own))
    # Networks of other runs cost nothing in this one, and somebody trained them.
    for seed in study.further(OTHERS.get(run, 0)):
        measured["seconds"] += study.generalist(seed)["generalist"]["cost"]["seconds"]
    return measured


# What training costs


def training(study: Study) -> dict:
    """What training the branches took, beside as many copies: seconds where these were trained.

    multiplications: forward, and twice that backward. Kept features ask for no gradient.
    """
    run, results = study.path("branches"), study.branches
    copy = copied_specialists(study)
    examples = len(results["specialists"]) * copy["steps"] * copy["batch_size"]
    of_copies = 3 * generalist_cost(study).multiplications * examples
    measured = {"branches": of_branches(run), "copies": {"multiplications": of_copies}}
    ratio = {"multiplications": measured["branches"]["multiplications"] / of_copies}
    if (study.path("copies") / "results.json").exists():
        summaries = summaries_of(study.path("copies"))
        measured["copies"]["seconds"] = sum(each["seconds"] for each in summaries)
        ratio["seconds"] = measured["branches"]["seconds"] / measured["copies"]["seconds"]
    return measured | {"ratio": ratio}


def of_branches(run: Path) -> dict:
    summaries = summaries_of(run)
    features = read_json(run / "features" / "summary.json")
    ensemble = SpecialistEnsemble.load(run)
    general = ensemble.generalist
    kept = sum(each["samples"] * each["views"] for each in features["splits"].values())
    total = kept * multiplications(general, general.zero_input())
    for m, specialist in ensemble.specialists.items():
        assert isinstance(specialist, Branch) and not list(specialist.blocks.parameters())
        own_logits = len(specialist.classes) * general.linear_head.in_features
        each = 2 * specialist.hidden.weight.numel() + 3 * specialist.correction.weight.numel()
        total += summaries[m]["examples_seen"] * (each + own_logits)
    seconds = sum(each["seconds"] for each in summaries)
    examples = sum(each["examples_seen"] for each in summaries)
    return {
        "multiplications": total,
        "seconds": seconds + features["seconds"],
        "features_seconds": features["seconds"],
        "examples_per_s": round(examples / seconds),
    }


def summaries_of(run: Path) -> list[dict]:
    directory = RunDirectory(run, load_config(run / "config.toml"))
    return [read_json(stage.path("summary.json")) for stage in directory.specialists]


def peak_memory(study: Study, names: list[str]) -> int:
    """Bytes of the process that took most of them."""
    places = {study.path(ROWS[name][0]) for name in names}
    found = [path for place in places for path in place.rglob("summary.json")]
    return max(read_json(path).get("peak_memory_bytes") or 0 for path in found)


# The program


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, choices=sorted(SETTINGS), default=data.LEVEL_ONE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--to", type=Path, help="(runs/characters-CLASSES)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="made-up characters, below TO/quick")
    options = parser.parse_args(words)
    options.to = options.to or Path(f"runs/characters-{options.classes}")
    if options.quick:
        options.to, options.set = options.to / "quick", [*runs.QUICK_NETWORKS, *options.set]
        options.classes = data.QUICK_CLASSES
        shutil.rmtree(options.to, ignore_errors=True)
    options.to.mkdir(parents=True, exist_ok=True)
    return options


def drawn(to: Path, classes: int) -> Path:
    """The directory of the shards, which are written unless they are there."""
    make: dict[int, Callable[[Path], object]] = {
        data.QUICK_CLASSES: lambda path: data.make_quick(path.parent),
        data.LEVEL_ONE: lambda path: data.make(path.parent, data.LEVEL_ONE),
        HAN: han.make,
    }
    return lab.shards(to / "data" / "seen", make[classes]).parent


def study_of(options: argparse.Namespace) -> Study:
    shards = drawn(options.to, options.classes)
    settings = [*runs.FASTER, *SETTINGS.get(options.classes, [])]
    config = runs.config_of(shards, options.seed)
    branches = {key: config["specialists"][key] for key in ("batch_size", "log_every")}
    base = config | {"specialists": branches | BRANCHES, "students": {}}
    config = load_config(None, [*settings, *options.set], base).dump()
    return Study(options.to, options.seed, config, options.quick)


def with_leads(found: dict[str, dict]) -> dict[str, dict]:
    """Each row with the share of the generalist's errors that it removes, and branches of its own.

    "fewer": the share of the row's errors that branches do not make.
    """

    def fewer(own: dict, other: dict) -> float:
        return 1 - (1 - own["top1"]) / max(1e-12, 1 - other["top1"])

    more = {}
    for name, each in found.items():
        more[name] = dict(each)
        if "generalist" in found:
            more[name]["removed"] = fewer(each, found["generalist"])
        if "branches" in found:
            more[name]["fewer"] = fewer(found["branches"], each)
    return more


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    study = study_of(options)
    found = {}
    for name in options.rows:
        found[name] = row(study, name)
        print(f"{name}: {found[name]}", flush=True)
    print(rows.table(with_leads(found), ("removed", "fewer")))
    measured = {
        "classes": options.classes,
        "n": study.generalist()["generalist"]["n"],
        "rows": with_leads(found),
        "training": training(study),
        "peak_memory_bytes": peak_memory(study, options.rows),
    }
    command = lab.command_line("benchmarks.characters", words)
    lab.print_json(measured, options, command)


if __name__ == "__main__":
    main()
