"""How much faster two ranks do a stage than one, and whether they find the same.

    OMP_NUM_THREADS=1 python -m benchmarks.ranks [--ranks 2] [--rounds 3] [--stages measure ...]
    python -m benchmarks.ranks --quick          a minute: does it run at all?

A run over made-up vectors of planted classes, whose networks are trained for a few steps: what a
stage takes does not depend on what they know.  Each stage is done by one rank and by several, in
turns, from the same inputs; what it took before is cleared.

seconds     what the stage itself took, from its DONE; the median over the rounds
clock_s     with the start of its processes and their imports
ratio       seconds of one rank over those of several, the median over the rounds
difference  the largest between the two in the numbers that the stage leaves

The last line is one JSON object: {"ranks", "stages": {name: {"seconds": [one, several],
"clock_s": [...], "ratio", "difference"}}, "cores"}.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from launch.local import torchrun
from pipeline.config import Config, load_config, save_config
from pipeline.graph import RunDirectory
from pipeline.store import Stage, read_json
from trainer.data.shards import ShardWriter, write_manifest
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_stage

NUMBERS, FAMILY = 64, 10  # of an input; classes that look alike
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


def do(run: RunDirectory, stage: Stage, ranks: int) -> float:
    """Seconds by the clock of a stage on so many ranks."""
    words = [stage.name]
    if stage.address is not None:
        words += [f"--{stage.kind.addressed_by}", str(stage.address)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    began = time.monotonic()
    ended = subprocess.run(
        [*torchrun(ranks), *words, "--run", str(run.root)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)} on {ranks} ranks failed:\n{ended.stdout[-3000:]}")
    return time.monotonic() - began


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
    seconds: dict[int, list[float]] = {1: [], ranks: []}
    clock: dict[int, list[float]] = {1: [], ranks: []}
    left = {}
    for _ in range(rounds):
        for count in seconds:
            stage.clear()
            clock[count].append(do(run, stage, count))
            done = stage.done()
            assert done is not None, "it ended without an error"
            seconds[count].append(done["seconds"])
            left[count] = NUMBERS_OF[stage.name](stage)
    ratios = [one / several for one, several in zip(*seconds.values(), strict=True)]
    return {
        "seconds": [round(statistics.median(each), 3) for each in seconds.values()],
        "clock_s": [round(statistics.median(each), 3) for each in clock.values()],
        "ratio": round(statistics.median(ratios), 3),
        "difference": float(np.abs(left[1].astype(float) - left[ranks]).max()),
    }


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
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(measure_all(Path(directory), options)))


if __name__ == "__main__":
    main()
