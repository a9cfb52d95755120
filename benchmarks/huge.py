"""Every stage of the method over a huge label set, what each takes, and how it grows.

    python -m benchmarks.huge --classes 200000 --groups 2000 [--ranks 1 2]
        [--to runs/huge]
    python -m benchmarks.huge --classes 200000 1000000  and how each stage's cost grows
    python -m benchmarks.huge --quick  seconds, 600 classes, no result

The same command goes on where it was interrupted.

The inputs are vectors of 64 numbers.  Classes come in families of 100: a family's centre is drawn
from a normal distribution, a class's centre lies NEAR from it, and an example NOISE from that, so
that a class is confused with its family.  Of each class TRAIN examples are for training. Val and
test have HELD_OUT examples each, of classes drawn at random.

Generalist: one hidden layer of 64 numbers and a head of all classes whose labels meet some of the
others (train.negatives).  Groups are found by its predictions for MEASURED examples.  The
--specialists groups with the largest forecasts get a branch.  A student starts as the generalist
and learns what all of them say.

Each stage is a process of its own, or under torchrun --ranks of them where it scales.  seconds are
on the clock. cpu_s those of all its processes. peak_bytes the largest resident set of one process,
files that it maps included.  The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tomli_w

from benchmarks.papers import lab
from pipeline.graph import RunDirectory, open_run
from pipeline.store import Stage, read_json, write_json

NUMBERS, FAMILY, TRAIN, HELD_OUT, MEASURED = 64, 100, 4, 20_000, 2**17
NEAR, NOISE = 0.5, 0.28
SEVERAL_ROWS = 100_000  # written at a time


# The data


def family_centres(classes: int, seed: int = 0) -> np.ndarray:
    """float32 [families, NUMBERS]."""
    random = np.random.default_rng([seed, 0])
    return random.standard_normal((-(-classes // FAMILY), NUMBERS), dtype=np.float32)


def class_centres(classes: int, seed: int = 0) -> np.ndarray:
    """float32 [classes, NUMBERS]. Neighbours in number are a family."""
    random = np.random.default_rng([seed, 1])
    own = random.standard_normal((classes, NUMBERS), dtype=np.float32)
    return np.repeat(family_centres(classes, seed), FAMILY, axis=0)[:classes] + NEAR * own


def write_split(folder: Path, split: str, centres: np.ndarray, labels: np.ndarray) -> str:
    """X and Y of a split as npy files. Returns what `shards arrays` calls them."""
    random = np.random.default_rng([1, len(labels), ord(split[1])])
    x_file, y_file = folder / f"{split}-x.npy", folder / f"{split}-y.npy"
    shape = (len(labels), NUMBERS)
    x = np.lib.format.open_memmap(x_file, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, len(labels), SEVERAL_ROWS):
        own = labels[start : start + SEVERAL_ROWS]
        noise = random.standard_normal((len(own), NUMBERS), dtype=np.float32)
        x[start : start + len(own)] = centres[own] + NOISE * noise
    x.flush()
    np.save(y_file, labels)
    return f"{x_file},{y_file}"


def write_arrays(folder: Path, classes: int, held_out: int) -> list[str]:
    """The three splits, as options of `shards arrays`."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(2)
    centres = class_centres(classes)
    labels = {
        "train": random.permutation(np.repeat(np.arange(classes), TRAIN)),
        "val": random.integers(classes, size=held_out),
        "test": random.integers(classes, size=held_out),
    }
    words = []
    for split, own in labels.items():
        words += [f"--{split}", write_split(folder, split, centres, own)]
    return words


# The run


