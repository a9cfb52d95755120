"""Small sets of shards for the tests of trainer.data."""

import io
import tarfile

import numpy as np
from PIL import Image

from trainer.data import ShardWriter, write_manifest
from trainer.data.tars import save_index, scan_tar
from trainer.data.writing import shard_entry

CLASSES = [f"class {c}" for c in range(7)]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def picture(number: int) -> np.ndarray:
    """uint8 [6, 5]: another picture for every number."""
    return np.random.default_rng(number).integers(0, 256, (6, 5), dtype=np.uint8)


def label_of(number: int) -> int:
    return number * number % 7


def sample(number: int) -> dict:
    return {
        "__key__": f"{number:05d}",
        "png": png(picture(number)),
        "cls": str(label_of(number)).encode(),
    }


def write_split(directory, count: int, split="train", per_shard=10_000, first=0):
    """`count` samples numbered from `first`, and the manifest."""
    with ShardWriter(directory, split, CLASSES, per_shard) as writer:
        for number in range(first, first + count):
            writer.write(sample(number))
    write_manifest(directory, CLASSES, {split: writer.facts})
    return directory


def write_uneven(directory, sizes, manifest=True, indexed=True):
    """train-000000.tar, ... of the given sizes, numbered through."""
    shards, first = [], 0
    for shard, size in enumerate(sizes):
        numbers = range(first, first + size)
        path = write_tar(directory / f"train-{shard:06d}.tar", tar_files(numbers))
        index = scan_tar(path)
        if indexed:
            save_index(path, index)
        labels = np.array([label_of(number) for number in numbers])
        shards.append(shard_entry(path.name, index, labels))
        first += size
    if manifest:
        write_manifest(directory, CLASSES, {"train": {"samples": first, "shards": shards}})
    return directory


def tar_files(numbers) -> list[tuple[str, bytes]]:
    files = []
    for number in numbers:
        content = sample(number)
        files += [(f"{number:05d}.{extension}", content[extension]) for extension in ("cls", "png")]
    return files


def write_tar(path, files: list[tuple[str, bytes]]):
    """A tar of exactly these files, whatever their names."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path
