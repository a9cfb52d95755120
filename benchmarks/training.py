"""Samples per second of the product's loop, beside a bare loop.

    # 1 and 2 processes, DDP and DeepSpeed stage 1
    OMP_NUM_THREADS=1 python -m benchmarks.training
    # one GPU: memory and FLOPs utilisation too
    python -m benchmarks.training --device cuda --shapes resnet50 vit
    # seconds: does it run at all?
    python -m benchmarks.training --quick

Both train the same network, with the same batch and precision.  The bare loops are written below:
DistributedDataParallel, or deepspeed.initialize, over decoded inputs in memory.  Ours draws the
same inputs through the training stream, and logs, agrees on stop signals and feeds its watchdog as
always.  In each process the two take turns, round by round. The medians' ratio is what counts, not
the rates.

Each case prints its row as a JSON object. The last line is {"rows": [all of them]}.
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
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import shapes
from benchmarks.in_memory import InMemory
from networks import Classifier, InputSpec, ModelSpec, build_classifier
from pipeline.config import DEFAULT_SCHEDULE, Engine, ResolvedSchedule
from trainer.core.loop import Trainer, TrainingFiles, TrainingTask
from trainer.core.objectives import classify
from trainer.core.optim import build_optimizer
from trainer.data.streams import Source, TrainingStream, shuffled
from trainer.distributed.ranks import Ranks, precision, process_group
from trainer.engines import build_engine
from trainer.engines.zero import import_deepspeed

REQUIRED_RATIO = {"ddp": 0.97, "deepspeed": 0.95}
# Dense bf16, from the vendor's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
QUICK = {"processes": [1], "engines": ["ddp"], "rounds": 1, "steps": 6, "warm": 2}


class Shape(NamedTuple):
    """A network, its inputs and the examples per step of one process."""

    builder: str
    input: tuple[int, ...]
    classes: int
    batch: int


SHAPES = {
    "convnet": Shape("convnet", (1, 32, 32), 3755, 256),
    "resnet50": Shape("benchmarks.shapes:resnet50", (3, 224, 224), 1000, 128),
    "vit": Shape("benchmarks.shapes:vit_b16", (3, 224, 224), 1000, 128),
}
BUILDERS = {
    "benchmarks.shapes:resnet50": shapes.resnet50,
    "benchmarks.shapes:vit_b16": shapes.vit_b16,
}


@dataclass(frozen=True)
class Case:
    """What one process measures.  warm: steps that are not counted."""

    shape: Shape
    engine: Engine
    ranks: Ranks
    images: np.ndarray
    labels: np.ndarray
    steps: int
    warm: int

    @property
    def global_batch(self) -> int:
        return self.shape.batch * self.ranks.world_size


def build_network(shape: Shape) -> Classifier:
    options = {}
    if shape.builder not in BUILDERS:
        options = {"width": 16, "depth": 3, "embedding": 64}
    spec = ModelSpec(
        shape.builder,
        shape.classes,
        InputSpec(shape.input, mean=(0.5,), std=(0.25,)),
        options,
    )
    return build_classifier(spec, BUILDERS)


def schedule_of(case: Case) -> ResolvedSchedule:
    return DEFAULT_SCHEDULE.model_copy(
        update={
            "batch_size": case.global_batch,
            "schedule": "constant",
            "warmup": 0.0,
            "log_every": case.warm,
            "checkpoint_every": 10**9,
        }
    )


def our_rate(case: Case) -> float:
    """Global samples per second after the warm steps, from the rows that the loop itself logs."""
    shards = InMemory(case.images, case.labels)
    source = Source(shards, shuffled(len(shards), 0), case.global_batch)
    task = TrainingTask(
        build_network(case.shape),
        classify(),
        TrainingStream([source], 0),
        schedule_of(case),
        case.steps,
    )
    with tempfile.TemporaryDirectory() as directory:
        files = TrainingFiles(Path(directory) / "checkpoints", Path(directory) / "metrics.jsonl")
        with closing(build_engine(case.engine, case.ranks)) as engine:
            Trainer(task, engine, case.ranks, files).train()
        if not case.ranks.is_main:
            return 0.0
        rows = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    first = next(row for row in rows if row["step"] == case.warm)
    last = rows[-1]
    return (last["examples"] - first["examples"]) / (last["seconds"] - first["seconds"])


def bare_rate(case: Case) -> float:
    """Global samples per second of a loop of a few lines."""
    network = build_network(case.shape).to(case.ranks.device).train()
    optimizer = build_optimizer(network, schedule_of(case))
    if case.engine.name == "deepspeed":
        return bare_deepspeed(case, network, optimizer)
    return bare_ddp(case, network, optimizer)


def bare_ddp(case: Case, network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    devices = [case.ranks.device.index] if case.ranks.device.type == "cuda" else None
    model = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)

    def step(images: Tensor, labels: Tensor) -> None:
        loss_of(case, model, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    rate = timed(case, step)
    del model.logger, model.reducer  # while the process group lives
    return rate


def bare_deepspeed(case: Case, network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": case.shape.batch,
        "zero_optimization": {"stage": case.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }
    if precision(case.engine, case.ranks.device) == torch.bfloat16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    model, *_ = import_deepspeed(case.ranks).initialize(
        model=network, optimizer=optimizer, dist_init_required=False, config=config
    )

    def step(images: Tensor, labels: Tensor) -> None:
        model.backward(loss_of(case, model, images, labels))
        model.step()

    rate = timed(case, step)
    model.destroy()
    return rate


def loss_of(case: Case, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    device = case.ranks.device.type
    dtype = precision(case.engine, case.ranks.device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        return F.cross_entropy(model(images).float(), labels)


def timed(case: Case, step: Callable[[Tensor, Tensor], None]) -> float:
    """Global samples per second of `step` over random batches, after the warm steps."""
    images, labels = torch.from_numpy(case.images), torch.from_numpy(case.labels)
    generator = torch.Generator().manual_seed(case.ranks.rank)
    began = time.perf_counter()
    for index in range(case.steps):
        if index == case.warm:
            synchronise(case.ranks)
            began = time.perf_counter()
        ids = torch.randint(len(labels), (case.shape.batch,), generator=generator)
        step(images[ids].to(case.ranks.device), labels[ids].to(case.ranks.device))
    synchronise(case.ranks)
    seconds = time.perf_counter() - began
    return (case.steps - case.warm) * case.global_batch / seconds


def synchronise(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def measure(shape_name: str, engine_name: str, options: argparse.Namespace) -> None:
    """One process of the job that `main` started. Rank 0 prints one JSON line."""
    engine = Engine(name=engine_name, zero_stage=1, device=options.device)
    shape = SHAPES[shape_name]
    with process_group(engine) as ranks:
        images, labels = random_images(shape)
        case = Case(shape, engine, ranks, images, labels, options.steps, options.warm)
        row = compare(case, options.rounds)
        if ranks.is_main:
            print(json.dumps({"shape": shape_name, **row}), flush=True)


def compare(case: Case, rounds: int) -> dict[str, object]:
    """The medians of both loops, which take turns."""
    loops = {"ours": our_rate, "bare": bare_rate}
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    memory: dict[str, float] = {}
    on_gpu = case.ranks.device.type == "cuda"
    for index in range(rounds):
        order = ("ours", "bare") if index % 2 == 0 else ("bare", "ours")
        for name in order:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            rates[name].append(loops[name](case))
            if on_gpu:
                memory[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if not case.ranks.is_main:
        return {}
    median = {name: statistics.median(values) for name, values in rates.items()}
    row: dict[str, object] = {
        "engine": case.engine.name,
        "processes": case.ranks.world_size,
        "batch": case.global_batch,
        "samples_per_s": {name: round(rate, 1) for name, rate in median.items()},
        "ratio": round(median["ours"] / median["bare"], 3),
        "bar": REQUIRED_RATIO[case.engine.name],
        "peak_gib": memory,
    }
    peak = peak_flops(case.ranks)
    if peak:
        flops = training_flops(case) / case.ranks.world_size / peak
        row["mfu"] = {name: round(rate * flops, 3) for name, rate in median.items()}
    return row


def random_images(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    count = 8192 if shape.input[1] <= 64 else 1024
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape.input), dtype=np.uint8)
    return images, rng.integers(0, shape.classes, count)


def peak_flops(ranks: Ranks) -> float | None:
    """Of the GPU, None where it is not in the table."""
    if ranks.device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(ranks.device)
    return next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)


def training_flops(case: Case) -> float:
    """Operations of one example's forward and backward pass, as torch counts them."""
    network = build_network(case.shape).to(case.ranks.device)
    x = torch.zeros(2, *case.shape.input, dtype=torch.uint8, device=case.ranks.device)
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    return counter.get_total_flops() / 2


def run_case(shape: str, engine: str, processes: int, options: argparse.Namespace) -> dict:
    """Start the processes of one case. Their row."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "benchmarks.training"]
    command += ["--child", shape, engine, "--device", options.device]
    for name in ("rounds", "steps", "warm"):
        command += [f"--{name}", str(getattr(options, name))]
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
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", default=["convnet"], choices=list(SHAPES))
    parser.add_argument(
        "--engines", nargs="+", default=list(REQUIRED_RATIO), choices=list(REQUIRED_RATIO)
    )
    parser.add_argument("--processes", nargs="+", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one short case, in seconds")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        shape, engine = options.child
        return measure(shape, engine, options)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    processes = options.processes
    if processes is None:
        processes = [1, 2] if options.device == "cpu" else [1]
    rows = []
    for shape in options.shapes:
        for engine in options.engines:
            rows += [run_case(shape, engine, count, options) for count in processes]
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
