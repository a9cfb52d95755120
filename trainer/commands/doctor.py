"""`referral doctor`: is this machine fit for a run?

One line a finding; exit code 1 if something needed is missing. Under torchrun (`torchrun ... -m
trainer -- doctor --run DIR`) every rank looks for itself, and rank 0 reports what only some ranks
see, or see differently.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from importlib.util import find_spec
from typing import NamedTuple

from pipeline.choices import ENGINES
from pipeline.config import Engine, UserError
from pipeline.extras import remedy
from pipeline.graph import RunDirectory, open_run
from pipeline.trust import COMMAND, FUNCTION, HELP, check_trusted
from pipeline.usage import Parser

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
ENGINES_NEED = tuple(engine.package for engine in ENGINES.values() if engine.package)
OPTIONAL = (*ENGINES_NEED, "onnx", "timm", "tensorboard", "wandb")


class Finding(NamedTuple):
    """ok: whether all is well."""

    ok: bool
    text: str


class RankFindings(NamedTuple):
    host: str
    device: str
    findings: list[Finding]


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    run = open_run(args.run) if args.run else None
    if run is not None:
        check_trusted(run, args.trust, (FUNCTION, COMMAND))
    if "RANK" in os.environ:
        return examine_ranks(run)
    return report([*versions(), *devices(), *run_findings(run)])


def _parser() -> Parser:
    parser = Parser(
        "referral doctor",
        "Check this machine and what is installed; exit code 1 if something needed is missing. "
        "Under torchrun every rank looks for itself, and rank 0 reports where they differ.",
        "referral doctor --run runs/mine\n"
        "PYTHONSAFEPATH=1 torchrun --nproc-per-node 2 -m trainer -- doctor --run runs/a",
    )
    parser.add_argument(
        "--run", metavar="DIR", help="also look at this run's shards and free disk space"
    )
    parser.add_argument("--trust", action="store_true", help=HELP)
    return parser


def report(findings: list[Finding]) -> int:
    for ok, text in findings:
        print(f"{'ok     ' if ok else 'MISSING'}  {text}")
    return 0 if all(ok for ok, _ in findings) else 1


# Every rank


def examine_ranks(run: RunDirectory | None) -> int:
    """Report rank 0's findings, one sum over all ranks, and where other ranks' findings differ."""
    import torch

    from ..distributed.ranks import broadcast, gather, process_group, sum_over_ranks

    engine = Engine.model_validate({})
    if run is not None:
        engine = run.config.engine
    with process_group(engine) as ranks:
        total = float(sum_over_ranks(torch.ones(()), ranks))
        findings = [*versions(), *run_findings(run)]
        own = RankFindings(socket.gethostname(), str(ranks.device), findings)
        gathered = gather(own, ranks)
        code = report(compare_ranks(gathered, total)) if ranks.is_main else 0
        return broadcast(code, ranks)


def compare_ranks(ranks: list[RankFindings], total: float) -> list[Finding]:
    """Rank 0's findings, and those of other ranks that differ.

    ranks: in their order. total: of an all-reduce of ones.
    """
    world, first = len(ranks), ranks[0].findings
    lines = [*first, Finding(total == world, f"all-reduce over {world} ranks: {total:g}")]
    for rank, (host, device, findings) in enumerate(ranks):
        different = [finding for finding in findings if finding not in first]
        # Disks fill up while the ranks look at them.
        different = [finding for finding in different if "free under" not in finding[1]]
        agrees = "sees other things than rank 0:" if different else "sees the same"
        lines.append(Finding(not different, f"rank {rank} on {host}, {device}, {agrees}"))
        lines += [Finding(ok, f"    {text}") for ok, text in different]
    return lines


# What is looked at


def versions() -> list[Finding]:
    python = f"Python {platform.python_version()} on {platform.platform()}"
    findings = [Finding(sys.version_info >= (3, 11), python)]
    for name in (*NEEDED, *OPTIONAL):
        try:
            findings.append(Finding(True, f"{name} {importlib.metadata.version(name)}"))
        except importlib.metadata.PackageNotFoundError:
            if name in NEEDED:
                findings.append(Finding(False, f"{name}: {remedy('torch')}"))
    return findings


def devices() -> list[Finding]:
    """Cores and GPUs, and a collective on every backend that a run would use."""
    if find_spec("torch") is None:
        return []  # `versions` says so
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    findings = [Finding(True, f"{_num_cores()} cores, OMP_NUM_THREADS = {threads}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            text = f"cuda:{index} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
            findings.append(Finding(True, text))
    else:
        findings.append(Finding(True, "no CUDA device: runs go on gloo and the CPU"))
    findings.append(_collective("gloo", "cpu"))
    if torch.cuda.is_available():
        findings.append(_collective("nccl", "cuda"))
    return findings


def _num_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _collective(backend: str, device: str) -> Finding:
    """An all-reduce in one process, which says more than a version number."""
    import torch
    import torch.distributed as dist

    try:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] torch documents it
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        one = torch.ones(1, device=device)
        dist.all_reduce(one)
        dist.destroy_process_group()
        is_one = one.item() == 1
    except Exception as error:  # whatever a broken installation raises is the finding
        return Finding(False, f"{backend}: {error}")
    return Finding(is_one, f"{backend}: all-reduce on {device}")


def run_findings(run: RunDirectory | None) -> list[Finding]:
    """The disk and the shards of a run, where one is named."""
    if run is None or find_spec("torch") is None:
        return []
    from ..data.shards import open_shards

    config, root = run.config, run.root
    free = shutil.disk_usage(root).free
    findings = [
        Finding(free > 2**30, f"{free / 2**30:.1f} GiB free under {root}"),
        Finding(os.access(root, os.W_OK), f"{root} can be written"),
    ]
    for split in ("train", "val", "test"):
        try:
            shards = open_shards(getattr(config.data, split), config.data, split)
        except UserError as error:
            findings.append(Finding(False, str(error)))
            continue
        text = (
            f"{split}: {shards.num_samples} samples of {shards.num_classes} classes "
            f"({shards.fingerprint[:8]})"
        )
        findings.append(Finding(True, text))
    return findings
