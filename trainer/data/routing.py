"""Routed samples: what the specialists read of the training data, found once after clustering.

Mode "index" keeps the ids of each group's samples.  Mode "copy" also keeps their raw files, in
shards of the group's own, so that a specialist with 2 % of the classes does not read from
everywhere in a large set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.config import UserError
from pipeline.store import read_json, write_json

from .kept_arrays import kept_npy
from .shards import ShardSet, open_shards
from .writing import ShardWriter, write_manifest

SCHEMA = 1
CHUNK = 256  # samples read together
OPEN_WRITERS = 256  # one open file each, well below the usual limit of 1,024

Mode = Literal["index", "copy"]


def routed_ids(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """int64: the samples whose label is one of `classes`, in order."""
    return np.flatnonzero(np.isin(labels, classes))


def routed_bytes(shards: ShardSet, ids: np.ndarray, mode: Mode) -> int:
    """What routing these samples writes: their ids, and with "copy" their files in tar blocks."""
    if mode == "copy":
        return ids.nbytes + shards.raw_bytes(ids)
    return ids.nbytes


def group_directory(directory: str | Path, group: int) -> Path:
    """Where a group's routed samples lie."""
    return Path(directory) / f"{group:03d}"


def route(
    shards: ShardSet,
    groups: Mapping[int, np.ndarray],
    directory: str | Path,
    mode: Mode = "index",
    max_bytes: int = 64 * 1024**3,
    say: Callable[[str], object] = print,
) -> dict[int, str]:
    """Write each group's samples to DIRECTORY/000, DIRECTORY/001, ...

    A group's directory gets ids.npy and routed.json, and with mode "copy" routed-*.tar.  All are
    written in one pass over the shards, which reads each sample once, with "copy", one pass for
    every OPEN_WRITERS groups.

    routed.json has {"samples", "bytes", "frequency", ...}: frequency is the group's share of the
    whole set's samples, from which the dustbin's shift is computed.

    Parameters
    ----------
    shards : ShardSet
    groups : {number of the group: its classes, int64}
        They may overlap.
    directory : path
    mode : "index" or "copy"
    max_bytes : int
        What may be written at most.
    say : callable
        Told the size before anything is written.

    Returns
    -------
    {id: reason}
        The corrupt samples, which are not copied (data.damage = skip).

    Raises
    ------
    UserError
        If a group has no sample, or if all together would take more than max_bytes.
    """
    ids = {group: routed_ids(shards.labels, classes) for group, classes in groups.items()}
    for group, group_ids in ids.items():
        if not len(group_ids):
            raise UserError(
                f"{shards.split} has no sample of the {len(groups[group])} classes of group {group}"
            )
    sizes = {group: routed_bytes(shards, group_ids, mode) for group, group_ids in ids.items()}
    _check_size(shards, ids, sizes, mode, max_bytes, say)
    for group in groups:
        group_directory(directory, group).mkdir(parents=True, exist_ok=True)
    lost: dict[int, str] = {}
    if mode == "copy":
        numbers = list(groups)
        for first in range(0, len(numbers), OPEN_WRITERS):
            together = numbers[first : first + OPEN_WRITERS]
            lost |= _copy(shards, {group: ids[group] for group in together}, directory)
    for group, classes in groups.items():
        kept = ids[group][~np.isin(ids[group], list(lost))]
        with open(group_directory(directory, group) / "ids.npy", "wb") as file:
            np.save(file, kept)
        header = {
            "schema": SCHEMA,
            "mode": mode,
            "fingerprint": shards.fingerprint,
            "samples": len(kept),
            "bytes": sizes[group],
            "frequency": len(ids[group]) / len(shards),
            "classes": [int(c) for c in classes],
        }
        write_json(group_directory(directory, group) / "routed.json", header)
    return lost


def _check_size(
    shards: ShardSet,
    ids: Mapping[int, np.ndarray],
    sizes: Mapping[int, int],
    mode: Mode,
    max_bytes: int,
    say: Callable[[str], object],
) -> None:
    total = sum(sizes.values())
    samples = sum(map(len, ids.values()))
    say(
        f"routing {samples} samples (of {len(shards)}) to {len(ids)} groups by {mode}: "
        f"{total / 2**20:.1f} MiB"
    )
    if total > max_bytes:
        remedy = ""
        if mode == "copy":
            remedy = '; route.mode = "index" writes only which samples they are'
        raise UserError(
            f"routing by {mode} takes {total} bytes, above route.max_bytes = {max_bytes}{remedy}"
        )


