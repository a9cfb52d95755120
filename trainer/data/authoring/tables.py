"""Shards from tables: the texts of a csv."""

from __future__ import annotations

import csv
import io
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pipeline.config import UserError

from ..labels import BOM, clean, printable
from ..packing import unpacked
from .arrays import Column, write_arrays
from .foreign_files import refuse_foreign
from .reporting import Report
from .split_names import SPLIT_OF, split_called

PROPOSED_OF = 1_000  # rows that a proposal in an error is made of
FIELD_LIMIT = 64 * 2**20  # letters. Python's own is 131,072
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "cls", "y")
SPLIT_COLUMN = "split"
ROW_COLUMNS = ("", "id", "idx", "index", "uid", "key", "unnamed: 0")  # they name rows: never a text


@dataclass
class Columns:
    """Names of columns. "" where the header says it: see `from_table`.

    key: of the column that tells the rows apart. None where rows need no keys.
    needs_label: whether a table without a column of labels is refused.
    """

    text: str = ""
    label: str = ""
    split: str = ""
    key: str | None = None
    needs_label: bool = True


@dataclass
class Rows:
    """What is kept of a table: texts, labels, keys and the row's name in messages, by split.

    Without a column of labels they are "".  Without one of keys they are "line N".
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)

    def add(self, split: str, text: str, label: str, name: str, key: str) -> None:
        self.texts.setdefault(split, []).append(text)
        self.labels.setdefault(split, []).append(label)
        self.names.setdefault(split, []).append(name)
        self.keys.setdefault(split, []).append(key)


@dataclass
class _Places:
    """Places of the columns. None where there is none."""

    text: int
    label: int | None
    split: int | None
    key: int | None


def from_table(
    path: str | Path,
    out: str | Path,
    columns: Columns,
    fractions: Mapping[str, float],
    seed: int = 0,
    encoding: str = "utf-8-sig",
    drop: Sequence[str] = (),
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    report: Report | None = None,
    split_files: Mapping[str, str | Path] | None = None,
) -> Report:
    """Shards of a csv (or csv.gz) with a header.

    Parameters
    ----------
    path, out : path
    columns : Columns
        The input, kept as txt, the class, and the split.  By default the label is the only column
        called label, class, category, target, ..., the split one called split, and the text the
        only other one that is not called id, index, ...
    fractions : {split: fraction}
        Of each class for val and test, where the table has no such split.
    seed : int
        Of the division into splits.
    encoding : str
    drop : sequence of str
        Labels whose rows are left out.
    samples_per_shard : int
    overwrite : bool
    report : Report, optional
        Its `skip` says whether corrupt rows are left out.
    split_files : {split: path}, optional
        The user's own val and test tables, with the same columns.

    Returns
    -------
    Report

    Raises
    ------
    UserError
        For a file that cannot be read, a column that is absent, a label to drop that does not
        occur, and corrupt rows that are not to be skipped.
    """
    report = report or Report()
    for file in (path, *(split_files or {}).values()):
        refuse_foreign(file)
    rows = Rows()
    dropped = {clean(name): 0 for name in drop}
    for split, file in {"train": Path(path), **(split_files or {})}.items():
        _read_rows(Path(file), split, columns, encoding, dropped, rows, report)
    for name, count in dropped.items():
        if not count:
            raise UserError(f"{path} has no {columns.label or 'label'} {name!r} to leave out")
        report.pass_over("classes that --drop names", f"{name}, {count} rows")
    if "train" not in rows.texts:
        report.refuse_corrupt()
        raise UserError(
            f"{path} has no row of the split train (it has {', '.join(rows.texts) or 'none'})"
        )
    made_by = {
        "command": "shards table",
        "files": [str(path), *map(str, (split_files or {}).values())],
        "text": columns.text,
        "label": columns.label,
        "drop": list(drop),
    }
    texts: dict[str, Column] = dict(rows.texts)
    labels: dict[str, Column] = dict(rows.labels)
    write_arrays(
        texts,
        labels,
        out,
        fractions,
        seed,
        made_by,
        samples_per_shard,
        overwrite,
        report,
        names=rows.names,
    )
    return report


def read_table(
    path: str | Path, columns: Columns, encoding: str, report: Report, split: str = "train"
) -> Rows:
    """The rows of a csv, as `from_table` reads them.  split: theirs, where no column says it."""
    rows = Rows()
    _read_rows(Path(path), split, columns, encoding, {}, rows, report)
    return rows


def _read_rows(
    path: Path,
    split: str,
    columns: Columns,
    encoding: str,
    dropped: dict[str, int],
    rows: Rows,
    report: Report,
) -> None:
    """Add a table's rows."""
    table = _Table(path, encoding)
    header = table.header
    places = _choose_columns(table, columns, split)
    if places.split is not None:
        report.note(f"column {header[places.split]} says the split of each row")
    used = (places.text, places.label, places.split, places.key)
    for place, name in enumerate(header):
        if place not in used:
            report.pass_over("columns", name or "(without a name)")
    for line, fields in table.rows():
        name = f"{path}, line {line}:"
        if not any(map(str.strip, fields)):
            report.pass_over("empty rows", f"line {line}")
            continue
        if len(fields) > len(header) and any(map(str.strip, fields[len(header) :])):
            report.corrupt.append(
                f"{name} has {len(fields)} fields, the header {len(header)}; "
                "quote fields that hold a comma"
            )
            continue
        fields += [""] * (len(header) - len(fields))
        if not fields[places.text].strip():
            report.pass_over(f"rows without {header[places.text]}", f"line {line}")
            continue
        label = "" if places.label is None else fields[places.label]
        if clean(label) in dropped:
            dropped[clean(label)] += 1
            continue
        its_split = split
        if places.split is not None:
            its_split = split_called(fields[places.split])
            if its_split is None:
                report.corrupt.append(
                    f"{name} {header[places.split]} {printable(fields[places.split])!r} is none "
                    f"of {', '.join(SPLIT_OF)}"
                )
                continue
        key = f"line {line}" if places.key is None else fields[places.key].strip()
        rows.add(its_split, fields[places.text].strip(), label, name, key)


