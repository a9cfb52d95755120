"""Shards from tables: the texts of a csv."""

from __future__ import annotations

import csv
import gzip
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from pipeline.config import UserError

from ..labels import BOM, clean, printable
from .arrays import Column, write_arrays
from .foreign_files import refuse_foreign
from .reporting import Report
from .split_names import SPLIT_OF, split_called

PROPOSED_OF = 1_000  # rows that a proposal in an error is made of
FIELD_LIMIT = 64 * 2**20  # letters; Python's own is 131,072
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "cls", "y")
SPLIT_COLUMN = "split"
ROW_COLUMNS = ("", "id", "idx", "index", "uid", "key", "unnamed: 0")  # they name rows: never a text


@dataclass
class Columns:
    """Names of columns; "" where the header says it: see `from_table`."""

    text: str = ""
    label: str = ""
    split: str = ""


@dataclass
class _Rows:
    """What is kept of a table: texts, labels and the row's name in messages, by split."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, split: str, text: str, label: str, name: str) -> None:
        self.texts.setdefault(split, []).append(text)
        self.labels.setdefault(split, []).append(label)
        self.names.setdefault(split, []).append(name)


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
    rows = _Rows()
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


def _read_rows(
    path: Path,
    split: str,
    columns: Columns,
    encoding: str,
    dropped: dict[str, int],
    rows: _Rows,
    report: Report,
) -> None:
    """Add a table's rows."""
    table = _Table(path, encoding)
    header = table.header
    text, label, split_column = _choose_columns(table, columns, split)
    if split_column is not None:
        report.note(f"column {header[split_column]} says the split of each row")
    others = [name for place, name in enumerate(header) if place not in (text, label, split_column)]
    for name in others:
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
        if not fields[text].strip():
            report.pass_over(f"rows without {header[text]}", f"line {line}")
            continue
        if clean(fields[label]) in dropped:
            dropped[clean(fields[label])] += 1
            continue
        its_split = split
        if split_column is not None:
            its_split = split_called(fields[split_column])
            if its_split is None:
                report.corrupt.append(
                    f"{name} {header[split_column]} {printable(fields[split_column])!r} is none "
                    f"of {', '.join(SPLIT_OF)}"
                )
                continue
        rows.add(its_split, fields[text].strip(), fields[label], name)


def _choose_columns(table: _Table, columns: Columns, split: str) -> tuple[int, int, int | None]:
    """(text, label, split or None): places of the columns."""
    path, header = table.path, table.header
    label = _place(path, header, columns.label) if columns.label else None
    text = _place(path, header, columns.text) if columns.text else None
    split_column = None
    if split == "train" and columns.split:
        split_column = _place(path, header, columns.split)
    elif split == "train":
        called = [
            place
            for place, name in enumerate(header)
            if name.strip().casefold() == SPLIT_COLUMN and place not in (text, label)
        ]
        split_column = called[0] if len(called) == 1 else None
    free = [place for place in range(len(header)) if place not in (text, label, split_column)]
    if label is None:
        called = [place for place in free if header[place].strip().casefold() in LABEL_COLUMNS]
        label = _only(table, called, called or free, "--label")
        free.remove(label)
    if text is None:
        rest = [place for place in free if place != label]
        texts = [place for place in rest if header[place].strip().casefold() not in ROW_COLUMNS]
        text = _only(table, texts or rest, texts or rest, "--text")
    return text, label, split_column


def _place(path: Path, header: Sequence[str], column: str) -> int:
    places = [place for place, name in enumerate(header) if name == column]
    places = places or [place for place, name in enumerate(header) if name.strip() == column]
    if not places:
        raise UserError(f"{path} has no column {column!r}; it has {_listed(header)}")
    if len(places) > 1:
        raise UserError(f"{path} has {len(places)} columns called {column!r}; rename all but one")
    return places[0]


def _only(table: _Table, places: Sequence[int], likely: Sequence[int], option: str) -> int:
    """The only place; otherwise UserError, with the likeliest column."""
    if len(places) == 1:
        return places[0]
    message = f"{table.path} has the columns {_listed(table.header)}; choose one with {option}"
    if likely:
        chosen = shlex.quote(table.header[_likeliest(table, likely, option)])
        message += f", e.g. {option} {chosen}"
    raise UserError(message)


def _likeliest(table: _Table, places: Sequence[int], option: str) -> int:
    """By the first rows: a label has few values, and a text is long."""
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
    """Different values; a column with one alone tells no classes apart."""
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
        """(number of its first line, fields) of each row behind the header; not of blank lines."""
        return self._records

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(FIELD_LIMIT)
        opener = gzip.open if self.path.suffix == ".gz" else open
        first = 1
        try:
            with opener(self.path, "rt", encoding=self.encoding, newline="") as file:
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
    """The lines; each is appended to `record` too."""
    for line in lines:
        record.append(line)
        yield line
