"""What a head over very many classes costs, held and in blocks, and a training run with a million classes.

    OMP_NUM_THREADS=1 python -m benchmarks.head step [--rows 1024 --size 512 --classes 200000 --rounds 5]
    OMP_NUM_THREADS=1 python -m benchmarks.head run [--classes 1000000 --size 256 --ranks 2]

step: loss and gradients of F.cross_entropy(F.linear(x, W, b), y) with smoothing 0.1, float32.  Every measurement is a
process of its own, the two forms in turn; extra memory is the peak resident size over that before the step, less the
gradients that either form returns.  Time is the process's own CPU time beside the clock's, because a shared machine's
clock says little; ratios are of medians, and within one call.

run: `trainer generalist` itself, by torchrun, with engine.shard_head: an MLP with `size` features and `classes` labels,
one example each of some of them, AdamW.  It is killed a step after its first checkpoint and begun again: the rest of
the steps, validation, a checkpoint, export.  Resident sizes of all its processes are added up every 50 ms; pages that
they share count twice.
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

import numpy as np
import torch
import torch.nn.functional as F

from networks.linear_logits import LinearLogits, Targets
from pipeline.config import load_config, save_config
from trainer.data import ShardWriter, write_manifest

SMOOTHING = 0.1
MIB = 2**20


def materialize(x, weight, bias, labels):
    return F.cross_entropy(F.linear(x, weight, bias), labels, label_smoothing=SMOOTHING)


def in_blocks(x, weight, bias, labels):
    targets = Targets.of_labels(labels, len(weight), SMOOTHING)
    return LinearLogits(x, weight, bias, len(weight)).cross_entropy(targets).mean()


FORMS = {"dense": materialize, "blocks": in_blocks}


def one_step(form: str, rows: int, size: int, classes: int) -> None:
    """In a process of its own: print what one step took."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, size, generator=draw).mul_(0.5).requires_grad_()
    weight = torch.randn(classes, size, generator=draw).mul_(0.05).requires_grad_()
    bias, labels = (
        torch.zeros(classes, requires_grad=True),
        torch.randint(classes, (rows,), generator=draw),
    )
    few = [torch.zeros(8, size), torch.zeros(64, size), torch.zeros(64)]
    FORMS[form](
        *(part.requires_grad_() for part in few), labels[:8] % 64
    ).backward()  # loads what a first call loads
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    loss = FORMS[form](x, weight, bias, labels)
    loss.backward()
    taken = time.perf_counter() - began, time.process_time() - cpu
    gradients = sum(part.grad.nbytes for part in (x, weight, bias))
    checks = float(x.grad.norm()), float(weight.grad.norm())
    print(
        json.dumps(
            {
                "seconds": taken[0],
                "cpu_seconds": taken[1],
                "extra": peak_bytes() - before - gradients,
                "loss": float(loss.detach()),
                "gradients": checks,
            }
        )
    )


def steps(rows: int, size: int, classes: int, rounds: int) -> None:
    found = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.head",
                "one",
                form,
                str(rows),
                str(size),
                str(classes),
            ]
            found[form].append(
                json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout
                )
            )
    print(
        f"N = {rows}, D = {size}, C = {classes}, float32, smoothing {SMOOTHING}, {rounds} rounds, medians"
    )
    middle = {
        form: {
            key: statistics.median(row[key] for row in found[form])
            for key in ("seconds", "cpu_seconds", "extra")
        }
        for form in FORMS
    }
    for form, row in middle.items():
        print(
            f"  {form:8} {row['extra'] / MIB:8.0f} MiB extra {row['seconds']:6.2f} s {row['cpu_seconds']:6.2f} s CPU;"
            f" loss {found[form][0]['loss']:.6f}, |gradients| {found[form][0]['gradients']}"
        )
    ratio = {key: middle["blocks"][key] / middle["dense"][key] for key in middle["dense"]}
    print(
        f"  blocks / held: memory {ratio['extra']:.3f} (bar 0.1), time {ratio['seconds']:.2f}, CPU time "
        f"{ratio['cpu_seconds']:.2f} (bar 1.5)"
    )


