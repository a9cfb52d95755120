"""A network that one rank may not hold is trained by ZeRO 3 on two, from the first step to export.

    python -m benchmarks.limited [--width 2000] [--depth 16] [--limit 13]
    python -m benchmarks.limited --quick          a minute: does it run at all?

An MLP learns made-up vectors in the stage `generalist`, as a run does it.  It is stopped as by a
signal at its second step, and goes on from the checkpoint in new processes.  It is validated at
both.

LIMIT is the bytes a weight that each process may hold: the operating system refuses more
(RLIMIT_DATA, which counts private memory that can be written).  They come on top of what it held
before it saw the network, with everything imported and a tiny network trained.

Each row is a JSON object:

    ranks, engine  zero3 is DeepSpeed's stage 3
    limit          null where there is none
    ended          "done", or "out of memory"
    held           bytes a weight at most, on the rank that holds most (seen every 5 ms)
    loss           of the last step

held and loss are null where memory ran out.  Of what DDP holds some 12 bytes are its checkpoint's,
which a resumed run maps from the file.

On one rank the limit has to be too small for DDP and for ZeRO 3, and on two ranks large enough for
ZeRO 3.  What these learn has to be what DDP learns without a limit, to 1e-4 of the loss.
Otherwise the exit code is 1.  The last line is {"weights", "rows"}.  Memory that glibc keeps for
later would count: it is told to give back blocks from a megabyte on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from networks import InputSpec, ModelSpec, build_classifier, load_classifier, parameter_count
from pipeline.choices import resolve
from pipeline.config import DEFAULT_SCHEDULE, Config, load_config, save_config
from pipeline.config import Engine as EngineConfig
from pipeline.graph import RunDirectory, open_run
from trainer.core import loop
from trainer.data.streams import Batch
from trainer.distributed.exit import leave
from trainer.distributed.ranks import Ranks, StopSignal, process_group
from trainer.engines import build_engine
from trainer.session import Session, start_logging
from trainer.stages import run_stage

from .ranks import NUMBERS, write_vectors

CLASSES, ROWS, BATCH = 40, 400, 16
STEPS, STOPPED = 4, 2
TOLERANCE = 1e-4
LOOKS_S = 0.005
GIVEN_BACK = 2**20  # bytes from which on glibc gives a freed block back
OUT_OF_MEMORY = ("allocate memory", "bad_alloc", "MemoryError", "out of memory")
QUICK = {"width": 1000, "depth": 3, "limit": 60.0}
ENGINES = {
    "ddp": {"name": "ddp"},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}


def config_of(data: Path, engine: str, width: int, depth: int) -> Config:
    values = {
        "data": {split: str(data) for split in ("train", "val", "test")},
        "model": {"name": "mlp", "width": width, "depth": depth},
        "train": {
            "steps": STEPS,
            "batch_size": BATCH,
            "learning_rate": 1e-4,
            "validate_every": 2,
            "log_every": 1,
            "keep": 1,
        },
        "engine": {"device": "cpu", **ENGINES[engine]},
    }
    return load_config(None, [], values)


# One process


def child(root: Path, limit: int | None, stopped: int | None) -> int:
    """One rank. limit: in bytes. stopped: the step at which the signal comes."""
    run = open_run(root)
    start_logging()
    with process_group(run.config.engine) as ranks:
        resolve(run.generalist.kind.function)
        import_module("torch._dynamo")  # torch does so at its own time
        warm_up(run.config.engine, ranks)
        session = Session(run, ranks)
        before = private_bytes()
        if limit is not None:
            most = before + limit
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        held = Held(before)
        if stopped is not None:
            stop_at(stopped)
        run_stage(session, run.generalist)
        print(json.dumps({"held": held.most}), flush=True)
    return 0


def warm_up(config: EngineConfig, ranks: Ranks) -> None:
    """A step of a tiny network, after which everything is imported and every thread is there."""
    spec = ModelSpec("mlp", 4, InputSpec((3,), "float32"), {"width": 4})
    engine = build_engine(config, ranks)
    schedule = DEFAULT_SCHEDULE.model_copy(update={"batch_size": ranks.world_size})
    module = engine.prepare(build_classifier(spec), schedule)
    with engine.accumulating(last=True):
        engine.backward(module(torch.zeros(1, 3)).square().mean())
    engine.step(1e-3)
    engine.export()
    engine.close()


def stop_at(step: int) -> None:
    """The signal to stop comes in that step."""
    plain = loop.Trainer.train_step

    def train_step(self: loop.Trainer, batch: Batch, rate: float) -> None:
        plain(self, batch, rate)
        StopSignal.received = self.progress.step >= step

    loop.Trainer.train_step = train_step


class Held:
    """A thread that looks at what this process holds. most: bytes beyond `before`."""

    def __init__(self, before: int):
        self.before = before
        self.most = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        pause = threading.Event()
        while True:
            self.most = max(self.most, private_bytes() - self.before)
            pause.wait(LOOKS_S)


def private_bytes() -> int:
    """Private memory of this process that can be written, as RLIMIT_DATA counts it."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmData:")]
    return int(line.split()[1]) * 1024


