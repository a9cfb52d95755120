import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from trainer.config import Data
from trainer.data import ShardWriter, write_manifest

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


def samples(numbers) -> list[dict]:
    return [{"__key__": f"{n:05d}", "png": png(picture(n)), "cls": str(label_of(n)).encode()} for n in numbers]


def write_set(directory, sizes, split="train", manifest=True):
    """Shards of the given sizes, numbered through; returns the directory."""
    facts, first = [], 0
    for shard, size in enumerate(sizes):
        with ShardWriter(directory / f"part{shard}", split, CLASSES) as writer:
            for sample in samples(range(first, first + size)):
                writer.write(sample)
        first += size
        for file in sorted((directory / f"part{shard}").iterdir()):
            file.rename(directory / file.name.replace("000000", f"{shard:06d}"))
        (directory / f"part{shard}").rmdir()
        entry = writer.facts["shards"][0] | {"name": f"{split}-{shard:06d}.tar"}
        facts.append(entry)
    if manifest:
        write_manifest(directory, CLASSES, {split: {"samples": sum(sizes), "shards": facts}})
    return directory


def write_tar(path, members: list[tuple[str, bytes]]):
    """A tar of exactly these members, whatever their names."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def data():
    return Data(cache="none")


@pytest.fixture(scope="session")
def uneven(tmp_path_factory):
    """Seven shards of unlike sizes, 150 samples; do not change it."""
    return write_set(tmp_path_factory.mktemp("uneven"), [1, 40, 7, 13, 60, 2, 27])
