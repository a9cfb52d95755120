"""What the programs on characters share: runs that copy what they have in common, metrics.

A program's runs are of headline.toml.  Those that agree with a finished run up to some stage begin
as a copy of it, so that what is the same is neither done nor stored again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tomllib
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.papers import lab
from ensemble import SpecialistEnsemble
from networks import load_classifier
from pipeline.config import Data, load_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json, write_json
from trainer.data import MeasuringStream, open_shards

from . import data as drawings

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Predict = Callable[[Tensor], Tensor]  # raw inputs -> probabilities [B, C]

CONFIG = Path(__file__).with_name("headline.toml")
PAGE = lab.ROOT / "docs" / "results.md"
HARD = "_hard"  # ends the twin's name
TAKEN = "taken.json"  # in a copy of a run: the stages that it took over
# Of lab.named_rows, where no students are asked about.
ROWS = ("generalist", "control_wall", "control_compute", "ensemble")
# By the generalist's parameters.
STUDENTS = {"same": "1 x", "double": "2 x", "few": "2 x, few images"}
SIXTH_CLASSES = 626
SIXTH = [  # the generalist was looked at on val of seed 100
    "model.embedding=6",
    "train.steps=4000",
    "train.validate_every=2000",
    "clusters.num_groups=12",
    "specialists.steps=170",
    "specialists.validate_every=85",
]
FASTER = ["engine.shard_head=true"]  # no logits in memory: students are 1.6 times as fast
QUICK_NETWORKS = [
    "train.steps=40",
    "train.batch_size=64",
    "train.validate_every=0",
    "clusters.num_groups=3",
    "specialists.steps=6",
    "specialists.batch_size=64",
    "specialists.validate_every=0",
    "controls.learning_rates=[3e-3]",
]
QUICK = [
    *QUICK_NETWORKS,
    *(f"students.{name}{end}.steps=6" for name in STUDENTS for end in ("", HARD)),
]


# The command line


def parser(description: str | None) -> argparse.ArgumentParser:
    options = lab.arguments(description, page=PAGE, to="runs/characters")
    add_jobs(options)
    size = options.add_mutually_exclusive_group()
    size.add_argument(
        "--sixth", action="store_true", help=f"{SIXTH_CLASSES:,} classes, below TO/sixth"
    )
    size.add_argument(
        "--both-levels",
        action="store_true",
        help=f"{drawings.BOTH_LEVELS:,} classes, below TO/both",
    )
    return options


def add_jobs(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--jobs", type=int, default=lab.cores(), help="runs side by side (all cores)"
    )


def parsed(options: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """The arguments and the number of `classes`.

    --sixth, --both-levels and --quick name another place. --sixth and --quick short trainings, too.
    """
    given = lab.parsed(options, words)
    if given.quick and (given.sixth or given.both_levels):
        options.error("--quick has a size of its own")
    given.classes = drawings.LEVEL_ONE
    if given.quick:
        given.set, given.classes, given.jobs = [*QUICK, *given.set], drawings.QUICK_CLASSES, 1
    if given.both_levels:
        given.to, given.classes = given.to / "both", drawings.BOTH_LEVELS
    if given.sixth:
        given.to, given.set, given.classes = given.to / "sixth", [*SIXTH, *given.set], SIXTH_CLASSES
    given.to.mkdir(parents=True, exist_ok=True)
    return given


# Configs and runs


def drawn(given: argparse.Namespace) -> Path:
    """The directory of the shards, seen/ and unseen/. unseen/ is written last."""

    def make(path: Path) -> None:
        if given.quick:
            drawings.make_quick(path.parent)
        else:
            drawings.make(path.parent, given.classes)

    return lab.shards(given.to / "data" / "unseen", make).parent


def config_of(data: Path, seed: int, settings: Iterable[str] = ()) -> dict:
    """headline.toml with data, seed, twins and `settings`, every default filled in."""
    config = tomllib.loads(CONFIG.read_text(encoding="utf-8")) | {"seed": seed}
    config = reading(config, data / "seen")
    for name in STUDENTS:
        config["students"][name + HARD] = config["students"][name] | {"method": "hard"}
    return load_config(None, list(settings), config).dump()


def reading(config: dict, shards: Path) -> dict:
    """The config on other shards."""
    splits = dict.fromkeys(("train", "val", "test"), str(shards))
    return config | {"data": config["data"] | splits}


def alone(config: dict) -> dict:
    """The config without students and controls."""
    return config | {"students": {}, "controls": config.get("controls", {}) | {"enabled": False}}


def all_of(tasks: dict[Key, Callable[[], Value]], jobs: int) -> dict[Key, Value]:
    """{key: what the task returned}, `jobs` of them side by side."""
    if jobs == 1:
        return {key: task() for key, task in tasks.items()}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {key: pool.submit(task) for key, task in tasks.items()}
        return {key: future.result() for key, future in futures.items()}


def main_runs(given: argparse.Namespace, configs: dict[int, dict]) -> dict[int, dict]:
    """results.json of each seed's run, TO/seed-SEED."""
    tasks = {
        seed: lambda seed=seed: lab.finished(
            configs[seed], given.to / f"seed-{seed}", in_process=given.quick
        )
        for seed in configs
    }
    return all_of(tasks, given.jobs)


def copied(config: dict, path: Path, run: Path, in_process: bool = False) -> dict:
    """results.json of the run of `config` at `path`, which takes over from `run` what both have."""
    begin(path, config, run)
    return lab.finished(config, path, in_process=in_process)