# All of them


def train(root: Path, ranks: int, limit: int | None) -> tuple[str, int | None]:
    """("done" or "out of memory", bytes held at most). Stopped once, and resumed."""
    held: list[int] = []
    for stopped in (STOPPED, None):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "benchmarks.limited"]
        command += ["--child", str(root)]
        if limit is not None:
            command += ["--bytes", str(limit)]
        if stopped is not None:
            command += ["--stopped", str(stopped)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "MALLOC_MMAP_THRESHOLD_": str(GIVEN_BACK),
        }
        ended = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        interrupted = stopped is not None and f"exitcode  : {loop.REQUEUE} " in ended.stdout
        if ended.returncode and not interrupted:
            if any(words in ended.stdout for words in OUT_OF_MEMORY):
                return "out of memory", None
            raise SystemExit(f"{root.name} failed:\n{ended.stdout[-4000:]}")
        assert interrupted == (stopped is not None), ended.stdout[-4000:]
        lines = [line for line in ended.stdout.splitlines() if line.startswith('{"held"')]
        held += [json.loads(line)["held"] for line in lines]
    return "done", max(held)


class Trial(NamedTuple):
    engine: str
    ranks: int
    limit: float | None  # bytes a weight


def row_of(trial: Trial, directory: Path, options: argparse.Namespace) -> dict:
    root = directory / f"{trial.engine}-{trial.ranks}-{trial.limit}"
    config = config_of(directory / "data", trial.engine, options.width, options.depth)
    root.mkdir()
    save_config(config, root / "config.toml")
    count, limit = weights_of(options), None
    if trial.limit is not None:
        limit = int(trial.limit * count)
    ended, held = train(root, trial.ranks, limit)
    row: dict = {**trial._asdict(), "ended": ended, "held": None, "loss": None}
    if held is not None:
        row["held"] = round(held / count, 2)
        row["loss"] = last_loss(RunDirectory(root, config))
    return row


def weights_of(options: argparse.Namespace) -> int:
    sizes = {"width": options.width, "depth": options.depth}
    with torch.device("meta"):
        return parameter_count(
            build_classifier(ModelSpec("mlp", CLASSES, InputSpec((NUMBERS,), "float32"), sizes))
        )


def last_loss(run: RunDirectory) -> float:
    """Of a finished run, whose network can be read."""
    load_classifier(run.generalist.directory)
    lines = run.generalist.path("metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (loss,) = [row["loss"] for row in rows if row["step"] == STEPS and "loss" in row]
    return loss


def is_as_it_should_be(rows: list[dict]) -> bool:
    endings = [row["ended"] for row in rows]
    if endings != ["out of memory", "out of memory", "done", "done"]:
        return False
    unlimited, limited = rows[2:]
    return abs(limited["loss"] - unlimited["loss"]) <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--limit", type=float, default=13.0, help="bytes a weight")
    parser.add_argument("--quick", action="store_true", help="a narrow network, with room for all")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stopped", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.bytes, options.stopped)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    trials = [
        Trial("ddp", 1, options.limit),
        Trial("zero3", 1, options.limit),
        Trial("ddp", 1, None),
        Trial("zero3", 2, options.limit),
    ]
    if options.quick:
        trials = trials[-1:]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        write_vectors(Path(directory) / "data", CLASSES, ROWS)
        for trial in trials:
            rows.append(row_of(trial, Path(directory), options))
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"weights": weights_of(options), "rows": rows}))
    return 0 if options.quick or is_as_it_should_be(rows) else 1


if __name__ == "__main__":
    leave(main)
