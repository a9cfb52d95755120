"""Decoded, shuffled samples per second: our stream, webdataset's pipeline and a bare tarfile loop.

    OMP_NUM_THREADS=1 python -m benchmarks.data [--workers 0 1 2] [--rounds 7]
        [--seconds 2]
    OMP_NUM_THREADS=1 python -m benchmarks.data --quick  seconds: does it run at all?

All decode with trainer.data.decoding.image and make batches of 64.  With workers, each runs in as
many workers of torch's DataLoader, the bare loop too: every worker reads its share of the shards.
("in process" has no worker and hands nothing over, so it is no like for like, it shows what a
worker costs.)

They take turns, round by round, each for about `seconds`.  A ratio is taken within a round, and the
median over the rounds is printed with the smallest and the largest, so that a machine that is busy
for a while slows both sides.  Ratios count, not rates.

The last table is about order: distinct classes per batch, read from shards that are sorted by
class, over the number expected of a fair draw without replacement (`expected_distinct`).

The last line is one JSON object with all of it:
    {"rates": [{"pictures", "workers", "samples", "passes", "rounds", "run", "rate", "ours_over"}],
     "mixing": [{"run", "mean", "fair", "least"}]}
rate is per second and worker. ours_over is {"median", "least", "largest"} of the ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from webdataset.compat import WebDataset

from pipeline.config import Data
from trainer.data import (
    ShardSet,
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

Labels = Iterator[torch.Tensor]  # the labels of each batch: what a reader here yields
ImageBatch = tuple[torch.Tensor, torch.Tensor]


class Pictures(NamedTuple):
    name: str
    extension: str
    side: int
    count: int


PICTURES = [Pictures("32x32 PNG", "png", 32, 8000), Pictures("224x224 JPEG", "jpg", 224, 1024)]
QUICK_PICTURES = [Pictures("32x32 PNG", "png", 32, 512), Pictures("224x224 JPEG", "jpg", 224, 128)]


@dataclass(frozen=True)
class Options:
    workers: list[int]
    rounds: int
    seconds: float
    pictures: list[Pictures]
    mixed_samples: int = 8000
    mixed_classes: int = 200


def write(directory: Path, pictures: Pictures, classes: int = 2) -> None:
    """Write pictures sorted by class in eight shards.

    They are smooth enough for the codecs to do their usual work.
    """
    rng = np.random.default_rng(0)
    names = [str(c) for c in range(classes)]
    side, count, extension = pictures.side, pictures.count, pictures.extension
    codec = "jpeg" if extension == "jpg" else extension
    with ShardWriter(directory, "train", names, samples_per_shard=count // 8) as writer:
        for number in range(count):
            small = rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
            file = io.BytesIO()
            smooth = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
            smooth.save(file, codec)
            label = b"%d" % (number * classes // count)
            writer.write({"__key__": f"{number:06d}", extension: file.getvalue(), "cls": label})
    write_manifest(directory, names, {"train": writer.facts})


def read_ours(shards: ShardSet, passes: int, workers: int) -> Labels:
    stream = TrainingStream([Source(shards, shuffled(len(shards), 0), BATCH)], 0)
    for batch in stream.loader(0, passes * len(shards) // BATCH, workers=workers):
        yield batch.labels


def read_webdataset(urls: list[str], extension: str, passes: int, workers: int) -> Labels:
    shards = WebDataset(urls, shardshuffle=100, nodesplitter=None)
    # `repeat` is declared to return the base class, and returns a copy of itself.
    repeated = cast(WebDataset, shards.repeat(passes))
    pipeline = (
        repeated.shuffle(1000)
        .map_dict(**{extension: image, "cls": int})
        .to_tuple(extension, "cls")
        .batched(BATCH, collation_fn=default_collate)
    )
    dataset = cast(IterableDataset, pipeline)
    for _, labels in DataLoader(dataset, batch_size=None, num_workers=workers):
        yield labels


class BareTars(IterableDataset[ImageBatch]):
    """The floor: files as tarfile gives them, not shuffled, not checked."""

    def __init__(self, urls: list[str], extension: str, passes: int):
        self.urls = urls
        self.extension = extension
        self.passes = passes

    def __iter__(self) -> Iterator[ImageBatch]:
        worker = get_worker_info()
        mine = self.urls
        if worker is not None:
            mine = mine[worker.id :: worker.num_workers]
        pictures, labels = [], []
        for name, content in _tar_files(mine * self.passes):
            if name.endswith(self.extension):
                pictures.append(image(content))
            else:
                labels.append(int(content))
            if len(pictures) == len(labels) == BATCH:
                yield torch.from_numpy(np.stack(pictures)), torch.tensor(labels)
                pictures, labels = [], []


def _tar_files(urls: list[str]) -> Iterator[tuple[str, bytes]]:
    for url in urls:
        with tarfile.open(url, "r|") as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None, member.name
                yield member.name, file.read()


def read_bare(urls: list[str], extension: str, passes: int, workers: int) -> Labels:
    dataset = BareTars(urls, extension, passes)
    for _, labels in DataLoader(dataset, batch_size=None, num_workers=workers):
        yield labels


def rate(batches: Iterable[torch.Tensor]) -> float:
    """Samples per second."""
    began = time.perf_counter()
    seen = sum(len(labels) for labels in batches)
    return seen / (time.perf_counter() - began)


def compare(pictures: Pictures, workers: int, options: Options) -> list[dict]:
    """Read the same pictures in every way, and print and return a row for each."""
    extension = pictures.extension
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write(directory, pictures)
        urls = [str(path) for path in sorted(directory.glob("*.tar"))]
        shards = open_shards(str(directory), Data(), "train")
        decoded = cached(shards, directory / "cache", Data(cache="decoded"))
        one_pass = rate(read_ours(shards, 1, 0))
        passes = max(1, round(options.seconds * one_pass / pictures.count))
        runs: dict[str, Callable[[], Labels]] = {
            "ours": lambda: read_ours(shards, passes, workers),
            "webdataset": lambda: read_webdataset(urls, extension, passes, workers),
            "bare tarfile": lambda: read_bare(urls, extension, passes, workers),
        }
        if workers == 1:
            runs["bare, in process"] = lambda: read_bare(urls, extension, passes, 0)
        runs["ours, decoded cache"] = lambda: read_ours(decoded, 4 * passes, workers)
        rates = take_turns(runs, options.rounds, workers)
    print(
        f"{pictures.name}, {pictures.count} pictures x {passes} passes, {workers} workers, "
        f"{options.rounds} rounds, batches of {BATCH}"
    )
    conditions = {
        "pictures": pictures.name,
        "workers": workers,
        "samples": pictures.count,
        "passes": passes,
        "rounds": options.rounds,
    }
    return [conditions | _rate_row(run, rates) for run in rates]


def take_turns(
    runs: dict[str, Callable[[], Labels]], rounds: int, workers: int
) -> dict[str, list[float]]:
    """{run: its samples per second and worker in each round}."""
    rates: dict[str, list[float]] = {run: [] for run in runs}
    for turn in range(rounds):
        order = list(runs) if turn % 2 else list(reversed(runs))
        for run in order:
            rates[run].append(rate(runs[run]()) / max(workers, 1))
    return rates


def _rate_row(run: str, rates: dict[str, list[float]]) -> dict:
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[run], strict=True)]
    median, ratio = statistics.median(rates[run]), statistics.median(ratios)
    print(
        f"  {run:20} {median:9.0f} /s and worker   "
        f"ours is {ratio:5.2f} x ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    ours_over = {"median": ratio, "least": min(ratios), "largest": max(ratios)}
    return {"run": run, "rate": median, "ours_over": ours_over}


def mixing(samples: int, classes: int) -> list[dict]:
    """Distinct classes per batch over one pass of samples that are sorted by class."""
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), Pictures("8x8 PNG", "png", 8, samples), classes)
        urls = [str(path) for path in sorted(Path(directory).glob("*.tar"))]
        shards = open_shards(directory, Data(), "train")
        fair = expected_distinct(shards.class_counts, BATCH)
        print(
            f"distinct classes in a batch of {BATCH}, {classes} classes sorted by class; "
            f"a fair draw: {fair:.2f}"
        )
        rows = []
        runs = {
            "ours": read_ours(shards, 1, 0),
            "webdataset": read_webdataset(urls, "png", 1, 0),
        }
        for run, batches in runs.items():
            distinct = [len(labels.unique()) for labels in batches if len(labels) == BATCH]
            mean = float(np.mean(distinct))
            print(f"  {run:20} mean {mean:6.2f}, {mean / fair:4.2f} of it; least {min(distinct)}")
            rows.append({"run": run, "mean": mean, "fair": fair, "least": min(distinct)})
        return rows


def parse(argv: list[str] | None = None) -> Options:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run in a round")
    parser.add_argument("--quick", action="store_true", help="few pictures, one round, in seconds")
    args = parser.parse_args(argv)
    if args.quick:
        return Options([0, 1], 1, 0.1, QUICK_PICTURES, mixed_samples=1024, mixed_classes=64)
    return Options(args.workers, args.rounds, args.seconds, PICTURES)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    # default_collate of decoded bytes.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    rates = []
    for workers in options.workers:
        for pictures in options.pictures:
            rates += compare(pictures, workers, options)
    rows = mixing(options.mixed_samples, options.mixed_classes)
    print(json.dumps({"rates": rates, "mixing": rows}))


if __name__ == "__main__":
    main()
