"""Inputs that a set holds more than once, where that makes its figures wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import Data, UserError

from ..shards import ShardSet, open_shards

MOST_COMPARED = 20_000_000  # samples: 16 bytes of memory each, and as much again while they sort


@dataclass(frozen=True)
class Repeats:
    """Inputs that are the same, byte for byte.

    in_train: {split: samples whose input train holds, too}, int64 [k] each.  Empty ones are absent.
    labelled_otherwise: samples of train whose input has another label in train, too, int64 [k].
    """

    in_train: dict[str, np.ndarray]
    labelled_otherwise: np.ndarray


def find_repeats(inputs: Mapping[str, np.ndarray], labels: np.ndarray) -> Repeats:
    """Which samples of other splits are in train, and which of train contradict each other.

    inputs: {split: int [n], equal numbers of equal inputs}.  A number below 0 equals none.
    labels: int [n], of train.
    """
    train = inputs["train"]
    in_train: dict[str, np.ndarray] = {}
    for split, numbers in inputs.items():
        repeated = np.flatnonzero((numbers >= 0) & np.isin(numbers, train))
        if split != "train" and len(repeated):
            in_train[split] = repeated
    order = np.lexsort([labels, train])
    numbers, sorted_labels = train[order], labels[order]
    contradict = (numbers[1:] == numbers[:-1]) & (sorted_labels[1:] != sorted_labels[:-1])
    contradicted = numbers[1:][contradict & (numbers[1:] >= 0)]
    return Repeats(in_train, np.flatnonzero(np.isin(train, contradicted)))


def repeat_lines(directory: str | Path, manifest: dict, data: Data) -> list[str]:
    """What is to be said of a directory's shards: a line for each split that train repeats.

    Nothing of sets without train, of shards that lie elsewhere or cannot be opened, and of sets of
    more than MOST_COMPARED samples.
    """
    entries = manifest["splits"]
    samples = sum(entry["samples"] for entry in entries.values())
    names = [shard["name"] for entry in entries.values() for shard in entry["shards"]]
    is_local = all((Path(directory) / name).exists() for name in names)
    if "train" not in entries or samples > MOST_COMPARED or not is_local:
        return []
    try:
        sets = {split: open_shards(str(directory), data, split) for split in entries}
    except UserError:
        return []  # whoever reads the shards says why
    repeats = _compared(sets)
    lines = []
    for split, repeated in repeats.in_train.items():
        first = sets[split].where(int(repeated[0]))
        lines.append(
            f"warning: {len(repeated)} of {len(sets[split])} inputs of {split} are in train, too "
            f"(the first: {first}): figures on {split} come out too good"
        )
    if len(repeats.labelled_otherwise):
        first = sets["train"].where(int(repeats.labelled_otherwise[0]))
        lines.append(
            f"warning: {len(repeats.labelled_otherwise)} of {len(sets['train'])} inputs of train "
            f"are there with another label, too (the first: {first})"
        )
    return lines


def _compared(sets: Mapping[str, ShardSet]) -> Repeats:
    """Repeats by size and checksum, and of those that agree in both by content."""
    inputs = {split: shards.input_checksums() for split, shards in sets.items()}
    labels = np.asarray(sets["train"].labels)
    alike = find_repeats(inputs, labels)
    doubtful = [inputs[split][repeated] for split, repeated in alike.in_train.items()]
    doubtful.append(inputs["train"][alike.labelled_otherwise])
    looked_at = np.unique(np.concatenate(doubtful))
    number_of: dict[bytes, int] = {}
    exact = {
        split: _numbered(sets[split], np.isin(numbers, looked_at), number_of)
        for split, numbers in inputs.items()
    }
    return find_repeats(exact, labels)


def _numbered(shards: ShardSet, chosen: np.ndarray, number_of: dict[bytes, int]) -> np.ndarray:
    """int64 [N]: the number of each chosen sample's content. -1 of all others.

    chosen: bool [N].  number_of: {digest of a content: its number}, which grows.
    """
    numbers = np.full(len(shards), -1, np.int64)
    for sample in np.flatnonzero(chosen).tolist():
        try:
            _, content = shards.input_file(sample)
        except ValueError:  # corrupt, which is for whoever decodes it to say
            continue
        digest = hashlib.blake2b(content, digest_size=16).digest()
        numbers[sample] = number_of.setdefault(digest, len(number_of))
    return numbers
