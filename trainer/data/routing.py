"""Routed samples: what one specialist reads of the training data, found once after clustering.

Mode "index" keeps the ids of S_m's samples; "copy" also their raw members, in shards of their own, so that a specialist
with 2 % of the classes does not read from everywhere in a large set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..config import UserError
from ..run_directory import read_json, write_json
from .shards import ShardSet, open_shards
from .writing import ShardWriter, write_manifest

SCHEMA = 1


def routed_ids(labels: np.ndarray, members) -> np.ndarray:
    """int64: the samples whose label is one of `members`, in order."""
    return np.flatnonzero(np.isin(labels, members))


def routed_bytes(shards: ShardSet, ids: np.ndarray, mode: str) -> int:
    """What routing these samples writes: their ids, and with mode "copy" their members in whole tar blocks."""
    return ids.nbytes + (shards.raw_bytes(ids) if mode == "copy" else 0)


def route(shards: ShardSet, members, directory, mode: str = "index", max_bytes: int = 64 * 1024**3) -> dict:
    """Write DIRECTORY/{ids.npy, routed.json} for the classes `members`, and with mode "copy" DIRECTORY/routed-*.tar.

    The size is printed before anything is written.  Returns routed.json: {"samples", "bytes", "frequency", ...}:
    frequency is the share of S_m's samples in the whole set, from which the dustbin's shift is computed.
    Raises UserError if no sample is of these classes, or if it would take more than max_bytes.
    """
    if mode not in ("index", "copy"):
        raise UserError(f"route = {mode!r}: index or copy")
    directory = Path(directory)
    ids = routed_ids(shards.labels, members)
    if not len(ids):
        raise UserError(f"{shards.split} has no sample of the {len(members)} classes of {directory.name}")
    size = routed_bytes(shards, ids, mode)
    print(f"{directory.name}: {len(ids)} of {len(shards)} samples, {size / 2**20:.1f} MiB", flush=True)
    if size > max_bytes:
        raise UserError(
            f"routing {directory.name} by {mode} takes {size} bytes, above specialists.route_max_bytes = {max_bytes}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    if mode == "copy":
        _copy(shards, ids, directory)
    with open(directory / "ids.npy", "wb") as file:
        np.save(file, ids)
    facts = {
        "schema": SCHEMA, "mode": mode, "fingerprint": shards.fingerprint, "samples": len(ids), "bytes": size,
        "frequency": len(ids) / len(shards), "classes": [int(member) for member in members],
    }  # fmt: skip
    write_json(directory / "routed.json", facts)
    return facts


def _copy(shards: ShardSet, ids: np.ndarray, directory: Path) -> None:
    label_member = shards.data.label.partition(":")[0]
    with ShardWriter(directory, "routed", shards.class_names, overwrite=True) as writer:
        for sample in ids.tolist():
            (members,) = shards.raw([sample])
            members.pop(label_member)
            label = b"%d" % shards.labels[sample]
            writer.write({"__key__": f"{sample:09d}", **members, "cls": label})
    write_manifest(directory, shards.class_names, {"routed": writer.facts}, {"command": "route"})


def open_routed(directory, shards: ShardSet) -> tuple[ShardSet, np.ndarray]:
    """(shards, ids) of a group's samples: the caller's shards with mode "index", the copy and all its ids with "copy".

    Raises UserError if `directory` was routed from other shards.
    """
    directory = Path(directory)
    try:
        facts = read_json(directory / "routed.json")
        ids = np.load(directory / "ids.npy", allow_pickle=False)
    except (OSError, ValueError):
        raise UserError(f"{directory} holds no routed samples; run the stage `route` again") from None
    if facts["fingerprint"] != shards.fingerprint:
        raise UserError(f"{directory} was routed from other shards than {shards.names[0]} ...; run `route` again")
    if facts["mode"] == "index":
        return shards, ids
    data = shards.data.model_copy(update={"label": "cls"})
    copied = open_shards(str(directory), data, "routed")
    return copied, np.arange(len(copied))
