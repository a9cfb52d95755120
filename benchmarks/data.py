"""Decoded, shuffled samples per second and worker: our stream, webdataset's pipeline and a bare tarfile loop.

    OMP_NUM_THREADS=1 python -m benchmarks.data [--workers 0 1 2] [--rounds 7] [--seconds 2]

All decode with trainer.data.decoding.image and make batches of 64.  With workers, each runs in as many workers of
torch's DataLoader, the bare loop too: every worker reads its share of the shards ("in process" has no worker and hands
nothing over, so it is no like for like; it shows what a worker costs).  They are taken in turn, round by
round, each for about `seconds`; a ratio is taken within a round and the median over the rounds is printed with the
smallest and the largest, so that a machine that is busy for a while slows both sides.  Ratios count, not rates.

The last table is about order: distinct classes per batch, read from shards that are sorted by class, over the number
expected of a fair draw without replacement (`expected_distinct`).
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from pipeline.config import Data
from trainer.data import (
    ShardWriter,
    Source,
    TrainingStream,
    cached,
    open_shards,
    shuffled,
    write_manifest,
)
from trainer.data.decoding import image
from trainer.data.orders import expected_distinct

BATCH = 64


def write(directory: Path, kind: str, side: int, count: int, classes: int = 2) -> None:
    """`count` pictures sorted by class, smooth enough for the codecs to do their usual work, in eight shards."""
    rng = np.random.default_rng(0)
    names = [str(c) for c in range(classes)]
    with ShardWriter(directory, "train", names, samples_per_shard=count // 8) as writer:
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
            file = io.BytesIO()
            small.resize((side, side), Image.Resampling.BICUBIC).save(
                file, "jpeg" if kind == "jpg" else kind
            )
            label = b"%d" % (number * classes // count)
            writer.write({"__key__": f"{number:06d}", kind: file.getvalue(), "cls": label})
    write_manifest(directory, names, {"train": writer.facts})


def ours(shards, passes: int, workers: int):
    stream = TrainingStream([Source(shards, shuffled(len(shards), 0), BATCH)], 0)
    for batch in stream.loader(0, passes * len(shards) // BATCH, workers=workers):
        yield batch.labels


def webdatasets(urls: list[str], kind: str, passes: int, workers: int):
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=100, nodesplitter=None)
        .repeat(passes)
        .shuffle(1000)
        .map_dict(**{kind: image, "cls": int})
        .to_tuple(kind, "cls")
        .batched(BATCH, collation_fn=torch.utils.data.default_collate)
    )
    for _, labels in torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers):
        yield labels


class Bare(torch.utils.data.IterableDataset):
    """The floor: members as tarfile gives them, not shuffled, not checked."""

    def __init__(self, urls: list[str], kind: str, passes: int):
        self.urls, self.kind, self.passes = urls, kind, passes

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        mine = self.urls[worker.id :: worker.num_workers] if worker else self.urls
        pictures, labels = [], []
        for url in mine * self.passes:
            with tarfile.open(url, "r|") as archive:
                for member in archive:
                    content = archive.extractfile(member).read()
                    if member.name.endswith(self.kind):
                        pictures.append(image(content))
                    else:
                        labels.append(int(content))
                    if len(pictures) == len(labels) == BATCH:
                        yield torch.from_numpy(np.stack(pictures)), torch.tensor(labels)
                        pictures, labels = [], []


def bare(urls: list[str], kind: str, passes: int, workers: int):
    for _, labels in torch.utils.data.DataLoader(
        Bare(urls, kind, passes), batch_size=None, num_workers=workers
    ):
        yield labels


def rate(batches) -> float:
    began = time.perf_counter()
    seen = sum(len(labels) for labels in batches)
    return seen / (time.perf_counter() - began)


def compare(
    name: str, kind: str, side: int, count: int, workers: int, rounds: int, seconds: float
) -> None:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        write(directory, kind, side, count)
        urls = [str(path) for path in sorted(directory.glob("*.tar"))]
        shards = open_shards(str(directory), Data(), "train")
        kept = cached(shards, directory / "cache", Data(cache="decoded"))
        passes = max(1, round(seconds * rate(ours(shards, 1, 0)) / count))
        runs = {
            "ours": lambda: ours(shards, passes, workers),
            "webdataset": lambda: webdatasets(urls, kind, passes, workers),
            "bare tarfile": lambda: bare(urls, kind, passes, workers),
            **({"bare, in process": lambda: bare(urls, kind, passes, 0)} if workers == 1 else {}),
            "ours, decoded cache": lambda: ours(kept, 4 * passes, workers),
        }
        rates = {run: [] for run in runs}
        for turn in range(rounds):
            for run, call in list(runs.items())[:: 1 if turn % 2 else -1]:
                rates[run].append(rate(call()) / max(workers, 1))
    print(
        f"{name}, {count} pictures x {passes} passes, {workers} workers, {rounds} rounds, batches of {BATCH}"
    )
    for run, values in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(rates["ours"], values, strict=True)]
        print(
            f"  {run:20} {statistics.median(values):9.0f} /s and worker   "
            f"ours is {statistics.median(ratios):5.2f} x ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def mixing() -> None:
    """Distinct classes per batch of 64 over one pass of 8,000 samples of 200 classes, sorted by class."""
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), "png", 8, 8000, 200)
        urls = [str(path) for path in sorted(Path(place).glob("*.tar"))]
        shards = open_shards(place, Data(), "train")
        fair = expected_distinct(shards.class_counts, BATCH)
        print(
            f"distinct classes in a batch of {BATCH}, 200 classes sorted by class; a fair draw: {fair:.2f}"
        )
        for run, batches in {
            "ours": ours(shards, 1, 0),
            "webdataset": webdatasets(urls, "png", 1, 0),
        }.items():
            found = [len(labels.unique()) for labels in batches if len(labels) == BATCH]
            print(
                f"  {run:20} mean {np.mean(found):6.2f}, {np.mean(found) / fair:4.2f} of it; least {min(found)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    warnings.filterwarnings(
        "ignore", "The given NumPy array is not writable"
    )  # default_collate of decoded bytes
    for workers in args.workers:
        for name, kind, side, count in (
            ("32x32 PNG", "png", 32, 8000),
            ("224x224 JPEG", "jpg", 224, 1024),
        ):
            compare(name, kind, side, count, workers, args.rounds, args.seconds)
    mixing()


if __name__ == "__main__":
    main()
