"""What each engine holds in memory and sends per step on one rank, beside formulas.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling [--width 2000] [--processes 2]
    python -m benchmarks.scaling --quick          seconds: does it run at all?

The formulas are those of docs/scaling.md.  An MLP of P weights takes a few AdamW steps.

Bytes held  the storages of all tensors alive between two steps, between backward and step, with a
            checkpoint's state at hand, and while a layer computes in a validation.
Bytes sent  the tensors given to each collective in one step, from torch's profiler, as a ring of R
            ranks moves them.

Each engine prints its row as a JSON object. The last line is {"rows": [all of them]}.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable

import torch
from torch.profiler import profile

from networks import InputSpec, ModelSpec, build_classifier, parameter_count
from pipeline.config import DEFAULT_SCHEDULE, Engine
from pipeline.scaling import STATE, Network, sent_per_step
from trainer.distributed.ranks import process_group
from trainer.engines import Engine as TrainingEngine
from trainer.engines import build_engine

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
# How often a ring moves the whole.
PASSES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "reduce": 1, "broadcast": 1}
COLLECTIVE = re.compile(rf"(?:gloo|nccl):_?({'|'.join(PASSES)})\w*")
QUICK = {"width": 200, "engines": ["ddp"], "processes": 2}


def engine_config(name: str) -> Engine:
    if name == "ddp":
        return Engine(name="ddp", device="cpu")
    return Engine(name="deepspeed", zero_stage=int(name.removeprefix("zero")), device="cpu")


def measure(name: str, width: int) -> None:
    """One process of the job that `main` started. Rank 0 prints one JSON line."""
    config = engine_config(name)
    with process_group(config) as ranks:
        engine = build_engine(config, ranks)
        x = torch.zeros(8, 1, 20, 20, dtype=torch.uint8)
        spec = ModelSpec(
            "mlp",
            1000,
            InputSpec((1, 20, 20), mean=(0.5,), std=(0.25,)),
            {"width": width, "depth": 3},
        )
        network = build_classifier(spec)
        count = parameter_count(network)
        schedule = DEFAULT_SCHEDULE.model_copy(update={"batch_size": 8 * ranks.world_size})
        module = engine.prepare(network, schedule)

        def backward() -> None:
            with engine.accumulating(last=True):
                engine.backward(module(x).float().square().mean())

        for _ in range(2):
            backward()
            engine.step(1e-3)
        backward()
        before_step = storages()
        engine.step(1e-3)
        between = storages()
        with profile(record_shapes=True) as trace:
            backward()
            engine.step(1e-3)
        at_checkpoint = held_with_state(engine)
        at_validation = held_in_validation(engine, x)
        if ranks.is_main:
            sent = sent_bytes(trace.events() or (), ranks.world_size)
            row = {
                "engine": name,
                "ranks": ranks.world_size,
                "weights": count,
                "held_bytes_per_weight": [round(between / count, 2), round(before_step / count, 2)],
                "formula_sent": round(
                    sent_per_step(Network(count, 0, 0, 0), schedule, config, ranks.world_size)
                    / count,
                    2,
                ),
                "formula": round(STATE[name](ranks.world_size, 2), 2),
                "at_checkpoint": round(at_checkpoint / count, 2),
                "at_validation": round(at_validation / count, 2),
                "largest_layer": round(4 * largest_layer(spec) / count, 2),
                "sent_bytes_per_weight": {
                    kind: round(moved / count, 2) for kind, moved in sent.items()
                },
            }
            print(json.dumps(row), flush=True)
        engine.close()


def held_with_state(engine: TrainingEngine) -> int:
    """Bytes while a checkpoint's state is at hand, which is written tensor by tensor."""
    state = engine.state()
    held = storages()
    del state
    return held


def held_in_validation(engine: TrainingEngine, x: torch.Tensor) -> int:
    """Bytes of the layer's forward pass in which most is held."""
    held = [0]

    def note(*_: object) -> None:
        held.append(storages())

    with engine.eval_model(None) as network, torch.no_grad():
        hooks = [each.register_forward_hook(note) for each in network.modules()]
        network.eval()(x)
        for hook in hooks:
            hook.remove()
    return max(held)


def largest_layer(spec: ModelSpec) -> int:
    """Weights of the module that has most of its own."""
    modules = build_classifier(spec).modules()
    return max(sum(p.numel() for p in each.parameters(recurse=False)) for each in modules)


def sent_bytes(events: Iterable, ranks: int) -> dict[str, float]:
    """Bytes that a ring of `ranks` moves on each, by kind of collective. events: a profile's."""
    sent: dict[str, float] = {}
    for event in events:
        collective = COLLECTIVE.fullmatch(event.name)
        if not collective:
            continue
        kind = collective[1]
        # An all_gather's input is this rank's part of the whole.
        parts = ranks if kind == "all_gather" else 1
        moved = 4 * parts * largest(event.input_shapes) * PASSES[kind] * (ranks - 1) / ranks
        sent[kind] = sent.get(kind, 0.0) + moved
    return sent


def storages() -> int:
    """Bytes of all tensors that this process holds, each storage once."""
    gc.unfreeze()  # what a stage has frozen is not listed
    gc.collect()
    sizes: dict[int, int] = {}
    for value in gc.get_objects():
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            continue
        tensors = [value]
        if value.is_leaf and value.grad is not None:
            tensors.append(value.grad)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def largest(shapes: Iterable) -> int:
    """Entries of the largest of some inputs' shapes. Inputs that are no tensors have none."""
    sizes = [0]
    for shape in shapes:
        total = 1
        for length in shape if isinstance(shape, (list, tuple)) else []:
            total *= length if isinstance(length, int) else 1
        sizes.append(total if shape else 0)
    return max(sizes)


def run_engine(engine: str, options: argparse.Namespace) -> dict:
    """Start the processes of one engine. Their row."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(options.processes), "-m", "benchmarks.scaling"]
    command += ["--child", engine, "--width", str(options.width)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    output = subprocess.run(
        command, check=True, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout
    row = json.loads(output.splitlines()[-1])
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--quick", action="store_true", help="a narrow network by DDP, in seconds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return measure(options.child, options.width)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    print(json.dumps({"rows": [run_engine(engine, options) for engine in options.engines]}))


if __name__ == "__main__":
    main()
