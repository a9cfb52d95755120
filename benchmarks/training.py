"""Samples per second of the product's loop, beside a bare loop around the same network, batch and precision.

    OMP_NUM_THREADS=1 python -m benchmarks.training                     1 and 2 processes, DDP and DeepSpeed stage 1
    python -m benchmarks.training --device cuda --shapes resnet50 vit   one GPU: memory and model FLOPs utilisation too

The bare loops are written below: DistributedDataParallel, or deepspeed.initialize, over decoded inputs in memory.  Ours
draws the same through the training stream and logs, agrees on stop signals and feeds its watchdog as always.  In each
process the two take turns, round by round; the medians' ratio is what counts, not the rates.
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
from contextlib import closing
from pathlib import Path

from benchmarks.in_memory import InMemory

BARS = {"ddp": 0.97, "deepspeed": 0.95}
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}  # dense bf16, from the vendor's data sheets
SHAPES = {  # builder, input shape, classes, global batch per process
    "convnet": ("convnet", (1, 32, 32), 3755, 256),
    "resnet50": ("benchmarks.shapes:resnet50", (3, 224, 224), 1000, 128),
    "vit": ("benchmarks.shapes:vit_b16", (3, 224, 224), 1000, 128),
}


def network_of(shape: str):
    from benchmarks import shapes
    from networks import ModelSpec, build_classifier

    builder, size, classes, _ = SHAPES[shape]
    named = {name: getattr(shapes, name.partition(":")[2]) for name in (builder,) if ":" in name}
    options = {} if named else {"width": 16, "depth": 3, "embedding": 64}
    spec = ModelSpec(builder, classes, {"shape": size, "mean": [0.5], "std": [0.25]}, options)
    return build_classifier(spec, named)


def random_images(size: tuple[int, ...], classes: int, count: int) -> InMemory:
    import numpy as np

    rng = np.random.default_rng(0)
    return InMemory(
        rng.integers(0, 256, (count, *size), dtype=np.uint8), rng.integers(0, classes, count)
    )


def ours(shape: str, engine, ranks, shards, steps: int, warm: int, place: Path) -> float:
    """Global samples per second after `warm` steps, from the rows that the loop itself logs."""
    from pipeline.config import Schedule
    from trainer.core.loop import train
    from trainer.core.objectives import classify
    from trainer.data.streams import Source, TrainingStream, shuffled
    from trainer.engines import build_engine

    batch = SHAPES[shape][3] * ranks.world_size
    schedule = schedule_of(Schedule, batch, log_every=warm)
    stream = TrainingStream([Source(shards, shuffled(len(shards), 0), batch)], 0)
    with closing(build_engine(engine, ranks)) as engine:
        train(
            engine,
            network_of(shape),
            classify(),
            stream,
            schedule,
            steps,
            ranks=ranks,
            checkpoints=place / "checkpoints",
            metrics=place / "metrics.jsonl",
        )
    if not ranks.is_main:
        return 0.0
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["step"] == warm)
    last = rows[-1]
    return (last["examples"] - first["examples"]) / (last["seconds"] - first["seconds"])


def bare(shape: str, engine, ranks, shards, steps: int, warm: int, place: Path) -> float:
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from pipeline.config import Schedule
    from trainer.core.optim import build_optimizer
    from trainer.distributed.ranks import precision

    batch, dtype = SHAPES[shape][3], precision(engine, ranks.device)
    network = network_of(shape).to(ranks.device).train()
    optimizer = build_optimizer(network, schedule_of(Schedule, batch * ranks.world_size))
    images, labels = torch.from_numpy(shards.images), torch.from_numpy(shards.labels)
    generator = torch.Generator().manual_seed(ranks.rank)
    if engine.name == "deepspeed":
        from trainer.engines.zero import import_deepspeed

        low = (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
            if dtype == torch.bfloat16
            else {}
        )
        model, *_ = import_deepspeed(ranks).initialize(
            model=network,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": batch,
                "zero_optimization": {"stage": engine.zero_stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": sys.maxsize,
                **low,
            },
        )
    else:
        devices = [ranks.device.index] if ranks.device.type == "cuda" else None
        model = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)
    for step in range(steps):
        if step == warm:
            synchronise(ranks)
            began = time.perf_counter()
        ids = torch.randint(len(labels), (batch,), generator=generator)
        x, y = images[ids].to(ranks.device), labels[ids].to(ranks.device)
        with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x).float(), y)
        if engine.name == "deepspeed":
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    synchronise(ranks)
    rate = (steps - warm) * batch * ranks.world_size / (time.perf_counter() - began)
    if engine.name == "deepspeed":
        model.destroy()
    else:
        model.logger = model.reducer = None
    return rate


def schedule_of(kind, batch: int, log_every: int = 10):
    from pipeline.config import DEFAULT_SCHEDULE

    update = {"batch_size": batch, "schedule": "constant", "warmup": 0.0, "log_every": log_every}
    update["checkpoint_every"] = 10**9
    return DEFAULT_SCHEDULE.model_copy(update=update)


def synchronise(ranks) -> None:
    import torch

    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def measure(shape: str, name: str, device: str, rounds: int, steps: int, warm: int) -> None:
    """One process of the job that `main` started; rank 0 prints one JSON line."""
    import torch

    from pipeline.config import Engine
    from trainer.distributed.ranks import process_group

    engine = Engine(name=name, zero_stage=1, device=device)
    with process_group(engine) as ranks:
        _, size, classes, batch = SHAPES[shape]
        shards = random_images(size, classes, 8192 if size[1] <= 64 else 1024)
        rates: dict[str, list[float]] = {"ours": [], "bare": []}
        memory = {}
        for number in range(rounds):
            turns = [("ours", ours), ("bare", bare)]
            for which, run in turns if number % 2 == 0 else turns[::-1]:
                if ranks.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                with tempfile.TemporaryDirectory() as place:
                    rates[which].append(run(shape, engine, ranks, shards, steps, warm, Path(place)))
                if ranks.device.type == "cuda":
                    memory[which] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if not ranks.is_main:
            return
        median = {which: statistics.median(values) for which, values in rates.items()}
        row = {
            "shape": shape,
            "engine": name,
            "processes": ranks.world_size,
            "batch": batch * ranks.world_size,
            "samples_per_s": {which: round(rate, 1) for which, rate in median.items()},
            "ratio": round(median["ours"] / median["bare"], 3),
            "bar": BARS[name],
            "peak_gib": memory,
        }
        peak = next((flops for card, flops in PEAK_FLOPS.items() if card in card_name(ranks)), None)
        if peak:
            flops = training_flops(shape, ranks)
            row["mfu"] = {
                which: round(rate * flops / ranks.world_size / peak, 3)
                for which, rate in median.items()
            }
        print(json.dumps(row), flush=True)


def card_name(ranks) -> str:
    import torch

    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""


def training_flops(shape: str, ranks) -> float:
    """Floating-point operations of one example's forward and backward pass, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = network_of(shape).to(ranks.device)
    x = torch.zeros(2, *SHAPES[shape][1], dtype=torch.uint8, device=ranks.device)
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    return counter.get_total_flops() / 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", default=["convnet"], choices=list(SHAPES))
    parser.add_argument("--engines", nargs="+", default=["ddp", "deepspeed"], choices=list(BARS))
    parser.add_argument("--processes", nargs="+", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return measure(*options.child, options.device, options.rounds, options.steps, options.warm)
    for shape in options.shapes:
        for engine in options.engines:
            for processes in options.processes or ([1, 2] if options.device == "cpu" else [1]):
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command += [
                    "--nproc-per-node",
                    str(processes),
                    "-m",
                    "benchmarks.training",
                    "--child",
                    shape,
                    engine,
                ]
                for name in ("device", "rounds", "steps", "warm"):
                    command += [f"--{name}", str(getattr(options, name))]
                subprocess.run(command, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


if __name__ == "__main__":
    main()
