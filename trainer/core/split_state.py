"""A checkpoint's state whose head is split over the ranks: each rank's rows, apart from the rest.

In a state "rows" says which tensors of its parts are split, by the names that a network with a
split head has: {name: the first row of each rank, and their number}.  In files and in what is read
of them they have the names of a plain head's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from networks.row_files import RowFiles

PREFIX = "state"
WEIGHTS = ("network", "average", "best")  # parts that are weights by name
SPLIT = ("head.rows.", "head.")  # before the names of a split head's tensors, and a plain one's


def plain_name(name: str) -> str:
    split, plain = SPLIT
    return plain + name.removeprefix(split) if name.startswith(split) else name


def take_rows(state: dict) -> tuple[dict[str, Tensor], dict]:
    """({PART/NAME or optimizer/NAME/KEY: this rank's rows}, the state without them)."""
    split, rest, rows = state["rows"], dict(state), {}
    for part in WEIGHTS:
        if state.get(part) is not None:
            rest[part] = {n: v for n, v in state[part].items() if n not in split}
            of_part = {n: v for n, v in state[part].items() if n in split}
            rows |= {f"{part}/{plain_name(name)}": value for name, value in of_part.items()}
    rest["optimizer"] = {}
    for name, entries in state["optimizer"].items():
        own = {key: v for key, v in entries.items() if name in split and _is_per_row(v)}
        rows |= {f"optimizer/{plain_name(name)}/{key}": value for key, value in own.items()}
        left = {key: value for key, value in entries.items() if key not in own}
        rest["optimizer"][plain_name(name)] = left
    rest["rows"] = {plain_name(name): tuple(bounds) for name, bounds in split.items()}
    return rows, rest


def bounds_of(
    rows: Mapping[str, Tensor], split: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Of each entry of `rows` the bounds of its tensor."""
    return {entry: tuple(split[entry.split("/")[1]]) for entry in rows}


def read_rows(directory: Path, state: dict, own_rows: Mapping[str, slice]) -> dict:
    """The state with the rows that lie in files: those in `own_rows`, or all of a tensor's."""
    if "rows" not in state:
        return state
    del state["rows"]
    files = RowFiles.open(directory, PREFIX)
    for entry in files.bounds:
        part, name, *key = entry.split("/")
        value = files.read(entry, own_rows.get(name))
        if key:
            state[part].setdefault(name, {})[key[0]] = value
        else:
            state[part][name] = value
    return state


def _is_per_row(value: object) -> bool:
    """A step count has one entry for all rows."""
    return isinstance(value, Tensor) and value.ndim > 0
