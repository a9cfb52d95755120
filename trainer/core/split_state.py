"""A checkpoint's state that is split over the ranks: what each rank has, apart from the rest.

Of a split head "rows" says which tensors of a state are split, by the names that a network with a
split head has: {name: the first row of each rank, and their number}.  In files and in what is read
of them they have the names of a plain head's.

Of weights and optimizer states that are split otherwise each tensor is a `Part`.  In files it is a
flat tensor, whose rows are its entries. "shapes" in the state says what it is when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from networks.row_files import RowFiles

PREFIX = "state"
WEIGHTS = ("network", "average", "best")  # parts that are weights by name
SPLIT = ("head.rows.", "head.")  # before the names of a split head's tensors, and a plain one's


class Part(NamedTuple):
    """This rank's entries of a flattened tensor.

    bounds: the first entry of each rank, and their number.  shape: of the whole tensor.
    """

    own: Tensor
    bounds: tuple[int, ...]
    shape: tuple[int, ...]

    def clone(self) -> Part:
        return self._replace(own=self.own.clone())

    def to(self, device: torch.device, copy: bool = False) -> Part:
        return self._replace(own=self.own.to(device, copy=copy))


class OnDisk(NamedTuple):
    """A tensor that ranks have written their parts of.

    shape: of the whole.  rows: those of it that are read.
    """

    files: RowFiles
    entry: str
    shape: tuple[int, ...]
    rows: slice | None

    def read(self) -> Tensor:
        whole = self.files.read(self.entry).view(self.shape)
        return whole if self.rows is None else whole[self.rows].clone()


class Unread(Mapping[str, object]):
    """Values by name, of which those on the disk are read anew each time they are asked for.

    A rank that takes its share of one tensor after the other never holds them all.
    """

    def __init__(self, values: Mapping[str, object]):
        self._values = values

    def __getitem__(self, name: str) -> object:
        value = self._values[name]
        return value.read() if isinstance(value, OnDisk) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def is_split(state: dict) -> bool:
    """Whether each rank has something of its own to write."""
    return "rows" in state or any(isinstance(v, Part) for v in state.get("network", {}).values())


def take_own(state: dict) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], dict]:
    """({entry: what is this rank's}, {entry: bounds}, the state without them)."""
    if "rows" in state:
        rows, rest = take_rows(state)
        return rows, bounds_of(rows, rest["rows"]), rest
    parts = {}
    rest = {**state, "optimizer": {}}
    for part in WEIGHTS:
        if state.get(part) is not None:
            rest[part] = {n: v for n, v in state[part].items() if not isinstance(v, Part)}
            parts |= {f"{part}/{n}": v for n, v in state[part].items() if isinstance(v, Part)}
    for name, entries in state["optimizer"].items():
        own = {key: v for key, v in entries.items() if isinstance(v, Part)}
        parts |= {f"optimizer/{name}/{key}": v for key, v in own.items()}
        rest["optimizer"][name] = {key: v for key, v in entries.items() if key not in own}
    rest["shapes"] = {entry: part.shape for entry, part in parts.items()}
    own_entries = {entry: part.own for entry, part in parts.items()}
    return own_entries, {entry: part.bounds for entry, part in parts.items()}, rest


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
    """The bounds of each entry's tensor in `rows`."""
    return {entry: tuple(split[entry.split("/")[1]]) for entry in rows}


def read_rows(directory: Path, state: dict, own_rows: Mapping[str, slice]) -> dict:
    """The state with the rows that lie in files: those in `own_rows`, or all of a tensor's.

    Tensors of which ranks have parts otherwise are `Unread`.
    """
    if "rows" not in state and "shapes" not in state:
        return state
    state.pop("rows", None)
    shapes = state.pop("shapes", {})
    files = RowFiles.open(directory, PREFIX)
    for entry in files.bounds:
        part, name, *key = entry.split("/")
        if entry in shapes:
            value = OnDisk(files, entry, shapes[entry], own_rows.get(name))
        else:
            value = files.read(entry, own_rows.get(name))
        if key:
            state[part].setdefault(name, {})[key[0]] = value
        else:
            state[part][name] = value
    if not shapes:
        return state
    state["optimizer"] = {name: Unread(of_name) for name, of_name in state["optimizer"].items()}
    return state | {part: Unread(state[part]) for part in WEIGHTS if state.get(part) is not None}


def _is_per_row(value: object) -> bool:
    """A step count has one entry for all rows."""
    return isinstance(value, Tensor) and value.ndim > 0
