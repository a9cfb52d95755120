"""What a head over very many classes costs, held and in blocks, and a training run with a million classes.

    OMP_NUM_THREADS=1 python -m benchmarks.head step [--rows 1024 --size 512 --classes 200000 --rounds 5]
    OMP_NUM_THREADS=1 python -m benchmarks.head run [--classes 1000000 --size 256 --ranks 2]

step: loss and gradients of F.cross_entropy(F.linear(x, W, b), y) with smoothing 0.1, float32.  Every measurement is a
process of its own, the two forms in turn; extra memory is the peak resident size over that before the step, less the
gradients that either form returns.  Time is the process's own CPU time beside the clock's, because a shared machine's
clock says little; ratios are of medians, and within one call.

run: `trainer generalist` itself, by torchrun, with engine.shard_head: an MLP with `size` features and `classes` labels,
a few examples each of some of them, AdamW, validation, a checkpoint, export.  The memory of all ranks together is summed
every 50 ms from /proc (proportional set size: pages that the ranks share count once).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from networks.linear_logits import LinearLogits, Targets

SMOOTHING = 0.1
MIB = 2**20


def held(x, weight, bias, labels):
    return F.cross_entropy(F.linear(x, weight, bias), labels, label_smoothing=SMOOTHING)


def in_blocks(x, weight, bias, labels):
    targets = Targets.of_labels(labels, len(weight), SMOOTHING)
    return LinearLogits(x, weight, bias, len(weight)).cross_entropy(targets).mean()


FORMS = {"held": held, "blocks": in_blocks}


def one_step(form: str, rows: int, size: int, classes: int) -> None:
    """In a process of its own: print what one step took."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, size, generator=draw).mul_(0.5).requires_grad_()
    weight = torch.randn(classes, size, generator=draw).mul_(0.05).requires_grad_()
    bias, labels = torch.zeros(classes, requires_grad=True), torch.randint(classes, (rows,), generator=draw)
    few = [torch.zeros(8, size), torch.zeros(64, size), torch.zeros(64)]
    FORMS[form](*(part.requires_grad_() for part in few), labels[:8] % 64).backward()  # loads what a first call loads
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    loss = FORMS[form](x, weight, bias, labels)
    loss.backward()
    taken = time.perf_counter() - began, time.process_time() - cpu
    gradients = sum(part.grad.nbytes for part in (x, weight, bias))
    checks = float(x.grad.norm()), float(weight.grad.norm())
    print(json.dumps({
        "seconds": taken[0], "cpu_seconds": taken[1], "extra": peak_bytes() - before - gradients,
        "loss": float(loss.detach()), "gradients": checks,
    }))  # fmt: skip


def steps(rows: int, size: int, classes: int, rounds: int) -> None:
    found = {form: [] for form in FORMS}
    for _ in range(rounds):
        for form in FORMS:
            command = [sys.executable, "-m", "benchmarks.head", "one", form, str(rows), str(size), str(classes)]
            found[form].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"N = {rows}, D = {size}, C = {classes}, float32, smoothing {SMOOTHING}, {rounds} rounds, medians")
    middle = {
        form: {key: statistics.median(row[key] for row in found[form]) for key in ("seconds", "cpu_seconds", "extra")}
        for form in FORMS
    }
    for form, row in middle.items():
        print(f"  {form:8} {row['extra'] / MIB:8.0f} MiB extra  {row['seconds']:6.2f} s  {row['cpu_seconds']:6.2f} s CPU"
              f"  loss {found[form][0]['loss']:.6f}, |gradients| {found[form][0]['gradients']}")  # fmt: skip
    ratio = {key: middle["blocks"][key] / middle["held"][key] for key in middle["held"]}
    print(f"  blocks / held: memory {ratio['extra']:.3f} (bar 0.1), time {ratio['seconds']:.2f}, CPU time "
          f"{ratio['cpu_seconds']:.2f} (bar 1.5)")  # fmt: skip


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    step = tasks.add_parser("step")
    for name, default in (("rows", 1024), ("size", 512), ("classes", 200_000), ("rounds", 5)):
        step.add_argument(f"--{name}", type=int, default=default)
    one = tasks.add_parser("one")
    one.add_argument("form", choices=FORMS)
    for name in ("rows", "size", "classes"):
        one.add_argument(name, type=int)
    args = vars(parser.parse_args())
    {"step": steps, "one": one_step}[args.pop("task")](**args)


if __name__ == "__main__":
    main()
