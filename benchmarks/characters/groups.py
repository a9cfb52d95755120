"""What groups of confusable characters capture of a generalist's test errors, by every method.

    OMP_NUM_THREADS=1 python -m benchmarks.characters.groups --run RUN ... --out DIR
        [--groups 24]
    python -m benchmarks.characters.groups --quick  seconds: 24 made-up characters

RUN: runs whose generalist and measure are done (benchmarks.characters.generalist makes them), one
per seed.  Groups, disjoint and overlapping, are found on the predictions on val and without labels.
Test is read for the captured fraction alone.  Every case is kept in DIR/cases.jsonl as it is
measured, and not measured again.  At the end DIR/groups.json and DIR/groups.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from scipy.sparse import csr_array

import clustering
from benchmarks.papers import lab
from clustering import PredictionStatistics, captured_confusion, captured_unlabelled, group_classes
from networks import load_classifier
from pipeline.graph import RunDirectory, open_run
from pipeline.store import read_json, write_json
from trainer.data import MeasuringStream, open_shards

from . import generalist
from .data import make_quick

OVERLAPS = (1, 2, 3)
# (method, refine): each in its own form, and with the local search on the expected confusion.
CASES = (
    ("kmeans", True),
    ("kmeans", False),
    ("minibatch", True),
    ("minibatch", False),
    ("correlation", True),
    ("correlation", False),
    ("agglomerative", True),
    ("agglomerative", False),
    ("classifier", True),
    ("classifier", False),
    ("raw", True),
    ("raw", False),
    ("graph", True),
    ("random", False),
)
METRICS = ("test", "val", "val_unlabelled", "chance", "largest", "seconds")
IDENTITY = ("code", "attempt", "seed", "groups", "method", "refine", "overlap")
QUICK_GROUPS = 4


# Measuring


def measure(
    statistics: PredictionStatistics,
    rows: np.ndarray | None,
    test: csr_array,
    num_groups: int,
    method: str,
    refine: bool,
    overlap: int,
    seed: int,
) -> dict[str, float]:
    """One case: captured fractions, chance, the largest group over the mean, CPU seconds.

    rows: of the generalist's head, which the method "classifier" groups.
    test: confusion_on_test.
    """
    started = time.process_time()
    groups = group_classes(
        statistics,
        num_groups,
        method,
        overlap=overlap,
        seed=seed,
        refine=refine,
        classifier_rows=rows if method == "classifier" else None,
    )
    seconds = time.process_time() - started
    fraction, chance = captured_confusion(groups, test)
    return {
        "test": fraction,
        "val": captured_confusion(groups, statistics.confusion)[0],
        "val_unlabelled": captured_unlabelled(groups, statistics)[0],
        "chance": chance,
        "largest": float(groups.sizes.max() / groups.sizes.mean()),
        "seconds": seconds,
    }


def confusion_on_test(run: RunDirectory, file: Path) -> csr_array:
    """Test examples by true and most probable class, int64 [C, C]. Kept in `file`."""
    if not file.exists():
        save_predictions(run, file)
    with np.load(file, allow_pickle=False) as saved:
        labels, predicted = saved["labels"], saved["predicted"]
        num_classes = int(saved["num_classes"])
    ones = np.ones(len(labels), np.int64)
    return csr_array((ones, (labels, predicted)), shape=(num_classes, num_classes))


def save_predictions(run: RunDirectory, file: Path) -> None:
    network = load_classifier(run.generalist.path("model.safetensors").parent)
    shards = open_shards(run.config.data.test, run.config.data, "test")
    labels, predicted = [], []
    with torch.inference_mode():
        for batch in MeasuringStream(shards, 512).loader():
            labels.append(batch.labels)
            predicted.append(network(batch.inputs).argmax(1))
    temporary = file.with_suffix(".part.npz")
    np.savez(
        temporary,
        labels=torch.cat(labels).numpy(),
        predicted=torch.cat(predicted).numpy(),
        num_classes=shards.num_classes,
    )
    os.replace(temporary, file)


def measure_all(
    runs: list[RunDirectory], out: Path, num_groups: int
) -> tuple[list[dict], list[dict]]:
    """(cases, descriptions of the runs): a case for each run, method, refinement and overlap."""
    path = out / "cases.jsonl"
    known = {}
    if path.exists():
        done = map(json.loads, path.read_text().splitlines())
        known = {identity(case): case for case in done}
    descriptions, cases = [], []
    for run in runs:
        weights = run.generalist.path("model.safetensors")
        attempt = weights.resolve().parent.name
        test = confusion_on_test(run, out / f"test-{attempt}.npz")
        statistics = PredictionStatistics.load(run.measure.path("statistics.npz"))
        rows = head_rows(weights)
        descriptions.append(describe(run, statistics, test))
        for (method, refine), overlap in product(CASES, OVERLAPS):
            seed = run.config.seed
            values = (code_mark(), attempt, seed, num_groups, method, refine, overlap)
            case = dict(zip(IDENTITY, values, strict=True))
            if identity(case) not in known:
                case |= measure(statistics, rows, test, num_groups, method, refine, overlap, seed)
                with open(path, "a") as file:
                    file.write(json.dumps(case) + "\n")
                known[identity(case)] = case
            cases.append(known[identity(case)])
            print(json.dumps(cases[-1]), flush=True)
    return cases, descriptions


def identity(case: dict) -> tuple:
    return tuple(case[key] for key in IDENTITY)


@cache
def code_mark() -> str:
    """A digest of what finds and judges groups: other code's metrics do not count as measured."""
    sources = sorted(Path(clustering.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def head_rows(weights: Path) -> np.ndarray:
    return load_file(weights)["head.weight"]


def describe(run: RunDirectory, statistics: PredictionStatistics, test: csr_array) -> dict:
    """What a reader needs to know of one generalist."""
    summary = read_json(run.generalist.path("summary.json"))
    return {
        "seed": run.config.seed,
        "val_top1": summary["val"]["top1"],
        "test_top1": float(test.trace() / test.sum()),
        "test_examples": int(test.sum()),
        "test_errors": int(test.sum() - test.trace()),
        "val_examples": statistics.num_examples,
        "examples_seen": summary["examples_seen"],
        "seconds": summary["seconds"],
    }


# The table


def summary_of(cases: list[dict]) -> list[dict]:
    """Mean and deviation over the seeds of each (method, refine, overlap), in order of `cases`."""
    by_case: dict[tuple, list[dict]] = {}
    for case in cases:
        by_case.setdefault((case["method"], case["refine"], case["overlap"]), []).append(case)
    rows = []
    for (method, refine, overlap), of_seeds in by_case.items():
        row = {"method": method, "refine": refine, "overlap": overlap, "seeds": len(of_seeds)}
        row |= {key: float(np.mean([case[key] for case in of_seeds])) for key in METRICS}
        row["test_std"] = None
        if len(of_seeds) > 1:
            row["test_std"] = float(np.std([case["test"] for case in of_seeds], ddof=1))
        rows.append(row)
    return rows


def table(summary: list[dict]) -> str:
    """Markdown: by method the fraction of test errors captured at each overlap, best first."""
    of_case = {(row["method"], row["refine"], row["overlap"]): row for row in summary}
    methods = list(dict.fromkeys((row["method"], row["refine"]) for row in summary))
    methods.sort(key=lambda method: -of_case[*method, OVERLAPS[0]]["test"])
    lines = [
        "| method | local search | disjoint | overlap 2 | overlap 3 | largest / mean "
        "| CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, refine in methods:
        rows = [of_case[method, refine, overlap] for overlap in OVERLAPS]
        captured = " | ".join(map(captured_cell, rows))
        largest = max(row["largest"] for row in rows)
        seconds = " / ".join(f"{row['seconds']:.1f}" for row in rows)
        word = "yes" if refine else "no"
        lines.append(f"| `{method}` | {word} | {captured} | {largest:.2f} | {seconds} |")
    chances = []
    for overlap in OVERLAPS:
        chance = np.mean([row["chance"] for row in summary if row["overlap"] == overlap])
        chances.append(f"{chance:.3f}")
    lines.append(f"| chance | | {' | '.join(chances)} | | |")
    return "\n".join(lines) + "\n"


def captured_cell(row: dict) -> str:
    if row["test_std"] is None:
        return f"{row['test']:.3f}"
    return f"{row['test']:.3f} ± {row['test_std']:.3f}"


# The program


def conditions() -> dict:
    command = ["git", "describe", "--always", "--dirty"]
    return {
        "machine": f"{lab.processor()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "commit": lab.output_of(command),
    }


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="may be repeated, one per seed"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/characters/groups"))
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="a run of its own, below OUT/quick")
    options = parser.parse_args(words)
    if not options.run and not options.quick:
        parser.error("--run is missing: which generalists?")
    return options


def quick_run(out: Path) -> Path:
    """A generalist of made-up characters, trained and measured."""
    make_quick(out / "data")
    splits = [f"data.{split}={out.resolve() / 'data/seen'}" for split in ("train", "val", "test")]
    settings = [*generalist.QUICK, *splits]
    lab.run_in_process(generalist.CONFIG, out / "run", settings, only=("generalist", "measure"))
    return out / "run"


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    if options.quick:
        options.out = options.out / "quick"
        shutil.rmtree(options.out, ignore_errors=True)
        options.run, options.groups = [quick_run(options.out)], QUICK_GROUPS
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [open_run(run) for run in options.run]
    cases, descriptions = measure_all(runs, options.out, options.groups)
    summary = summary_of(cases)
    results = {
        "conditions": conditions(),
        "groups": options.groups,
        "generalists": descriptions,
        "summary": summary,
        "cases": cases,
    }
    write_json(options.out / "groups.json", results)
    (options.out / "groups.md").write_text(table(summary))
    print(table(summary))
    command = lab.command_line("benchmarks.characters.groups", words)
    del results["cases"]
    lab.print_json(results, options, command)


if __name__ == "__main__":
    main()
