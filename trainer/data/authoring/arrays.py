"""Shards from arrays: an npz with x and y, idx files as MNIST has them, or a csv table of texts and labels."""

from __future__ import annotations

import csv
import gzip
import io
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.config import UserError

from .splitting import split_by_class, write_splits

SPLITS = ("train", "val", "test")
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def from_arrays(
    files: list, out, fractions: dict[str, float], seed: int = 0, **options
) -> dict[str, int]:
    """Shards of one npz (x, y or x_train, y_train, ...), idx files, or two npy, x and y.  Returns {split: samples}.

    x: [n, ...]; uint8 [n, H, W] and [n, H, W, 1 or 3] become PNG, texts become txt, anything else npy.
    y: [n] integers 0 .. C - 1, or names.  Splits that are absent are taken from train by `fractions`.
    """
    inputs, labels = {}, {}
    for path in map(Path, files):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        for name, array in _read(path).items():
            split = next((s for s in SPLITS if s in name), "test" if "t10k" in name else "train")
            kind = labels if _is_labels(name) else inputs
            if split in kind:
                raise UserError(
                    f"{path}: a second array for {split}; give one array of inputs and one of labels per split"
                )
            kind[split] = array
    made_by = {"command": "shards arrays", "files": [str(file) for file in files]}
    return write_arrays(inputs, labels, out, fractions, seed, made_by, **options)


def from_table(
    path,
    out,
    text: str,
    label: str,
    fractions: dict[str, float],
    seed: int = 0,
    encoding="utf-8-sig",
    drop: Sequence[str] = (),
    **options,
) -> dict[str, int]:
    """Shards of a csv (or csv.gz) with a header: column `text` as txt members, column `label` as classes.

    drop: labels whose rows are left out.  Raises UserError for one that does not occur.
    """
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding=encoding, newline="") as file:
            rows = list(csv.DictReader(file))
    except UnicodeDecodeError as mistake:
        raise UserError(
            f"{path} is not {encoding} ({mistake.reason}); try --encoding cp1252"
        ) from None
    except (OSError, LookupError, csv.Error, EOFError) as mistake:
        raise UserError(f"{path}: cannot be read as csv: {mistake}") from None
    for column in (text, label):
        if not rows or column not in rows[0]:
            raise UserError(
                f"{path} has no column {column!r}; it has {', '.join(rows[0]) if rows else 'no rows'}"
            )
    kept = [row for row in rows if row[text] and row[label]]
    if len(kept) < len(rows):
        print(
            f"{path}: {len(rows) - len(kept)} of {len(rows)} rows have no {text} or no {label} and are left out"
        )
    inputs, labels = (
        np.array([row[column].strip() for row in kept], dtype=np.str_) for column in (text, label)
    )
    for name in drop:
        if name not in labels:
            raise UserError(f"{path} has no {label} {name!r} to leave out")
    inputs, labels = inputs[~np.isin(labels, drop)], labels[~np.isin(labels, drop)]
    made_by = {
        "command": "shards table",
        "files": [str(path)],
        "text": text,
        "label": label,
        "drop": list(drop),
    }
    return write_arrays(
        {"train": inputs}, {"train": labels}, out, fractions, seed, made_by, **options
    )


def write_arrays(
    inputs: dict, labels: dict, out, fractions, seed: int, made_by: dict, **options
) -> dict[str, int]:
    """Shards of {split: x} and {split: y}; see from_arrays."""
    if "train" not in inputs or inputs.keys() != labels.keys():
        raise UserError(
            f"found inputs for {sorted(inputs) or 'no split'} and labels for {sorted(labels) or 'none'}"
        )
    for split, x in inputs.items():
        if labels[split].ndim == 2 and labels[split].shape[1] == 1:
            labels[split] = labels[split][:, 0]
        y = labels[split]
        if y.ndim != 1 or x.ndim < 1 or len(x) != len(y):
            raise UserError(
                f"{split}: inputs {list(x.shape)} and labels {list(y.shape)} do not belong together"
            )
    y = np.concatenate([labels[split] for split in inputs])
    names, y = _classes(y)
    ends = np.cumsum([len(x) for x in inputs.values()])
    splits = {
        split: np.arange(end - len(x), end)
        for (split, x), end in zip(inputs.items(), ends, strict=True)
    }
    missing = {
        split: share for split, share in fractions.items() if split not in splits and share > 0
    }
    if missing:
        train = splits["train"]
        splits |= {
            split: train[ids] for split, ids in split_by_class(y[train], missing, seed).items()
        }
    starts = dict(zip(inputs, ends - [len(x) for x in inputs.values()], strict=True))
    owner = np.repeat(np.arange(len(inputs)), [len(x) for x in inputs.values()])
    by_number = list(inputs)

    def sample(number: int) -> dict:
        split = by_number[owner[number]]
        extension, content = encode(inputs[split][number - starts[split]])
        return {extension: content, "cls": b"%d" % y[number]}

    return write_splits(out, names, splits, sample, made_by | {"seed": seed}, **options)


def encode(x: np.ndarray) -> tuple[str, bytes]:
    """(extension, content) of one input: png for pictures, txt for texts, npy for the rest."""
    if x.dtype.kind in "US":
        return "txt", (str(x) if x.dtype.kind == "U" else bytes(x).decode("utf-8")).encode("utf-8")
    file = io.BytesIO()
    if x.dtype == np.uint8 and (x.ndim == 2 or (x.ndim == 3 and x.shape[2] in (1, 3))):
        from PIL import Image

        Image.fromarray(x[..., 0] if x.shape[2:] == (1,) else x).save(file, "png")
        return "png", file.getvalue()
    np.save(file, x, allow_pickle=False)
    return "npy", file.getvalue()


def _classes(y: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(class names, int64 labels) of integers or names."""
    if y.dtype.kind in "US":
        names, y = np.unique(y.astype(np.str_), return_inverse=True)
        return [str(name) for name in names], y
    if y.dtype.kind not in "iub" and not (y == np.floor(y)).all():
        raise UserError(f"labels of type {y.dtype} are neither whole numbers nor names")
    y = y.astype(np.int64)
    if y.size and y.min() < 0:
        raise UserError(f"label {y.min()} is below 0")
    return [str(number) for number in range(int(y.max(initial=0)) + 1)], y


def _is_labels(name: str) -> bool:
    return bool(re.search(r"label|target|(^|[^a-z])y($|[^a-z])", name.lower()))


def _read(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of an npz, npy or idx file."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        if path.suffix == ".npy":
            return {path.stem: np.load(path, allow_pickle=False)}
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return {path.name: _idx(file.read())}
    except (OSError, ValueError, EOFError, KeyError, struct.error) as mistake:
        raise UserError(f"{path}: cannot be read as npz, npy or idx: {mistake}") from None


def _idx(content: bytes) -> np.ndarray:
    zero, kind, ndim = struct.unpack(">HBB", content[:4])
    if zero or kind not in IDX_TYPES:
        raise ValueError("it does not start as an idx file does")
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    return np.frombuffer(content, IDX_TYPES[kind], offset=4 + 4 * ndim).reshape(shape)
