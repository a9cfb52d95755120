"""Shards from parquet: tables of pictures, texts or lists of numbers, as Hugging Face has them.

Two passes: the column of labels alone says which classes there are and which row goes to which
split. Then rows are read in the files' order, some at a time.  So memory holds the labels, some
rows, and what parquet keeps of one row group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from networks.pictures import PictureRules, picture_shape
from pipeline.config import UserError
from pipeline.extras import require

from ..bounds import GIB, JSON_BYTES, LABEL_BYTES, MEMBER_BYTES, exceeds, open_regular
from ..labels import NONE, doubts, printable
from .arrays import encode, settle_labels
from .folder import lies_outside, picture_entry
from .reporting import Report
from .split_names import split_called, split_within
from .splitting import add_missing_splits, write_splits
from .tables import LABEL_COLUMNS, ROW_COLUMNS

if TYPE_CHECKING:
    import pyarrow as pa  # pyright: ignore[reportMissingImports]  # an extra
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]  # an extra

END = ".parquet"
ROWS = 64  # that are decoded at a time
GROUP_BYTES = 4 * GIB  # of a row group, decoded: parquet may hold one whole
FOOTER_BYTES = 64 << 20  # texts of the footer, and its lists. A file says itself how long they are
COLUMNS = 10_000
UNLABELLED = -1  # what Hugging Face writes where a split has no labels
SPLITS = ("train", "val", "test")
# First bytes of a picture -> the extension under which a shard holds it as it is.
SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"BM": "bmp"}
SIGNATURES |= {b"II*\0": "tiff", b"MM\0*": "tiff", b"RIFF": "webp"}


@dataclass(frozen=True)
class ParquetColumns:
    """Names of columns. "" where the schema says it: see `from_parquet`.

    key: of the column that tells rows apart.  needs_label: whether files without a column of labels
    are refused.
    """

    input: str = ""
    label: str = ""
    key: str = ""
    needs_label: bool = True


def from_parquet(
    places: Sequence[str | Path],
    out: str | Path,
    columns: ParquetColumns,
    fractions: Mapping[str, float],
    rules: PictureRules | None = None,
    seed: int = 0,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    report: Report | None = None,
    class_names: Sequence[str] | None = None,
) -> Report:
    """Shards of parquet files, or of all those below directories.

    Parameters
    ----------
    places, out : paths
        A file's name says its split (train-00000-of-00002.parquet), else its directory's
        (train/0000.parquet). Where none does, all are train.
    columns : ParquetColumns
        By default the label is the only ClassLabel of Hugging Face's metadata, or the only column
        called label, class, ... The input is the only column of pictures ({bytes, path} or
        bytes), else of texts, else of lists of numbers.  "a,b,c" are several columns of numbers,
        side by side.
    fractions : {split: fraction}
        Of each class for val and test. Splits that are absent are taken from train.
    rules : PictureRules, optional
        Of pictures. See from_folder.
    seed : int
        Of the division into splits.
    samples_per_shard : int
    overwrite : bool
    report : Report, optional
        Its `skip` says whether corrupt rows are left out.
    class_names : sequence of str, optional
        By default those of the ClassLabel, else what the labels say.

    Returns
    -------
    Report

    Raises
    ------
    UserError
        For files that cannot be read, a column that is absent or cannot be chosen, and corrupt
        rows that are not to be skipped.
    """
    require("pyarrow", "parquet files")
    report = report or Report()
    tables = [_Table(path, split) for split, path in _files_of_splits(places, report)]
    chosen = _choose_columns(tables, columns, report)
    names, classes, reasons = _labels(tables, chosen, class_names, report)
    starts = np.cumsum([0, *(table.rows for table in tables)])
    rows = _Rows(tables, starts, chosen.inputs)
    unlabelled = _unlabelled_of(tables, starts, classes, reasons, report)
    report.corrupt += [f"{rows.name(index)} {reasons[index]}" for index in sorted(reasons)]
    report.refuse_corrupt()
    splits = {
        split: np.flatnonzero((_splits_of(tables) == split) & (classes != NONE) & ~unlabelled)
        for split in SPLITS
    }
    splits = {split: ids for split, ids in splits.items() if len(ids)}
    if "train" not in splits:
        raise UserError(f"{places[0]} has no labelled row of the split train")
    splits = add_missing_splits(splits, classes, fractions, seed)
    # In the files' order, so that each is read forward once for a split.
    splits = {split: np.sort(ids) for split, ids in splits.items()}
    rules, shape = _settle_pictures(rows, chosen, splits["train"], rules or PictureRules())

    def sample(index: int) -> dict:
        value = rows[index]
        extension, content = chosen.encode(rows.name(index), value, rules, shape, report)
        return {extension: content, "cls": b"%d" % classes[index]}

    made_by = {
        "command": "shards parquet",
        "files": [str(place) for place in places],
        "input": ",".join(chosen.inputs),
        "label": chosen.label,
        "seed": seed,
    }
    write_splits(
        out,
        names,
        splits,
        sample,
        made_by,
        samples_per_shard,
        overwrite,
        report,
        rules if shape else None,
    )
    return report


# Files and their splits


def parquet_files(place: str | Path, report: Report | None = None) -> list[Path]:
    """The parquet files below a directory, without hidden ones and links that lead out of it."""
    root = Path(place)
    inside = os.path.realpath(root)
    found: list[Path] = []
    for path in sorted(root.rglob(f"*{END}")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        if lies_outside(path, inside):
            if report is not None:
                report.pass_over("links out of the directory", path)
        else:
            found.append(path)
    return found


def split_of(path: Path) -> str | None:
    """The split that a file's name says, else that of the directory in which it lies."""
    return split_within(path.stem) or split_called(path.parent.name)


