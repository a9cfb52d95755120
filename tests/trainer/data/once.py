"""Measuring passes over seven shards of unlike sizes, for every number of ranks and workers.

`python tests/trainer/data/once.py` checks a hundred of them: `make soak`.
"""

import itertools
import random
import sys
import tempfile
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "support"), str(Path(__file__).parents[3])]

import numpy as np  # noqa: E402
from campaigns import Asked, asked  # noqa: E402
from shardsets import label_of, picture, write_uneven  # noqa: E402

from pipeline.config import Data  # noqa: E402
from trainer.data import MeasuringStream, open_shards  # noqa: E402

RANKS, WORKERS = range(1, 6), range(4)
SETS = 5


def uneven_set(directory: Path, seed: int):
    """Seven shards of 1 to 90 samples, no two of one size."""
    sizes = random.Random(seed).sample(range(1, 91), 7)
    return open_shards(str(write_uneven(directory, sizes)), Data(cache="none"), "train")


def times_seen(shards, batch_size: int, ranks: int, workers: int) -> np.ndarray:
    """int64 [N]: how often each sample came, over all ranks.

    Raises AssertionError if one came with what is not its own.
    """
    times = np.zeros(len(shards), np.int64)
    for rank in range(ranks):
        for batch in MeasuringStream(shards, batch_size).loader(rank, ranks, workers):
            check_intact(batch)
            times[batch.ids.numpy()] += 1
    return times


def check_intact(batch) -> None:
    ids, labels = batch.ids.tolist(), batch.labels.tolist()
    assert len(set(ids)) == len(ids), "a sample came twice in a batch"
    for sample, label, inputs in zip(ids, labels, batch.inputs, strict=True):
        assert label == label_of(sample) and (inputs[0].numpy() == picture(sample)).all()


def soak(given: Asked) -> None:
    warnings.filterwarnings("ignore", "This DataLoader will create")
    passes = samples = 0
    for seed in given.numbers:
        with tempfile.TemporaryDirectory() as directory:
            shards = uneven_set(Path(directory), seed)
            for ranks, workers in itertools.product(RANKS, WORKERS):
                batch_size = random.Random(f"{seed} {ranks} {workers}").choice([1, 7, 16, 64, 1000])
                times = times_seen(shards, batch_size, ranks, workers)
                geometry = f"{ranks} ranks, {workers} workers"
                assert (times == 1).all(), f"seed {seed}, {geometry}: {np.bincount(times)}"
                passes += 1
                samples += len(times)
    print(f"sets {given}: {passes} passes, {samples} samples, each seen exactly once")


if __name__ == "__main__":
    soak(asked(SETS))
