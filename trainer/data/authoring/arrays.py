"""Shards from arrays: npz with x and y, idx files as in MNIST, npy."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.config import UserError

from ..labels import (
    NONE,
    LabelSet,
    clean,
    printable,
    readings,
    settle,
    settle_given,
    settle_numbers,
)
from ..packing import check_members, unpacked
from .foreign_files import refuse_foreign
from .reporting import Report, not_finite
from .split_names import split_within, without_split
from .splitting import add_missing_splits, write_splits

SPLITS = ("train", "val", "test")
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
INPUT_NAMES = ("x", "data", "image", "images", "input", "inputs", "features", "text", "texts")
CLASS_NAMES = re.compile(r"(class|label|target)(es|s)?_?names?|class_?list|classes")
Channels = Literal["", "first", "last"]
Column = np.ndarray | Sequence[str]  # the inputs or the labels of one split


@dataclass
class Selection:
    """Which arrays are meant, where names do not say it.

    x, y:   names of the arrays of inputs and labels, with or without the split's name.
    splits: {split: its files or arrays}, as the user lists them.
    """

    x: str = ""
    y: str = ""
    splits: Mapping[str, Sequence[str]] | None = None


@dataclass
class _Named:
    name: str  # the array's own
    source: Path
    array: np.ndarray

    def __str__(self) -> str:
        return f"{self.name} {self.array.dtype} {list(self.array.shape)}"


def from_arrays(
    files: Sequence[str | Path],
    out: str | Path,
    fractions: Mapping[str, float],
    seed: int = 0,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    report: Report | None = None,
    selection: Selection | None = None,
    channels: Channels = "",
    encoding: str = "utf-8",
    class_names: Sequence[str] | None = None,
) -> Report:
    """Shards of one npz (x, y or x_train, y_train, ...), idx files, or two npy, x and y.

    x: [n, ...].  uint8 [n, H, W] and [n, H, W, 1 or 3] become PNG, texts become txt, anything else
    npy.  Other pictures [n, H, W, C] get their channels first.
    y: [n] whole numbers, or names. `trainer.data.labels` says which classes they make.

    Parameters
    ----------
    files : sequence of paths
    out : path
    fractions : {split: fraction}
        Of each class for val and test. Splits that are absent are taken from train.
    seed : int
        Of the division into splits.
    samples_per_shard : int
    overwrite : bool
    report : Report, optional
        Its `skip` says whether corrupt samples are left out.
    selection : Selection, optional
        Which arrays are meant.
    channels : "first" or "last", optional
        Where the channels of pictures [n, ., ., .] are, where the shape does not say it.
    encoding : str
        Of byte strings.
    class_names : sequence of str, optional
        In the order of the class indices.  By default those of an array that is called
        class_names, label_names or target_names, where it has one for every label.

    Returns
    -------
    Report

    Raises
    ------
    UserError
        For a file that cannot be read, or inputs and labels that do not belong together.
    """
    report = report or Report()
    selection = selection or Selection()
    arrays = read_arrays(files, selection, channels, encoding, report)
    inputs, labels = arrays.inputs, arrays.labels
    if "train" not in inputs or inputs.keys() != labels.keys():
        raise UserError(unpaired(arrays))
    if class_names is None:
        class_names = _names_beside(arrays, encoding, report)
    made_by = {"command": "shards arrays", "files": [str(file) for file in files]}
    write_arrays(
        inputs,
        labels,
        out,
        fractions,
        seed,
        made_by,
        samples_per_shard,
        overwrite,
        report,
        channels,
        class_names=class_names,
    )
    return report


@dataclass
class Arrays:
    """{split: its inputs}, {split: its labels}, and {split: every array that there is}."""

    inputs: dict[str, Column]
    labels: dict[str, Column]
    by_split: Mapping[str, list[_Named]]


def read_arrays(
    files: Sequence[str | Path],
    selection: Selection,
    channels: Channels,
    encoding: str,
    report: Report,
) -> Arrays:
    """The inputs and labels in npz, npy or idx files. See from_arrays.  Either may be absent."""
    by_split = _arrays_of_splits(list(map(Path, files)), selection)
    read = Arrays({}, {}, by_split)
    for split, arrays in by_split.items():
        y = _choose_labels(split, arrays, selection)
        x = _choose_inputs(split, arrays, y, selection, report)
        if y is not None:
            read.labels[split] = _as_column(_texts_of_bytes(y.array, str(y), encoding))
        if x is not None:
            pixels = _channels_first(x, channels, report)
            read.inputs[split] = _texts_of_bytes(pixels, str(x), encoding)
    return read


def _names_beside(arrays: Arrays, encoding: str, report: Report) -> list[str] | None:
    """The class names in an array of their own. None where there is none that fits the labels."""
    beside = [array for named in arrays.by_split.values() for array in named]
    found = [array for array in beside if _is_class_names(array)]
    if len(found) != 1:
        return None
    texts = _texts_of_bytes(found[0].array, str(found[0]), encoding)
    names = [clean(name) for name in _as_list(texts)]
    labels = {text for column in arrays.labels.values() for text in label_texts(column)} - {""}
    indices = set(map(str, range(len(names))))
    if len(set(names)) < len(names) or "" in names or not labels <= indices:
        return None
    report.use("arrays", str(found[0]))
    report.note(f"array {found[0].name} names the {len(names)} classes")
    return names


def _is_class_names(array: _Named) -> bool:
    is_text = array.array.ndim == 1 and array.array.dtype.kind in "US"
    return is_text and bool(CLASS_NAMES.fullmatch(array.name.lower()))


def label_texts(column: Column) -> list[str]:
    """[n]: the labels as texts. Of whole numbers their digits, of NaN an empty one."""
    if not isinstance(column, np.ndarray) or column.dtype.kind not in "biuf":
        return _as_list(column)
    label_set, classes = settle_numbers(column)
    names = [*label_set.names, ""]  # NONE is the last
    return [names[c] for c in classes.tolist()]


# Which array is what


def _arrays_of_splits(files: list[Path], selection: Selection) -> dict[str, list[_Named]]:
    """{split: its arrays}."""
    pool = [array for path in files for array in _read(path)]
    by_split: dict[str, list[_Named]] = {}
    for split, words in (selection.splits or {}).items():
        for word in words:
            if Path(word).is_file():
                by_split.setdefault(split, []).extend(_read(Path(word)))
                continue
            chosen = [array for array in pool if array.name == word]
            if not chosen:
                names = ", ".join(array.name for array in pool) or "none"
                raise UserError(f"--{split} {word}: no such file, and none of the arrays ({names})")
            by_split.setdefault(split, []).extend(chosen)
            pool = [array for array in pool if array.name != word]
    for array in pool:
        split = split_within(array.name) or split_within(array.source.stem) or "train"
        by_split.setdefault(split, []).append(array)
    return {split: by_split[split] for split in SPLITS if split in by_split}


def _is_labels(name: str) -> bool:
    if re.search(r"(label|target|class)_?names?$|^(labels?|class(es)?)_?names?", name.lower()):
        return False
    words = without_split(name).split()
    return "y" in words or bool(re.search(r"label|target", name.lower()))


def _is_called(array: _Named, name: str) -> bool:
    return name in (array.name, without_split(array.name)) or (
        without_split(name) == without_split(array.name) != ""
    )


def _choose_labels(split: str, arrays: list[_Named], selection: Selection) -> _Named | None:
    """The array of labels of a split: the one that is asked for, or the only one called so."""
    if selection.y:
        return _only([a for a in arrays if _is_called(a, selection.y)], "y", split, arrays)
    labels = [array for array in arrays if _is_labels(array.name)]
    if not labels and len(arrays) == 2 and split in (selection.splits or {}):
        return arrays[1]  # the user lists inputs and labels in this order
    if len(labels) > 1:
        raise UserError(
            f"{split} has several arrays of labels: {_listed(labels)}; "
            "choose one with --y, and the inputs with --x"
        )
    return labels[0] if labels else None


def _choose_inputs(
    split: str, arrays: list[_Named], y: _Named | None, selection: Selection, report: Report
) -> _Named | None:
    """The array of inputs: the one that is asked for, or the only one as long as the labels.

    Of several, the one called x, images, data, .... The report names what is passed over.
    """
    others = [array for array in arrays if array is not y]
    if selection.x:
        x = _only([a for a in others if _is_called(a, selection.x)], "x", split, arrays)
    else:
        candidates = others
        if len(others) > 1:
            length = len(y.array) if y is not None and y.array.ndim else -1
            candidates = [a for a in others if a.array.ndim and len(a.array) == length]
            candidates = [a for a in candidates if not _is_labels(a.name)]
            candidates = [a for a in candidates if not _is_class_names(a)]
        if len(candidates) > 1:
            called = [a for a in candidates if without_split(a.name) in INPUT_NAMES]
            candidates = called if len(called) == 1 else candidates
        if len(candidates) > 1:
            raise UserError(
                f"{split} has several arrays that could be inputs: {_listed(candidates)}; "
                "choose one with --x"
            )
        x = candidates[0] if candidates else None
    for array in others:
        if array is not x:
            report.pass_over("arrays", str(array))
    return x


def _only(chosen: list[_Named], option: str, split: str, arrays: list[_Named]) -> _Named:
    if len(chosen) != 1:
        raise UserError(
            f"--{option}: {len(chosen)} arrays of {split} are called so; it has {_listed(arrays)}"
        )
    return chosen[0]


def _listed(arrays: Sequence[_Named]) -> str:
    return ", ".join(map(str, arrays))


def unpaired(arrays: Arrays) -> str:
    """The error about splits that lack inputs or labels."""
    there = "; ".join(f"{split}: {_listed(named)}" for split, named in arrays.by_split.items())
    return (
        f"found inputs for {', '.join(sorted(arrays.inputs)) or 'no split'} "
        f"and labels for {', '.join(sorted(arrays.labels)) or 'none'}; there are ({there}): "
        "say which with --x and --y, or per split with --train X,Y"
    )


# Content


def _texts_of_bytes(array: np.ndarray, name: str, encoding: str) -> Column:
    """Byte strings as a list of texts. Other arrays as they are."""
    if array.dtype.kind != "S":
        return array
    texts: list[str] = []
    for row, content in enumerate(array.reshape(-1).tolist()):
        try:
            texts.append(content.decode(encoding))
        except UnicodeDecodeError:
            raise UserError(
                f"{name}: element {row} is {content!r:.60}, which is not {encoding}; "
                "say with --encoding what it is, e.g. latin-1"
            ) from None
        except LookupError:
            raise UserError(f"--encoding {encoding}: there is no such encoding") from None
    return texts


def _channels_first(x: _Named, channels: Channels, report: Report) -> np.ndarray:
    """Pictures [n, H, W, C] with their channels first. uint8 that becomes PNG as it is.

    The rule: an axis of length 1 or 3 behind the first are the channels, else one of length 4.
    """
    array = x.array
    if array.ndim != 4 or array.dtype.kind not in "biuf":
        return array
    first, last = array.shape[1], array.shape[3]
    where = channels
    if not where:
        for lengths in ((1, 3), (4,)):
            if (first in lengths) != (last in lengths):
                where = "first" if first in lengths else "last"
                break
            if first in lengths:
                raise UserError(f"{x}: channels could be first or last; say which with --channels")
    if where != "last":
        return array
    report.note(f"{x}: channels are last, [n, height, width, {last}]")
    if _becomes_png(array.dtype, array.shape[1:]):
        return array
    return np.moveaxis(array, 3, 1)


def write_arrays(
    inputs: Mapping[str, Column],
    labels: Mapping[str, Column],
    out: str | Path,
    fractions: Mapping[str, float],
    seed: int,
    made_by: dict,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    report: Report | None = None,
    channels: Channels = "",
    names: Mapping[str, Sequence[str]] | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, int]:
    """Shards of {split: x} and {split: y}. See from_arrays.

    names: {split: what each sample is called in messages}, by default its row.
    """
    report = report or Report()
    columns = {split: _as_column(labels[split]) for split in inputs}
    for split, x in inputs.items():
        check_pair(split, x, columns[split])
        if isinstance(x, np.ndarray) and x.dtype.kind not in "biufU":
            raise UserError(f"{split}: inputs of type {x.dtype}; numbers or texts are needed")
    label_set, y, reasons = _settle(list(columns.values()), class_names)
    report.note(label_set.notes)
    # Samples are numbered through all arrays, in the order of `inputs`.
    arrays = list(inputs.values())
    starts = np.cumsum([0, *map(len, arrays)])

    def place(index: int) -> tuple[int, int]:
        array = int(np.searchsorted(starts, index, side="right")) - 1
        return array, index - int(starts[array])

    def name(index: int) -> str:
        array, row = place(index)
        split = list(inputs)[array]
        return names[split][row] if names else f"{split}, sample {row}"

    report.corrupt += [f"{name(index)} {reasons[index]}" for index in sorted(reasons)]
    report.refuse_corrupt()
    splits = {
        split: np.arange(start, start + len(array))[y[start : start + len(array)] != NONE]
        for split, array, start in zip(inputs, arrays, starts[:-1].tolist(), strict=True)
    }
    splits = add_missing_splits(splits, y, fractions, seed)

    def sample(index: int) -> dict:
        array, row = place(index)
        try:
            extension, content = encode(arrays[array][row], channels)
        except ValueError as error:
            raise UserError(f"{name(index)} {error}") from None
        return {extension: content, "cls": b"%d" % y[index]}

    made_by = made_by | {"seed": seed}
    return write_splits(
        out, label_set.names, splits, sample, made_by, samples_per_shard, overwrite, report
    )


def check_pair(split: str, x: Column, y: Column) -> None:
    """Raises UserError where inputs and labels are not two columns of the same length."""
    ours, theirs = _shape(x), _shape(y)
    if len(theirs) == 1 and len(ours) >= 1 and ours[0] == theirs[0]:
        return
    hint = "; of one-hot labels give y.argmax(1)" if len(theirs) == 2 else ""
    raise UserError(
        f"{split}: inputs {list(ours)} and labels {list(theirs)} do not belong together{hint}"
    )


def _shape(column: Column) -> tuple[int, ...]:
    return column.shape if isinstance(column, np.ndarray) else (len(column),)


def _as_column(y: Column) -> Column:
    """[n] of [n, 1]. Other shapes as they are."""
    if isinstance(y, np.ndarray) and y.ndim == 2 and y.shape[1] == 1:
        return y[:, 0]
    return y


def _settle(
    columns: Sequence[Column], class_names: Sequence[str] | None
) -> tuple[LabelSet, np.ndarray, dict[int, str]]:
    """(classes, int64 [n], {sample: why it has no class}) of all splits' labels."""
    arrays = [column for column in columns if isinstance(column, np.ndarray)]
    kinds = {array.dtype.kind for array in arrays}
    if len(arrays) == len(columns) and kinds <= set("biuf"):
        joined = _joined(arrays)
        if class_names is not None:
            return settle_labels(label_texts(joined), class_names)
        label_set, classes = settle_numbers(joined)
        empty = np.flatnonzero(classes == NONE).tolist()
        return label_set, classes, dict.fromkeys(empty, "has an empty label (NaN)")
    if not kinds <= {"U"}:
        types = sorted({str(array.dtype) for array in arrays})
        raise UserError(
            f"labels of type {' and '.join(types)} are neither whole numbers nor names; bring "
            "those of all splits to one of the two"
        )
    return settle_labels([text for column in columns for text in _as_list(column)], class_names)


