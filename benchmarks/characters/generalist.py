"""Generalists for Chinese characters, one run per seed: each learns, and its predictions on val are measured.

    OMP_NUM_THREADS=1 python -m benchmarks.characters.generalist --data DIR --out RUNS [--seeds 0 1 2] [--set KEY=VALUE]

DIR is what benchmarks.characters.data wrote.  The runs are RUNS/seed0, RUNS/seed1, ..., of characters.toml, and can be
gone on with by `referral run`; the same command goes on with what was interrupted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).with_name("characters.toml")
# glibc would give each step's large buffers back to the system and ask for them anew: a fifth of the time, measured.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def commands(run: Path, data: Path, seed: int, settings: list[str]) -> list[list[str]]:
    """What lays the run out and what trains and measures its generalist; both do nothing where that is done."""
    places = [f"data.{split}={data / 'seen'}" for split in ("train", "val", "test")]
    words = [
        word for setting in [*places, f"seed={seed}", *settings] for word in ("--set", setting)
    ]
    prepare = [
        sys.executable,
        "-m",
        "launch.cli",
        "prepare",
        str(CONFIG),
        "--run",
        str(run),
        *words,
    ]
    return [prepare, [sys.executable, "-m", "trainer", "generalist", "measure", "--run", str(run)]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of `referral prepare`"
    )
    args = parser.parse_args()
    for seed in args.seeds:
        for command in commands(args.out / f"seed{seed}", args.data.resolve(), seed, args.set):
            code = subprocess.run(command, env=os.environ | ENVIRONMENT).returncode
            if code:
                raise SystemExit(code)


if __name__ == "__main__":
    main()