def config_of(classes: int, given: argparse.Namespace, shards: Path) -> dict:
    splits = dict.fromkeys(("train", "val", "test"), str(shards))
    batch = 512 if given.quick else 2048
    student = {"steps": 20 if given.quick else 200, "batch_size": 512, "answers": "live"}
    return {
        "seed": 0,
        "data": splits,
        "model": {"name": "mlp", "width": NUMBERS, "depth": 1},
        "train": {
            "epochs": 3.0,
            "batch_size": batch,
            "learning_rate": 0.01,
            "weight_decay": 0.0,
            "negatives": min(20_000, classes // 2),
            "checkpoint_every": 10_000,
        },
        "clusters": {
            "num_groups": given.groups or max(2, classes // FAMILY),
            "top_k": 10,
            "train_examples": MEASURED,
            "specialists": given.specialists,
        },
        "specialists": {"kind": "branch", "steps": 200, "batch_size": 64, "learning_rate": 0.005},
        "controls": {"enabled": False},
        "students": {"main": student | {"learning_rate": 3e-4}},
        "engine": {"device": "cpu", "shard_head": True},
        "launch": {"retries": 0},
    }


def stages_of(run: RunDirectory) -> Iterator[tuple[str, list[Stage]]]:
    """Name -> stages that one command does. Specialists are known once there are groups."""
    done: set[str] = set()
    while True:
        waiting = [stage for stage in open_run(run.root).stages if stage.place not in done]
        if not waiting:
            return
        name = waiting[0].name
        alike = [stage for stage in waiting if stage.name == name]
        done |= {stage.place for stage in alike}
        yield name, alike


def command_of(run: RunDirectory, stages: list[Stage], ranks: int) -> list[str]:
    kind = stages[0].kind
    words = [kind.name, "--run", str(run.root)]
    if kind.addressed_by != "nothing":
        words += [f"--{kind.addressed_by}", *(str(stage.address) for stage in stages)]
    if ranks == 1 or not kind.scales:
        return [sys.executable, "-P", "-m", "trainer", *words]
    torchrun = ["-P", "-m", "trainer.distributed.torchrun", "--standalone"]
    return [sys.executable, *torchrun, "--nproc-per-node", str(ranks), "--", *words]


def measured(command: list[str]) -> dict:
    """Run a command in the root of the repository: seconds, cpu_s and peak_bytes."""
    report, write = os.pipe()
    child = os.fork()
    if child == 0:  # of its own, so that its children's peak is this command's
        os.close(report)
        start = time.monotonic()
        paths = os.pathsep.join(filter(None, [str(lab.ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | lab.ENVIRONMENT | {"PYTHONPATH": paths}
        code = subprocess.run(command, cwd=lab.ROOT, env=environment).returncode
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        row = {
            "code": code,
            "seconds": round(time.monotonic() - start, 2),
            "cpu_s": round(used.ru_utime + used.ru_stime, 2),
            "peak_bytes": used.ru_maxrss * 1024,
        }
        os.write(write, json.dumps(row).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(report) as pipe:
        row = json.loads(pipe.read())
    os.waitpid(child, 0)
    if row.pop("code"):
        raise SystemExit(f"error: {' '.join(command)} failed; the same command goes on")
    return row


def together(row: dict, before: dict) -> dict:
    """What a command took that was interrupted and went on: times add up, peaks do not."""
    times = {key: row[key] + before[key] for key in ("seconds", "cpu_s")}
    return {**times, "peak_bytes": max(row["peak_bytes"], before["peak_bytes"])}


def measure_run(root: Path, classes: int, ranks: int, given: argparse.Namespace) -> dict:
    """All stages, those that are done by what they took. Rows of the results."""
    kept = root / "measured.json"
    stages = read_json(kept) if kept.exists() else {}

    def take(name: str, command: list[str]) -> None:
        row = measured(command)
        before = stages.get(name)
        if before is not None:  # it was interrupted and went on
            row = together(row, before)
        stages[name] = row
        write_json(kept, stages)
        print(f"{classes:,} classes, {ranks} ranks, {name}: {stages[name]}", flush=True)

    root.mkdir(parents=True, exist_ok=True)
    shards = given.to / f"data-{classes}"
    manifest = shards / "manifest.json"
    if not manifest.exists():
        held_out = min(HELD_OUT, 10 * classes)
        words = write_arrays(given.to / f"arrays-{classes}", classes, held_out)
        script = [
            sys.executable,
            "-P",
            "-m",
            "launch.cli",
            "shards",
            "arrays",
            "--out",
            str(shards),
        ]
        write_json(shards.with_suffix(".json"), measured([*script, "--overwrite", *words]))
    stages["shards"] = read_json(shards.with_suffix(".json"))
    run_directory = root / "run"
    if not (run_directory / "config.toml").exists():
        config = root / "huge.toml"
        config.write_text(tomli_w.dumps(config_of(classes, given, shards.resolve())))
        launcher = [sys.executable, "-P", "-m", "launch.cli", "prepare", str(config)]
        take("prepare", [*launcher, "--run", str(run_directory)])
    run = open_run(run_directory)
    for name, alike in stages_of(run):
        if not all(stage.is_done for stage in alike):
            take(name, command_of(run, alike, ranks))
    results = read_json(run_directory / "results.json")
    rows = {
        "generalist": results["generalist"],
        "ensemble": results["ensemble"],
        "student": results["student"],
    }
    return {
        "classes": classes,
        "ranks": ranks,
        "stages": stages,
        **{name: {key: row[key] for key in ("top1", "nll")} for name, row in rows.items()},
        "paired": results["ensemble"].get("versus_generalist"),
    }


def exponents(small: dict, large: dict) -> dict[str, float]:
    """Of each stage e in cost ~ classes^e, by CPU seconds: 1 is linear."""
    factor = math.log(large["classes"] / small["classes"])
    shared = [name for name in small["stages"] if name in large["stages"]]
    return {
        name: math.log(large["stages"][name]["cpu_s"] / small["stages"][name]["cpu_s"]) / factor
        for name in shared
    }


def table(rows: list[dict]) -> str:
    """Markdown: a line a stage, columns of each run."""
    names = list(dict.fromkeys(name for row in rows for name in row["stages"]))
    header = ["stage"]
    for row in rows:
        header += [f"{row['classes']:,} classes, {row['ranks']} ranks: s", "CPU s", "MiB"]
    lines = []
    for name in names:
        cells = [name]
        for row in rows:
            stage = row["stages"].get(name)
            if stage is None:
                cells += ["", "", ""]
                continue
            cells += [f"{stage['seconds']:,.0f}", f"{stage['cpu_s']:,.0f}"]
            cells.append(f"{stage['peak_bytes'] / 2**20:,.0f}")
        lines.append(cells)
    return lab.table(header, lines)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[200_000])
    parser.add_argument("--groups", type=int, help="absent: one for each 100 classes")
    parser.add_argument("--specialists", type=int, default=256, help="groups that get one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--to", type=Path, default=Path("runs/huge"))
    parser.add_argument("--quick", action="store_true", help="a rehearsal of 600 classes")
    options = parser.parse_args(words)
    if options.quick:
        options.to = options.to / "quick"
        options.classes, options.specialists = [600], 3
    options.to = options.to.resolve()
    return options


def main(words: list[str] | None = None) -> None:
    given = parse(words)
    rows = [
        measure_run(given.to / f"{classes}-{ranks}", classes, ranks, given)
        for classes in given.classes
        for ranks in given.ranks
    ]
    print(table(rows))
    command = lab.command_line("benchmarks.huge", words)
    of_one = [row for row in rows if row["ranks"] == given.ranks[0]]
    growth = [exponents(small, large) for small, large in zip(of_one, of_one[1:], strict=False)]
    for each in growth:
        print("exponents:", ", ".join(f"{name} {value:.2f}" for name, value in each.items()))
    last = rows[0] if len(rows) == 1 else {"runs": rows, "exponents": growth}
    lab.print_json(last, given, command)


if __name__ == "__main__":
    main()
