"""A set of shards as one array-like: labels, keys, raw files and decoded inputs of any samples.

Opening finds structural corruption: each tar is checked once against its manifest, its index and
itself.  A tar that was checked before, and has its time and size since, is opened when it is first
read. Until then the manifest says its samples.  Reading checks every file's checksum, so that no
garbled byte reaches a decoder unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from networks.pictures import PictureRules
from pipeline.config import Data, UserError
from pipeline.redaction import printable

from .arriving import Arrivals
from .bounds import CLASSES, exceeds
from .choices import DECODERS
from .decoding import (
    decode,
    decoder_table,
    find_decoder,
    picture_rules,
    recorded_name,
    with_rules,
)
from .fetching import FetchDir
from .label_files import DTYPE, count_classes, map_labels
from .labels import Kind, LabelSet
from .opening import (
    Corrupt,
    Corruption,
    OpenedShard,
    ShardPart,
    check_corruption,
    is_the_machines,
    label_kind,
    read_shard,
    reopened,
    unread,
    vouched,
)
from .orders import Windows
from .patterns import Shard, expand
from .window import Need, Passage, most_at_once
from .writing import ShardWriter, agreed_rules, recorded_rules, write_manifest

__all__ = ["Corruption", "ShardSet", "ShardWriter", "open_shards", "write_manifest"]

OPEN_FILES = 256  # shards
MOST_POSITIVE = (1 << 63) - 1
MOST_FILES = 1 << 16  # whatever a process may open: a mapping costs address space

Ids = Sequence[int] | np.ndarray  # indices of samples, int64 [n]


class ShardSet:
    """Samples 0 .. num_samples - 1 of one split, in the order of the shards.

    Attributes
    ----------
    split : str
    labels : int32 [N]
        UNLABELLED throughout where data.label is "".
    class_names : list of C str
    class_counts : int64 [C]
    corruption : list of Corruption
        What opening left out. Nothing under data.damage = strict.
    names, paths : list of str
        Each shard as the user knows it, and where it is read.
    extensions : list of str
        Of all files in the shards.
    input_extensions : list of str
        Of the files that are inputs.
    input_shape, input_dtype
        Of one decoded input: the first readable one's.
    recorded : PictureRules, optional
        What the manifest says of how its pictures were made.
    pictures : PictureRules, optional
        The rules that the inputs are read by. None where they are no pictures, where a decoder of
        the user's own reads them, and where nothing is recorded.
    decoder_names : dict
        {extension: name} of the decoders that read anything but pictures and arrays.
    fingerprint : str
        A hash of the shards' contents, the classes and what is read of them.
    windows : Windows, optional
        How training mixes shards behind URLs with data.stream_shards, whether they stream or fit.
    """

    _mapped_labels: tuple[Path, int, int] | None = None  # file, first and last place in it
    _counts: np.ndarray | None = None
    _streams: Mapping[int, Shard] = {}  # of sets in memory, too: no shard of theirs streams
    _arrivals: Arrivals | None = None
    windows: Windows | None = None

    def __init__(
        self,
        split: str,
        parts: Sequence[ShardPart],
        class_names: Iterable[str],
        corruption: Iterable[Corruption],
        data: Data,
    ):
        self.split = split
        self.data = data
        self.corruption = list(corruption)
        self.class_names = list(class_names)
        shards = [part.shard for part in parts]
        self.paths = [shard.path for shard in shards]
        self.names = [shard.name for shard in shards]
        self._parts = list(parts)
        self._shard_start = np.cumsum([0, *(part.samples for part in parts)])
        self._mapped_labels = _stretch(parts)
        self.labels = _joined_labels(parts, self._mapped_labels)
        self.recorded = _recorded_rules(shards, split)
        self.fingerprint = self._fingerprint()
        self.extensions = sorted(set().union(*(part.extensions for part in parts)))
        self._find_decoders()
        self._streams = {n: part.shard for n, part in enumerate(parts) if part.shard.streams}
        if data.stream_shards and any(part.shard.url for part in parts):
            self.windows = Windows(self._shard_start, data.stream_shards)
        if self._streams:
            needed = self._room(np.diff(self._shard_start), span=1)
            self.check_room(needed, "two windows")
        self._forget_open()
        self._first: tuple[tuple[int, ...], np.dtype] | None = None

    def _forget_open(self) -> None:
        """Begin with no open files: in another process, or as another set."""
        self._descriptors: dict[int, int] = {}
        self._opened: dict[int, OpenedShard] = {}
        self._checked: set[int] = set()
        self._arrivals = None
        if self._streams:
            self._arrivals = Arrivals(self.data, self._streams, self._close_shard)

    def _find_decoders(self) -> None:
        """One decoder for each kind of input, and what is said of them."""
        of_inputs = set().union(*(part.input_extensions for part in self._parts))
        self.input_extensions = sorted(of_inputs)
        table = decoder_table(self.data.decoders)
        found = {each: find_decoder(table, each) for each in self.input_extensions}
        self._decoders = {each: with_rules(one, self.recorded) for each, one in found.items()}
        rules = {picture_rules(decoder, self.recorded) for decoder in found.values()}
        self.pictures: PictureRules | None = rules.pop() if len(rules) == 1 else None
        self.decoder_names: dict[str, str] = {}
        for extension, decoder in found.items():
            last = extension.rpartition(".")[2]
            named = DECODERS | self.data.decoders
            name = recorded_name(decoder, named.get(extension) or named.get(last, ""))
            if name is not None:
                self.decoder_names[last] = name

    def _fingerprint(self) -> str:
        contents = [
            [os.path.basename(part.shard.name), part.sha256, part.samples] for part in self._parts
        ]
        identity = [contents, self.data.label, self.data.input, self.class_names]
        says_inputs = any("inputs" in (part.shard.manifest or {}) for part in self._parts)
        if says_inputs and self.recorded:
            identity.append(self.recorded.as_json())
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _take_over(self, other: ShardSet) -> None:
        """Become another set's samples, with no open files: for the constructors of subclasses."""
        self.__dict__.update(other.__dict__)
        self._forget_open()

    def announce(self, need: Need, reader: object = None, fetch: bool = True) -> None:
        """Shards that stream: what a reader needs from here on.  See Arrivals."""
        if self._arrivals is not None:
            self._arrivals.announce(need, reader, fetch)

    def leave(self, reader: object) -> None:
        """The reader that announced what it needs has ended."""
        if self._arrivals is not None:
            self._arrivals.leave(reader)

    def passage(self, ids: Ids) -> Passage | None:
        """What reading samples in this order needs. None where no shard streams."""
        if not self._streams:
            return None
        return Passage(self.shard_of(ids), self.data.stream_shards)

    def need_of(self, passage: Passage, first: int, last: int, end: int) -> Need:
        """Like Passage.need. Nothing if the samples lie in more shards than can be held."""
        need = passage.need(first, last, end)
        size = sum(self._bytes(number) for number in need.now if number in self._streams)
        return need if 2 * size <= self.data.fetch_bytes else Need()

    def _bytes(self, shard: int) -> int:
        entry = self._parts[shard].shard.entry
        assert entry is not None, self.names[shard]
        return FetchDir.taken(entry)

    def room(self, ids: Ids, span: int) -> int:
        """Bytes of the shards that stream, of those that `span` neighbours in an order may touch.

        ids: of the order.
        """
        if not self._streams:
            return 0
        counts = np.bincount(self.shard_of(ids), minlength=len(self._parts))
        return self._room(counts, span)

    def _room(self, counts: np.ndarray, span: int) -> int:
        """counts: int64, how many positions are of each shard."""
        used = [number for number in self._streams if counts[number]]
        sizes = [self._bytes(number) for number in used]
        return most_at_once(sizes, counts[used].tolist(), self.data.stream_shards, span)

    def check_room(self, needed: int, what: str) -> None:
        """UserError where data.fetch_bytes is too small for what is read at once."""
        if not self._streams:
            return
        if 0 in self._streams:  # that of the first input is kept
            needed = min(needed + self._bytes(0), sum(map(self._bytes, self._streams)))
        kept = FetchDir(self.data).kept
        if needed + kept > self.data.fetch_bytes:
            beside = f" beside {kept} bytes that are kept" if kept else ""
            raise UserError(
                f"data.stream_shards = {self.data.stream_shards}: {what} may take {needed} bytes "
                f"of {self.split}{beside}, more than data.fetch_bytes = {self.data.fetch_bytes}; "
                "lower data.stream_shards or data.workers, or raise data.fetch_bytes"
            )

    @property
    def arrival(self) -> str:
        """A line about shards behind URLs: what streams, what is kept and where. Else ""."""
        entries = [part.shard.entry for part in self._parts if part.shard.url]
        if not entries:
            return ""
        size = sum(entry["bytes"] for entry in entries if entry)
        directory = os.path.dirname(self.paths[0])
        line = f"{self.split}: {len(entries)} shards behind URLs, {size / 2**20:.1f} MiB"
        if not self._streams:
            return f"{line}, kept in {directory}"
        return (
            f"{line}, stream through {directory}, of which data.fetch_bytes allows "
            f"{self.data.fetch_bytes / 2**20:.1f} MiB; {self.data.stream_shards} shards are mixed "
            "at a time"
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_counts(self) -> np.ndarray:
        if self._counts is None:
            self._counts = count_classes(self.labels, self.num_classes)
        return self._counts.copy()

    @property
    def lost(self) -> int:
        """Samples that opening left out."""
        return sum(corruption.samples for corruption in self.corruption)

    @property
    def contents(self) -> frozenset[str]:
        """The sha256 of each shard."""
        return frozenset(part.sha256 for part in self._parts)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._first_input()[0]

    @property
    def input_dtype(self) -> np.dtype:
        return self._first_input()[1]

    def shard_of(self, ids: Ids) -> np.ndarray:
        """int64 [n]: the index of each sample's shard."""
        return np.searchsorted(self._shard_start, ids, side="right") - 1

    def keys(self, ids: Ids) -> list[str]:
        """The samples' keys as webdataset gives them. The place in a shard that is unreadable."""
        keys = []
        for shard, place in self._places(ids):
            opened = self._open(shard)
            if opened.index is None:
                keys.append(f"number {place}")
            else:
                keys.append(opened.index.keys[place].decode("utf-8", "surrogateescape"))
        return keys

    def _places(self, ids: Ids) -> list[tuple[int, int]]:
        """(shard, place in it) of each sample."""
        ids = np.asarray(ids, np.int64)
        shards = self.shard_of(ids)
        places = ids - self._shard_start[shards]
        return list(zip(shards.tolist(), places.tolist(), strict=True))

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        shard = int(self.shard_of([sample])[0])
        return printable(f"{self.names[shard]}: sample {self.keys([sample])[0]}")

    def _open(self, shard: int) -> OpenedShard:
        """A shard's index, mapped when it is first asked for.  UserError as in open_shards."""
        opened = self._opened.get(shard)
        if opened is None:
            if len(self._opened) >= _open_indexes():
                self._opened.pop(next(iter(self._opened)))
            opened = self._opened[shard] = self._mapped(shard)
        return opened

    def _mapped(self, shard: int) -> OpenedShard:
        part = self._parts[shard]
        if part.index is not None:
            return OpenedShard(part.index, self.data)
        if self._arrivals is not None and part.shard.streams:
            self._arrivals.have(shard)
        first = shard not in self._checked
        try:
            opened = reopened(part, self.class_names, self.data, first)
        except OSError as error:
            raise unread(self.names[shard], error) from None
        self._checked.add(shard)
        return opened

    def raw(self, ids: Ids) -> list[dict[str, bytes]]:
        """Every file of the samples, {extension: content}.  UserError if one is corrupt."""
        samples, unreadable = self.read_raw(ids)
        self._refuse(unreadable)
        return samples

    def read_raw(self, ids: Ids) -> tuple[list[dict[str, bytes]], dict[int, str]]:
        """Like `read`: (every file of the samples, {id: reason} of the unreadable ones).

        An unreadable sample has no files, {}.
        """
        samples: list[dict[str, bytes]] = []
        unreadable: dict[int, str] = {}
        ids = np.asarray(ids, np.int64)
        for sample, (shard, place) in zip(ids.tolist(), self._places(ids), strict=True):
            try:
                samples.append(self._files_of(shard, place))
            except Corrupt as reason:
                samples.append({})
                unreadable[sample] = str(reason)
        self.check(unreadable)
        return samples, unreadable

    def _files_of(self, shard: int, place: int) -> dict[str, bytes]:
        opened = self._open(shard)
        return {
            opened.extension(row): self._content(shard, opened, row) for row in opened.rows(place)
        }

    def input_file(self, sample: int) -> tuple[str, bytes]:
        """(extension, content) of a sample's input.  Raises ValueError if it is corrupt."""
        ((shard, place),) = self._places([sample])
        try:
            return self._input(shard, place)
        except Corrupt as reason:
            raise ValueError(str(reason)) from None

    def input_checksums(self) -> np.ndarray:
        """int64 [N]: one number for the size and crc32 of each sample's input, from the indexes.

        Equal contents have equal numbers.  -1 where a sample has no input, or several.
        """
        numbers = np.full(len(self), -1, np.int64)
        for shard, start in enumerate(self._shard_start[:-1].tolist()):
            rows = self._open(shard).input_rows()
            index = self._opened[shard].index
            if index is None:
                continue
            has_one = rows >= 0
            rows = rows[has_one]
            mixed = (index.size[rows].astype(np.int64) << 32) | index.crc[rows].astype(np.int64)
            numbers[start : start + len(has_one)][has_one] = mixed & MOST_POSITIVE
        return numbers

    def raw_bytes(self, ids: Ids) -> int:
        """Bytes that the samples' files take in a tar: contents and headers in whole blocks.

        Of shards that stream their share of the shard.
        """
        ids = np.asarray(ids, np.int64)
        shards = self.shard_of(ids)
        total = 0
        for shard in np.unique(shards).tolist():
            if shard in self._streams:  # by their share of it: it need not be fetched for that
                share = np.count_nonzero(shards == shard) / self._parts[shard].samples
                entry = self._parts[shard].shard.entry
                total += math.ceil((entry["bytes"] if entry else 0) * share)
                continue
            index = self._open(shard).index
            if index is None:
                continue
            places = ids[shards == shard] - self._shard_start[shard]
            blocks = np.concatenate([[0], np.cumsum(1 + (index.size + 511) // 512)])
            start = index.member_start
            total += int(512 * (blocks[start[places + 1]] - blocks[start[places]]).sum())
        return total

    def inputs(self, ids: Ids) -> np.ndarray:
        """Decoded inputs [n, *input_shape].  UserError if one cannot be read."""
        inputs, unreadable = self.read(ids)
        self._refuse(unreadable)
        return inputs

    def read(self, ids: Ids) -> tuple[np.ndarray, dict[int, str]]:
        """(inputs [n, *input_shape], {id: reason} of the unreadable ones).

        The rows of unreadable samples are arbitrary.  Under data.damage = strict one is a UserError
        that names shard, sample and reason.
        """
        inputs = np.empty((len(ids), *self.input_shape), self.input_dtype)
        return inputs, self.read_into(inputs, np.arange(len(ids)), ids)

    def read_into(self, inputs: np.ndarray, rows: np.ndarray, ids: Ids) -> dict[int, str]:
        """Like `read`, into `rows` (int64 [n]) of an array of the set's shape and dtype."""
        ids = np.asarray(ids, np.int64)
        shape, dtype = self._first_input()
        unreadable: dict[int, str] = {}
        for part in self._parts_of(ids):
            unreadable |= self._read_part(inputs, rows[part], ids[part], shape, dtype)
        self.check(unreadable)
        return unreadable

    def _parts_of(self, ids: np.ndarray) -> Iterator[np.ndarray | slice]:
        """Places of the ids that are read together: all, unless more shards stream than are held.

        Each shard is then read once, whatever the order of the ids, and the next ones are coming.
        """
        arrivals = self._arrivals
        if arrivals is None or arrivals.holds(np.unique(self.shard_of(ids)).tolist()):
            yield slice(None)
            return
        places = np.argsort(self.shard_of(ids), kind="stable")
        shards, begins = np.unique(self.shard_of(ids[places]), return_index=True)
        most, begins = self.data.stream_shards, [*begins.tolist(), len(ids)]
        for first in range(0, len(shards), most):
            behind = first + most
            now, ahead = shards[first:behind].tolist(), shards[behind : behind + most].tolist()
            arrivals.announce(Need(tuple(now), tuple(ahead)))
            yield places[begins[first] : begins[min(behind, len(shards))]]

    def _read_part(
        self,
        inputs: np.ndarray,
        rows: np.ndarray,
        ids: np.ndarray,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> dict[int, str]:
        unreadable: dict[int, str] = {}
        for row, sample, (shard, place) in zip(
            rows.tolist(), ids.tolist(), self._places(ids), strict=True
        ):
            try:
                inputs[row] = self._decode(shard, place, shape, dtype)
            except Corrupt as reason:
                unreadable[sample] = str(reason)
        return unreadable

    def check(self, unreadable: dict[int, str]) -> None:
        """Raises UserError for the first of `unreadable` under data.damage = strict."""
        if unreadable and self.data.damage == "strict":
            sample, reason = next(iter(unreadable.items()))
            raise UserError(
                f"{self.where(sample)}: {reason}; "
                'data.damage = "skip" leaves such samples out and counts them'
            )

    def _refuse(self, unreadable: dict[int, str]) -> None:
        for sample, reason in unreadable.items():
            raise UserError(f"{self.where(sample)}: {reason}")

    def _decode(
        self, shard: int, place: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray:
        extension, content = self._input(shard, place)
        try:
            array = decode(self._decoders[extension], content)
        except Exception as error:  # decoders, the user's too, raise what they like
            if is_the_machines(error):
                raise unread(self.where(int(self._shard_start[shard]) + place), error) from None
            reason = f"cannot be decoded: {type(error).__name__}: {error}"
            raise Corrupt(printable(reason.replace("\n", " "))) from None
        if array.shape == shape and array.dtype == dtype:
            return array
        if len(shape) == 3 == array.ndim and array.shape[0] == 1 and array.shape[1:] == shape[1:]:
            return array  # a gray picture among RGB ones: assignment repeats its channel
        raise Corrupt(
            f"is {array.dtype} {list(array.shape)}, the first sample {dtype} {list(shape)}; "
            "bring all to one size"
        )

    def _input(self, shard: int, place: int) -> tuple[str, bytes]:
        """(extension, content) of a sample's input."""
        opened = self._open(shard)
        row = opened.input_row(place)
        return opened.extension(row), self._content(shard, opened, row)

    def _content(self, shard: int, opened: OpenedShard, row: int) -> bytes:
        index = opened.index
        assert index is not None
        size = int(index.size[row])
        try:
            if shard not in self._descriptors:
                if len(self._descriptors) >= OPEN_FILES:
                    self._close()
                self._descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            content = os.pread(self._descriptors[shard], size, int(index.offset[row]))
        except OSError as error:
            if is_the_machines(error):
                raise unread(self.names[shard], error) from None
            raise Corrupt(f"cannot be read: {error.strerror}") from None
        if len(content) != size or zlib.crc32(content) != index.crc[row]:
            raise Corrupt(
                f"its member .{opened.extension(row)} has changed since the shard was indexed "
                "(checksum)"
            )
        return content

    def _first_input(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of the first readable input.  UserError if the first 100 are not."""
        if self._first is not None:
            return self._first
        reason = ""
        for sample in range(min(len(self), 100)):
            ((shard, place),) = self._places([sample])
            try:
                if self._arrivals is not None and shard in self._streams:
                    # The first epoch may read it late: it would be fetched twice.
                    self._arrivals.have(shard, keep=True)
                extension, content = self._input(shard, place)
                array = decode(self._decoders[extension], content)
            except UserError:
                raise
            except Exception as error:  # as in _decode
                if is_the_machines(error):
                    raise unread(self.where(sample), error) from None
                reason = reason or f"{self.where(sample)}: cannot be decoded: {error}"
                if self.data.damage == "strict":
                    break
            else:
                self._first = array.shape, array.dtype
                return self._first
        raise UserError(reason)

    def _close(self) -> None:
        for file in self._descriptors.values():
            os.close(file)
        self._descriptors.clear()

    def _close_shard(self, shard: int) -> None:
        """Let its files go: an open one takes room on the disk after it is evicted."""
        self._opened.pop(shard, None)
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self):
        if hasattr(self, "_descriptors"):
            self._close()
        if self._arrivals is not None:
            self._arrivals.end()

    def __getstate__(self) -> dict:
        state = self.__dict__ | {"_descriptors": {}, "_opened": {}, "_arrivals": None}
        if self._mapped_labels is not None:
            state["labels"] = None
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self._streams:
            self._forget_open()
        if self._mapped_labels is not None:
            path, first, last = self._mapped_labels
            self.labels = map_labels(path)[first:last]


def _stretch(parts: Sequence[ShardPart]) -> tuple[Path, int, int] | None:
    """(path, first, last) where the parts' labels are a stretch of one mapped array, else None."""
    firsts, end, paths = [], 0, set()
    for part in parts:
        if part.labels is not None or part.shard.labels is None:
            return None
        if firsts and part.shard.first != end:
            return None
        firsts.append(part.shard.first)
        paths.add(part.shard.labels.path)
        end = part.shard.first + part.samples
    return (paths.pop(), firsts[0], end) if len(paths) == 1 else None


def _joined_labels(parts: Sequence[ShardPart], stretch: tuple[Path, int, int] | None) -> np.ndarray:
    """int32 [N]: the labels of all parts. Mapped where they are a stretch of one array."""
    if stretch is not None:
        labels = parts[0].shard.labels
        assert labels is not None
        return labels.classes[stretch[1] : stretch[2]]
    return np.concatenate([part.own_labels() for part in parts]).astype(DTYPE, copy=False)


def _open_indexes() -> int:
    """How many indexes may be mapped at once: each takes a file descriptor."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(soft, MOST_FILES) // 4)


def open_shards(pattern: str, data: Data, split: str) -> ShardSet:
    """Open the samples of one split.

    Parameters
    ----------
    pattern : str
        Tars with braces or globs, a directory of shards, URLs that webdataset opens. Several are
        joined by `::`.
    data : Data
        The config's section [data].
    split : str
        train, val or test: which shards of a directory are meant.

    Returns
    -------
    ShardSet

    Raises
    ------
    UserError
        In one line: nothing matches, a shard is absent or empty, a label is no class, a manifest
        disagrees.  Under data.damage = strict also any corruption. Under skip, corruption that
        cannot be counted or exceeds data.damage_share.
    """
    shards = expand(pattern, data, split)
    class_names = _class_names(shards, data, split)
    label_sets = {kind: LabelSet(class_names, kind) for kind in get_args(Kind)}
    corruption: list[Corruption] = []
    parts: list[ShardPart] = []
    for shard in shards:
        part = vouched(shard, data)
        if part is None:
            part = read_shard(shard, label_sets[label_kind(shard)], data, corruption)
        if part is not None:
            parts.append(part)
    num_samples = sum(part.samples for part in parts)
    check_corruption(corruption, num_samples, data)
    if not num_samples:
        raise UserError(f"{pattern}: the {split} shards hold no samples")
    return ShardSet(split, parts, class_names, corruption, data)


def _class_names(shards: list[Shard], data: Data, split: str) -> list[str]:
    names = _manifest_classes(shards)
    if names is None:
        if not data.label:
            return []
        if data.classes is None:
            directory = shards[0].directory or "DIRECTORY"
            raise UserError(
                f"{shards[0].name} has no manifest; set data.classes, "
                f"or make one with `referral shards index {shlex.quote(str(directory))}`"
            )
        if reason := exceeds("data.classes", data.classes, CLASSES, "classes"):
            raise UserError(
                f"{reason}; give the shards a manifest, which names those that there are"
            )
        return [str(number) for number in range(data.classes)]
    if data.classes is not None and data.classes != len(names):
        raise UserError(
            f"data.classes = {data.classes}, but the manifest of the {split} shards "
            f"has {len(names)} classes"
        )
    return names


def _manifest_classes(shards: list[Shard]) -> list[str] | None:
    """The class names of the shards' manifests, which must agree. None where there is none."""
    manifests = {shard.directory: shard.manifest for shard in shards if shard.manifest}
    names = None
    for directory, manifest in manifests.items():
        if names is not None and manifest["classes"] != names:
            raise UserError(
                f"{directory} and {next(iter(manifests))} have different classes; "
                "one split needs one label set"
            )
        names = manifest["classes"]
    return names


def _recorded_rules(shards: Sequence[Shard], split: str) -> PictureRules | None:
    """The rules of pictures in the shards' manifests, which must agree."""
    manifests = {shard.directory: shard.manifest for shard in shards if shard.manifest}
    rules = {directory: recorded_rules(each) for directory, each in manifests.items()}
    return agreed_rules(rules, f"data.{split}")
