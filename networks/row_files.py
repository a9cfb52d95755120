"""Tensors in safetensors files, one of each rank, whose rows are split over the files.

An index beside them follows the ecosystem's convention, {"weight_map": {tensor: file}}.  A part of
a tensor is a tensor of its own there, NAME.rows-00000 and so on. "metadata" says which rows it has.
A split tensor is read whole, or some of its rows, without the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from . import regular
from .integrity import check_file
from .regular import check_regular
from .temporaries import appearing

# As the format calls them (https://github.com/huggingface/safetensors).
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
OF_NUMPY = set(DTYPES.values()) - {"BF16"}
Bounds = Mapping[str, tuple[int, ...]]  # name -> the first row of each part, and their number


def index_path(directory: Path, prefix: str) -> Path:
    return directory / f"{prefix}.safetensors.index.json"


def part_name(prefix: str, part: int, parts: int) -> str:
    return f"{prefix}-{part + 1:05d}-of-{parts:05d}.safetensors"


def write_part(
    directory: Path,
    prefix: str,
    part: int,
    parts: int,
    rows: Mapping[str, Tensor],
    whole: Mapping[str, Tensor] | None = None,
) -> None:
    """One rank's file: its rows of split tensors, and `whole`, tensors that no other rank writes.

    Raises OSError where it cannot be written.
    """
    named = {_part_of(name, part): tensor for name, tensor in rows.items()} | {**(whole or {})}
    final = directory / part_name(prefix, part, parts)
    with appearing(final) as unfinished, open(unfinished, "wb") as file:
        _write_tensors(file, named)
        file.flush()
        os.fsync(file.fileno())


def _write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, one tensor after the other: the format's own writer copies them all."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    head: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        kind = DTYPES[tensor.dtype]
        head[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        file.write(tensor.flatten().view(torch.uint8).numpy().data)


def write_index(directory: Path, prefix: str, bounds: Bounds) -> None:
    """The index, once all parts are there. bounds: of each split tensor."""
    parts = {len(each) - 1 for each in bounds.values()}
    assert len(parts) == 1, "every tensor is split over the same ranks"
    (count,) = parts
    weight_map, total = {}, 0
    for part in range(count):
        name = part_name(prefix, part, count)
        for key, nbytes in _entries(directory / name).items():
            weight_map[key] = name
            total += nbytes
    rows = {name: list(each) for name, each in bounds.items()}
    content = {"metadata": {"total_size": total, "rows": rows}, "weight_map": weight_map}
    final = index_path(directory, prefix)
    with appearing(final) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _entries(path: Path) -> dict[str, int]:
    """{tensor: its bytes} of a file, by its head alone."""
    with open(path, "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in head.items()
        if name != "__metadata__"
    }


def _checked_bounds(name: str, bounds: list) -> tuple[int, ...]:
    """ValueError for bounds that do not ascend from 0."""
    are_numbers = isinstance(bounds, list) and all(type(bound) is int for bound in bounds)
    if not are_numbers or len(bounds) < 2 or bounds[0] != 0 or bounds != sorted(bounds):
        raise ValueError(f"the rows of {name} do not ascend from 0")
    return tuple(bounds)


def _parts_of(name: str, bounds: tuple[int, ...]) -> list[str]:
    """What the parts of a tensor are called in their files."""
    return [_part_of(name, part) for part in range(len(bounds) - 1)]


def _part_of(name: str, part: int) -> str:
    return f"{name}.rows-{part:05d}"


def _rows_of(opened: Any, key: str, rows: slice | None) -> Any:
    """Of a tensor in a safetensors file, whose slices have an entry at least."""
    part = opened.get_slice(key)
    length = (part.get_shape() or [0])[0]
    if rows is None or length == 0:
        return opened.get_tensor(key)
    first, end, _ = rows.indices(length)
    if first >= end:
        return part[0:1][:0]
    return part[first:end]


@dataclass(frozen=True)
class RowFiles:
    """The files that an index names."""

    directory: Path
    bounds: dict[str, tuple[int, ...]]  # of split tensors
    files: dict[str, str]  # tensor, or part of one -> file

    @classmethod
    def open(cls, directory: Path, prefix: str) -> RowFiles:
        """Raises ValueError, naming the file, where the index cannot be read or lacks a part.

        What the parts hold is compared with it when they are read.
        """
        path = index_path(directory, prefix)
        check_file(path)
        try:
            content = regular.read_json(path)
            rows = content["metadata"].get("rows", {})
            bounds = {name: _checked_bounds(name, each) for name, each in rows.items()}
            files = dict(content["weight_map"])
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no index of safetensors files: {error}") from None
        for file in sorted(set(map(str, files.values()))):
            if os.path.basename(file) != file or not (directory / file).is_file():
                raise ValueError(f"{path}: {file} is not beside it, one of its files")
        for key in sorted(part for name in bounds for part in _parts_of(name, bounds[name])):
            if key not in files:
                raise ValueError(f"{path}: it names no file of {key}")
        return cls(directory, bounds, files)

    @property
    def names(self) -> list[str]:
        """Tensors, split ones by their own names."""
        parts = {part for name, own in self.bounds.items() for part in _parts_of(name, own)}
        return [*self.bounds, *(name for name in self.files if name not in parts)]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows of it, from the files that hold them.

        Raises ValueError, naming the file, where it is cut short, lacks the tensor, or has other
        rows of it than the index says.
        """
        if name not in self.bounds:
            whole = self._read(self.files[name], name)
            return whole if rows is None else whole[rows]
        bounds = self.bounds[name]
        first, end, _ = (rows or slice(None)).indices(bounds[-1])
        spans = {}  # part -> those of its rows that are read, where there are any
        for part, (start, stop) in enumerate(pairwise(bounds)):
            if max(first, start) < min(end, stop):
                spans[part] = slice(max(first, start) - start, min(end, stop) - start)
        if len(spans) < 2:  # without a row it is of the shape and kind that any part has
            part, here = next(iter(spans.items()), (0, slice(0, 0)))
            return self._read_part(name, part, here)
        # No memory is taken before every part is known to be as the index says.
        empty = [self._read_part(name, part, slice(0, 0)) for part in spans]
        if len({(each.dtype, each.shape[1:]) for each in empty}) > 1:
            key = _part_of(name, min(spans))
            raise ValueError(
                f"{self.directory / self.files[key]} is damaged: the rows of {name} are of another "
                "shape or kind in other files"
            )
        joined = empty[0].new_empty((end - first, *empty[0].shape[1:]))
        for part, here in spans.items():  # one at a time is beside the whole
            to = bounds[part] - first
            joined[here.start + to : here.stop + to] = self._read_part(name, part, here)
        return joined

    def _read_part(self, name: str, part: int, rows: slice) -> Tensor:
        """Rows of a part of a split tensor, which must have as many as the index says."""
        bounds = self.bounds[name]
        key = _part_of(name, part)
        return self._read(self.files[key], key, rows, bounds[part + 1] - bounds[part])

    def _read(self, file: str, key: str, rows: slice | None = None, count: int = 0) -> Tensor:
        """A file's tensor, or `rows` of it. It must have `count` rows then."""
        from safetensors import SafetensorError, safe_open

        path = self.directory / file
        check_file(path)
        try:
            check_regular(path)
            # For torch the whole file would be mapped as memory that can be written, which a limit
            # of memory counts. For numpy, which lacks some kinds, it can only be read.
            with safe_open(path, framework="np") as opened:
                part = opened.get_slice(key)
                shape = part.get_shape()
                if rows is not None and shape[:1] != [count]:
                    raise ValueError(
                        f"{path} is damaged: {key} is {shape}, and has not {count} rows"
                    )
                if part.get_dtype() in OF_NUMPY:
                    return torch.from_numpy(np.asarray(_rows_of(opened, key, rows)))
            with safe_open(path, framework="pt") as opened:
                return _rows_of(opened, key, rows)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
