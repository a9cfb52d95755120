"""Branches against copies: examples a second of training, errors removed, multiplications.

    OMP_NUM_THREADS=1 python -m benchmarks.branches [--seeds N] [--keep DIR]
    OMP_NUM_THREADS=1 python -m benchmarks.branches --latency [--rounds N]
    python -m benchmarks.branches [--latency] --quick  few classes and steps, in seconds

The data are made so that the head is what is short: pictures of many classes in look-alike
families, and an embedding of a few numbers.  One generalist is trained. Copies and branches start
from it, with the same groups, steps and batches, in one process on one thread.  Every stage is the
product's own.  The last line of the output is one JSON object with a row for each seed.

--latency measures how long an answer takes instead, as ONNX in onnxruntime on one thread: untrained
MLPs of 64 and 256 numbers an embedding, 26,386 classes, 88 groups, branches of 64 numbers, one and
two branches a row, batches of 1 and 256.  The ensemble and its generalist take turns. Ratios are
medians of each round's, of the process's CPU time.  The bar is 1.3.  `wide head` is the generalist
with its head's bias as the weight of a further feature, as the ensemble's program has it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import (
    Softmax,
    SoftmaxOfWideHead,
    Times,
    in_onnx,
    measure,
    medians,
    ratio,
)
from clustering import ClassGroups
from ensemble import SpecialistEnsemble, ensemble_program
from networks import InputSpec, ModelSpec, branch_off, build_classifier, parameter_count
from pipeline.config import Config, load_config, save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.__main__ import in_a_row
from trainer.data import ShardWriter, write_manifest
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_together

SIDE, FAMILY = 20, 10  # pixels. Classes that look alike
SETTINGS: dict[str, Any] = {
    "classes": 1000,
    "train": 60,
    "val": 10,
    "test": 10,
    "embedding": 6,
    "branch": 64,
    "groups": 16,
    "steps": 4000,
    "specialist_steps": 300,
}
QUICK = SETTINGS | {
    "classes": 60,
    "train": 10,
    "val": 4,
    "test": 4,
    "groups": 4,
    "steps": 60,
    "specialist_steps": 20,
}


LATENCY = {"classes": 26_386, "groups": 88, "widths": (64, 256), "overlaps": (1, 2), "rounds": 21}
QUICK_LATENCY = LATENCY | {"classes": 5000, "groups": 8, "widths": (8,), "rounds": 3}
LATENCY_BAR = 1.3
BATCHES = (1, 256)
INPUTS = 256


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="benchmarks.branches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--latency", action="store_true", help="measure what an answer takes")
    parser.add_argument("--rounds", type=int, help="of --latency")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a directory for data and runs")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else SETTINGS
    torch.set_num_threads(1)
    if args.latency:
        settings = QUICK_LATENCY if args.quick else LATENCY
        if args.rounds:
            settings = settings | {"rounds": args.rounds}
        return latency(settings)
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or Path(temporary)
        data = root / "data"
        if not (data / "manifest.json").exists():
            write_data(data, settings)
        rows = [trained(root, data, settings, seed) for seed in range(args.seeds)]
    result = {"settings": settings, "torch": torch.__version__, "seeds": rows}
    print(json.dumps(result))
    return result


def latency(settings: dict[str, Any]) -> dict[str, Any]:
    """Prints and returns a row for each width, number of branches a row, and batch."""
    rows = []
    for width in settings["widths"]:
        for overlap in settings["overlaps"]:
            ensemble = untrained(settings["classes"], settings["groups"], width, overlap)
            began = time.perf_counter()
            forms = in_onnx(
                {
                    "generalist": Softmax(ensemble.generalist),
                    "wide head": SoftmaxOfWideHead(ensemble.generalist),
                    "ensemble": ensemble_program(ensemble, portable=True),
                }
            )
            export_s = round(time.perf_counter() - began, 1)
            for batch in BATCHES:
                raw = torch.randn(batch, INPUTS, generator=torch.Generator().manual_seed(1))
                row = {"embedding": width, "branches_a_row": overlap, "batch": batch}
                row |= latency_row(measure(forms, raw, settings["rounds"]))
                q = torch.from_numpy(forms["ensemble"](raw))
                row["error"] = float((q - ensemble.probabilities(raw)).abs().max())
                rows.append(row | {"bar": LATENCY_BAR, "export_s": export_s})
                say_latency(rows[-1])
    passed = all(row["ratio"] <= LATENCY_BAR for row in rows)
    versions = {"torch": torch.__version__, "onnxruntime": version("onnxruntime")}
    result = {"settings": settings, **versions, "rows": rows, "passed": passed}
    print(json.dumps(result))
    return result


def untrained(classes: int, groups: int, width: int, overlap: int) -> SpecialistEnsemble:
    """Random branches of random groups, as many of them on each row as a class is in groups."""
    torch.manual_seed(0)
    inputs = InputSpec((INPUTS,), dtype="float32", scale=1.0)
    spec = ModelSpec("mlp", classes, inputs, {"width": 256, "depth": 1, "embedding": width})
    generalist = build_classifier(spec).eval()
    with torch.no_grad():
        generalist.linear_head.weight.mul_(20)  # confident
    parts = [torch.randperm(classes).tensor_split(groups // overlap) for _ in range(overlap)]
    members = [part.sort().values.numpy() for each in parts for part in each]
    branches = {}
    for m, own in enumerate(members):
        branches[m] = branch_off(generalist, own.tolist(), 64).eval()
        torch.nn.init.normal_(branches[m].correction.weight, std=0.3)
    return SpecialistEnsemble(
        generalist,
        branches,
        ClassGroups(members, classes),
        temperatures=[1.0, *np.linspace(0.8, 1.4, len(members))],
        weights=[1.0, *[3.0] * len(members)],
    )


def latency_row(times: dict[str, Times]) -> dict[str, Any]:
    return {
        "cpu_ms": medians(times),
        "ms": medians(times, clock=True),
        "ratio": ratio(times, "ensemble", "generalist"),
        "ratio_of_clock": ratio(times, "ensemble", "generalist", clock=True),
        "ratio_to_wide_head": ratio(times, "ensemble", "wide head"),
    }


def say_latency(row: dict[str, Any]) -> None:
    times = ", ".join(f"{name} {value:.3f}" for name, value in row["cpu_ms"].items())
    print(
        f"{row['embedding']:3} numbers, {row['branches_a_row']} branches a row, "
        f"batch {row['batch']:3}: {times} ms of CPU; {row['ratio']:.2f} x the generalist "
        f"(bar {row['bar']}); exported in {row['export_s']} s",
        flush=True,
    )


def write_data(directory: Path, settings: dict[str, Any]) -> None:
    """Shards of pictures: a family's pattern, a fainter one of the class, and noise."""
    names = [f"class {c}" for c in range(settings["classes"])]
    splits = {}
    for number, split in enumerate(("train", "val", "test")):
        labels = np.repeat(np.arange(len(names)), settings[split])
        pictures = draw(labels, len(names), np.random.default_rng(number + 1))
        with ShardWriter(directory, split, names, samples_per_shard=5000) as writer:
            for k, (label, picture) in enumerate(zip(labels, pictures, strict=True)):
                png = io.BytesIO()
                Image.fromarray(picture).save(png, format="png")
                sample = {"png": png.getvalue(), "cls": str(label).encode()}
                writer.write({"__key__": f"{k:07d}", **sample})
        splits[split] = writer.facts
    write_manifest(directory, names, splits)