def _copy(shards: ShardSet, ids: Mapping[int, np.ndarray], directory: str | Path) -> dict[int, str]:
    """Copy each sample's raw files to the shards of every group that it belongs to.

    Returns {id: reason} of the corrupt ones.
    """
    samples = np.concatenate(list(ids.values()))
    owners = np.repeat(list(ids), [len(group_ids) for group_ids in ids.values()])
    order = np.argsort(samples, kind="stable")
    samples, owners = samples[order], owners[order]
    distinct, starts = np.unique(samples, return_index=True)
    owners_of = np.split(owners, starts[1:])
    lost: dict[int, str] = {}
    with ExitStack() as stack:
        writers = {}
        for group in ids:
            out = group_directory(directory, group)
            writer = ShardWriter(out, "routed", shards.class_names, overwrite=True)
            writers[group] = stack.enter_context(writer)
        passage = shards.passage(distinct)
        for first in range(0, len(distinct), CHUNK):
            chunk = slice(first, first + CHUNK)
            if passage is not None:
                last = min(first + CHUNK, len(distinct))
                shards.announce(shards.need_of(passage, first, last, len(distinct)))
            read, corrupt = shards.read_raw(distinct[chunk])
            lost |= corrupt
            for sample, files, groups in zip(
                distinct[chunk].tolist(), read, owners_of[chunk], strict=True
            ):
                if sample in corrupt:
                    continue
                copied = _copied_sample(shards, sample, files)
                for group in groups.tolist():
                    writers[group].write(copied)
    for group, writer in writers.items():
        out = group_directory(directory, group)
        splits = {"routed": writer.facts}
        write_manifest(out, shards.class_names, splits, {"command": "route"}, shards.recorded)
    return lost


def _copied_sample(
    shards: ShardSet, sample: int, files: dict[str, bytes]
) -> dict[str, str | bytes]:
    """A sample for ShardWriter.  Its key is its id, and its label is the class index."""
    label = shards.data.label.partition(":")[0]
    others = {
        extension: content
        for extension, content in files.items()
        if extension != label or label == shards.data.input
    }
    return {"__key__": f"{sample:09d}", **others, "cls": b"%d" % shards.labels[sample]}


class RoutedShards(ShardSet):
    """Copied samples, named in messages and records as in the set that they come from."""

    def __init__(self, copied: ShardSet, origin: ShardSet):
        self._take_over(copied)
        self.split = origin.split
        self._origin = origin

    def where(self, sample: int) -> str:
        """See ShardSet."""
        return self._origin.where(int(self.keys([sample])[0]))


def open_routed(directory: str | Path, shards: ShardSet) -> tuple[ShardSet, np.ndarray]:
    """Open a group's routed samples.

    Parameters
    ----------
    directory : path
        One group's.
    shards : ShardSet
        What it was routed from.

    Returns
    -------
    shards : ShardSet
        The caller's with mode "index", the copy with "copy".
    ids : int64 [n]
        The group's samples in it.

    Raises
    ------
    UserError
        If `directory` holds no routed samples, or some of other shards.
    """
    directory = Path(directory)
    try:
        header = read_json(directory / "routed.json")
        ids = np.array(kept_npy(directory / "ids.npy", "iu", (None,)))
    except (OSError, ValueError):
        raise UserError(
            f"{directory} holds no routed samples; run the stage `route` again"
        ) from None
    if header["fingerprint"] != shards.fingerprint:
        raise UserError(
            f"{directory} was routed from other shards than {shards.names[0]} ...; "
            "run `route` again"
        )
    if header["mode"] == "index":
        return shards, ids
    # data.damage_share is of the whole split: a small group may by chance hold more of its corrupt
    # samples.
    data = shards.data.model_copy(update={"label": "cls", "damage_share": 0.999999})
    copied = RoutedShards(open_shards(str(directory), data, "routed"), shards)
    return copied, np.arange(len(copied))
