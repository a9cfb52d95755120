"""`referral doctor`: is this machine fit for a run?

One line a finding. Exit code 1 if something needed is missing. Whatever is missing or broken is a
finding, torch too: no error ends the list. Under torchrun (`torchrun ... -m
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
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from pipeline.choices import AUGMENT_OPTIONS
from pipeline.config import Config, Engine, UserError, load_config
from pipeline.extras import EXTRAS, PACKAGES, install, is_installed, remedy
from pipeline.graph import open_run
from pipeline.trust import COMMAND, FUNCTION, HELP, check_trusted
from pipeline.usage import Parser
from pipeline.version import DISTRIBUTION, VERSION

from .gpus import TorchBuild, gpus_of_machine, judge

BASE = ("numpy", "pydantic")
TIMM = "timm:"  # begins model.name of a network of timm's
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # what torchrun gives every rank


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
    run = Path(args.run) if args.run else None
    config = read_config(run)
    if run is not None and isinstance(config, Config):
        check_trusted(open_run(run), args.trust, (FUNCTION, COMMAND))
    if all(name in os.environ for name in TORCHRUN) and is_installed("torch"):
        return examine_ranks(run, config)
    return report([*versions(), *devices(_engine(config)), *run_findings(run, config)])


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


def examine_ranks(run: Path | None, config: Config | Finding | None) -> int:
    """Report rank 0's findings, one sum over all ranks, and where other ranks' findings differ."""
    import torch

    from ..distributed.ranks import broadcast, gather, process_group, sum_over_ranks

    with process_group(_engine(config)) as ranks:
        total = float(sum_over_ranks(torch.ones(()), ranks))
        findings = [*versions(), *run_findings(run, config)]
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


def read_config(run: Path | None) -> Config | Finding | None:
    """The config of a run, or what is wrong with it. None where no run is named."""
    if run is None:
        return None
    try:
        return load_config(run / "config.toml")
    except UserError as error:
        return Finding(False, str(error))
    except OSError as error:
        return Finding(False, f"{run / 'config.toml'}: {error.strerror or error}")


def _engine(config: Config | Finding | None) -> Engine:
    return config.engine if isinstance(config, Config) else Engine.model_validate({})


def versions() -> list[Finding]:
    """Python, this software, and its packages with their versions."""
    python = f"Python {platform.python_version()} on {platform.platform()}"
    findings = [Finding(sys.version_info >= (3, 11), python)]
    findings.append(Finding(True, f"{DISTRIBUTION} {VERSION}"))
    missing = []
    for extra in ("", *EXTRAS):
        for module in EXTRAS[extra] if extra else BASE:
            package = PACKAGES.get(module, module)
            version = _version(module, package)
            if version:
                findings.append(Finding(True, f"{package} {version}"))
            elif extra == "train":
                missing.append(package)
    if missing:
        findings.append(_not_installed(missing))
    return findings


def _version(module: str, package: str) -> str:
    """The version of an installed package. "" without it."""
    try:
        return importlib.metadata.version(package) or "of an unknown version"
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return "of an unknown version" if is_installed(module) else ""


def _not_installed(packages: list[str]) -> Finding:
    """A node that only submits jobs needs none of the extra `train`."""
    names = f"not installed: {', '.join(packages)}"
    is_login_node = shutil.which("sbatch") is not None and "SLURM_JOB_ID" not in os.environ
    if is_login_node and "torch" in packages:
        return Finding(True, f"{names}; a login node needs none, jobs do: {install('train')}")
    return Finding(False, f"{names}; {install('train')}")


def devices(engine: Engine) -> list[Finding]:
    """Cores and GPUs, and a collective on every backend that a run would use."""
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    findings = [Finding(True, f"{_num_cores()} cores, OMP_NUM_THREADS = {threads}")]
    gpus = gpus_of_machine()
    if not is_installed("torch"):
        return [*findings, *([Finding(True, gpus.text)] if gpus else [])]  # `versions` says so
    try:
        import torch

        build = _build(torch)
    except Exception as error:  # whatever a broken installation raises is the finding
        text = f"torch cannot be used: {_one_line(error)}; install it again"
        return [*findings, Finding(False, text)]
    if build.error:
        findings.append(Finding(False, f"torch {build.version} cannot ask its GPUs: {build.error}"))
    findings += [Finding(ok, text) for ok, text in judge(build, gpus, engine.device)]
    findings.append(_collective("gloo", "cpu"))
    if build.devices:
        findings.append(_collective("nccl", "cuda"))
    return findings


def _build(torch: ModuleType) -> TorchBuild:
    """torch: the module."""
    names, fault = [], ""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        for index in range(count):
            gpu = torch.cuda.get_device_properties(index)
            names.append(f"cuda:{index} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    except Exception as error:  # whatever a driver that fails raises is the finding
        fault = _one_line(error)
    rocm = getattr(torch.version, "hip", None)
    return TorchBuild(torch.__version__, torch.version.cuda, rocm, names, fault)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _num_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _collective(backend: str, device: str) -> Finding:
    """An all-reduce in one process, which says more than a version number."""
    try:
        total = _all_reduce(backend, device)
    except Exception as error:  # whatever a broken installation raises is the finding
        return Finding(False, f"{backend}: {_one_line(error)}")
    return Finding(total == 1, f"{backend}: all-reduce on {device}")


def _all_reduce(backend: str, device: str) -> float:
    import torch
    import torch.distributed as dist

    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] torch documents it
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        one = torch.ones(1, device=device)
        dist.all_reduce(one)
        return one.item()
    finally:
        dist.destroy_process_group()


def run_findings(root: Path | None, config: Config | Finding | None) -> list[Finding]:
    """The disk, the packages and the shards of a run, where one is named."""
    if root is None or config is None:
        return []
    if isinstance(config, Finding):
        return [config]
    findings = [*_disk(root), *_packages(config)]
    if is_installed("torch"):
        findings += [_shards(config, split) for split in ("train", "val", "test")]
    return findings


def _disk(root: Path) -> list[Finding]:
    try:
        free = shutil.disk_usage(root).free
    except OSError as error:
        return [Finding(False, f"{root}: {error.strerror or error}")]
    return [
        Finding(free > 2**30, f"{free / 2**30:.1f} GiB free under {root}"),
        Finding(os.access(root, os.W_OK), f"{root} can be written"),
    ]


def _packages(config: Config) -> list[Finding]:
    """What this run's config needs and is not installed."""
    engine = config.engine
    needed = {f'engine.name = "{engine.name}"': engine.kind.package} if engine.kind.package else {}
    needed |= {f'engine.track = ["{name}"]': name for name in engine.track}
    if config.model.name.startswith(TIMM):
        needed[f'model.name = "{config.model.name}"'] = "timm"
    if config.data.augment in AUGMENT_OPTIONS:
        needed[f'data.augment = "{config.data.augment}"'] = "torchvision"
    return [
        Finding(False, f"{key}: {module} is not installed; {remedy(module)}")
        for key, module in needed.items()
        if not is_installed(module)
    ]


def _shards(config: Config, split: str) -> Finding:
    try:
        from ..data.shards import open_shards

        shards = open_shards(getattr(config.data, split), config.data, split)
    except (UserError, OSError, ImportError) as error:
        return Finding(False, str(error))
    return Finding(
        True,
        f"{split}: {shards.num_samples} samples of {shards.num_classes} classes "
        f"({shards.fingerprint[:8]})",
    )
