"""Shards from arrays: an npz with x and y, idx files as MNIST has them, or a csv table of texts."""

from __future__ import annotations

import csv
import gzip
import io
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.config import UserError

from .splitting import add_missing_splits, write_splits

SPLITS = ("train", "val", "test")
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def from_arrays(
    files: Sequence[str | Path],
    out: str | Path,
    fractions: Mapping[str, float],
    seed: int = 0,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
) -> dict[str, int]:
    """Shards of one npz (x, y or x_train, y_train, ...), idx files, or two npy, x and y.

    x: [n, ...].  uint8 [n, H, W] and [n, H, W, 1 or 3] become PNG, texts become txt, anything else
    npy.
    y: [n] integers 0 .. C - 1, or names.

    Parameters
    ----------
    files : sequence of paths
    out : path
    fractions : {split: fraction}
        Of each class for val and test; splits that are absent are taken from train.
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
        For a file that cannot be read, or inputs and labels that do not belong together.
    """
    inputs: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for path in map(Path, files):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        for name, array in _read(path).items():
            split = _split_of(name)
            kind = labels if _is_labels(name) else inputs
            if split in kind:
                raise UserError(
                    f"{path}: a second array for {split}; "
                    "give one array of inputs and one of labels per split"
                )
            kind[split] = array
    made_by = {"command": "shards arrays", "files": [str(file) for file in files]}
    return write_arrays(inputs, labels, out, fractions, seed, made_by, samples_per_shard, overwrite)


def _split_of(name: str) -> str:
    """The split that an array's name means.  MNIST calls its test split t10k."""
    for split in SPLITS:
        if split in name:
            return split
    return "test" if "t10k" in name else "train"


def _is_labels(name: str) -> bool:
    return bool(re.search(r"label|target|(^|[^a-z])y($|[^a-z])", name.lower()))


def from_table(
    path: str | Path,
    out: str | Path,
    text: str,
    label: str,
    fractions: Mapping[str, float],
    seed: int = 0,
    encoding: str = "utf-8-sig",
    drop: Sequence[str] = (),
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
) -> dict[str, int]:
    """Shards of a csv (or csv.gz) with a header.

    Parameters
    ----------
    path, out : path
    text, label : str
        Columns: the input, kept as txt, and the class.
    fractions : {split: fraction}
        Of each class for val and test.
    seed : int
        Of the division into splits.
    encoding : str
    drop : sequence of str
        Labels whose rows are left out.
    samples_per_shard : int
    overwrite : bool

    Returns
    -------
    {split: number of samples}

    Raises
    ------
    UserError
        For a file that cannot be read, a column that is absent, and a label to drop that does not
        occur.
    """
    path = Path(path)
    rows = _read_rows(path, encoding)
    for column in (text, label):
        if not rows or column not in rows[0]:
            columns = ", ".join(rows[0]) if rows else "no rows"
            raise UserError(f"{path} has no column {column!r}; it has {columns}")
    kept = [row for row in rows if row[text] and row[label]]
    if len(kept) < len(rows):
        print(
            f"{path}: {len(rows) - len(kept)} of {len(rows)} rows have no {text} or no {label} "
            "and are left out"
        )
    inputs = np.array([row[text].strip() for row in kept], dtype=np.str_)
    labels = np.array([row[label].strip() for row in kept], dtype=np.str_)
    for name in drop:
        if name not in labels:
            raise UserError(f"{path} has no {label} {name!r} to leave out")
    dropped = np.isin(labels, drop)
    inputs, labels = inputs[~dropped], labels[~dropped]
    made_by = {
        "command": "shards table",
        "files": [str(path)],
        "text": text,
        "label": label,
        "drop": list(drop),
    }
    train, classes = {"train": inputs}, {"train": labels}
    return write_arrays(train, classes, out, fractions, seed, made_by, samples_per_shard, overwrite)


def _read_rows(path: Path, encoding: str) -> list[dict[str, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding=encoding, newline="") as file:
            return list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not {encoding} ({error.reason}); try --encoding cp1252"
        ) from None
    except (OSError, LookupError, csv.Error, EOFError) as error:
        raise UserError(f"{path}: cannot be read as csv: {error}") from None


