"""What a run will take of memory and disk, roughly, against what is there.

Counted are weights, gradients, optimizer states and logits. Activations are not, so that a
training needs more than is said here.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from networks import BranchedClassifier, Classifier, parameter_count
from networks.cutting import cut_at
from pipeline.config import Config, UserError

from ..core.optim import has_all_rows
from ..data.shards import ShardSet
from ..stages import rerank
from ..stages.features import check_size, row_bytes, row_shapes
from ..stages.rehearsal import Part, share_of_batch

FLOAT = 4  # bytes
LOGITS_COPIES = 3  # logits, their softmax and its gradient
CGROUP = Path("/sys/fs/cgroup")


def check_memory(config: Config, parts: Sequence[Part], device: torch.device) -> list[str]:
    """A warning where a network's training takes more memory than there is."""
    free = free_memory(device)
    warnings = []
    for part in parts:
        need = memory_of(config, part)
        if device.type != "cuda":
            need *= part.ranks  # they share this machine's
        if need > free:
            logits = logits_bytes(config, part)
            warnings.append(
                f"{part.section}: weights, optimizer and logits take {gib(need)} (logits of a "
                f"micro-batch {gib(logits)}) and {gib(free)} are free; a smaller batch, more "
                "accumulation or engine.shard_head = true takes less"
            )
    return list(dict.fromkeys(warnings))


def memory_of(config: Config, part: Part) -> int:
    """Bytes of one rank's weights, gradients, optimizer states, averages and logits."""
    weights = parameter_count(part.network)
    learning = parameter_count(part.network, trainable=True)
    numbers = weights + learning + optimizer_numbers(part)
    if part.schedule.ema:
        numbers += weights
    if part.schedule.patience:
        numbers += weights
    if config.engine.splits_weights or config.engine.shard_head:
        numbers //= part.ranks
    return FLOAT * numbers + logits_bytes(config, part)


def optimizer_numbers(part: Part) -> int:
    """Numbers kept for each weight: two by AdamW, one by SGD, none for rows without averages."""
    learning = parameter_count(part.network, trainable=True)
    if part.schedule.row_rate is not None and has_all_rows(part.network):
        assert isinstance(part.network, Classifier)
        learning -= parameter_count(part.network.head, trainable=True)
    return learning if part.schedule.optimizer == "sgd" else 2 * learning


def logits_bytes(config: Config, part: Part) -> int:
    if config.engine.shard_head:
        return 0
    outputs = part.network.spec.num_outputs * part.network.num_members
    if part.columns is not None:
        outputs = part.columns
    return FLOAT * LOGITS_COPIES * share_of_batch(part) * outputs


def free_memory(device: torch.device) -> int:
    """Bytes that may still be had: of the GPU, or of this machine or its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_available(Path("/proc/meminfo"))]
    try:
        limit = int((CGROUP / "memory.max").read_text())
        free.append(limit - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # "max": no limit
        pass
    return min(free)


def _available(meminfo: Path) -> int:
    """MemAvailable of /proc/meminfo. Where there is none, nothing is known to be too much."""
    try:
        lines = meminfo.read_text().splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(found.split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return 2**62


# Disk


def check_disk(
    config: Config, parts: Sequence[Part], shards: dict[str, ShardSet], run: Path
) -> list[str]:
    """A warning where the run takes more than is free under RUN.

    Raises UserError where not even the first network and one checkpoint of it fit.
    """
    place = next(path for path in (run, *run.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    checkpoints = sum(
        checkpoint_bytes(part) * kept_checkpoints(part) * part.count for part in parts
    )
    networks = sum(FLOAT * parameter_count(part.network) * part.count for part in parts)
    routing, cache = routing_bytes(config, shards["train"]), cache_bytes(config, shards)
    routing += features_bytes(config, parts, shards) + shortlists_bytes(config, shards)
    need = checkpoints + networks + routing + cache
    said = (
        f"{run}: {gib(free)} are free; checkpoints take {gib(checkpoints)}, networks "
        f"{gib(networks)}, routing {gib(routing)}, decoded inputs {gib(cache)}"
    )
    if parts and free < checkpoint_bytes(parts[0]) + FLOAT * parameter_count(parts[0].network):
        raise UserError(f"{said}: not even one checkpoint fits; choose --run on another disk")
    return [f"{said}: {gib(need)} in all, more than there is"] if need > free else []


def checkpoint_bytes(part: Part) -> int:
    """Bytes of one state.pt."""
    numbers = parameter_count(part.network) + optimizer_numbers(part)
    for kept in (part.schedule.ema, part.schedule.patience):
        if kept:
            numbers += parameter_count(part.network)
    return FLOAT * numbers


def kept_checkpoints(part: Part) -> int:
    """How many checkpoints lie on the disk: kept ones, the best one, and the one being written."""
    schedule = part.schedule
    written = schedule.keep + 1
    if schedule.steps and schedule.checkpoint_every:
        written = min(written, -(-schedule.steps // schedule.checkpoint_every))
    return written + (1 if schedule.patience else 0)


def routing_bytes(config: Config, train: ShardSet) -> int:
    """Ids of the samples, once for each group that has them, and with "copy" their files."""
    if not config.has_specialists or config.specialists.is_branch:
        return 0
    ids = np.arange(len(train))
    of_each = ids.nbytes + (train.raw_bytes(ids) if config.route.mode == "copy" else 0)
    return of_each * config.clusters.overlap


def features_bytes(config: Config, parts: Sequence[Part], shards: dict[str, ShardSet]) -> int:
    """Bytes of what branches learn from. Raises UserError above the config's limit."""
    branched = [part.network for part in parts if isinstance(part.network, BranchedClassifier)]
    if not branched:
        return 0
    section, generalist = config.specialists, branched[0].generalist
    shapes = row_shapes(generalist, cut_at(generalist.trunk, section.blocks))
    rows = len(shards["train"]) * section.views_of(config.data.augment) + len(shards["val"])
    needed = rows * row_bytes(shapes)
    check_size(section, needed)
    return needed


def shortlists_bytes(config: Config, shards: dict[str, ShardSet]) -> int:
    """Bytes of what re-rankers learn from. Raises UserError above the config's limit."""
    if not config.has_rerankers:
        return 0
    examples = len(shards["train"]) + len(shards["val"])
    needed = rerank.shortlist_bytes(config.rerank.k, examples)
    rerank.check_size(config.rerank, needed)
    return needed


def cache_bytes(config: Config, shards: dict[str, ShardSet]) -> int:
    """Bytes of decoded inputs, of the splits that are small enough to be kept."""
    if config.data.cache == "none":
        return 0
    sizes = [
        len(each) * int(np.prod(each.input_shape)) * each.input_dtype.itemsize
        for each in shards.values()
    ]
    return sum(size for size in sizes if size <= config.data.cache_bytes)


def gib(count: int) -> str:
    if count < 2**30:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**30:.1f} GiB"
