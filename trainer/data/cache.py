"""Decoded inputs in one memory-mapped file: decode once, then every batch is an index into an array."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import uuid
from pathlib import Path

import numpy as np

from pipeline.config import Data, UserError
from pipeline.store import read_json, write_json

from .shards import ShardSet

SCHEMA = 1


class CachedShards(ShardSet):
    """The same samples; reading indexes a memory-mapped array instead of decoding."""

    def __init__(self, shards: ShardSet, array_path: Path, unreadable: dict[int, str]):
        self.__dict__.update(copy.copy(shards.__dict__) | {"_files": {}})
        self._array_path, self._unreadable = array_path, unreadable
        self._map()
        self._shape = self._array.shape[1:], self._array.dtype
        self._bad = np.array(sorted(unreadable), np.int64)

    def _map(self) -> None:
        # A plain array over the mapping: numpy's memmap class costs more than the indexing itself.
        self._array = np.asarray(np.load(self._array_path, mmap_mode="r", allow_pickle=False))

    def read_into(self, inputs: np.ndarray, places, ids) -> dict[int, str]:
        ids = np.asarray(ids, np.int64)
        unreadable = {}
        if len(self._bad):
            unreadable = {i: self._unreadable[i] for i in ids[np.isin(ids, self._bad)].tolist()}
            self.check(unreadable)
        inputs[places] = self._array[ids]
        return unreadable

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_array": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()


def cached(shards: ShardSet, path, data: Data) -> ShardSet:
    """The same samples, ids and fingerprint, decoded once into PATH-KEY.npy (KEY: of the shards and the decoders).

    data.cache: "none" returns `shards` as they are; "auto" too where inputs differ in shape or take more
    than data.cache_bytes, and "decoded" makes that a UserError.  Several processes may do this at once: each writes
    under a name of its own, and the same content is renamed into place.
    """
    if data.cache == "none" or isinstance(shards, CachedShards):
        return shards
    path = Path(path)
    path = path.with_suffix("") if path.suffix == ".npy" else path
    key = _key(shards)
    array_path, header_path = (
        path.with_name(f"{path.name}-{key[:16]}{suffix}") for suffix in (".npy", ".json")
    )
    found = _open(shards, array_path, header_path, key)
    if found is not None:
        return found
    size = (
        len(shards) * int(np.prod(shards.input_shape, dtype=np.int64)) * shards.input_dtype.itemsize
    )
    if size > data.cache_bytes:
        if data.cache == "auto":
            return shards
        raise UserError(
            f'data.cache = "decoded" takes {size} bytes, more than data.cache_bytes = {data.cache_bytes}'
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = _write(shards, array_path, header_path, key, data)
    except OSError as mistake:
        if data.cache == "auto":
            return shards
        raise UserError(f"{array_path}: cannot be written: {mistake.strerror}") from None
    if not written:
        return shards
    return _open(shards, array_path, header_path, key)


def _key(shards: ShardSet) -> str:
    """Hash of what the decoded arrays depend on: the shards, and the source files of the decoders."""
    sources = []
    for extension in shards.input_extensions:
        name = shards.data.decoders.get(extension, "built-in")
        if name != "built-in":
            file = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
            name += hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
        sources.append([extension, name])
    return hashlib.sha256(json.dumps([SCHEMA, shards.fingerprint, sources]).encode()).hexdigest()


def _open(shards: ShardSet, array_path: Path, header_path: Path, key: str) -> CachedShards | None:
    try:
        header = read_json(header_path)
        unreadable = {int(sample): reason for sample, reason in header["unreadable"].items()}
        if header["key"] != key:
            return None
        found = CachedShards(shards, array_path, unreadable)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    found.check(unreadable)
    return found if len(found._array) == len(shards) else None


def _write(shards: ShardSet, array_path: Path, header_path: Path, key: str, data: Data) -> bool:
    """Decode everything.  False where "auto" meets inputs of several shapes."""
    from .streams import MeasuringStream

    temporary = array_path.with_name(f".{array_path.name}.{uuid.uuid4().hex[:8]}")
    shape = (len(shards), *shards.input_shape)
    lenient = copy.copy(shards)
    lenient._files, lenient.data = (
        {},
        data.model_copy(update={"damage": "skip", "damage_share": 0.999999}),
    )
    try:
        array = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=shards.input_dtype, shape=shape
        )
        unreadable: dict[int, str] = {}
        for batch in MeasuringStream(lenient, 256).loader(workers=data.workers):
            array[batch.ids.numpy()] = batch.inputs.numpy()
            for _, sample, reason in batch.lost:
                unreadable[sample] = reason
                if "the first sample" in reason and data.cache == "auto":
                    return False
        array.flush()
        del array
        shards.check(unreadable)
        temporary.replace(array_path)
        write_json(
            header_path,
            {"key": key, "unreadable": {str(i): reason for i, reason in unreadable.items()}},
        )
    finally:
        temporary.unlink(missing_ok=True)
    return True