def _files_of_splits(places: Sequence[str | Path], report: Report) -> list[tuple[str, Path]]:
    """(split, file), by split and name."""
    found: list[Path] = []
    for place in map(Path, places):
        files = parquet_files(place, report) if place.is_dir() else [place]
        if not files:
            raise UserError(f"{place} holds no {END} file")
        found += files
    for path in found:
        if not path.exists():
            raise UserError(f"{path}: no such file")
    named = {path: split_of(path) for path in found}
    if not any(named.values()):
        return [("train", path) for path in found]
    kept: list[tuple[str, Path]] = []
    for path, split in named.items():
        if split is None:
            report.pass_over("files whose names say no split", path)
        else:
            kept.append((split, path))
    return sorted(kept, key=lambda each: (SPLITS.index(each[0]), str(each[1])))


class _Table:
    """A parquet file.  Raises UserError for what is none, and for what is beyond the limits."""

    def __init__(self, path: Path, split: str):
        import pyarrow as pa  # pyright: ignore[reportMissingImports]  # an extra
        import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]  # an extra

        self.path = path
        self.split = split
        try:
            self.file: pq.ParquetFile = pq.ParquetFile(
                open_regular(path),
                pre_buffer=False,
                thrift_string_size_limit=FOOTER_BYTES,
                thrift_container_size_limit=FOOTER_BYTES,
            )
            self.schema: pa.Schema = self.file.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self.unreadable(error) from None
        metadata = self.file.metadata
        self.rows = metadata.num_rows
        self.groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        self.ends = np.cumsum(self.groups)
        reason = exceeds("it", metadata.num_columns, COLUMNS, "columns")
        for number in range(len(self.groups)):
            size = metadata.row_group(number).total_byte_size
            reason = reason or exceeds(f"row group {number}", size, GROUP_BYTES)
        if reason or self.rows != sum(self.groups):
            raise UserError(f"{path}: {reason or 'its row groups are not all its rows'}")

    def unreadable(self, error: Exception) -> UserError:
        words = " ".join(str(error).split())
        return UserError(f"{self.path}: cannot be read as parquet: {words[:200]}")

    def batches(self, columns: Sequence[str], first_group: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows of the groups from `first_group` on, some at a time."""
        import pyarrow as pa  # pyright: ignore[reportMissingImports]  # an extra

        for group in range(first_group, len(self.groups)):
            rows = 0
            # Group by group, and without fetching ahead: parquet would keep what it has read.
            try:
                for batch in self.file.iter_batches(ROWS, [group], columns, use_threads=False):
                    rows += batch.num_rows
                    yield batch
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self.unreadable(error) from None
            if rows != self.groups[group]:
                raise UserError(
                    f"{self.path}: row group {group} has {rows} rows and says {self.groups[group]}"
                )

    def class_labels(self) -> dict[str, list[str]]:
        """{column: names of its classes}, of Hugging Face's metadata."""
        raw = (self.schema.metadata or {}).get(b"huggingface", b"{}")
        reason = exceeds("its Hugging Face metadata", len(raw), JSON_BYTES)
        if reason:
            raise UserError(f"{self.path}: {reason}")
        try:
            features = json.loads(raw)["info"]["features"].items()
            return {
                column: [str(name) for name in feature["names"]]
                for column, feature in features
                if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
            }
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
            return {}


def _splits_of(tables: Sequence[_Table]) -> np.ndarray:
    """[n]: the split of each row."""
    return np.repeat([table.split for table in tables], [table.rows for table in tables])


# Columns


@dataclass
class _Chosen:
    """The columns of inputs and labels.

    kind: pictures, texts or numbers.  dtype: of numbers.  classes: of a ClassLabel.  shape: of
    numbers, the first row's.
    """

    inputs: list[str]
    label: str
    kind: str
    dtype: np.dtype
    classes: list[str] | None = None
    shape: tuple[int, ...] | None = None

    def encode(
        self,
        name: str,
        value: Any,
        rules: PictureRules,
        shape: tuple[int, ...] | None,
        report: Report,
    ) -> tuple[str, bytes]:
        """(extension, content) of a row as the shard holds it.  UserError for a corrupt one."""
        extension, content = self.content(name, value)
        if self.kind != "pictures":
            return extension, content
        return picture_entry(name, content, extension, rules, shape, report)

    def content(self, name: str, value: Any) -> tuple[str, bytes]:
        """(extension, content) of a row, pictures as they are.  UserError for a corrupt one."""
        if value is None:
            raise UserError(f"{name} has no input")
        if self.kind == "pictures":
            picture = picture_bytes(name, value)
            return _extension(picture), picture
        if self.kind == "texts":
            if not value.strip():
                raise UserError(f"{name} has an empty text")
            return encode(value.strip())
        try:
            array = np.asarray(value, self.dtype)
        except (ValueError, TypeError):
            raise UserError(f"{name} holds lists of unlike lengths, or empty places") from None
        self.shape = self.shape or array.shape
        if array.shape != self.shape:
            raise UserError(f"{name} has shape {list(array.shape)}, others {list(self.shape)}")
        try:
            return encode(array)
        except ValueError as error:
            raise UserError(f"{name} {error}") from None


def _choose_columns(tables: Sequence[_Table], asked: ParquetColumns, report: Report) -> _Chosen:
    """The columns that are asked for, or that the first file's schema says. All files have them."""
    first = tables[0]
    label = _choose_label(first, asked)
    inputs = [name.strip() for name in asked.input.split(",") if name.strip()]
    inputs = inputs or [_choose_input(first, label)]
    kinds = {_kind(_type_of(first, name)) for name in inputs}
    kind = _kind(_type_of(first, inputs[0]))
    if kinds == {"number"}:
        kind = "numbers"
    elif len(inputs) > 1 or not kind:
        listed = ", ".join(f"{name} {_type_of(first, name)}" for name in inputs)
        raise UserError(
            f"{first.path}: {listed}: an input is pictures, texts, a list of numbers, or columns "
            "of numbers"
        )
    for table in tables[1:]:
        for name in filter(None, (*inputs, label)):
            if _type_of(table, name) != _type_of(first, name):
                raise UserError(
                    f"{table.path} has column {name} as {_type_of(table, name)}, "
                    f"{first.path} as {_type_of(first, name)}"
                )
    for name in first.schema.names:
        if name not in (*inputs, label):
            report.pass_over("columns", name)
    dtype = _dtype(_type_of(first, inputs[0])) if len(inputs) == 1 else np.dtype(np.float32)
    return _Chosen(inputs, label, kind, dtype, first.class_labels().get(label))


def _type_of(table: _Table, name: str) -> pa.DataType:
    places = table.schema.get_all_field_indices(name)
    if len(places) != 1:
        listed = ", ".join(table.schema.names)
        problem = f"has {len(places)} columns called {name!r}" if places else f"has no {name!r}"
        raise UserError(f"{table.path} {problem}; its columns: {listed}")
    return table.schema.field(places[0]).type


def _choose_label(table: _Table, asked: ParquetColumns) -> str:
    """The column of labels. "" where there is none and none is needed."""
    if asked.label:
        _type_of(table, asked.label)
        return asked.label
    called = [name for name in table.schema.names if name.strip().casefold() in LABEL_COLUMNS]
    for names in (list(table.class_labels()), called):
        if len(names) == 1:
            return names[0]
    if not asked.needs_label:
        return ""
    listed = ", ".join(table.class_labels() or table.schema.names)
    raise UserError(f"{table.path}: choose the label with --label, of the columns {listed}")


def _choose_input(table: _Table, label: str) -> str:
    """The only column of pictures, else of texts, else of lists of numbers."""
    names = [
        name
        for name in table.schema.names
        if name != label and name.strip().casefold() not in ROW_COLUMNS
    ]
    names = [name for name in names if name not in table.class_labels()]
    kinds = {name: _kind(_type_of(table, name)) for name in names}
    for kind in ("pictures", "texts", "numbers"):
        found = [name for name in names if kinds[name] == kind]
        if len(found) == 1:
            return found[0]
        if found:
            names = found
            break
    raise UserError(
        f"{table.path}: choose the input with --input, of the columns {', '.join(names) or 'none'}"
    )


def _kind(column: pa.DataType) -> str:
    """pictures, texts, numbers (lists of them), number (a column of them), or ""."""
    import pyarrow as pa  # pyright: ignore[reportMissingImports]  # an extra

    if isinstance(column, pa.ExtensionType):
        column = column.storage_type
    types = pa.types
    if types.is_struct(column):
        fields = {column.field(n).name for n in range(column.num_fields)}
        return "pictures" if "bytes" in fields else ""
    if types.is_binary(column) or types.is_large_binary(column):
        return "pictures"
    if types.is_string(column) or types.is_large_string(column):
        return "texts"
    if types.is_integer(column) or types.is_floating(column) or types.is_boolean(column):
        return "number"
    if types.is_list(column) or types.is_large_list(column) or types.is_fixed_size_list(column):
        return "numbers" if _kind(column.value_type) in ("number", "numbers") else ""
    return ""


def _dtype(column: pa.DataType) -> np.dtype:
    """The dtype of numbers in a column of lists. 8-byte numbers and bits become float32."""
    while hasattr(column, "storage_type") or hasattr(column, "value_type"):
        column = getattr(column, "storage_type", None) or column.value_type
    if _kind(column) != "number":
        return np.dtype(np.float32)
    dtype = np.dtype(column.to_pandas_dtype())
    return dtype if dtype.kind in "iu" and dtype.itemsize < 8 else np.dtype(np.float32)


def picture_bytes(name: str, value: Any) -> bytes:
    """A picture's content of its cell.  Raises UserError where it has none."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not content:
        where = value.get("path") if isinstance(value, dict) else None
        at = f": it names the file {printable(str(where))}" if where else ""
        raise UserError(f"{name} has no bytes of a picture{at}")
    reason = exceeds("its picture", len(content), MEMBER_BYTES)
    if reason:
        raise UserError(f"{name}: {reason}")
    return content


def _extension(content: bytes) -> str:
    """The extension that a file's first bytes say. "png" if none, which is refused later."""
    return next((end for start, end in SIGNATURES.items() if content.startswith(start)), "png")


# Reading what is predicted


@dataclass
class ParquetRows:
    """The rows of a split.  content(i): (extension, bytes). ValueError where it is corrupt."""

    keys: list[str]
    labels: list[str] | None
    content: Callable[[int], tuple[str, bytes]]


def read_parquet(
    places: Sequence[str | Path], columns: ParquetColumns, report: Report
) -> dict[str, ParquetRows]:
    """{split: its rows}, found as `from_parquet` finds them.

    Keys are those of `columns.key`, else of the only column called id, key, ... Else numbers.
    Labels are None where there are none. One that is kept back is "".
    """
    require("pyarrow", "parquet files")
    tables = [_Table(path, split) for split, path in _files_of_splits(places, report)]
    chosen = _choose_columns(tables, columns, report)
    key = columns.key or _only_key(tables[0])
    return {
        split: _rows_to_read([table for table in tables if table.split == split], chosen, key)
        for split in dict.fromkeys(table.split for table in tables)
    }


def _rows_to_read(tables: Sequence[_Table], chosen: _Chosen, key: str) -> ParquetRows:
    starts = np.cumsum([0, *(table.rows for table in tables)])
    rows = _Rows(tables, starts, chosen.inputs)
    keys = [str(number) for number in range(int(starts[-1]))]
    if key:
        keys = [str(value) for value in _column(tables, key)]
    labels = None
    if chosen.label:
        labels = [_as_text(value, chosen.classes) for value in _column(tables, chosen.label)]

    def content(index: int) -> tuple[str, bytes]:
        try:
            return chosen.content(rows.name(index), rows[index])
        except UserError as error:
            raise ValueError(str(error)) from None

    return ParquetRows(keys, labels, content)


def _only_key(table: _Table) -> str:
    called = [name for name in table.schema.names if name.strip().casefold() in ROW_COLUMNS]
    return called[0] if len(called) == 1 else ""


def _column(tables: Sequence[_Table], name: str) -> list[Any]:
    for table in tables:
        _type_of(table, name)
    return [
        value
        for table in tables
        for batch in table.batches([name])
        for value in batch.column(0).to_pylist()
    ]


def _as_text(value: Any, classes: Sequence[str] | None) -> str:
    """A label as a table writes it: of a ClassLabel its name."""
    if value is None or value == UNLABELLED:
        return ""
    if classes and isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    return str(value)


# Labels


def _labels(
    tables: Sequence[_Table], chosen: _Chosen, given: Sequence[str] | None, report: Report
) -> tuple[list[str], np.ndarray, dict[int, str]]:
    """(names of the classes, int64 [n] classes, {row: why it has none}) of all files."""
    values = _column(tables, chosen.label)
    reasons = {
        number: reason for number, value in enumerate(values) if (reason := _no_label(value))
    }
    are_numbers = all(isinstance(value, int) for n, value in enumerate(values) if n not in reasons)
    names = given or (chosen.classes if are_numbers else None)
    if names and given is None:
        report.note(f"Hugging Face's metadata name the {len(names)} classes of {chosen.label}")
        report.note(doubts(names))
        classes = np.full(len(values), NONE, np.int64)
        for number, value in enumerate(values):
            if number in reasons:
                continue
            if UNLABELLED < value < len(names):
                classes[number] = value
            elif value != UNLABELLED:
                reasons[number] = f"has label {value}, which is none of the {len(names)} classes"
        return list(names), classes, reasons
    texts = ["" if n in reasons else str(value) for n, value in enumerate(values)]
    known = [n for n, value in enumerate(values) if n not in reasons and value != UNLABELLED]
    label_set, settled, more = settle_labels([texts[n] for n in known], given)
    report.note(label_set.notes)
    classes = np.full(len(texts), NONE, np.int64)
    classes[known] = settled
    reasons |= {known[place]: reason for place, reason in more.items()}
    return label_set.names, classes, reasons


def _no_label(value: Any) -> str:
    """Why a cell is no label. "" where it is one."""
    if value is None:
        return "has no label"
    if not isinstance(value, (int, str)):
        return f"has a label of type {type(value).__name__}; whole numbers or texts are needed"
    if isinstance(value, str):
        return exceeds("its label", len(value.encode("utf-8", "surrogatepass")), LABEL_BYTES)
    return ""


def _unlabelled_of(
    tables: Sequence[_Table],
    starts: np.ndarray,
    classes: np.ndarray,
    reasons: Mapping[int, str],
    report: Report,
) -> np.ndarray:
    """bool [n]: rows whose label is -1. Whoever published them kept the labels."""
    unlabelled = classes == NONE
    unlabelled[list(reasons)] = False
    for table, start in zip(tables, starts.tolist(), strict=False):
        count = int(unlabelled[start : start + table.rows].sum())
        if count:
            report.pass_over("files with rows without labels (-1)", f"{table.path}, {count} rows")
    return unlabelled


# Rows


class _Rows:
    """The inputs of all files, numbered through. Reading on is cheap, going back opens anew."""

    def __init__(self, tables: Sequence[_Table], starts: np.ndarray, columns: Sequence[str]):
        self.tables = tables
        self.starts = starts
        self.columns = columns
        self._table = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first = 0  # the row of the file with which the batch in memory begins
        self._cells: Sequence[Any] | pa.RecordBatch = ()
        # {(table, row group): (the first row that cannot be read, why)}
        self._lost: dict[tuple[int, int], tuple[int, str]] = {}

    def _place(self, index: int) -> tuple[int, int]:
        table = int(np.searchsorted(self.starts, index, side="right")) - 1
        return table, index - int(self.starts[table])

    def name(self, index: int) -> str:
        """What a row is called in messages."""
        table, row = self._place(index)
        return f"{self.tables[table].path}, row {row}"

    def __getitem__(self, index: int) -> Any:
        """The cell of one column, or the numbers of several. None where one is empty."""
        table, row = self._place(index)
        lost = self._lost.get((table, self._group_of(table, row)))
        if lost and row >= lost[0]:
            raise UserError(lost[1])
        reached = self._first + max(len(self._cells) - 1, 0)  # the last row in memory
        if (
            table != self._table
            or row < self._first
            or self._group_of(table, row) > self._group_of(table, reached)
        ):
            self._seek(table, row)
        while row >= self._first + len(self._cells):
            self._read_on()
        return self._cell(self._cells, row - self._first)

    def _read_on(self) -> None:
        """The next batch.  What cannot be read stays so: the rest of its row group is lost."""
        self._first += len(self._cells)
        self._cells = ()
        try:
            self._cells = next(self._batches)
        except UserError as error:
            group = self._group_of(self._table, self._first)
            self._lost[self._table, group] = (self._first, str(error))
            self._table = -1
            raise

    def _group_of(self, table: int, row: int) -> int:
        return int(np.searchsorted(self.tables[table].ends, row, side="right"))

    def _seek(self, table: int, row: int) -> None:
        """Begin with the row group that holds the row."""
        group = self._group_of(table, row)
        self._table, self._cells = table, ()
        self._first = sum(self.tables[table].groups[:group])
        self._batches = self.tables[table].batches(self.columns, group)

    def _cell(self, batch: Any, row: int) -> Any:
        """One cell alone becomes Python's: lists of numbers take ten times their room there."""
        columns = [batch.column(batch.schema.get_field_index(name)) for name in self.columns]
        values = [column[row].as_py() for column in columns]
        if len(values) == 1:
            return values[0]
        return None if None in values else values


def _settle_pictures(
    rows: _Rows, chosen: _Chosen, ids: np.ndarray, rules: PictureRules
) -> tuple[PictureRules, tuple[int, ...] | None]:
    """(the rules with their channels, [C, H, W] of every picture). (rules, None) of no pictures.

    Without a size the first picture that can be read says it, and others must agree.
    """
    if chosen.kind != "pictures":
        return rules, None
    if rules.size:
        channels = rules.channels or 3
        return replace(rules, channels=channels), (channels, *rules.size)
    for index in ids.tolist():
        try:
            content = picture_bytes(rows.name(index), rows[index])
            shape = picture_shape(content, rules)
        except (UserError, ValueError):
            continue  # named among all corrupt rows when it is to be written
        return replace(rules, channels=shape[0]), cast(tuple[int, ...], shape)
    return rules, (rules.channels or 3, 1, 1)  # all are corrupt
