"""What each engine holds in memory and sends per step on one rank, beside the formulas of docs/scaling.md.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling [--width 2000] [--processes 2]

An MLP of P weights takes a few AdamW steps.  Bytes held: the storages of all tensors alive between two steps, and
between backward and step.  Bytes sent: the tensors given to each collective in one step, from torch's profiler, as a
ring of R ranks moves them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
STATE = {  # bytes per weight on one of R ranks: weights, gradients, Adam's two averages, all float32
    "ddp": lambda R: 4 + 4 + 8,
    "zero0": lambda R: 4 + 4 + 8,
    "zero1": lambda R: 4 + 4 + (4 + 8) / R,
    "zero2": lambda R: 4 + (4 + 4 + 8) / R,
    "zero3": lambda R: (4 + 4 + 4 + 8) / R,
}
PASSES = {
    "all_reduce": 2,
    "reduce_scatter": 1,
    "all_gather": 1,
    "reduce": 1,
    "broadcast": 1,
}  # of a ring


def measure(name: str, width: int) -> None:
    import torch
    from torch.profiler import profile

    from networks import ModelSpec, build_classifier, parameter_count
    from pipeline.config import DEFAULT_SCHEDULE, Engine
    from trainer.distributed.ranks import process_group
    from trainer.engines import build_engine

    chosen = (
        {"name": "ddp"} if name == "ddp" else {"name": "deepspeed", "zero_stage": int(name[4:])}
    )
    engine = Engine(**chosen, device="cpu")
    with process_group(engine) as ranks:
        engine, R = build_engine(engine, ranks), ranks.world_size
        x = torch.zeros(8, 1, 20, 20, dtype=torch.uint8)
        options = {"width": width, "depth": 3}
        spec = ModelSpec("mlp", 1000, {"shape": (1, 20, 20), "mean": [0.5], "std": [0.25]}, options)
        network = build_classifier(spec)
        count = parameter_count(network)
        module = engine.prepare(network, DEFAULT_SCHEDULE.model_copy(update={"batch_size": 8 * R}))

        held = []

        def step():
            with engine.accumulating(last=True):
                engine.backward(module(x).float().square().mean())
            held.append(storages())
            engine.step(1e-3)

        for _ in range(3):
            step()
        between, before_step = storages(), held[-1]
        with profile(record_shapes=True) as trace:
            step()
        sent: dict[str, float] = {}
        for event in trace.events():
            kind = re.fullmatch(rf"(?:gloo|nccl):_?({'|'.join(PASSES)})\w*", event.name)
            if kind:
                share = (
                    R if kind[1] == "all_gather" else 1
                )  # its input is this rank's part of the whole
                moved = 4 * share * largest(event.input_shapes) * PASSES[kind[1]] * (R - 1) / R
                sent[kind[1]] = sent.get(kind[1], 0.0) + moved
        if ranks.is_main:
            print(
                json.dumps(
                    {
                        "engine": name,
                        "ranks": R,
                        "weights": count,
                        "held_bytes_per_weight": [
                            round(between / count, 2),
                            round(before_step / count, 2),
                        ],
                        "formula": round(STATE[name](R), 2),
                        "sent_bytes_per_weight": {
                            kind: round(moved / count, 2) for kind, moved in sent.items()
                        },
                    }
                ),
                flush=True,
            )
        engine.close()


def storages() -> int:
    """Bytes of all tensors that this process holds, each storage once."""
    import torch

    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def largest(shapes) -> int:
    sizes = [0]
    for shape in shapes:
        total = 1
        for length in shape if isinstance(shape, (list, tuple)) else []:
            total *= length if isinstance(length, int) else 1
        sizes.append(total if shape else 0)
    return max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return measure(options.child, options.width)
    for engine in options.engines:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            "--nproc-per-node",
            str(options.processes),
            "-m",
            "benchmarks.scaling",
            "--child",
            engine,
        ]
        command += ["--width", str(options.width)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


if __name__ == "__main__":
    main()
