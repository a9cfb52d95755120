"""What a head over very many classes costs, dense and in blocks, and a run with a million classes.

    OMP_NUM_THREADS=1 python -m benchmarks.head step [--rows 1024 --size 512
        --classes 200000]
    OMP_NUM_THREADS=1 python -m benchmarks.head run [--classes 1000000 --size 256
        --ranks 2]
    python -m benchmarks.head --quick           step with few rows and classes, in seconds
    python -m benchmarks.head run --quick       the other one so, in half a minute

step: loss and gradients of F.cross_entropy(F.linear(x, W, b), y) with smoothing 0.1, float32.
Every measurement is a process of its own, the two forms in turn.  Extra memory is the peak resident
size over that before the step, less the gradients that either form returns.  Time is the process's
own CPU time beside the clock's, because a shared machine's clock says little.  Ratios are of
medians, and within one call.

run: `trainer generalist` itself, by torchrun, with engine.shard_head: an MLP with `size` features
and `classes` labels, one example each of some of them, AdamW.  It is killed a step after its first
checkpoint and begun again: the rest of the steps, validation, a checkpoint, export.  Resident sizes
of all its processes are added up every 50 ms. Pages that they share count twice.

The last line of the output is one JSON object with what was measured.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from networks.linear_logits import LinearLogits, Targets
from pipeline.config import load_config, save_config
from trainer.data import ShardWriter, write_manifest

SMOOTHING = 0.1
MIB = 2**20
SETTINGS = {
    "step": {"rows": 1024, "size": 512, "classes": 200_000, "rounds": 5},
    "run": {"classes": 1_000_000, "size": 256, "ranks": 2, "batch": 256, "steps": 4},
}
QUICK = {
    "step": {"rows": 64, "size": 32, "classes": 20_000, "rounds": 1},
    "run": {"classes": 2000, "size": 16, "ranks": 2, "batch": 32, "steps": 60},
}


def dense(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), labels, label_smoothing=SMOOTHING)


def in_blocks(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    targets = Targets.of_labels(labels, len(weight), SMOOTHING)
    return LinearLogits(x, weight, bias, len(weight)).cross_entropy(targets).mean()


FORMS = {"dense": dense, "blocks": in_blocks}


def one_step(form: str, rows: int, size: int, classes: int) -> dict[str, Any]:
    """What one step took, in a process of its own."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, size, generator=draw).mul_(0.5).requires_grad_()
    weight = torch.randn(classes, size, generator=draw).mul_(0.05).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    labels = torch.randint(classes, (rows,), generator=draw)
    load_libraries(form, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    began, began_cpu = time.perf_counter(), time.process_time()
    loss = FORMS[form](x, weight, bias, labels)
    loss.backward()
    seconds = time.perf_counter() - began
    cpu_seconds = time.process_time() - began_cpu
    gradients = [part.grad for part in (x, weight, bias) if part.grad is not None]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "extra_bytes": peak_bytes() - before - sum(gradient.nbytes for gradient in gradients),
        "loss": float(loss.detach()),
        "gradient_norms": [float(gradient.norm()) for gradient in gradients[:2]],
    }


def load_libraries(form: str, size: int) -> None:
    """A small step, for what a first call loads."""
    few = [torch.zeros(8, size), torch.zeros(64, size), torch.zeros(64)]
    x, weight, bias = (part.requires_grad_() for part in few)
    FORMS[form](x, weight, bias, torch.arange(8)).backward()


