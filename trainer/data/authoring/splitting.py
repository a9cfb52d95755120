"""From labelled samples to a directory of splits: who goes where, and writing all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import numpy as np

from pipeline.config import UserError

from ..orders import generator
from ..writing import ShardWriter, write_manifest


def split_by_class(
    labels: np.ndarray, fractions: dict[str, float], seed: int
) -> dict[str, np.ndarray]:
    """{split: ids int64, shuffled}: of each class `fractions[split]` to val and test, rounded; the rest is train.

    Every class keeps at least one sample in train.  Raises UserError for fractions that leave no train split.
    """
    if any(not 0 <= share < 1 for share in fractions.values()) or sum(fractions.values()) >= 1:
        raise UserError(
            f"split fractions {fractions}: each is 0 or more, and together they leave something to train"
        )
    order = generator(seed, 5).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    places = np.arange(len(labels)) - np.repeat(starts, counts)
    counts = np.repeat(counts, counts)
    split_of = np.full(len(labels), "train", dtype=object)
    taken = np.zeros(len(labels))
    for split, share in fractions.items():
        wanted = np.minimum(np.round(share * counts), counts - 1 - taken).clip(min=0)
        split_of[by_class[(places >= taken) & (places < taken + wanted)]] = split
        taken = taken + wanted
    return {split: order[split_of[order] == split] for split in ("train", *fractions)}


def write_splits(
    out,
    class_names: list[str],
    splits: dict[str, Iterable[int]],
    sample: Callable[[int], dict],
    made_by: dict,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write each split's samples, sample(id) -> {"cls": bytes, extension: bytes}, and the manifest; all or nothing.

    Empty splits are left out.  Returns {split: number of samples}.
    """
    from rich.progress import Progress

    splits = {split: list(ids) for split, ids in splits.items() if len(ids)}
    if not splits:
        raise UserError("there is nothing to write: no samples found")
    with ExitStack() as stack:
        writers = {}
        for split in splits:
            writers[split] = stack.enter_context(
                ShardWriter(out, split, class_names, samples_per_shard, overwrite)
            )
        with Progress() as progress:
            for split, ids in splits.items():
                for number, item in enumerate(progress.track(ids, description=split)):
                    writers[split].write({"__key__": f"{number:08d}", **sample(item)})
    write_manifest(
        out, class_names, {split: writer.facts for split, writer in writers.items()}, made_by
    )
    return {split: len(ids) for split, ids in splits.items()}
