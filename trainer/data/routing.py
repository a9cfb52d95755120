"""Routed samples: what the specialists read of the training data, found once after clustering.

Mode "index" keeps the ids of each S_m's samples; "copy" also their raw members, in shards of the group's own, so that a
specialist with 2 % of the classes does not read from everywhere in a large set.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pipeline.config import UserError
from pipeline.store import read_json, write_json

from .shards import ShardSet, open_shards
from .writing import ShardWriter, write_manifest

SCHEMA = 1
CHUNK = 256  # samples read together
OPEN_WRITERS = 256  # one open file each, well below the usual limit of 1,024


def routed_ids(labels: np.ndarray, members) -> np.ndarray:
    """int64: the samples whose label is one of `members`, in order."""
    return np.flatnonzero(np.isin(labels, members))


def routed_bytes(shards: ShardSet, ids: np.ndarray, mode: str) -> int:
    """What routing these samples writes: their ids, and with mode "copy" their members in whole tar blocks."""
    return ids.nbytes + (shards.raw_bytes(ids) if mode == "copy" else 0)


def route(
    shards: ShardSet,
    groups: dict[int, np.ndarray],
    directory,
    mode="index",
    max_bytes=64 * 1024**3,
    say=print,
):
    """Write DIRECTORY/000/{ids.npy, routed.json} ..., and with mode "copy" DIRECTORY/000/routed-*.tar, for each group.

    groups: {number: its classes}, which may overlap.  All are written in one pass over the shards, which reads each
    sample once (one pass for every OPEN_WRITERS groups, with mode "copy").  The size is said before.
    routed.json: {"samples", "bytes", "frequency", ...}: frequency is the share of S_m's samples in the whole set, from
    which the dustbin's shift is computed.
    Returns {id: reason} of the damaged samples, which are not copied (data.damage = skip).
    Raises UserError if a group has no sample, or if all together would take more than max_bytes.
    """
    directory = Path(directory)
    ids = {number: routed_ids(shards.labels, members) for number, members in groups.items()}
    for number, found in ids.items():
        if not len(found):
            raise UserError(
                f"{shards.split} has no sample of the {len(groups[number])} classes of group {number}"
            )
    sizes = {number: routed_bytes(shards, found, mode) for number, found in ids.items()}
    total, samples = sum(sizes.values()), sum(map(len, ids.values()))
    say(
        f"routing {samples} samples (of {len(shards)}) to {len(groups)} groups by {mode}: {total / 2**20:.1f} MiB"
    )
    if total > max_bytes:
        raise UserError(
            f"routing by {mode} takes {total} bytes, above route.max_bytes = {max_bytes}"
            + (
                '; route.mode = "index" writes only which samples they are'
                if mode == "copy"
                else ""
            )
        )
    for number in groups:
        (directory / f"{number:03d}").mkdir(parents=True, exist_ok=True)
    numbers, lost = list(groups), {}
    if mode == "copy":
        for first in range(0, len(numbers), OPEN_WRITERS):
            lost |= _copy(
                shards,
                {number: ids[number] for number in numbers[first : first + OPEN_WRITERS]},
                directory,
            )
    for number, members in groups.items():
        place = directory / f"{number:03d}"
        kept = ids[number][~np.isin(ids[number], list(lost))]
        with open(place / "ids.npy", "wb") as file:
            np.save(file, kept)
        write_json(
            place / "routed.json",
            {
                "schema": SCHEMA,
                "mode": mode,
                "fingerprint": shards.fingerprint,
                "samples": len(kept),
                "bytes": sizes[number],
                "frequency": len(ids[number]) / len(shards),
                "classes": [int(c) for c in members],
            },
        )
    return lost


def _copy(shards: ShardSet, ids: dict[int, np.ndarray], directory: Path) -> dict[int, str]:
    """Each sample's raw members to the shards of every group that it belongs to.  Returns the damaged: {id: reason}."""
    samples = np.concatenate(list(ids.values()))
    order = np.argsort(samples, kind="stable")
    samples, owners = (
        samples[order],
        np.repeat(list(ids), [len(found) for found in ids.values()])[order],
    )
    label_member, lost = shards.data.label.partition(":")[0], {}
    with ExitStack() as stack:
        writers = {}
        for number in ids:
            place = directory / f"{number:03d}"
            writers[number] = stack.enter_context(
                ShardWriter(place, "routed", shards.class_names, overwrite=True)
            )
        distinct, starts = np.unique(samples, return_index=True)
        ends = np.append(starts[1:], len(samples))
        for first in range(0, len(distinct), CHUNK):
            chunk = slice(first, first + CHUNK)
            read, damaged = shards.read_raw(distinct[chunk])
            lost |= damaged
            for sample, members, start, end in zip(
                distinct[chunk].tolist(), read, starts[chunk], ends[chunk], strict=True
            ):
                if sample in damaged:
                    continue
                if label_member != shards.data.input:
                    members.pop(label_member)
                members = {
                    "__key__": f"{sample:09d}",
                    **members,
                    "cls": b"%d" % shards.labels[sample],
                }
                for owner in owners[start:end].tolist():
                    writers[owner].write(members)
    for number, writer in writers.items():
        write_manifest(
            directory / f"{number:03d}",
            shards.class_names,
            {"routed": writer.facts},
            {"command": "route"},
        )
    return lost


class RoutedShards(ShardSet):
    """Copied samples, known by what they are in the set that they come from, whose account they are in."""

    def __init__(self, copied: ShardSet, origin: ShardSet):
        self.__dict__.update(copied.__dict__ | {"_files": {}, "split": origin.split})
        self._origin = origin

    def where(self, sample: int) -> str:
        return self._origin.where(int(self.keys([sample])[0]))


def open_routed(directory, shards: ShardSet) -> tuple[ShardSet, np.ndarray]:
    """(shards, ids) of a group's samples: the caller's shards with mode "index", the copy and all its ids with "copy".

    Raises UserError if `directory` was routed from other shards.
    """
    directory = Path(directory)
    try:
        facts = read_json(directory / "routed.json")
        ids = np.load(directory / "ids.npy", allow_pickle=False)
    except (OSError, ValueError):
        raise UserError(
            f"{directory} holds no routed samples; run the stage `route` again"
        ) from None
    if facts["fingerprint"] != shards.fingerprint:
        raise UserError(
            f"{directory} was routed from other shards than {shards.names[0]} ...; run `route` again"
        )
    if facts["mode"] == "index":
        return shards, ids
    # data.damage_share is of the whole split: a small group may by chance hold more of its damage.
    data = shards.data.model_copy(update={"label": "cls", "damage_share": 0.999999})
    copied = RoutedShards(open_shards(str(directory), data, "routed"), shards)
    return copied, np.arange(len(copied))
