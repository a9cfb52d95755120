"""Decoded, shuffled samples per second of one process: our stream, webdataset's pipeline, and a bare tarfile loop.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.data [--workers 0] [--rounds 5]

All decode with trainer.data.decoding.image and make batches of 64.  They are taken in turn, round by round, and the
median of the rounds is printed, so that a machine that is busy for a while slows all of them.  Ratios count, not rates.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from trainer.config import Data
from trainer.data import ShardWriter, Source, TrainingStream, cached, open_shards, shuffled, write_manifest
from trainer.data.decoding import image

BATCH = 64


def write(directory: Path, kind: str, side: int, count: int) -> None:
    """`count` pictures, smooth enough for the codecs to do their usual work, in shards of 1,000."""
    rng = np.random.default_rng(0)
    with ShardWriter(directory, "train", ["a", "b"], samples_per_shard=1000) as writer:
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
            file = io.BytesIO()
            small.resize((side, side), Image.Resampling.BICUBIC).save(file, "jpeg" if kind == "jpg" else kind)
            writer.write({"__key__": f"{number:06d}", kind: file.getvalue(), "cls": b"%d" % (number % 2)})
    write_manifest(directory, ["a", "b"], {"train": writer.facts})


def ours(shards, count: int, workers: int) -> int:
    stream = TrainingStream([Source(shards, shuffled(len(shards), 0), BATCH)], 0)
    return sum(len(batch) for batch in stream.loader(0, count // BATCH, workers=workers))


def webdatasets(urls: list[str], kind: str, count: int, workers: int) -> int:
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=100, nodesplitter=None)
        .shuffle(1000)
        .map_dict(**{kind: image, "cls": int})
        .to_tuple(kind, "cls")
        .batched(BATCH, collation_fn=torch.utils.data.default_collate)
    )
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers)
    return sum(len(labels) for _, labels in loader)


def bare(urls: list[str], kind: str) -> int:
    """Not shuffled: the floor."""
    seen = 0
    for url in urls:
        with tarfile.open(url, "r|") as archive:
            pictures, labels = [], []
            for member in archive:
                content = archive.extractfile(member).read()
                if member.name.endswith(kind):
                    pictures.append(image(content))
                else:
                    labels.append(int(content))
                if len(pictures) == BATCH:
                    torch.from_numpy(np.stack(pictures)), torch.tensor(labels)
                    seen, pictures, labels = seen + BATCH, [], []
            seen += len(pictures)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name, kind, side, count in (("32x32 PNG", "png", 32, 8000), ("224x224 JPEG", "jpg", 224, 1000)):
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place)
            write(directory, kind, side, count)
            urls = [str(path) for path in sorted(directory.glob("*.tar"))]
            shards = open_shards(str(directory), Data(), "train")
            kept = cached(shards, directory / "cache", Data(cache="decoded"))
            runs = {
                "ours": lambda shards=shards, count=count: ours(shards, count, args.workers),
                "webdataset": lambda urls=urls, kind=kind, count=count: webdatasets(urls, kind, count, args.workers),
                "bare tarfile": lambda urls=urls, kind=kind: bare(urls, kind),
                "ours, decoded cache": lambda kept=kept, count=count: ours(kept, count, args.workers),
            }
            rates: dict[str, list[float]] = {run: [] for run in runs}
            for _ in range(args.rounds):
                for run, call in runs.items():
                    began = time.perf_counter()
                    seen = call()
                    rates[run].append(seen / (time.perf_counter() - began))
            median = {run: statistics.median(values) for run, values in rates.items()}
            print(f"{name}, {count} pictures, {args.workers} workers, {args.rounds} rounds, batches of {BATCH}")
            for run, rate in median.items():
                print(f"  {run:20} {rate:10.0f} /s   ours is {median['ours'] / rate:5.2f} x")


if __name__ == "__main__":
    main()
