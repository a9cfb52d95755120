"""`referral doctor`: is this machine fit for a run?  One line a finding; exit code 1 if something needed is missing.

Under torchrun (`torchrun ... -m trainer -- doctor --run DIR`) every rank looks for itself, and rank 0 tells what only
some ranks see, or see differently.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from pathlib import Path

from pipeline.config import UserError, load_config

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
Finding = tuple[bool, str]  # (whether all is well, what was found)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="referral doctor", description=__doc__)
    parser.add_argument(
        "--run", metavar="DIR", help="also look at this run's shards and free disk space"
    )
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        return every_rank(args)
    return tell([*versions(), *devices(), *(run_findings(Path(args.run)) if args.run else [])])


def tell(findings: list[Finding]) -> int:
    for good, what in findings:
        print(f"{'ok     ' if good else 'MISSING'}  {what}")
    return 0 if all(good for good, _ in findings) else 1


def every_rank(args) -> int:
    """Rank 0's findings, one sum over all ranks, and each rank whose own findings differ from rank 0's."""
    import torch

    from pipeline.config import Engine

    from ..distributed.ranks import broadcast, gather, process_group, sum_over_ranks

    engine = load_config(Path(args.run) / "config.toml").engine if args.run else Engine()
    with process_group(engine) as ranks:
        total = float(sum_over_ranks(torch.ones(()), ranks))
        own = [*versions(), *(run_findings(Path(args.run)) if args.run else [])]
        found = gather((socket.gethostname(), str(ranks.device), own), ranks)
        code = tell(compared(found, total)) if ranks.is_main else None
        return broadcast(code, ranks)


def compared(found: list[tuple[str, str, list[Finding]]], total: float) -> list[Finding]:
    """found: (host, device, findings) of each rank, in their order; total: of an all-reduce of ones."""
    world, first = len(found), found[0][2]
    lines = [*first, (total == world, f"all-reduce over {world} ranks: {total:g}")]
    for rank, (host, device, own) in enumerate(found):
        others = [
            finding for finding in own if finding not in first and "free under" not in finding[1]
        ]
        agrees = "sees the same" if not others else "sees other things than rank 0:"
        lines.append((not others, f"rank {rank} on {host}, {device}, {agrees}"))
        lines += [(good, f"    {what}") for good, what in others]
    return lines


def versions() -> list[Finding]:
    found = [
        (
            sys.version_info >= (3, 11),
            f"Python {platform.python_version()} on {platform.platform()}",
        )
    ]
    for name in (*NEEDED, *OPTIONAL):
        try:
            found.append((True, f"{name} {importlib.metadata.version(name)}"))
        except importlib.metadata.PackageNotFoundError:
            if name in NEEDED:
                found.append((False, f"{name}: pip install 'referral[train]'"))
    return found


def devices() -> list[Finding]:
    """A one-process collective on every backend that would be used, not only a look at version numbers."""
    import torch
    import torch.distributed as dist

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [
        (True, f"{cores} cores, OMP_NUM_THREADS = {os.environ.get('OMP_NUM_THREADS', 'not set')}")
    ]
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


def run_findings(root: Path) -> list[Finding]:
    from ..data.shards import open_shards

    config = load_config(root / "config.toml")
    free = shutil.disk_usage(root).free
    found = [
        (free > 2**30, f"{free / 2**30:.1f} GiB free under {root}"),
        (os.access(root, os.W_OK), f"{root} can be written"),
    ]
    for split in ("train", "val", "test"):
        try:
            shards = open_shards(getattr(config.data, split), config.data, split)
            what = f"{split}: {shards.num_samples} samples of {shards.num_classes} classes ({shards.fingerprint[:8]})"
            found.append((True, what))
        except UserError as mistake:
            found.append((False, str(mistake)))
    return found