def step(rows: int, size: int, classes: int, rounds: int) -> dict[str, Any]:
    measured = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            command = [sys.executable, "-m", "benchmarks.head", "one", form]
            command += [str(number) for number in (rows, size, classes)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured[form].append(json.loads(output))
    medians = {form: median_of(measured[form]) for form in FORMS}
    ratio = {key: medians["blocks"][key] / medians["dense"][key] for key in medians["dense"]}
    print(f"N = {rows}, D = {size}, C = {classes}, float32, smoothing {SMOOTHING}")
    print(f"medians of {rounds} rounds")
    for form, row in medians.items():
        first = measured[form][0]
        print(
            f"  {form:8} {row['extra_bytes'] / MIB:8.0f} MiB extra {row['seconds']:6.2f} s "
            f"{row['cpu_seconds']:6.2f} s CPU; loss {first['loss']:.6f}, "
            f"|gradients| {first['gradient_norms']}"
        )
    print(
        f"  blocks / dense: memory {ratio['extra_bytes']:.3f} (bar 0.1), "
        f"time {ratio['seconds']:.2f}, CPU time {ratio['cpu_seconds']:.2f} (bar 1.5)"
    )
    losses = {form: rows[0]["loss"] for form, rows in measured.items()}
    return {"medians": medians, "blocks_over_dense": ratio, "losses": losses}


def median_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("seconds", "cpu_seconds", "extra_bytes")
    return {key: statistics.median(row[key] for row in rows) for key in keys}


def run(classes: int, size: int, ranks: int, batch: int, steps: int) -> dict[str, Any]:
    attempts = {}
    print(f"C = {classes}, D = {size}, batch {batch}, {ranks} ranks")
    with tempfile.TemporaryDirectory() as temporary:
        data, root = Path(temporary) / "data", Path(temporary) / "run"
        write_shards(data, classes, batch)
        save_run_config(data, root, size, batch, steps)
        for attempt in ("killed", "resumed"):
            kill_after = steps if attempt == "killed" else None
            peak, seconds = train(root, ranks, kill_after)
            rows = metrics(root)
            attempts[attempt] = summary = attempt_summary(rows, peak, seconds)
            print(
                f"{attempt} after {summary['steps']} steps, {seconds:.0f} s: "
                f"together {peak / 2**30:.2f} GiB at most (bar 12)\n"
                f"  {summary['seconds_per_step']:.2f} s a step (median), "
                f"loss {summary['first_loss']:.3f} to {summary['last_loss']:.3f}, "
                f"last row {rows[-1]}",
                flush=True,
            )
    return attempts


def attempt_summary(rows: list[dict[str, Any]], peak: int, seconds: float) -> dict[str, Any]:
    losses = [row["loss"] for row in rows if "loss" in row]
    paces = [
        later["seconds"] - row["seconds"]
        for row, later in zip(rows, rows[1:], strict=False)
        if "loss" in later
    ]
    return {
        "steps": len(losses),
        "seconds": seconds,
        "seconds_per_step": statistics.median(paces),
        "peak_bytes": peak,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def write_shards(directory: Path, classes: int, batch: int) -> None:
    """One example each of 4 * batch classes."""
    rng = np.random.default_rng(0)
    names = [str(c) for c in range(classes)]
    labels = rng.choice(classes, 4 * batch, replace=False)
    inputs = rng.normal(size=(len(labels), 64)).astype(np.float32)
    splits = {}
    for split in ("train", "val"):
        with ShardWriter(directory, split, names) as writer:
            for index, (label, values) in enumerate(zip(labels, inputs, strict=True)):
                file = io.BytesIO()
                np.save(file, values)
                writer.write(
                    {"__key__": f"{index:06d}", "npy": file.getvalue(), "cls": b"%d" % label}
                )
        splits[split] = writer.facts
    write_manifest(directory, names, splits)


def metrics(root: Path) -> list[dict[str, Any]]:
    path = root / "generalist" / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_run_config(data: Path, root: Path, size: int, batch: int, steps: int) -> None:
    train = {
        "steps": 2 * steps,
        "batch_size": batch,
        "learning_rate": 0.003,
        "log_every": 1,
        "checkpoint_every": steps,
        "schedule": "constant",
        "warmup": 0.0,
    }
    sections = {
        "data": {split: str(data) for split in ("train", "val", "test")},
        "model": {"name": "mlp", "width": size, "depth": 1, "embedding": size},
        "train": train,
        "engine": {"device": "cpu", "shard_head": True},
    }
    root.mkdir(exist_ok=True)
    save_config(load_config(None, [], sections), root / "config.toml")


def train(root: Path, ranks: int, kill_after: int | None) -> tuple[int, float]:
    """(largest sum of resident sizes, seconds) of the stage.

    kill_after: end it a step after this one, behind which there is a checkpoint.
    """
    command = [sys.executable, "-P", "-m", "trainer.distributed.torchrun", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--", "generalist", "--run", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(root / "output.txt", "w") as output:
        began, peak = time.monotonic(), 0
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            if kill_after is not None and len(metrics(root)) > kill_after:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)
    expected = 0 if kill_after is None else -signal.SIGKILL
    assert process.returncode == expected, (root / "output.txt").read_text()[-3000:]
    return peak, time.monotonic() - began


def resident_bytes(root: int) -> int:
    """Of a process and all below it."""
    page = os.sysconf("SC_PAGESIZE")
    sizes, parents = {}, {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (directory / "stat").read_text().rpartition(")")[2]
            resident_pages = int((directory / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
        parents[int(directory.name)] = int(after_name.split()[1])
        sizes[int(directory.name)] = resident_pages * page
    family = {root}
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= children
    return sum(sizes.get(pid, 0) for pid in family)


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rows and classes, in seconds")
    tasks = parser.add_subparsers(dest="task")
    for task, settings in SETTINGS.items():
        of_task = tasks.add_parser(task)
        of_task.add_argument("--quick", action="store_true", default=argparse.SUPPRESS)
        for name in settings:
            of_task.add_argument(f"--{name}", type=int)
    one = tasks.add_parser("one", help="what step starts: one measurement")
    one.add_argument("form", choices=FORMS)
    for name in ("rows", "size", "classes"):
        one.add_argument(name, type=int)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    if args.task == "one":
        print(json.dumps(one_step(args.form, args.rows, args.size, args.classes)))
        return
    task = args.task or "step"
    settings = dict(QUICK[task] if args.quick else SETTINGS[task])
    for name in settings:
        given = getattr(args, name, None)
        if given is not None:
            settings[name] = given
    measure = {"step": step, "run": run}[task]
    print(json.dumps({"task": task, "quick": args.quick, **settings, **measure(**settings)}))


if __name__ == "__main__":
    main()
