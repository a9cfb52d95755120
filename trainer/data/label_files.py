"""The class of every sample of a split, as one array beside the manifest.

A manifest of schema 2 names the array by its sha256, so a hash of manifest.json stands for both.
It is mapped, not read: all processes of a machine share its pages, and a set of a hundred million
samples opens without its shards.  The counts of a shard's classes follow from it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from pydantic import BaseModel, Field

from networks.temporaries import discard, temporary_beside
from pipeline.config import UserError

from .tars import file_sha256

DTYPE = np.dtype("<i4")
CHUNK = 1 << 22  # labels that are counted at a time
ENDING = ".npy"


class LabelFile(BaseModel):
    """What a split's entry of the manifest says of its array: {"labels": {...}}.

    member: where the labels were read from, "cls" or "json:FIELD".
    extensions: of all files in the shards.
    """

    file: str = Field(pattern=r"^[^/]+\.labels-[0-9a-f]{16}\.npy$")
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    member: str
    extensions: list[str]


@dataclass(frozen=True)
class SplitLabels:
    """The samples of one split, shard by shard in the manifest's order.

    classes: int32 [N], mapped from `path`.  member, extensions: as in LabelFile.
    """

    path: Path
    classes: np.ndarray
    member: str
    extensions: tuple[str, ...]


def is_label_file(name: str) -> bool:
    """Whether a file of this name is such an array."""
    return ".labels-" in name and name.endswith(ENDING)


def write_labels(
    directory: str | Path,
    split: str,
    classes: Sequence[np.ndarray],
    member: str,
    extensions: Sequence[str],
) -> dict:
    """Write DIRECTORY/SPLIT.labels-SHA256.npy.  Returns what the manifest says of it.

    classes: the labels of each shard, int [n].  Raises OSError where it cannot be written.
    """
    joined = np.concatenate([np.zeros(0, DTYPE), *classes]).astype(DTYPE)
    temporary = temporary_beside(Path(directory) / f"{split}.labels")
    try:
        with open(temporary, "wb") as file:
            hashing = _Hashing(file)
            np.lib.format.write_array(cast(IO[bytes], hashing), joined, allow_pickle=False)
        sha256 = hashing.sha256.hexdigest()
        path = Path(directory) / f"{split}.labels-{sha256[:16]}{ENDING}"
        os.replace(temporary, path)
    finally:
        discard(temporary)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256,
        "member": member,
        "extensions": sorted(set(extensions)),
    }


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)


def remove_label_files(directory: str | Path, splits: Mapping[str, dict]) -> None:
    """Delete the arrays that no split's entry names."""
    named = {entry["labels"]["file"] for entry in splits.values() if "labels" in entry}
    for path in Path(directory).glob(f"*.labels-*{ENDING}"):
        if path.name not in named:
            path.unlink(missing_ok=True)


def open_labels(path: Path, manifest: dict, split: str, name: str) -> SplitLabels:
    """Map a split's array.

    Parameters
    ----------
    path : path
        Of the array.
    manifest : dict
    split : str
    name : str
        What the user calls the manifest.

    Raises
    ------
    UserError
        If it is absent, is not the one that the manifest names by sha256, or does not hold a class
        for each of the split's samples.
    """
    entry = manifest["splits"][split]
    said = entry["labels"]
    remedy = "copy it from where the manifest comes from, or run `referral shards index`"
    try:
        size = path.stat().st_size
        if size != said["bytes"] or file_sha256(path) != said["sha256"]:
            raise UserError(f"{path} is not the file that {name} names (sha256); {remedy}")
        classes = map_labels(path)
    except FileNotFoundError:
        raise UserError(f"{path}: {name} names this file and it is absent; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; {remedy}") from None
    if classes.dtype != DTYPE or classes.shape != (entry["samples"],):
        raise UserError(
            f"{path} holds {classes.dtype} {list(classes.shape)}, {name} says "
            f"{DTYPE} [{entry['samples']}]; {remedy}"
        )
    number = len(manifest["classes"])
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < number:
        raise UserError(
            f"{path} holds classes {classes.min()} to {classes.max()}, {name} has {number}; "
            f"{remedy}"
        )
    return SplitLabels(path, classes, said["member"], tuple(said["extensions"]))


def map_labels(path: Path) -> np.ndarray:
    """The array in a file, mapped."""
    # A plain array over the mapping: numpy's memmap class costs more than the indexing itself.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def count_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [C]: samples of each class. Negative labels do not count.

    labels: int [N].
    """
    counts = np.zeros(num_classes, np.int64)
    for first in range(0, len(labels), CHUNK):
        part = labels[first : first + CHUNK]
        counts += np.bincount(part[part >= 0], minlength=num_classes)
    return counts


def class_counts(directory: str | Path, manifest: dict, split: str) -> np.ndarray:
    """int64 [C]: the split's samples of each class, by the manifest in `directory`.

    Raises UserError for an array that is not the manifest's.
    """
    entry, names = manifest["splits"][split], manifest["classes"]
    if "labels" in entry:
        path = Path(directory) / entry["labels"]["file"]
        labels = open_labels(path, manifest, split, "manifest.json")
        return count_classes(labels.classes, len(names))
    class_of = {name: number for number, name in enumerate(names)}
    counts = np.zeros(len(names), np.int64)
    for shard in entry["shards"]:
        for name, count in shard["class_counts"].items():
            counts[class_of[name]] += count
    return counts
