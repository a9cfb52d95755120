"""What opening a large split costs: seconds and memory, of a manifest whose tars are holes.

    python -m benchmarks.opening --samples 100_000_000 --classes 1_000_000

Every shard is a file without blocks that has the size and time that its manifest and its index say.
So nothing of it can be read, and opening must not try.  A line of JSON: seconds to open, memory of
the process before, at most, and how much of it no other process shares.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.config import Data
from pipeline.store import write_json
from trainer.data.label_files import write_labels
from trainer.data.shards import open_shards
from trainer.data.tars import index_path
from trainer.data.writing import MANIFEST, SCHEMA

PER_SHARD = 10_000
BYTES = 50_000_000  # of a shard: pictures of 5 kB
QUICK = 20_000, 100  # samples, classes


def write_set(directory: Path, samples: int, classes: int, seed: int = 0) -> None:
    """A manifest of `samples` samples, each class as likely, and its hollow shards."""
    random = np.random.default_rng(seed)
    counts = [min(PER_SHARD, samples - first) for first in range(0, samples, PER_SHARD)]
    labels = [random.integers(0, classes, count, dtype=np.int32) for count in counts]
    said = write_labels(directory, "train", labels, "cls", ["cls", "jpg"])
    shards = []
    for number, count in enumerate(counts):
        path = directory / f"train-{number:06d}.tar"
        for each, size in ((path, BYTES), (index_path(path), 0)):
            with open(each, "wb") as file:
                file.truncate(size)
            os.utime(each, (1, 1))
        sha256 = random.bytes(32).hex()
        entry = {"name": path.name, "samples": count, "bytes": BYTES, "sha256": sha256}
        shards.append(entry)
    split = {"samples": samples, "shards": shards, "labels": said}
    names = [f"class {c:07d}" for c in range(classes)]
    content = {"schema": SCHEMA, "classes": names, "splits": {"train": split}, "made_by": {}}
    write_json(directory / MANIFEST, content)


def measure(directory: Path) -> dict:
    """Open the split in this process."""
    before = memory_kib("status", "VmHWM")
    start, start_cpu = time.perf_counter(), time.process_time()
    shards = open_shards(str(directory), Data(), "train")
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    counted = time.process_time()
    assert shards.class_counts.sum() == len(shards)
    counted = time.process_time() - counted
    return {
        "samples": len(shards),
        "classes": shards.num_classes,
        "shards": len(shards.paths),
        "manifest_MiB": round((directory / MANIFEST).stat().st_size / 2**20, 1),
        "open_s": round(seconds, 2),
        "open_cpu_s": round(cpu, 2),
        "count_classes_cpu_s": round(counted, 2),
        "before_MiB": before // 1024,
        "most_MiB": memory_kib("status", "VmHWM") // 1024,
        "own_MiB": memory_kib("smaps_rollup", "Private_Dirty") // 1024,
    }


def memory_kib(file: str, key: str) -> int:
    """A line of /proc/self/FILE."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="a few samples")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.samples, options.classes = QUICK
    if options.open:
        print(json.dumps(measure(options.open)))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_set(Path(directory), options.samples, options.classes)
        # A process of its own, so that what writing took is not in the figures.
        command = [sys.executable, "-m", "benchmarks.opening", "--open", directory]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
