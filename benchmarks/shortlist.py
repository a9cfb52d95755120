"""How long an answer takes: a generalist's, two networks' in full, and with a shortlist.

    OMP_NUM_THREADS=1 python -m benchmarks.shortlist [--onnx] [--classes 26386
        --rounds 15]
    python -m benchmarks.shortlist --quick      few classes, in seconds

Untrained MLPs of 64 and 256 numbers an embedding, batches of 1 and 256 rows, one thread.  The forms
take turns, so that a shared machine troubles all alike. Each number is a median of the rounds, in
milliseconds.  Ratios are medians of each round's.  They are of the process's own CPU time, because
a shared machine's clock says little. The clock's stand beside them.  `full` is the geometric mean
of both over all classes, `trunk` the second network's trunk by itself.  With --onnx the same is
measured in onnxruntime, where it is installed.  `wide head` is the generalist with its head's bias
as the weight of a further feature, as the ensembles' ONNX programs have it.

A shortlist of 100 has a bar: its latency is at most 1.3 times the generalist's at 256 numbers, 1.5
times at 64, and the second trunk's.  The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor, nn

from benchmarks.timing import (
    Softmax,
    SoftmaxOfWideHead,
    Times,
    in_onnx,
    in_torch,
    measure,
    medians,
    ratio,
)
from ensemble import ShortlistEnsemble, generalised_mean
from networks import Classifier, InputSpec, ModelSpec, build_classifier

BARS = {64: 1.5, 256: 1.3}
BARRED = "shortlist of 100"
SIZES = (20, 100)
BATCHES = (1, 256)
INPUTS = 256


class Full(nn.Module):
    """The geometric mean of two networks over all classes."""

    def __init__(self, first: Classifier, second: Classifier):
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, raw: Tensor) -> Tensor:
        log_p = [network(raw).log_softmax(1) for network in (self.first, self.second)]
        return generalised_mean(torch.stack(log_p)).exp()


class Trunk(nn.Module):
    """What the second network costs before its head."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.network = network

    def forward(self, raw: Tensor) -> Tensor:
        return self.network.trunk(self.network.preprocess(raw))


def modules_of(classes: int, embedding: int) -> dict[str, nn.Module]:
    """What is measured, by name."""
    torch.manual_seed(0)
    inputs = InputSpec((INPUTS,), dtype="float32", scale=1.0)
    spec = ModelSpec("mlp", classes, inputs, {"width": 256, "depth": 1, "embedding": embedding})
    first, second = build_classifier(spec).eval(), build_classifier(spec).eval()
    modules = {
        "generalist": Softmax(first),
        "wide head": SoftmaxOfWideHead(first),
        "full": Full(first, second),
        "trunk": Trunk(second),
    }
    for size in SIZES:
        modules[f"shortlist of {size}"] = ShortlistEnsemble([first, second], size).program
    return modules


def measured(classes: int, rounds: int, onnx: bool) -> list[dict]:
    """A row for each way of running, size of embedding and batch."""
    ways = {"torch": in_torch}
    if onnx:
        ways["onnx"] = in_onnx
    rows = []
    for embedding in BARS:
        modules = modules_of(classes, embedding)
        for way, forms_of in ways.items():
            forms = forms_of(modules)
            for batch in BATCHES:
                raw = torch.randn(batch, INPUTS, generator=torch.Generator().manual_seed(1))
                times = measure(forms, raw, rounds)
                rows.append({"way": way, "embedding": embedding, "batch": batch} | row_of(times))
                rows[-1]["bar"] = BARS[embedding]
                say(rows[-1])
    return rows


def row_of(times: dict[str, Times]) -> dict:
    return {
        "ms": medians(times, clock=True),
        "cpu_ms": medians(times),
        "ratio": ratio(times, BARRED, "generalist", less="trunk"),
        "ratio_of_clock": ratio(times, BARRED, "generalist", less="trunk", clock=True),
        "ratio_to_wide_head": ratio(times, BARRED, "wide head", less="trunk"),
    }


def say(row: dict) -> None:
    times = ", ".join(f"{name} {value:.3f}" for name, value in row["cpu_ms"].items())
    print(
        f"{row['way']:5} {row['embedding']:3} numbers, batch {row['batch']:3}: {times} ms of CPU; "
        f"{BARRED} without the trunk {row['ratio']:.2f} x the generalist (bar {row['bar']})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=26_386)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--onnx", action="store_true", help="measure onnxruntime, too")
    parser.add_argument("--quick", action="store_true", help="few classes and rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    classes, rounds = args.classes, args.rounds
    if args.quick:
        classes, rounds = 2000, 3
    with torch.no_grad():
        rows = measured(classes, rounds, args.onnx)
    passed = all(row["ratio"] <= row["bar"] for row in rows)
    print(json.dumps({"classes": classes, "rounds": rounds, "rows": rows, "passed": passed}))


if __name__ == "__main__":
    main()
