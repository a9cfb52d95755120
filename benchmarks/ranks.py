"""How much faster two ranks do a stage than one, and whether they find the same.

    OMP_NUM_THREADS=1 python -m benchmarks.ranks [--ranks 2] [--rounds 3]
        [--stages measure ...]
    python -m benchmarks.ranks --quick          a minute: does it run at all?

A run over made-up vectors of planted classes, whose networks are trained for a few steps: what a
stage takes does not depend on what they know.  Each stage is done by one rank and by several, in
turns, from the same inputs. What it took before is cleared.

seconds     by the clock, from the stage's start to its end, its modules imported before, the
            median over the rounds
cpu_s       of the rank that computed most, where ranks wait for each other without computing
ratio       seconds of one rank over those of several, the median over the rounds
cpu_ratio   the same of cpu_s: what the ratio is on free cores, but for the exchange of data
difference  the largest between the two in the numbers that the stage leaves

The last line is one JSON object: {"ranks", "stages": {name: {"seconds": [one, several], "cpu_s":
[...], "ratio", "cpu_ratio", "difference"}}, "cores"}.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.choices import resolve
from pipeline.config import Config, load_config, save_config
from pipeline.graph import RunDirectory, open_run
from pipeline.store import Stage, read_json
from trainer.data.shards import ShardWriter, write_manifest
from trainer.distributed.ranks import gather, process_group
from trainer.session import Session
from trainer.stages import run_stage

NUMBERS, FAMILY = 64, 10  # of an input. Classes that look alike
STAGES = ("measure", "targets", "evaluate")
SHARD = 5000
QUICK = {"classes": 40, "width": 32, "rows": 1200, "rounds": 1}


# The run


def write_vectors(directory: Path, classes: int, rows: int) -> None:
    """Shards of train, val and test, `rows` examples each but at least two of a class."""
    random = np.random.default_rng(0)
    families = random.normal(0, 1, (-(-classes // FAMILY), NUMBERS))
    centres = families[np.arange(classes) // FAMILY] + random.normal(0, 0.5, (classes, NUMBERS))
    names = [f"class {c}" for c in range(classes)]
    splits = {}
    for split in ("train", "val", "test"):
        labels = np.arange(max(rows, 2 * classes)) % classes
        vectors = centres[labels] + random.normal(0, 0.5, (len(labels), NUMBERS))
        with ShardWriter(directory, split, names, samples_per_shard=SHARD) as writer:
            for k, label in enumerate(labels):
                content = io.BytesIO()
                np.save(content, vectors[k].astype(np.float32))
                sample = {"npy": content.getvalue(), "cls": str(label).encode()}
                writer.write({"__key__": f"{k:08d}", **sample})
        splits[split] = writer.facts
    write_manifest(directory, names, splits)


def config_of(data: Path, options: argparse.Namespace) -> Config:
    values = {
        "data": {split: str(data) for split in ("train", "val", "test")},
        "model": {"name": "mlp", "width": options.width, "depth": 3},
        "train": {"steps": 40, "batch_size": 128, "learning_rate": 1e-3},
        "clusters": {"num_groups": 4},
        "specialists": {"steps": 20},
        "controls": {"enabled": False},
        "students": {"main": {"steps": 10, "temperature": 2.0}},
        "engine": {"device": "cpu"},
    }
    return load_config(None, [], values)


class Taken(NamedTuple):
    seconds: float
    cpu_s: float


def do(run: RunDirectory, stage: Stage, ranks: int) -> Taken:
    """A stage on so many ranks, in processes of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "benchmarks.ranks"]
    command += ["--child", str(run.root), stage.place]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if ended.returncode:
        raise SystemExit(f"{stage.place} on {ranks} ranks failed:\n{ended.stdout[-3000:]}")
    return Taken(*json.loads(ended.stdout.splitlines()[-1]))