def write_arrays(
    inputs: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    out: str | Path,
    fractions: Mapping[str, float],
    seed: int,
    made_by: dict,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
) -> dict[str, int]:
    """Shards of {split: x} and {split: y}; see from_arrays."""
    if "train" not in inputs or inputs.keys() != labels.keys():
        raise UserError(
            f"found inputs for {sorted(inputs) or 'no split'} "
            f"and labels for {sorted(labels) or 'none'}"
        )
    columns = {split: _as_column(labels[split]) for split in inputs}
    for split, x in inputs.items():
        y = columns[split]
        if y.ndim != 1 or x.ndim < 1 or len(x) != len(y):
            raise UserError(
                f"{split}: inputs {list(x.shape)} and labels {list(y.shape)} do not belong together"
            )
    names, y = _classes(np.concatenate(list(columns.values())))
    # Samples are numbered through all arrays, in the order of `inputs`.
    lengths = [len(x) for x in inputs.values()]
    starts = np.cumsum([0, *lengths])
    splits = {
        split: np.arange(start, start + length)
        for split, start, length in zip(inputs, starts[:-1], lengths, strict=True)
    }
    splits = add_missing_splits(splits, y, fractions, seed)
    arrays = list(inputs.values())

    def sample(index: int) -> dict:
        array = int(np.searchsorted(starts, index, side="right")) - 1
        extension, content = encode(arrays[array][index - starts[array]])
        return {extension: content, "cls": b"%d" % y[index]}

    made_by = made_by | {"seed": seed}
    return write_splits(out, names, splits, sample, made_by, samples_per_shard, overwrite)


def _as_column(y: np.ndarray) -> np.ndarray:
    """[n] of [n] or [n, 1]; other shapes as they are."""
    if y.ndim == 2 and y.shape[1] == 1:
        return y[:, 0]
    return y


def encode(x: np.ndarray) -> tuple[str, bytes]:
    """(extension, content) of one input: png for pictures, txt for texts, npy for the rest."""
    if x.dtype.kind == "U":
        return "txt", str(x).encode("utf-8")
    if x.dtype.kind == "S":
        return "txt", bytes(x).decode("utf-8").encode("utf-8")
    file = io.BytesIO()
    if x.dtype == np.uint8 and (x.ndim == 2 or (x.ndim == 3 and x.shape[2] in (1, 3))):
        from PIL import Image

        pixels = x[..., 0] if x.shape[2:] == (1,) else x
        Image.fromarray(pixels).save(file, "png")
        return "png", file.getvalue()
    np.save(file, x, allow_pickle=False)
    return "npy", file.getvalue()


def _classes(y: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(class names, int64 labels) of integers or names."""
    if y.dtype.kind in "US":
        names, indices = np.unique(y.astype(np.str_), return_inverse=True)
        return [str(name) for name in names], indices
    if y.dtype.kind not in "iub" and not (y == np.floor(y)).all():
        raise UserError(f"labels of type {y.dtype} are neither whole numbers nor names")
    y = y.astype(np.int64)
    if y.size and y.min() < 0:
        raise UserError(f"label {y.min()} is below 0")
    return [str(number) for number in range(int(y.max(initial=0)) + 1)], y


def _read(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of an npz, npy or idx file."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        if path.suffix == ".npy":
            return {path.stem: np.load(path, allow_pickle=False)}
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            return {path.name: _idx(file.read())}
    except (OSError, ValueError, EOFError, KeyError, struct.error) as error:
        raise UserError(f"{path}: cannot be read as npz, npy or idx: {error}") from None


def _idx(content: bytes) -> np.ndarray:
    zero, kind, ndim = struct.unpack(">HBB", content[:4])
    if zero or kind not in IDX_TYPES:
        raise ValueError("it does not start as an idx file does")
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    return np.frombuffer(content, IDX_TYPES[kind], offset=4 + 4 * ndim).reshape(shape)
