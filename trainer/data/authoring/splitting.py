"""From labelled samples to a directory of splits: who goes where, and writing all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from networks.pictures import PictureRules
from pipeline.config import UserError

from ..orders import generator
from ..replacing import Replacement
from ..writing import ShardWriter, read_manifest, write_manifest
from .reporting import Report


def split_by_class(
    labels: np.ndarray, fractions: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Divide samples into train and other splits, class by class.

    Every class keeps at least one sample in train.

    Parameters
    ----------
    labels : int64 [n]
    fractions : {split: fraction of each class}
        For val and test. Rounded.  Where that leaves nothing to a split in any class, it takes one
        example of some classes.  The rest is train.
    seed : int

    Returns
    -------
    {split: int64 [k]}
        Indices of the samples, shuffled.

    Raises
    ------
    UserError
        For fractions that leave no train split.
    """
    _check_fractions(fractions)
    order = generator(seed, 5).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    # Of each sample in `by_class`: its place within its class, and the class's size.
    places = np.arange(len(labels)) - np.repeat(starts, counts)
    counts = np.repeat(counts, counts)
    split_of = np.full(len(labels), "train", dtype=object)
    taken = np.zeros(len(labels))
    for split, fraction in fractions.items():
        room = (counts - 1 - taken).clip(min=0)
        size = np.minimum(np.round(fraction * counts), room)
        if fraction and not size.any():
            size = _one_of_some(by_class, labels, places, room, fraction)
        split_of[by_class[(places >= taken) & (places < taken + size)]] = split
        taken = taken + size
    return {split: order[split_of[order] == split] for split in ("train", *fractions)}


def _check_fractions(fractions: Mapping[str, float]) -> None:
    """Raises UserError for fractions that leave no train split, negative ones and NaN."""
    values = list(fractions.values())
    if any(not 0 <= fraction < 1 for fraction in values) or sum(values) >= 1:
        said = ", ".join(f"{split} {fraction:g}" for split, fraction in fractions.items())
        raise UserError(
            f"split fractions {said}: each is 0 or more, and together they leave something to train"
        )


def _one_of_some(
    by_class: np.ndarray, labels: np.ndarray, places: np.ndarray, room: np.ndarray, fraction: float
) -> np.ndarray:
    """Sizes, float64 [n] as `room`, of a split for which every class is too small.

    One example of each of so many classes, the roomiest first, that together they are `fraction`.
    """
    size = np.zeros(len(labels))
    able = np.flatnonzero((places == 0) & (room > 0))  # the first sample of each such class
    wanted = max(1, round(fraction * len(labels)))
    chosen = able[np.argsort(-room[able], kind="stable")][:wanted]
    size[np.isin(labels[by_class], labels[by_class[chosen]])] = 1
    return size


def add_missing_splits(
    splits: dict[str, np.ndarray], labels: np.ndarray, fractions: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """Take the splits of `fractions` that are absent from train.  splits: {split: indices}.

    Raises UserError as split_by_class does, also for a split that is there.
    """
    _check_fractions(fractions)
    missing = {
        split: fraction
        for split, fraction in fractions.items()
        if split not in splits and fraction > 0
    }
    if not missing:
        return splits
    train = splits["train"]
    divided = split_by_class(labels[train], missing, seed)
    return splits | {split: train[ids] for split, ids in divided.items()}


def write_splits(
    out: str | Path,
    class_names: Sequence[str],
    splits: Mapping[str, Sequence[int] | np.ndarray],
    sample: Callable[[int], dict],
    made_by: dict,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    report: Report | None = None,
    pictures: PictureRules | None = None,
    quiet: bool = False,
) -> dict[str, int]:
    """Write each split's shards and the manifest. All or nothing.

    Parameters
    ----------
    out : path
    class_names : sequence of str
    splits : {split: indices}
        Empty splits are left out.
    sample : callable
        sample(index) -> {"cls": bytes, extension: bytes}.  It raises UserError for a corrupt one.
    made_by : dict
        For the manifest.
    samples_per_shard : int
    overwrite : bool
    report : Report, optional
        Its `skip` says whether corrupt samples are left out. It lists them.
    pictures : PictureRules, optional
        How pictures were made, for the manifest.
    quiet : bool
        Show no progress.

    Returns
    -------
    {split: number of samples}

    Raises
    ------
    UserError
        If there is nothing to write, the directory cannot be written, or samples are corrupt and
        not to be skipped.
    """
    from rich.progress import Progress

    report = report or Report()
    lists = {split: list(ids) for split, ids in splits.items() if len(ids)}
    if not lists:
        raise UserError("there is nothing to write: no samples found")
    _refuse_leftovers(out, lists, made_by)
    corrupt: list[tuple[int, str]] = []
    with Replacement() as replacement:
        with ExitStack() as stack:
            writers: dict[str, ShardWriter] = {}
            for split in lists:
                writer = ShardWriter(
                    out, split, class_names, samples_per_shard, overwrite, replacement
                )
                writers[split] = stack.enter_context(writer)
            with Progress(disable=quiet) as progress:
                for split, ids in lists.items():
                    tracked = progress.track(ids, description=split)
                    report.samples[split] = _write_samples(
                        writers[split], tracked, sample, corrupt, report.skip
                    )
            report.corrupt += [reason for _, reason in sorted(corrupt)]
            report.refuse_corrupt()
            if not any(report.samples.values()):
                count = len(report.corrupt)
                raise UserError(f"all {count} samples are corrupt: {report.corrupt[0]}")
        entries = {split: writer.facts for split, writer in writers.items()}
        made_by = made_by | {"lost": len(report.corrupt)} if report.corrupt else made_by
        replacement.commit(lambda: write_manifest(out, class_names, entries, made_by, pictures))
    return report.samples


def _refuse_leftovers(out: str | Path, splits: Iterable[str], made_by: dict) -> None:
    """Raises UserError where splits of an earlier set would stay beside the new ones.

    The same command made them of the same source, so they would hold samples of the new train.
    """
    old = read_manifest(out) or {"splits": {}}
    earlier = (old.get("made_by") or {}).get("command")
    left = [split for split in old["splits"] if split not in set(splits)]
    if left and earlier == made_by.get("command"):
        raise UserError(
            f"{out}: {' and '.join(left)} of an earlier `{earlier}` would stay and may hold "
            "samples of the new train; give an empty directory, or make all splits anew"
        )


def _write_samples(
    writer: ShardWriter,
    ids: Iterable[int],
    sample: Callable[[int], dict],
    corrupt: list[tuple[int, str]],
    skip: bool,
) -> int:
    """Write the samples that are intact.  Returns how many there are.

    The others go to `corrupt`.  Unless they are skipped, all samples behind the first such one are
    only looked at, so that all that are corrupt get listed.
    """
    written = 0
    for index in ids:
        try:
            files = sample(index)
        except UserError as error:
            corrupt.append((index, str(error)))
            continue
        if corrupt and not skip:
            continue
        writer.write({"__key__": f"{written:08d}", **files})
        written += 1
    return written