def begin(path: Path, config: dict, run: Path) -> None:
    """Make `path`, unless it is there, a copy of the finished `run` as far as `config` agrees.

    The stages that both have, and the decoded inputs, are hard links.
    """
    if path.exists():
        return
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    own = RunDirectory(path, load_config(None, [], config))
    keys = {stage.place: stage.key for stage in own.stages}
    finished = [
        stage
        for stage in RunDirectory(run, load_config(run / "config.toml")).stages
        if stage.is_done
    ]
    taken = [stage for stage in finished if keys.get(stage.place) == stage.key]
    for stage in taken:
        link(stage.directory, unfinished / stage.place, below=("attempts",))
    write_json(unfinished / TAKEN, [stage.place for stage in taken])
    if (run / "cache").is_dir():
        link(run / "cache", unfinished / "cache")
    # What makes it a run. `referral run` writes its own.
    shutil.copy(run / "config.toml", unfinished)
    unfinished.rename(path)


def link(source: Path, target: Path, below: tuple[str, ...] = ()) -> None:
    """Hard links of the files in `source`. Of its directories those named `below` alone.

    Symbolic links stay so.
    """

    def is_left_out(path: Path) -> bool:
        return path.is_dir() and not path.is_symlink() and path.name not in below

    def left_out(directory: str, names: list[str]) -> list[str]:
        if Path(directory) != source:
            return []
        return [name for name in names if is_left_out(source / name)]

    shutil.copytree(
        source, target, symlinks=True, copy_function=os.link, ignore=left_out, dirs_exist_ok=True
    )


def own_seconds(run: Path) -> float:
    """What the stages of a run took, but for those that it took over from another."""
    taken = read_json(run / TAKEN) if (run / TAKEN).exists() else []
    return lab.seconds(run) - sum(read_json(run / place / "DONE")["seconds"] for place in taken)


# What results.json does not say


def kept(file: Path, of: list, measure: Callable[[], dict]) -> dict:
    """What `measure` returned, kept in `file` with what it is `of`. Anew if that has changed."""
    if not file.exists() or read_json(file)["of"] != of:
        write_json(file, {"of": of, "rows": measure()})
    return read_json(file)["rows"]


def kept_metrics(
    run: Path, results: dict, shards: Path, split: str, most: int | None = None
) -> dict[str, dict]:
    """metrics_on, kept beside the run. Measured anew where the run or the shards are others."""
    of = [results["generalist"], results["ensemble"], read_json(shards / "manifest.json"), most]
    file = run.with_name(f"{run.name}-{shards.name}-{split}.json")
    return kept(file, of, lambda: metrics_on(run, shards, split, most))


def metrics_on(
    run: Path, shards: Path, split: str = "test", most: int | None = None
) -> dict[str, dict]:
    """{"generalist": {"n", "top1", "nll"}, "ensemble": ...} of a run on a split of other shards.

    most: only so many of its examples, evenly over it.
    """
    ensemble = SpecialistEnsemble.load(run)
    predictors: dict[str, Predict] = {
        "generalist": lambda raw: ensemble.generalist(raw).float().softmax(1),
        "ensemble": ensemble.probabilities,
    }
    return metrics_of(predictors, ensemble.class_names, shards, split, most)


def generalists_together(runs: list[Path], shards: Path) -> dict[str, dict]:
    """metrics_of on test of the plain mean of the generalists' probabilities, as "together".

    That is a deep ensemble (Lakshminarayanan et al. 2017) of those runs' generalists.
    """
    networks = [load_classifier(run / "generalist").eval() for run in runs]
    names = read_json(runs[0] / "generalist" / "model.json")["class_names"]

    def mean(raw: Tensor) -> Tensor:
        probabilities = (network(raw).float().softmax(1) for network in networks)
        return reduce(torch.add, probabilities) / len(networks)

    return metrics_of({"together": mean}, names, shards, "test")


def metrics_of(
    predictors: dict[str, Predict],
    names: list[str],
    shards: Path,
    split: str,
    most: int | None = None,
) -> dict[str, dict]:
    """{name: {"n", "top1", "nll"}} of predictors over the classes `names`."""
    torch.set_num_threads(1)
    opened = open_shards(str(shards), Data(), split)
    if opened.class_names != names:
        raise SystemExit(f"{shards} has other classes than the run")
    n = len(opened) if most is None else min(most, len(opened))
    ids = np.linspace(0, len(opened) - 1, n).astype(np.int64)
    correct, losses = dict.fromkeys(predictors, 0), dict.fromkeys(predictors, 0.0)
    with torch.inference_mode():
        for batch in MeasuringStream(opened, 512, ids).loader():
            for name, predict in predictors.items():
                p = predict(batch.inputs)
                correct[name] += int((p.argmax(1) == batch.labels).sum())
                p_label = p.gather(1, batch.labels[:, None]).double().clamp_min(1e-30)
                losses[name] -= float(p_label.log().sum())
    return {
        name: {"n": n, "top1": correct[name] / n, "nll": losses[name] / n} for name in predictors
    }


def on_test(run: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(labels [n], whether the prediction is correct [n]) of a row of results.json.

    name: a student's is its own.
    """
    with np.load(run / "evaluation" / f"{name}.npz", allow_pickle=False) as evaluation:
        labels = evaluation["labels"]
        return labels, evaluation["top5"][:, 0] == labels


def still_wrong(run: Path, other: Path) -> float:
    """The fraction of the errors of run's generalist on test that other's generalist makes too."""
    first, second = (~on_test(place, "generalist")[1] for place in (run, other))
    return float(second[first].mean())
