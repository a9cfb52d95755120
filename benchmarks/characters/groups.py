"""What groups of confusable characters capture of a generalist's test errors: every method, disjoint and overlapping.

    OMP_NUM_THREADS=1 python -m benchmarks.characters.groups --run RUN ... --out DIR [--groups 24]

RUN: runs whose generalist and measure are done (benchmarks.characters.generalist makes them), one per seed.  Groups are
found on the predictions on val and without labels; test is read for the captured share alone.  Every case is kept in
DIR/cases.jsonl as it is measured, and not measured again.  At the end DIR/groups.json and DIR/groups.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import time
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

import clustering
from clustering import PredictionStatistics, captured_confusion, captured_unlabelled, group_classes
from pipeline.graph import RunDirectory
from pipeline.store import read_json, write_json

OVERLAPS = (1, 2, 3)
# (method, refine): each in its own form, and with the local search on the expected confusion after it.
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
FIGURES = ("test", "val", "val_unlabelled", "chance", "largest", "seconds")


def measure(
    statistics,
    rows,
    test: csr_array,
    num_groups: int,
    method: str,
    refine: bool,
    overlap: int,
    seed: int,
):
    """One case: captured shares, chance, the largest group as a multiple of the mean, CPU seconds."""
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
    share, chance = captured_confusion(groups, test)
    return {
        "test": share,
        "val": captured_confusion(groups, statistics.confusion)[0],
        "val_unlabelled": captured_unlabelled(groups, statistics)[0],
        "chance": chance,
        "largest": float(groups.sizes.max() / groups.sizes.mean()),
        "seconds": seconds,
    }


def confusion_on_test(run: RunDirectory, keep: Path) -> csr_array:
    """Test examples by true class (rows) and the generalist's most probable class, int64 [C, C]; kept in `keep`."""
    if not keep.exists():
        import torch

        from networks import load_classifier
        from trainer.data import MeasuringStream, open_shards

        network = load_classifier(run.generalist.path("model.safetensors").parent)
        shards = open_shards(run.config.data.test, run.config.data, "test")
        with torch.inference_mode():
            found = [
                (batch.labels, network(batch.inputs).argmax(1))
                for batch in MeasuringStream(shards, 512).loader()
            ]
        labels, predicted = (torch.cat(part).numpy() for part in zip(*found, strict=True))
        temporary = keep.with_suffix(".part.npz")
        np.savez(temporary, labels=labels, predicted=predicted, num_classes=shards.num_classes)
        os.replace(temporary, keep)
    with np.load(keep, allow_pickle=False) as found:
        labels, predicted, num_classes = (
            found["labels"],
            found["predicted"],
            int(found["num_classes"]),
        )
    return csr_array(
        (np.ones(len(labels), np.int64), (labels, predicted)), shape=(num_classes, num_classes)
    )


def measure_all(
    runs: list[RunDirectory], out: Path, num_groups: int
) -> tuple[list[dict], list[dict]]:
    """(cases, facts of the runs): one row of `cases` for each run, method, refinement and overlap."""
    path = out / "cases.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {identity(row): row for row in done}
    facts, cases = [], []
    for run in runs:
        weights = run.generalist.path("model.safetensors")
        attempt = weights.resolve().parent.name
        test = confusion_on_test(run, out / f"test-{attempt}.npz")
        statistics = PredictionStatistics.load(run.measure.path("statistics.npz"))
        rows = head_rows(weights)
        facts.append(facts_of(run, statistics, test))
        for (method, refine), overlap in product(CASES, OVERLAPS):
            row = {
                "code": code_mark(),
                "attempt": attempt,
                "seed": run.config.seed,
                "groups": num_groups,
                "method": method,
                "refine": refine,
                "overlap": overlap,
            }
            if identity(row) not in known:
                figures = measure(
                    statistics, rows, test, num_groups, method, refine, overlap, run.config.seed
                )
                with open(path, "a") as file:
                    file.write(json.dumps(row | figures) + "\n")
                known[identity(row)] = row | figures
            cases.append(known[identity(row)])
            print(json.dumps(cases[-1]), flush=True)
    return cases, facts


def identity(row: dict) -> tuple:
    return tuple(
        row[key] for key in ("code", "attempt", "seed", "groups", "method", "refine", "overlap")
    )


@cache
def code_mark() -> str:
    """A digest of what finds and judges groups: figures of other code do not count as measured."""
    sources = sorted(Path(clustering.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def head_rows(weights: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(weights)["head.weight"]


def facts_of(run: RunDirectory, statistics, test: csr_array) -> dict:
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


def summary_of(cases: list[dict]) -> list[dict]:
    """Mean and standard deviation over the seeds of each (method, refine, overlap), in the order of `cases`."""
    by_case: dict[tuple, list[dict]] = {}
    for row in cases:
        by_case.setdefault((row["method"], row["refine"], row["overlap"]), []).append(row)
    return [
        {"method": method, "refine": refine, "overlap": overlap, "seeds": len(rows)}
        | {figure: float(np.mean([row[figure] for row in rows])) for figure in FIGURES}
        | {
            "test_std": float(np.std([row["test"] for row in rows], ddof=1))
            if len(rows) > 1
            else None
        }
        for (method, refine, overlap), rows in by_case.items()
    ]


def table(summary: list[dict]) -> str:
    """Markdown: methods as rows, the share of test errors captured at each overlap, best first."""
    methods = list(dict.fromkeys((row["method"], row["refine"]) for row in summary))
    found = {(row["method"], row["refine"], row["overlap"]): row for row in summary}
    methods.sort(key=lambda method: -found[*method, OVERLAPS[0]]["test"])
    lines = [
        "| method | local search | disjoint | overlap 2 | overlap 3 | largest / mean | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, refine in methods:
        rows = [found[method, refine, overlap] for overlap in OVERLAPS]
        spread = ["" if row["test_std"] is None else f" ± {row['test_std']:.3f}" for row in rows]
        shares = [f"{row['test']:.3f}{more}" for row, more in zip(rows, spread, strict=True)]
        largest = max(row["largest"] for row in rows)
        seconds = " / ".join(f"{row['seconds']:.1f}" for row in rows)
        word = "yes" if refine else "no"
        lines.append(f"| `{method}` | {word} | {' | '.join(shares)} | {largest:.2f} | {seconds} |")
    chances = [
        np.mean([row["chance"] for row in summary if row["overlap"] == overlap])
        for overlap in OVERLAPS
    ]
    lines.append(f"| chance | | {' | '.join(f'{chance:.3f}' for chance in chances)} | | |")
    return "\n".join(lines) + "\n"


def conditions() -> dict:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    command = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "machine": f"{model}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "commit": git.stdout.strip(),
    }


def main() -> None:
    from pipeline.graph import open_run

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, action="append", required=True, help="may be repeated, one per seed"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--groups", type=int, default=24)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cases, facts = measure_all([open_run(run) for run in args.run], args.out, args.groups)
    summary = summary_of(cases)
    write_json(
        args.out / "groups.json",
        {
            "conditions": conditions(),
            "groups": args.groups,
            "generalists": facts,
            "summary": summary,
            "cases": cases,
        },
    )
    (args.out / "groups.md").write_text(table(summary))
    print(table(summary))


if __name__ == "__main__":
    main()