def _choose_columns(table: _Table, columns: Columns, split: str) -> _Places:
    """The columns that are asked for, or that the header says."""
    path, header = table.path, table.header
    label = _place(path, header, columns.label) if columns.label else None
    text = _place(path, header, columns.text) if columns.text else None
    key = _place(path, header, columns.key) if columns.key else None
    split_column = None
    if split == "train" and columns.split:
        split_column = _place(path, header, columns.split)
    elif split == "train":
        free = _free(header, text, label, key)
        called = [place for place in free if _is_called(header[place], (SPLIT_COLUMN,))]
        split_column = called[0] if len(called) == 1 else None
    if label is None:
        free = _free(header, text, split_column, key)
        called = [place for place in free if _is_called(header[place], LABEL_COLUMNS)]
        if called or columns.needs_label:
            label = _only(table, called, called or free, "--label")
    if text is None:
        free = _free(header, label, split_column, key)
        texts = [place for place in free if not _is_called(header[place], ROW_COLUMNS)]
        text = _only(table, texts or free, texts or free, "--text")
    if key is None and columns.key is not None:
        free = _free(header, text, label, split_column)
        keys = [place for place in free if _is_called(header[place], ROW_COLUMNS)]
        key = keys[0] if len(keys) == 1 else None
    return _Places(text, label, split_column, key)


def _free(header: Sequence[str], *taken: int | None) -> list[int]:
    return [place for place in range(len(header)) if place not in taken]


def _is_called(name: str, names: Sequence[str]) -> bool:
    return name.strip().casefold() in names


