"""Shards from a directory with one subdirectory per class."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pipeline.config import UserError

from ..decoding import BUILT_IN
from .splitting import split_by_class, write_splits

SPLITS = ("train", "val", "test")
PICTURES = ("jpg", "jpeg", "png", "webp")


def from_folder(
    directory,
    out,
    fractions: dict[str, float],
    size: int | None = None,
    gray: bool = False,
    seed: int = 0,
    **options,
) -> dict[str, int]:
    """DIRECTORY/CLASS/FILE, or DIRECTORY/SPLIT/CLASS/FILE, into shards.  Returns {split: samples}.

    fractions: the shares of val and test, taken from train where the directory has no such split.
    size: pictures are cut to the middle square, scaled to size x size and kept as PNG; without it files are kept as
    they are, and must agree in size and mode.  gray: one channel.
    Raises UserError, naming the file, for one that cannot be decoded; then nothing is written.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    places = {split: directory / split for split in SPLITS if (directory / split).is_dir()}
    places = places if "train" in places else {"train": directory}
    names = sorted({child.name for place in places.values() for child in _classes(place)})
    if len(names) < 2:
        raise UserError(
            f"{directory} has {len(names)} class directories; it needs one directory per class, at least 2"
        )
    files, labels, splits = [], [], {}
    for split, place in places.items():
        first = len(files)
        for child in _classes(place):
            found = sorted(
                file for file in child.rglob("*") if _extension(file) in BUILT_IN and file.is_file()
            )
            if not found and split == "train":
                raise UserError(
                    f"{child} holds no file of a known kind ({', '.join(sorted(BUILT_IN))})"
                )
            files += found
            labels += [names.index(child.name)] * len(found)
        splits[split] = np.arange(first, len(files))
    labels = np.array(labels)
    missing = {
        split: share for split, share in fractions.items() if split not in splits and share > 0
    }
    if missing:
        train = splits["train"]
        divided = split_by_class(labels[train], missing, seed)
        splits |= {split: train[ids] for split, ids in divided.items()}
    _check_sizes(files, size, gray)

    def sample(number: int) -> dict:
        extension, content = _extension(files[number]), files[number].read_bytes()
        try:
            if extension in PICTURES and (size or gray):
                extension, content = "png", _resized(content, size, gray)
            else:
                BUILT_IN[extension](content)
        except Exception as mistake:  # Pillow raises what it likes about bytes it does not know
            raise UserError(f"{files[number]}: cannot be decoded: {mistake}") from None
        return {extension: content, "cls": b"%d" % labels[number]}

    made_by = {
        "command": "shards folder",
        "directory": str(directory.resolve()),
        "size": size,
        "gray": gray,
        "seed": seed,
    }
    return write_splits(out, names, splits, sample, made_by, **options)


def _classes(place: Path) -> list[Path]:
    return sorted(
        child for child in place.iterdir() if child.is_dir() and not child.name.startswith(".")
    )


def _extension(file: Path) -> str:
    return "" if file.name.startswith(".") else file.suffix.lower().removeprefix(".")


def _check_sizes(files: list[Path], size: int | None, gray: bool) -> None:
    """Pictures kept as they are must agree in size and in having colour: a batch is one array."""
    if size:
        return
    from PIL import Image

    seen: dict[tuple, Path] = {}
    for file in files:
        if _extension(file) in PICTURES:
            try:
                with Image.open(file) as picture:
                    seen.setdefault((*picture.size, gray or picture.mode in ("1", "L")), file)
            except OSError as mistake:
                raise UserError(f"{file}: cannot be decoded: {mistake}") from None
        if len(seen) > 1:
            (a, first), (b, second) = seen.items()
            unlike = "size" if a[:2] != b[:2] else "mode"
            remedy = (
                "--size N brings all to one"
                if unlike == "size"
                else "--gray or --size N brings all to one"
            )
            raise UserError(
                f"{first} and {second} differ in {unlike} ({a[0]}x{a[1]}, {b[0]}x{b[1]}); {remedy}"
            )


def _resized(content: bytes, size: int | None, gray: bool) -> bytes:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as picture:
        picture = picture.convert("L" if gray else "RGB")
        if size:
            picture = ImageOps.fit(picture, (size, size))
        file = io.BytesIO()
        picture.save(file, "png")
    return file.getvalue()