def draw(labels: np.ndarray, classes: int, random: np.random.Generator) -> np.ndarray:
    """uint8 [n, SIDE, SIDE]: patterns of 5 x 5 patches, each enlarged, in noise."""
    fixed, patch = np.random.default_rng(0), SIDE // 5
    families = fixed.normal(0, 40, (-(-classes // FAMILY), 5, 5))
    own = fixed.normal(0, 28, (classes, 5, 5))
    patterns = families[labels // FAMILY] + own[labels]
    patterns = patterns + random.normal(0, 10, patterns.shape)
    pictures = np.kron(patterns, np.ones((1, patch, patch)))
    pictures = pictures + random.normal(128, 20, pictures.shape)
    return pictures.clip(0, 255).astype(np.uint8)


def config_of(data: Path, settings: dict[str, Any], seed: int, specialists: dict) -> Config:
    base = {
        "seed": seed,
        "data": {split: str(data) for split in ("train", "val", "test")},
        "model": {
            "name": "convnet",
            "embedding": settings["embedding"],
            "options": {"channels": [4, 8, 16]},
        },
        "train": {
            "steps": settings["steps"],
            "batch_size": 256,
            "learning_rate": 0.01,
            "beta2": 0.99,
            "weight_decay": 0.0,
        },
        "clusters": {"num_groups": settings["groups"], "overlap": 2},
        "specialists": {"steps": settings["specialist_steps"], **specialists},
        "controls": {"enabled": False},
        "engine": {"device": "cpu"},
    }
    return load_config(None, [], base)


def trained(root: Path, data: Path, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Generalist, copies and branches of one seed."""
    wide = {"kind": "branch", "model": {"embedding": settings["branch"]}}
    of_kind = {"branches": wide, "copies": {"learning_rate": 0.003, "patience": 10**6}}
    of_kind["copies"]["validate_every"] = max(1, settings["specialist_steps"] // 10)
    rows: dict[str, Any] = {"seed": seed}
    source = ""
    for name, specialists in of_kind.items():
        config = config_of(data, settings, seed, specialists)
        config.generalist.init = source
        run = do(root / f"{name}-{seed}", config)
        source = str(run.root)
        results = read_json(run.root / "results.json")
        rows["generalist"] = rows.get("generalist") or row_of(results["generalist"])
        rows[name] = row_of(results["ensemble"]) | costs_of(run)
        wrong = [1 - rows[each]["top1"] for each in ("generalist", name)]
        rows[name]["errors_removed"] = round(1 - wrong[1] / wrong[0], 4)
        say(name, rows)
    rates = [rows[name]["examples_per_s"] for name in ("branches", "copies")]
    rows["times_as_fast"] = round(rates[0] / rates[1], 2)
    print(f"branches train {rows['times_as_fast']} times as fast as copies")
    return rows


def do(root: Path, config: Config) -> RunDirectory:
    """Every stage of a run, in this process."""
    root.mkdir(parents=True, exist_ok=True)
    save_config(config, root / "config.toml")
    run = RunDirectory(root, config)
    with process_group(config.engine) as ranks:
        session = Session(run, ranks)
        for alike in in_a_row([stage for stage in run.stages if not stage.is_done]):
            run_together(session, alike)
    return run


def row_of(row: dict) -> dict[str, Any]:
    return {"top1": round(row["top1"], 4), "nll": round(row["nll"], 4)}


def costs_of(run: RunDirectory) -> dict[str, Any]:
    """What the specialists took to train, and what the ensemble takes to answer."""
    summaries = [read_json(stage.path("summary.json")) for stage in run.specialists]
    seconds = sum(each["seconds"] for each in summaries)
    examples = sum(each["examples_seen"] for each in summaries)
    costs = {
        "seconds": round(seconds, 2),
        "examples": examples,
        "examples_per_s": round(examples / seconds),
        "features_seconds": 0.0,
    }
    if run.config.specialists.is_branch:
        costs["features_seconds"] = read_json(run.features.path("summary.json"))["seconds"]
    ensemble = SpecialistEnsemble.load(run.root)
    with np.load(run.evaluate.path("ensemble.npz")) as arrays:
        active = torch.from_numpy(arrays["active"].astype(bool))
    none = torch.zeros_like(active)
    networks = [ensemble.generalist, *(ensemble.specialists[m] for m in ensemble.specialists)]
    return costs | {
        "multiplications": round(ensemble.multiplications(active)),
        "of_generalist": round(ensemble.multiplications(none)),
        "parameters": sum(map(parameter_count, networks)),
    }


def say(name: str, rows: dict[str, Any]) -> None:
    before, row = rows["generalist"], rows[name]
    print(
        f"seed {rows['seed']}: generalist {100 * before['top1']:.2f} %, NLL {before['nll']:.3f}; "
        f"{name} {100 * row['top1']:.2f} %, {row['nll']:.3f}, "
        f"{100 * row['errors_removed']:.1f} % of the errors removed; "
        f"{row['examples_per_s']:,} examples a second, features {row['features_seconds']:.1f} s; "
        f"{row['multiplications']:,} multiplications (generalist {row['of_generalist']:,})"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