def run(classes: int, size: int, ranks: int, batch: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        data, root = Path(place) / "data", Path(place) / "run"
        write_shards(data, classes, batch)
        for killed in (True, False):
            peak, seconds = train(data, root, size, ranks, batch, steps, killed)
            rows = metrics(root)
            losses = [row["loss"] for row in rows if "loss" in row]
            paces = [
                later["seconds"] - row["seconds"]
                for row, later in zip(rows, rows[1:], strict=False)
                if "loss" in later
            ]
            print(
                f"C = {classes}, D = {size}, batch {batch}, {ranks} ranks, {'killed' if killed else 'gone on with'} "
                f"after {len(losses)} steps, {seconds:.0f} s: together {peak / 2**30:.2f} GiB at most (bar 12)\n"
                f"  {statistics.median(paces):.2f} s a step (median), loss {losses[0]:.3f} to {losses[-1]:.3f}, "
                f"last row {rows[-1]}",
                flush=True,
            )


def write_shards(directory: Path, classes: int, batch: int) -> None:
    rng, names, splits = np.random.default_rng(0), [str(c) for c in range(classes)], {}
    labels = rng.choice(classes, 4 * batch, replace=False)
    inputs = rng.normal(size=(len(labels), 64)).astype(np.float32)
    for split in ("train", "val"):
        with ShardWriter(directory, split, names) as writer:
            for number, (label, values) in enumerate(zip(labels, inputs, strict=True)):
                file = io.BytesIO()
                np.save(file, values)
                writer.write(
                    {"__key__": f"{number:06d}", "npy": file.getvalue(), "cls": b"%d" % label}
                )
        splits[split] = writer.facts
    write_manifest(directory, names, splits)


def metrics(root: Path) -> list[dict]:
    path = root / "generalist" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(
    data: Path, root: Path, size: int, ranks: int, batch: int, steps: int, kill: bool
) -> tuple[int, float]:
    """(largest sum of resident sizes, seconds) of the stage; kill: end it a step after the checkpoint of `steps`."""
    config = load_config(
        None,
        [],
        {
            "data": {split: str(data) for split in ("train", "val", "test")},
            "model": {"name": "mlp", "width": size, "depth": 1, "embedding": size},
            "train": {
                "steps": 2 * steps,
                "batch_size": batch,
                "learning_rate": 0.003,
                "log_every": 1,
                "checkpoint_every": steps,
                "schedule": "constant",
                "warmup": 0.0,
            },
            "engine": {"device": "cpu", "shard_head": True},
        },
    )
    root.mkdir(exist_ok=True)
    save_config(config, root / "config.toml")
    command = [
        sys.executable,
        "-m",
        "trainer.distributed.torchrun",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "--",
        "generalist",
        "--run",
        str(root),
    ]
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
            if kill and len(metrics(root)) > steps:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)
    assert process.returncode == (-signal.SIGKILL if kill else 0), (
        root / "output.txt"
    ).read_text()[-3000:]
    return peak, time.monotonic() - began


def resident_bytes(root: int) -> int:
    """Of a process and all below it."""
    sizes, parents = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int(
                (place / "stat").read_text().rpartition(")")[2].split()[1]
            )
            sizes[int(place.name)] = int((place / "statm").read_text().split()[1]) * os.sysconf(
                "SC_PAGESIZE"
            )
        except (OSError, IndexError):
            continue  # it ended meanwhile
    family = {root}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(sizes.get(each, 0) for each in family)


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    step = tasks.add_parser("step")
    for name, default in (("rows", 1024), ("size", 512), ("classes", 200_000), ("rounds", 5)):
        step.add_argument(f"--{name}", type=int, default=default)
    whole = tasks.add_parser("run")
    for name, default in (
        ("classes", 1_000_000),
        ("size", 256),
        ("ranks", 2),
        ("batch", 256),
        ("steps", 4),
    ):
        whole.add_argument(f"--{name}", type=int, default=default)
    one = tasks.add_parser("one")
    one.add_argument("form", choices=FORMS)
    for name in ("rows", "size", "classes"):
        one.add_argument(name, type=int)
    args = vars(parser.parse_args())
    {"step": steps, "run": run, "one": one_step}[args.pop("task")](**args)


if __name__ == "__main__":
    main()
