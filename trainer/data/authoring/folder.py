"""Shards from a directory with one subdirectory per class."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.config import UserError

from ..choices import DECODERS
from ..decoding import Decoder, built_in
from .splitting import add_missing_splits, write_splits

SPLITS = ("train", "val", "test")
PICTURES = ("jpg", "jpeg", "png", "webp")


def from_folder(
    directory: str | Path,
    out: str | Path,
    fractions: Mapping[str, float],
    size: int | None = None,
    gray: bool = False,
    seed: int = 0,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
) -> dict[str, int]:
    """DIRECTORY/CLASS/FILE, or DIRECTORY/SPLIT/CLASS/FILE, into shards.

    Parameters
    ----------
    directory, out : path
    fractions : {split: fraction}
        Of each class for val and test, taken from train where the directory has no such split.
    size : int, optional
        Pictures are cut to the middle square, scaled to size x size and kept as PNG.  Without it
        files are kept as they are, and must agree in size and mode.
    gray : bool
        One channel.
    seed : int
        Of the division into splits.
    samples_per_shard : int
    overwrite : bool

    Returns
    -------
    {split: number of samples}

    Raises
    ------
    UserError
        Naming the file, for one that cannot be decoded; then nothing is written.
    """
    directory = Path(directory)
    roots = _split_roots(directory)
    children: set[str] = set()
    for root in roots.values():
        children |= {child.name for child in _class_directories(root)}
    names = sorted(children)
    if len(names) < 2:
        raise UserError(
            f"{directory} has {len(names)} class directories; "
            "it needs one directory per class, at least 2"
        )
    files, labels, splits = _list_files(roots, names)
    splits = add_missing_splits(splits, labels, fractions, seed)
    _check_sizes(files, size, gray)
    decoders = built_in()

    def sample(index: int) -> dict:
        extension, content = _encoded(files[index], size, gray, decoders)
        return {extension: content, "cls": b"%d" % labels[index]}

    made_by = {
        "command": "shards folder",
        "directory": str(directory.resolve()),
        "size": size,
        "gray": gray,
        "seed": seed,
    }
    return write_splits(out, names, splits, sample, made_by, samples_per_shard, overwrite)


def _split_roots(directory: Path) -> dict[str, Path]:
    """{split: the directory of its class directories}."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    roots = {split: directory / split for split in SPLITS if (directory / split).is_dir()}
    if "train" in roots:
        return roots
    return {"train": directory}


def _class_directories(root: Path) -> list[Path]:
    children = [child for child in root.iterdir() if child.is_dir()]
    return sorted(child for child in children if not child.name.startswith("."))


def _list_files(
    roots: dict[str, Path], names: list[str]
) -> tuple[list[Path], np.ndarray, dict[str, np.ndarray]]:
    """(all files, their labels int64 [n], {split: indices of its files})."""
    files: list[Path] = []
    labels: list[int] = []
    splits: dict[str, np.ndarray] = {}
    for split, root in roots.items():
        first = len(files)
        for child in _class_directories(root):
            known = [file for file in child.rglob("*") if _extension(file) in DECODERS]
            inside = sorted(file for file in known if file.is_file())
            if not inside and split == "train":
                raise UserError(
                    f"{child} holds no file of a known kind ({', '.join(sorted(DECODERS))})"
                )
            files += inside
            labels += [names.index(child.name)] * len(inside)
        splits[split] = np.arange(first, len(files))
    return files, np.array(labels), splits


def _extension(file: Path) -> str:
    if file.name.startswith("."):
        return ""
    return file.suffix.lower().removeprefix(".")


def _encoded(
    file: Path, size: int | None, gray: bool, decoders: dict[str, Decoder]
) -> tuple[str, bytes]:
    """(extension, content) as the shard holds it."""
    extension, content = _extension(file), file.read_bytes()
    try:
        if extension in PICTURES and (size or gray):
            return "png", _resized(content, size, gray)
        decoders[extension](content)
    except Exception as error:  # Pillow raises what it likes about bytes it does not know
        raise UserError(f"{file}: cannot be decoded: {error}") from None
    return extension, content


def _check_sizes(files: list[Path], size: int | None, gray: bool) -> None:
    """Pictures kept as they are must agree in size and in having colour: a batch is one array."""
    if size:
        return
    from PIL import Image

    # (width, height, whether it has one channel) -> the first file like that
    seen: dict[tuple[int, int, bool], Path] = {}
    for file in files:
        if _extension(file) not in PICTURES:
            continue
        try:
            with Image.open(file) as picture:
                one_channel = gray or picture.mode in ("1", "L")
                seen.setdefault((picture.width, picture.height, one_channel), file)
        except OSError as error:
            raise UserError(f"{file}: cannot be decoded: {error}") from None
        if len(seen) > 1:
            (a, first), (b, second) = seen.items()
            unlike, remedy = "mode", "--gray or --size N brings all to one"
            if a[:2] != b[:2]:
                unlike, remedy = "size", "--size N brings all to one"
            raise UserError(
                f"{first} and {second} differ in {unlike} ({a[0]}x{a[1]}, {b[0]}x{b[1]}); {remedy}"
            )


def _resized(content: bytes, size: int | None, gray: bool) -> bytes:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("L" if gray else "RGB")
        if size:
            picture = ImageOps.fit(picture, (size, size))
        file = io.BytesIO()
        picture.save(file, "png")
    return file.getvalue()