def child(root: Path, place: str) -> None:
    """One rank of `do`. Rank 0 prints what the stage took."""
    run = open_run(root)
    (stage,) = [stage for stage in run.stages if stage.place == place]
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        resolve(stage.kind.function)  # what every process imports once is no work of the stage's
        import_module("torch._dynamo")  # torch does so at its own time
        began, began_cpu = time.monotonic(), time.process_time()
        run_stage(session, stage)
        taken = time.monotonic() - began
        cpu_s = gather(time.process_time() - began_cpu, ranks)
        if ranks.is_main:
            print(json.dumps([taken, max(cpu_s)]), flush=True)


def do_here(run: RunDirectory, stage: Stage) -> None:
    """A stage that is not measured, in this process."""
    with process_group(run.config.engine) as ranks:
        run_stage(Session(run, ranks), stage)


# What a stage leaves


def numbers_of_measure(stage: Stage) -> np.ndarray:
    with np.load(stage.path("predictions.npz")) as found:
        return np.concatenate([found[key].ravel() for key in ("ids", "top", "top_probability")])


def numbers_of_targets(stage: Stage) -> np.ndarray:
    log_values = np.fromfile(stage.path("train/log_values.bin"), np.float16)
    return np.concatenate([log_values, np.load(stage.path("train/counts.npy"))])


def numbers_of_evaluate(stage: Stage) -> np.ndarray:
    contents = [read_json(path) for path in sorted(stage.path("").glob("*.json"))]
    rows = [content["row"] for content in contents if "row" in content]
    return np.array([row[key] for row in rows for key in ("top1", "nll", "brier", "cnll")])


NUMBERS_OF: dict[str, Callable[[Stage], np.ndarray]] = {
    "measure": numbers_of_measure,
    "targets": numbers_of_targets,
    "evaluate": numbers_of_evaluate,
}


def compare(run: RunDirectory, stage: Stage, ranks: int, rounds: int) -> dict:
    """One rank and several, in turns."""
    counts = (1, ranks)
    taken: list[tuple[Taken, Taken]] = []
    left = {}
    for _ in range(rounds):
        of_round = []
        for count in counts:
            stage.clear()
            of_round.append(do(run, stage, count))
            left[count] = NUMBERS_OF[stage.name](stage)
        taken.append((of_round[0], of_round[1]))
    return {
        "seconds": medians([(one.seconds, several.seconds) for one, several in taken]),
        "cpu_s": medians([(one.cpu_s, several.cpu_s) for one, several in taken]),
        "ratio": ratio([one.seconds / several.seconds for one, several in taken]),
        "cpu_ratio": ratio([one.cpu_s / several.cpu_s for one, several in taken]),
        "difference": float(np.abs(left[1].astype(float) - left[ranks]).max()),
    }


def medians(pairs: list[tuple[float, float]]) -> list[float]:
    return [round(statistics.median(each), 3) for each in zip(*pairs, strict=True)]


def ratio(of_rounds: list[float]) -> float:
    return round(statistics.median(of_rounds), 3)


def measure_all(root: Path, options: argparse.Namespace) -> dict:
    write_vectors(root / "data", options.classes, options.rows)
    run = RunDirectory(root / "run", config_of(root / "data", options))
    run.root.mkdir()
    save_config(run.config, run.root / "config.toml")
    rows = {}
    for stage in run.stages:
        if stage.name in options.stages:
            rows[stage.name] = compare(run, stage, options.ranks, options.rounds)
            print(json.dumps({stage.name: rows[stage.name]}), flush=True)
        elif stage.name != "report":
            do_here(run, stage)
    return {"ranks": options.ranks, "stages": rows, "cores": len(os.sched_getaffinity(0))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=20_000, help="of each split")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--quick", action="store_true", help="few small rows: no result")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        root, place = options.child
        return child(Path(root), place)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure_all(Path(directory), options)))


if __name__ == "__main__":
    main()
