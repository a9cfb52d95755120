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
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .integrity import check_file

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
    named = {f"{name}.rows-{part:05d}": tensor for name, tensor in rows.items()} | {**(whole or {})}
    final = directory / part_name(prefix, part, parts)
    unfinished = final.with_name(f".{final.name}.{os.getpid()}")
    with open(unfinished, "wb") as file:
        _write_tensors(file, named)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, final)


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
    unfinished = final.with_name(f".{final.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, final)


def _entries(path: Path) -> dict[str, int]:
    """{tensor: its bytes} of a file, by its head alone."""
    with open(path, "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in head.items()
        if name != "__metadata__"
    }


@dataclass(frozen=True)
class RowFiles:
    """The files that an index names."""

    directory: Path
    bounds: dict[str, tuple[int, ...]]  # of split tensors
    files: dict[str, str]  # tensor, or part of one -> file

    @classmethod
    def open(cls, directory: Path, prefix: str) -> RowFiles:
        """Raises ValueError, naming the file, where the index cannot be read or lacks a part."""
        path = index_path(directory, prefix)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = content["metadata"].get("rows", {})
            bounds = {name: tuple(each) for name, each in rows.items()}
            files = dict(content["weight_map"])
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no index of safetensors files: {error}") from None
        absent = [f for f in sorted(set(files.values())) if not (directory / f).is_file()]
        if absent:
            raise ValueError(f"{path}: {absent[0]} is not beside it, one of its files")
        return cls(directory, bounds, files)

    @property
    def names(self) -> list[str]:
        """Tensors, split ones by their own names."""
        parts = {f"{n}.rows-{p:05d}" for n, own in self.bounds.items() for p in range(len(own) - 1)}
        return [*self.bounds, *(name for name in self.files if name not in parts)]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows of it, from the files that hold them.

        Raises ValueError, naming the file, where it is cut short or lacks the tensor.
        """
        if name not in self.bounds:
            whole = self._read(self.files[name], name, slice(None))
            return whole if rows is None else whole[rows]
        bounds = self.bounds[name]
        first, end, _ = (rows or slice(None)).indices(bounds[-1])
        joined = None
        for part in range(len(bounds) - 1):
            start, stop = max(first, bounds[part]), min(end, bounds[part + 1])
            if start < stop:
                key = f"{name}.rows-{part:05d}"
                here = slice(start - bounds[part], stop - bounds[part])
                piece = self._read(self.files[key], key, here)
                if len(piece) == end - first:
                    return piece
                if joined is None:
                    joined = piece.new_empty((end - first, *piece.shape[1:]))
                joined[start - first : stop - first] = piece  # one part at a time is beside it
        if joined is not None:
            return joined
        key = f"{name}.rows-00000"  # of the shape and kind that any part has
        return self._read(self.files[key], key, slice(0, 0))

    def _read(self, file: str, key: str, rows: slice) -> Tensor:
        from safetensors import SafetensorError, safe_open

        path = self.directory / file
        check_file(path)
        try:
            with safe_open(path, framework="pt") as opened:
                if rows == slice(None):
                    return opened.get_tensor(key)
                return opened.get_slice(key)[rows]
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
