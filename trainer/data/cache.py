"""Decoded inputs in one memory-mapped file: decode once, then a batch is an index into an array."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from pathlib import Path

import numpy as np

from networks import checksums
from networks.temporaries import discard, sweep, temporary_beside
from pipeline.config import Data, UserError
from pipeline.failures import cannot_write
from pipeline.files import sync
from pipeline.store import read_json, write_json

from .mapped import create_mapped
from .shards import Ids, ShardSet
from .window import Need

log = logging.getLogger("referral")
SCHEMA = 2  # raised where decoders change what they make of the same bytes


class CachedShards(ShardSet):
    """A ShardSet that reads from a memory-mapped array instead of decoding.

    array_path: .npy of [N, *input_shape].  unreadable: {id: reason} of rows that hold nothing.
    """

    def __init__(self, shards: ShardSet, array_path: Path, unreadable: dict[int, str]):
        self._take_over(shards)
        self._array_path = array_path
        self._unreadable = unreadable
        self._unreadable_ids = np.array(sorted(unreadable), np.int64)
        self._array = self._map()
        self._first = self._array.shape[1:], self._array.dtype

    def announce(self, need: Need, reader: object = None, fetch: bool = True) -> None:
        """See ShardSet: no shard is read."""

    @property
    def num_cached(self) -> int:
        """Rows of the file."""
        return len(self._array)

    def _map(self) -> np.ndarray:
        # A plain array over the mapping: numpy's memmap class costs more than the indexing itself.
        return np.asarray(np.load(self._array_path, mmap_mode="r", allow_pickle=False))

    def read_into(self, inputs: np.ndarray, rows: np.ndarray, ids: Ids) -> dict[int, str]:
        """See ShardSet."""
        ids = np.asarray(ids, np.int64)
        unreadable = {}
        if len(self._unreadable_ids):
            asked = ids[np.isin(ids, self._unreadable_ids)].tolist()
            unreadable = {sample: self._unreadable[sample] for sample in asked}
            self.check(unreadable)
        inputs[rows] = self._array[ids]
        return unreadable

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_array": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._array = self._map()


def cached(shards: ShardSet, path: str | Path, data: Data) -> ShardSet:
    """Decode a set's inputs once, into a file that later calls open.

    Several processes may do this at once: each writes under a name of its own, and the same content
    is renamed into place.

    Parameters
    ----------
    shards : ShardSet
    path : path
        The file is PATH-KEY.npy, with PATH-KEY.json beside it.  KEY is a hash of the shards and the
        decoders.
    data : Data
        data.cache: "none" decodes nothing. "auto" decodes where all inputs have one shape and take
        at most data.cache_bytes. "decoded" insists on it.

    Returns
    -------
    ShardSet
        The same samples, ids and fingerprint. `shards` itself where nothing is cached.

    Raises
    ------
    UserError
        With "decoded", where the inputs take more than data.cache_bytes, differ in shape, or cannot
        be written.  With data.damage = strict, for a sample that cannot be decoded.
    """
    if data.cache == "none" or isinstance(shards, CachedShards):
        return shards
    path = Path(path)
    if path.suffix == ".npy":
        path = path.with_suffix("")
    key = _key(shards)
    array_path = path.with_name(f"{path.name}-{key[:16]}.npy")
    header_path = path.with_name(f"{path.name}-{key[:16]}.json")
    existing = _open(shards, array_path, header_path, key)
    if existing is not None:
        return existing
    size = len(shards) * int(np.prod(shards.input_shape, dtype=np.int64))
    size *= shards.input_dtype.itemsize
    if size > data.cache_bytes:
        if data.cache == "auto":
            return shards
        raise UserError(
            f'data.cache = "decoded" takes {size} bytes, '
            f"more than data.cache_bytes = {data.cache_bytes}"
        )
    try:
        path.parent.mkdir(exist_ok=True)  # not RUN, should it be gone
        written = _write(shards, array_path, header_path, key, data)
    except OSError as error:
        if data.cache == "auto":
            return shards
        raise cannot_write(array_path, error, size) from None
    if not written:
        return shards
    opened = _open(shards, array_path, header_path, key)
    assert opened is not None, array_path
    return opened


def _key(shards: ShardSet) -> str:
    """Hash of what the decoded arrays depend on: the shards, and the decoders' source files."""
    sources = []
    for extension in shards.input_extensions:
        name = shards.data.decoders.get(extension, "built-in")
        if name != "built-in":
            module = sys.modules.get(name.partition(":")[0])
            file = getattr(module, "__file__", None)
            if file:
                name += hashlib.sha256(Path(file).read_bytes()).hexdigest()
        sources.append([extension, name])
    return hashlib.sha256(json.dumps([SCHEMA, shards.fingerprint, sources]).encode()).hexdigest()


def _open(shards: ShardSet, array_path: Path, header_path: Path, key: str) -> CachedShards | None:
    """What was written, or None if there is nothing whole for this key."""
    try:
        header = read_json(header_path)
        if header["key"] != key:
            return None
        reason = _fault(header, array_path)
        if reason:
            log.info("%s is decoded again, for it is not whole: %s", array_path, reason)
            return None
        unreadable = {int(sample): reason for sample, reason in header["unreadable"].items()}
        opened = CachedShards(shards, array_path, unreadable)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    opened.check(unreadable)
    return opened if opened.num_cached == len(shards) else None


def _fault(header: dict, array_path: Path) -> str:
    """What is wrong with a header or its array. Empty if nothing."""
    if "checksum" not in header:
        return "an older version made it, without checksums"
    if header["checksum"] != _checksum(header):
        return "its header is damaged"
    return checksums.differs(array_path, header["array"])


def _checksum(header: dict) -> str:
    """The checksum of a header, without the checksum that it holds."""
    content = {name: header[name] for name in ("key", "unreadable", "array")}
    return checksums.digest_of([json.dumps(content, sort_keys=True).encode()])


def _write(shards: ShardSet, array_path: Path, header_path: Path, key: str, data: Data) -> bool:
    """Decode everything.  False where "auto" meets inputs of several shapes."""
    from .streams import MeasuringStream

    sweep(array_path.parent, recursive=False)
    temporary = temporary_beside(array_path)
    shape = (len(shards), *shards.input_shape)
    stream = MeasuringStream(_lenient(shards, data), 256)
    try:
        array = create_mapped(temporary, shards.input_dtype, shape)
        unreadable: dict[int, str] = {}
        for batch in stream.loader(workers=data.workers or 0):
            array[batch.ids.numpy()] = batch.inputs.numpy()
            for _, sample, reason in batch.lost:
                unreadable[sample] = reason
                if "the first sample" in reason and data.cache == "auto":
                    return False
        array.flush()
        del array
        shards.check(unreadable)
        sync(temporary)
        header = {
            "key": key,
            "unreadable": {str(sample): reason for sample, reason in unreadable.items()},
            "array": checksums.entry_of(temporary),
        }
        temporary.replace(array_path)
        write_json(header_path, header | {"checksum": _checksum(header)})
    finally:
        discard(temporary)
    return True


def _lenient(shards: ShardSet, data: Data) -> ShardSet:
    """The set with corrupt samples left out, whatever data.damage says."""
    lenient = copy.copy(shards)
    lenient._forget_open()
    lenient.data = data.model_copy(update={"damage": "skip", "damage_share": 0.999999})
    return lenient