def settle_labels(
    raw: Sequence[str], class_names: Sequence[str] | None
) -> tuple[LabelSet, np.ndarray, dict[int, str]]:
    """(classes, int64 [n], {sample: why it has no class}) of labels as texts."""
    texts, reasons = readings(raw)
    known = [text for number, text in enumerate(texts) if number not in reasons]
    label_set = settle(known) if class_names is None else settle_given(known, class_names)
    distinct = list(dict.fromkeys(texts))
    class_of = dict(zip(distinct, label_set.indices(distinct).tolist(), strict=True))
    classes = np.array([class_of[text] for text in texts], np.int64)
    classes[list(reasons)] = NONE
    for number in np.flatnonzero(classes == NONE).tolist():
        what = f"has label {printable(texts[number])}"
        reason = f"{what}, which is none of the {len(label_set.names)} classes"
        reasons.setdefault(number, reason)
    return label_set, classes, reasons


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """All labels in one array that holds them exactly."""
    joined = np.concatenate(arrays)
    if joined.dtype.kind == "f" and any(array.dtype.kind in "iu" for array in arrays):
        # Integers among floats, or uint64 among int64: numpy makes float64 of both.
        values = [value for array in arrays for value in array.tolist()]
        if all(not isinstance(value, float) for value in values):
            return np.array(values, dtype=object)
    return joined


