"""Generalists for Chinese characters, one run per seed: each is trained and measured.

    OMP_NUM_THREADS=1 python -m benchmarks.characters.generalist --data DIR --out RUNS
    python -m benchmarks.characters.generalist --quick  seconds: 24 made-up characters

DIR is what benchmarks.characters.data wrote.  The runs are RUNS/seed0, RUNS/seed1, ..., of
characters.toml, measured on val. `referral run` resumes them, and the same command resumes what was
interrupted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.papers import lab
from pipeline.store import read_json

from .data import make_quick

CONFIG = Path(__file__).with_name("characters.toml")
QUICK = [
    "train.steps=40",
    "train.batch_size=64",
    "train.validate_every=0",
    "clusters.num_groups=3",
    "engine.device=cpu",
]


def commands(run: Path, data: Path, seed: int, settings: list[str]) -> list[list[str]]:
    """What lays the run out and what trains and measures its generalist. Both know what is done."""
    splits = [f"data.{split}={data / 'seen'}" for split in ("train", "val", "test")]
    words = []
    for setting in (*splits, f"seed={seed}", *settings):
        words += ["--set", setting]
    prepare = [sys.executable, "-P", "-m", "launch.cli", "prepare", str(CONFIG), "--run", str(run)]
    train = [sys.executable, "-P", "-m", "trainer", "generalist", "measure", "--run", str(run)]
    return [[*prepare, *words], train]


def train(run: Path, data: Path, seed: int, settings: list[str]) -> dict:
    """Train and measure one generalist: its summary.json.  Exits with the code of what fails."""
    for command in commands(run.resolve(), data.resolve(), seed, settings):
        # Not lab.ENVIRONMENT: how many threads there are is the caller's to say.
        buffers = {key: value for key, value in lab.ENVIRONMENT.items() if "MALLOC" in key}
        code = subprocess.run(command, env=os.environ | buffers, cwd=lab.ROOT).returncode
        if code:
            raise SystemExit(code)
    return read_json(run / "generalist" / "summary.json")


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("characters"), help="(characters)")
    parser.add_argument("--out", type=Path, default=Path("runs/characters"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of `referral prepare`"
    )
    parser.add_argument("--quick", action="store_true", help="seconds: one seed, below OUT/quick")
    options = parser.parse_args(words)
    if options.quick:
        options.out = options.out / "quick"
        options.data, options.seeds = options.out / "data", options.seeds[:1]
        options.set = [*QUICK, *options.set]
    return options


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    if options.quick:
        shutil.rmtree(options.out, ignore_errors=True)
        make_quick(options.data)
    summaries = {
        seed: train(options.out / f"seed{seed}", options.data, seed, options.set)
        for seed in options.seeds
    }
    command = lab.command_line("benchmarks.characters.generalist", words)
    lab.print_json({"generalists": summaries}, options, command)


if __name__ == "__main__":
    main()
