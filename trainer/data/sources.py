"""What a user wants predicted: pictures, arrays, tables or shards, as files of one input each.

Every kind is read as the `shards` commands read it, and gives the bytes that its shard would hold.
So an input is decoded the same way wherever it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Data, UserError

from .authoring.arrays import (
    Arrays,
    Channels,
    Selection,
    check_pair,
    encode,
    label_texts,
    read_arrays,
    unpaired,
)
from .authoring.folder import labelled_files
from .authoring.foreign_files import refuse_foreign
from .authoring.parquet import END as PARQUET
from .authoring.parquet import ParquetColumns, read_parquet
from .authoring.reporting import Report
from .authoring.tables import TABLES, Columns, read_table
from .patterns import URL
from .shards import open_shards
from .writing import read_manifest

ARRAYS = (".npz", ".npy", ".idx", ".idx.gz", "-ubyte", "-ubyte.gz")
ALL_BUT_ONE = 1 - 1e-12  # every readable sample is wanted, whatever the share of the others
TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


@dataclass(frozen=True)
class Options:
    """What the command line says about the data. "" is found out.

    label:    the column of labels, or the member of shards: "cls" or "json:FIELD".
    text:     the column of texts.
    key:      the column that tells rows apart, else the only one called id, key, index, ...
    x, y:     arrays of inputs and labels.
    input:    the extension of inputs in a folder or in shards.
    split:    which split of the data.
    channels: where those of arrays of pictures are, first or last.
    encoding: of a table, and of arrays of byte strings.
    classes:  how many there are, for shards without a manifest.
    labelled: whether labels are needed.
    shards_input, shards_label: of shards, where `input` and `label` do not say it.
    decoders: as data.decoders, of shards.
    follow_links: whether links out of a folder are its files, too.
    """

    label: str = ""
    text: str = ""
    key: str = ""
    x: str = ""
    y: str = ""
    input: str = ""
    split: str = ""
    channels: Channels = ""
    encoding: str = ""
    classes: int | None = None
    labelled: bool = True
    shards_input: str = ""
    shards_label: str = "cls"
    decoders: Mapping[str, str] = field(default_factory=dict)
    follow_links: bool = False


@dataclass
class Source:
    """Inputs in their order.

    Attributes
    ----------
    keys : list of str
        What each is called: a file, the key of a sample, a row.
    labels : list of str, or None
        As the data writes them.
    content : callable
        content(i) -> (extension, bytes) of input i.  It raises ValueError, with the reason, for one
        that cannot be read.
    """

    keys: list[str]
    labels: list[str] | None
    content: Callable[[int], tuple[str, bytes]]


def open_source(places: Sequence[str], options: Options, report: Report) -> Source:
    """The inputs at `places`: a folder, shards, a table, or files of arrays.

    The report notes what is passed over.  Raises UserError for data that is of no known kind, lacks
    what is needed, or has several splits of which none is chosen.
    """
    kind = _kind(places)
    splits = _READERS[kind](places, options, report)
    return _chosen(splits, options.split, places)


def is_table(place: str) -> bool:
    return place.lower().endswith(TABLES)


def is_parquet(place: str) -> bool:
    """Whether this is a parquet file, or a directory of such files, as data sets come."""
    directory = Path(place)
    if not directory.is_dir():
        return place.lower().endswith(PARQUET)
    return any(directory.glob(f"*{PARQUET}")) or any(directory.glob(f"*/*{PARQUET}"))


def is_shards(place: str) -> bool:
    """Whether this is a tar, a pattern or URL of tars, or a directory that holds some."""
    if place.startswith(URL) or place.lower().endswith(TARS):
        return True
    directory = Path(place)
    if not directory.is_dir():
        return False
    return read_manifest(directory) is not None or any(directory.glob("*.tar"))


def _kind(places: Sequence[str]) -> str:
    first = places[0]
    if is_shards(first):
        return "shards"
    for place in places:
        if not Path(place).exists():
            raise UserError(f"{place}: no such file or directory")
    if is_parquet(first):
        return "parquet"
    if Path(first).is_dir():
        return "folder"
    if is_table(first):
        return "table"
    if first.lower().endswith(ARRAYS):
        return "arrays"
    refuse_foreign(first)
    raise UserError(
        f"{first}: labelled data is a directory of class directories, shards, a csv, "
        "parquet, or npz, npy or idx files"
    )


def _chosen(splits: dict[str, Source], name: str, places: Sequence[str]) -> Source:
    """The split that is asked for, the only one, or test."""
    listed = ", ".join(splits) or "none"
    if name:
        if name not in splits:
            raise UserError(f"--split {name}: {places[0]} has the splits {listed}")
        return splits[name]
    if len(splits) == 1:
        return next(iter(splits.values()))
    if "test" in splits:
        return splits["test"]
    raise UserError(f"{places[0]} has the splits {listed}; choose one with --split")


def _single(places: Sequence[str]) -> str:
    if len(places) > 1:
        raise UserError(f"{places[1]}: only one place is read beside files of arrays")
    return places[0]


# Kinds of data: (places, options, report) -> {split: Source}


def _from_folder(places: Sequence[str], options: Options, report: Report) -> dict[str, Source]:
    found = labelled_files(_single(places), report, options.input, options.follow_links)

    def source(files: list[tuple[Path, str]]) -> Source:
        return Source(
            [str(file) for file, _ in files],
            [name for _, name in files],
            lambda i: read_file(files[i][0]),
        )

    return {split: source(files) for split, files in found.items()}


def read_file(path: Path) -> tuple[str, bytes]:
    """(extension, content).  Raises ValueError with the reason."""
    try:
        return path.suffix[1:].lower(), path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _from_table(places: Sequence[str], options: Options, report: Report) -> dict[str, Source]:
    columns = Columns(options.text, options.label, "", options.key, options.labelled)
    encoding = options.encoding or "utf-8-sig"
    rows = read_table(_single(places), columns, encoding, report)

    def source(split: str) -> Source:
        texts = rows.texts[split]
        return Source(rows.keys[split], rows.labels[split], lambda i: encode(texts[i]))

    return {split: source(split) for split in rows.texts}


def _from_parquet(places: Sequence[str], options: Options, report: Report) -> dict[str, Source]:
    column = options.input or options.text or options.x
    columns = ParquetColumns(column, options.label, options.key, options.labelled)
    found = read_parquet(places, columns, report)
    return {split: Source(rows.keys, rows.labels, rows.content) for split, rows in found.items()}


def _from_arrays(places: Sequence[str], options: Options, report: Report) -> dict[str, Source]:
    selection = Selection(options.x, options.y)
    encoding = options.encoding or "utf-8"
    arrays = read_arrays(places, selection, options.channels, encoding, report)
    if not arrays.inputs or (options.labelled and arrays.inputs.keys() != arrays.labels.keys()):
        raise UserError(unpaired(arrays))
    return {split: _of_arrays(split, arrays, options) for split in arrays.inputs}


def _of_arrays(split: str, arrays: Arrays, options: Options) -> Source:
    x, y = arrays.inputs[split], arrays.labels.get(split)
    labels = None
    if y is not None and options.labelled:
        check_pair(split, x, y)
        labels = label_texts(y)
    keys = [str(row) for row in range(len(x))]
    return Source(keys, labels, lambda i: encode(x[i], options.channels))


def _from_shards(places: Sequence[str], options: Options, report: Report) -> dict[str, Source]:
    place = _single(places)
    manifest = read_manifest(place) if Path(place).is_dir() else None
    names = list(manifest["splits"]) if manifest else [options.split or "*"]
    if options.split in names:
        names = [options.split]
    elif "test" in names and not options.split:
        names = ["test"]
    return {name: _of_shards(place, name, manifest is not None, options, report) for name in names}


def _of_shards(
    place: str, split: str, has_manifest: bool, options: Options, report: Report
) -> Source:
    data = Data(
        label=(options.label or options.shards_label) if options.labelled else "",
        input=options.input or options.shards_input,
        classes=None if has_manifest else options.classes,
        decoders=dict(options.decoders),
        damage="skip",
        damage_share=ALL_BUT_ONE,
    )
    shards = open_shards(place, data, split)
    report.corrupt += map(str, shards.corruption)
    labels = None
    if options.labelled:
        labels = [shards.class_names[label] for label in shards.labels.tolist()]
    return Source(shards.keys(range(len(shards))), labels, shards.input_file)


_READERS = {
    "folder": _from_folder,
    "table": _from_table,
    "parquet": _from_parquet,
    "arrays": _from_arrays,
    "shards": _from_shards,
}
