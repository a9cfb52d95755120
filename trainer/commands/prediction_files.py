"""Predictions as a table in a file: parquet, csv or one JSON object a line.

Every kind has the same columns, those of `ensemble.prediction_columns` behind "file".
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from networks.temporaries import discard, temporary_beside
from pipeline.config import UserError
from pipeline.extras import require
from pipeline.failures import cannot_write
from pipeline.files import json_text, sync

ROWS = 8_192  # that are written at a time, a row group of parquet
Columns = dict[str, list]
Write = Callable[[Columns], None]


def check_target(path: Path, force: bool) -> None:
    """Raises UserError, before anything is computed, where `path` cannot become a table."""
    if path.suffix.lower() not in WRITERS:
        raise UserError(f"--to {path}: end it with {', '.join(WRITERS)}")
    if path.suffix.lower() == ".parquet":
        require("pyarrow", f"--to {path}")
    if path.is_dir():
        raise UserError(f"--to {path} is a directory; name a file in it")
    if path.exists() and not force:
        raise UserError(f"--to {path} exists; --force replaces it, or name another file")


@contextmanager
def table_file(path: Path, force: bool) -> Iterator[Write]:
    """What writes columns to `path`, some rows at a time.

    The file gets its name when the block ends without an error. Till then there is none.
    """
    temporary = temporary_beside(path)
    try:
        with ExitStack() as opened:
            with _said_of(path):
                write = opened.enter_context(WRITERS[path.suffix.lower()](temporary))

            def write_rows(columns: Columns) -> None:
                with _said_of(path):
                    write(columns)

            yield write_rows
            with _said_of(path):
                opened.close()
        check_target(path, force)  # somebody may have been faster
        with _said_of(path):
            sync(temporary)
            os.replace(temporary, path)
    finally:
        discard(temporary)


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """An error of the disk in here is one line about the file."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, option="--to") from None


def writable(columns: Columns) -> Columns:
    """Columns whose texts are UTF-8: bytes of file names that are not are escaped."""
    return {name: [_writable(value) for value in values] for name, values in columns.items()}


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def _rows(columns: Columns) -> Iterator[tuple]:
    return zip(*columns.values(), strict=True)


# Kinds of files


@contextmanager
def _csv(path: Path) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        header: Sequence[str] = ()

        def write(columns: Columns) -> None:
            nonlocal header
            if not header:
                header = list(columns)
                writer.writerow(header)
            writer.writerows(_rows(columns))

        yield write


@contextmanager
def _json_lines(path: Path) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8") as file:

        def write(columns: Columns) -> None:
            for row in _rows(columns):
                line = dict(zip(columns, row, strict=True))
                file.write(json_text(line, path.name, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    import pyarrow as pa  # pyright: ignore[reportMissingImports]  # an extra
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]  # an extra

    with ExitStack() as opened:
        writers: list[pq.ParquetWriter] = []  # none before the first columns

        def write(columns: Columns) -> None:
            schema = pa.schema([(name, _arrow_type(pa, name)) for name in columns])
            if not writers:
                writers.append(opened.enter_context(pq.ParquetWriter(path, schema)))
            writers[0].write_table(pa.table(columns, schema=schema))

        yield write


def _arrow_type(pa: Any, column: str) -> Any:
    if column.startswith("class_"):
        return pa.int32()
    if column.startswith("probability_"):
        return pa.float32()
    return pa.string()


WRITERS: dict[str, Callable[[Path], AbstractContextManager[Write]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".jsonl": _json_lines,
}
