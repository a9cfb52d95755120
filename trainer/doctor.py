"""`referral doctor`: is this machine fit for a run?  One line a finding; exit code 1 if something needed is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from .config import UserError, load_config

NEEDED = (
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "webdataset",
    "safetensors",
    "pillow",
    "pydantic",
    "jinja2",
    "matplotlib",
)
OPTIONAL = ("deepspeed", "onnx", "timm", "tensorboard", "wandb")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="referral doctor", description=__doc__)
    parser.add_argument("--run", metavar="DIR", help="also look at this run's shards and free disk space")
    args = parser.parse_args(argv)
    findings = [*versions(), *devices(), *(run_findings(Path(args.run)) if args.run else [])]
    for good, what in findings:
        print(f"{'ok     ' if good else 'MISSING'}  {what}")
    return 0 if all(good for good, _ in findings) else 1


def versions() -> list[tuple[bool, str]]:
    found = [(sys.version_info >= (3, 11), f"Python {platform.python_version()} on {platform.platform()}")]
    for name in (*NEEDED, *OPTIONAL):
        try:
            found.append((True, f"{name} {importlib.metadata.version(name)}"))
        except importlib.metadata.PackageNotFoundError:
            if name in NEEDED:
                found.append((False, f"{name}: pip install 'referral[train]'"))
    return found


def devices() -> list[tuple[bool, str]]:
    """A one-process collective on every backend that would be used, not only a look at version numbers."""
    import torch
    import torch.distributed as dist

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [(True, f"{cores} cores, OMP_NUM_THREADS = {os.environ.get('OMP_NUM_THREADS', 'not set')}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            found.append((True, f"cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB"))
    else:
        found.append((True, "no CUDA device: runs go on gloo and the CPU"))
    for backend, device in (("gloo", "cpu"), ("nccl", "cuda")):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        try:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            one = torch.ones(1, device=device)
            dist.all_reduce(one)
            dist.destroy_process_group()
            found.append((one.item() == 1, f"{backend}: all-reduce on {device}"))
        except Exception as mistake:  # whatever a broken installation raises is the finding
            found.append((False, f"{backend}: {mistake}"))
    return found


def run_findings(root: Path) -> list[tuple[bool, str]]:
    from .data.shards import open_shards

    config = load_config(root / "config.toml")
    free = shutil.disk_usage(root).free
    found = [
        (free > 2**30, f"{free / 2**30:.1f} GiB free under {root}"),
        (os.access(root, os.W_OK), f"{root} can be written"),
    ]
    for split in ("train", "val", "test"):
        try:
            shards = open_shards(getattr(config.data, split), config.data, split)
            found.append((True, f"{split}: {shards.num_samples} samples of {shards.num_classes} classes"))
        except UserError as mistake:
            found.append((False, str(mistake)))
    return found