def _as_list(column: Column) -> list[str]:
    return column.tolist() if isinstance(column, np.ndarray) else list(column)


def _becomes_png(dtype: np.dtype, shape: tuple[int, ...]) -> bool:
    return dtype == np.uint8 and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)))


def encode(x: np.ndarray | str, channels: Channels = "") -> tuple[str, bytes]:
    """(extension, content) of one input: png for pictures, txt for texts, npy for the rest.

    Raises ValueError with the reason for one that cannot be learned from.
    """
    if isinstance(x, str):  # an element of an array of texts too
        try:
            return "txt", str(x).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("cannot be written as UTF-8") from None
    reason = not_finite(x)
    if reason:
        raise ValueError(reason)
    file = io.BytesIO()
    if _becomes_png(x.dtype, x.shape) and not (channels == "first" and x.ndim == 3):
        from PIL import Image

        pixels = x[..., 0] if x.shape[2:] == (1,) else x
        Image.fromarray(pixels).save(file, "png")
        return "png", file.getvalue()
    np.save(file, x, allow_pickle=False)
    return "npy", file.getvalue()


# Files


def _read(path: Path) -> list[_Named]:
    """The arrays of an npz, npy or idx file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    refuse_foreign(path)
    try:
        if path.suffix == ".npz":
            check_members(path)
            with np.load(path, allow_pickle=False) as file:
                return [_Named(name, path, _member(path, file, name)) for name in file.files]
        if path.suffix == ".npy":
            return [_Named(path.stem, path, np.load(path, allow_pickle=False))]
        with unpacked(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return [_Named(path.name, path, _idx(file.read()))]
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        hint, reason = "", str(error).partition("\n")[0]  # further lines say how to trust pickles
        if "Object arrays" in reason:
            hint = "; save texts as y.astype(str), ragged inputs one file each for `shards folder`"
        raise UserError(f"{path}: cannot be read as npz, npy or idx: {reason}{hint}") from None


def _member(path: Path, file: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    try:
        return file[name]
    except ValueError as error:
        raise ValueError(f"array {name}: {error}") from None


def _idx(content: bytes) -> np.ndarray:
    zero, kind, ndim = struct.unpack(">HBB", content[:4])
    if content.startswith(b"\x80"):
        raise ValueError("it is a pickle, which may execute anything: np.savez its arrays")
    if zero or kind not in IDX_TYPES:
        raise ValueError("it does not start as an idx file does")
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    return np.frombuffer(content, IDX_TYPES[kind], offset=4 + 4 * ndim).reshape(shape)