def _place(path: Path, header: Sequence[str], column: str) -> int:
    places = [place for place, name in enumerate(header) if name == column]
    places = places or [place for place, name in enumerate(header) if name.strip() == column]
    if not places:
        raise UserError(f"{path} has no column {column!r}; it has {_listed(header)}")
    if len(places) > 1:
        raise UserError(f"{path} has {len(places)} columns called {column!r}; rename all but one")
    return places[0]


def _only(table: _Table, places: Sequence[int], likely: Sequence[int], option: str) -> int:
    """The only place. Otherwise UserError, with the likeliest column."""
    if len(places) == 1:
        return places[0]
    message = f"{table.path} has the columns {_listed(table.header)}; choose one with {option}"
    if likely:
        chosen = shlex.quote(table.header[_likeliest(table, likely, option)])
        message += f", e.g. {option} {chosen}"
    raise UserError(message)


def _likeliest(table: _Table, places: Sequence[int], option: str) -> int:
    """Guess columns by the first rows: a label has few values, and a text is long."""
    values: dict[int, list[str]] = {place: [] for place in places}
    for _, fields in islice(table.rows(), PROPOSED_OF):
        for place in places:
            values[place] += fields[place : place + 1]

    def length(place: int) -> int:
        return sum(map(len, values[place]))

    if option == "--text":
        return max(places, key=length)
    return min(places, key=lambda place: (_kinds(values[place]), length(place)))


def _kinds(values: Sequence[str]) -> int:
    """Different values. A column with one alone tells no classes apart."""
    kinds = len(set(values))
    return kinds if kinds > 1 else len(values) + 1


def _listed(header: Sequence[str]) -> str:
    return ", ".join(header)


class _Table:
    """A csv file, row by row.  Raises UserError where it cannot be read."""

    def __init__(self, path: Path, encoding: str):
        self.path = path
        self.encoding = encoding
        self._records = self._read()
        _, header = next(self._records, (0, []))
        if not header:
            raise UserError(f"{path} is empty; it needs a header with the columns' names")
        self.header = [name.lstrip(BOM) for name in header]
        if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
            raise UserError(
                f"{path}: its columns are not separated by commas: {header[0]!r:.80}; "
                "save it with commas"
            )

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """(number of its first line, fields) of each row behind the header. Not of blank lines."""
        return self._records

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(FIELD_LIMIT)
        first = 1
        try:
            is_packed = self.path.suffix == ".gz"
            content = unpacked(self.path) if is_packed else open(self.path, "rb")
            with io.TextIOWrapper(content, encoding=self.encoding, newline="") as file:
                record: list[str] = []  # the lines of the current row
                reader = csv.reader(_recorded(file, record))
                for fields in reader:
                    self._check_quotes(record, first)
                    if fields:
                        yield first, fields
                    first = reader.line_num + 1
                    record.clear()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not {self.encoding} ({error.reason}); "
                "try --encoding cp1252, or utf-16 for what Excel calls Unicode text"
            ) from None
        except csv.Error as error:
            hint = ""
            if "field limit" in str(error):
                hint = ": is the quote that opens it ever closed?"
            raise UserError(
                f"{self.path}, line {first}: cannot be read as csv: {error}{hint}"
            ) from None
        except (OSError, LookupError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path}: cannot be read as csv: {error}") from None

    def _check_quotes(self, record: list[str], first: int) -> None:
        """Refuse a row that a stray quote makes of several: rows would be lost without a word.

        record: the row's lines.  One line is as it is, unless a quote is still open at its end.
        """
        if len(record) == 1 and not record[0].count('"') % 2:
            return
        try:
            list(csv.reader(record, strict=True))
        except csv.Error:
            raise UserError(
                f"{self.path}, line {first}: a quote is opened and not closed as it should be, so "
                f"that {len(record)} lines are one row; close it, or double it within a field"
            ) from None


def _recorded(lines: Iterable[str], record: list[str]) -> Iterator[str]:
    """The lines. Each is appended to `record` too."""
    for line in lines:
        record.append(line)
        yield line
