"""A set of shards as one array-like: labels, keys, raw files and decoded inputs of any samples.

Opening finds structural corruption: each tar is checked once against its manifest, its index and
itself.  Reading checks every file's checksum, so that no garbled byte reaches a decoder unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from networks.pictures import PictureRules
from pipeline.config import Data, UserError

from .choices import DECODERS, PICTURES
from .decoding import (
    decode,
    decoder_table,
    find_decoder,
    picture_rules,
    recorded_name,
    with_rules,
)
from .labels import Kind, LabelSet
from .patterns import Shard, expand
from .tars import TarIndex, file_sha256, intact, load_index, save_index, scan_tar
from .writing import ShardWriter, agreed_rules, recorded_rules, write_manifest

__all__ = ["Corruption", "ShardSet", "ShardWriter", "open_shards", "write_manifest"]

OPEN_FILES = 256
UNLABELLED = -1  # the label of every sample where data.label = ""

Ids = Sequence[int] | np.ndarray  # indices of samples, int64 [n]


@dataclass(frozen=True)
class Corruption:
    """Something unreadable: where, why, and how many samples are lost by it."""

    shard: str
    member: str
    reason: str
    samples: int = 1

    def __str__(self) -> str:
        if not self.member:
            return f"{self.shard}: {self.reason}"
        return f"{self.shard}: {self.member} {self.reason}"


class ShardSet:
    """Samples 0 .. num_samples - 1 of one split, in the order of the shards.

    Attributes
    ----------
    split : str
    labels : int64 [N]
        UNLABELLED throughout where data.label is "".
    class_names : list of C str
    class_counts : int64 [C]
    corruption : list of Corruption
        What opening left out; nothing under data.damage = strict.
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
        The rules that the inputs are read by; None where they are no pictures, where a decoder of
        the user's own reads them, and where nothing is recorded.
    decoder_names : dict
        {extension: name} of the decoders that read anything but pictures and arrays.
    fingerprint : str
        A hash of the shards' contents, the classes and what is read of them.
    """

    def __init__(
        self,
        split: str,
        shards: Sequence[Shard],
        indexes: Sequence[TarIndex],
        labels: Sequence[np.ndarray],
        class_names: Iterable[str],
        corruption: Iterable[Corruption],
        data: Data,
    ):
        self.split = split
        self.data = data
        self.corruption = list(corruption)
        self.class_names = list(class_names)
        self.labels = np.concatenate(labels)
        self.paths = [shard.path for shard in shards]
        self.names = [shard.name for shard in shards]
        self._keys = [index.keys for index in indexes]
        self._shard_start = np.cumsum([0] + [len(index) for index in indexes])
        self._join_indexes(indexes)
        self.recorded = _recorded_rules(shards, split)
        self.fingerprint = self._fingerprint(indexes, shards)
        self._find_decoders(data)
        self._descriptors: dict[int, int] = {}
        self._first: tuple[tuple[int, ...], np.dtype] | None = None

    def _find_decoders(self, data: Data) -> None:
        """One decoder for each kind of input, and what is said of them."""
        table = decoder_table(data.decoders)
        used = np.unique(self._extension[self._input_row]).tolist()
        self.input_extensions = [self.extensions[number] for number in used]
        found = {number: find_decoder(table, self.extensions[number]) for number in used}
        self._decoders = {number: with_rules(each, self.recorded) for number, each in found.items()}
        rules = {picture_rules(decoder, self.recorded) for decoder in found.values()}
        self.pictures: PictureRules | None = rules.pop() if len(rules) == 1 else None
        self.decoder_names: dict[str, str] = {}
        for extension, decoder in zip(self.input_extensions, found.values(), strict=True):
            last = extension.rpartition(".")[2]
            named = DECODERS | data.decoders
            name = recorded_name(decoder, named.get(extension) or named.get(last, ""))
            if name is not None:
                self.decoder_names[last] = name

    def _join_indexes(self, indexes: Sequence[TarIndex]) -> None:
        """One row for each file in any shard; sample i has rows _start[i] : _start[i + 1]."""
        extensions = np.concatenate([index.extensions for index in indexes])
        self.extensions: list[str] = np.unique(extensions).tolist()
        number_of = {extension: number for number, extension in enumerate(self.extensions)}
        row_start = np.cumsum([0] + [len(index.offset) for index in indexes])
        starts, extension_numbers, input_rows = [], [], []
        for index, first in zip(indexes, row_start[:-1], strict=True):
            numbers = np.array([number_of[str(extension)] for extension in index.extensions])
            starts.append(index.member_start[:-1] + first)
            extension_numbers.append(numbers.astype(np.int16)[index.member_extension])
            input_rows.append(_input_rows(index, self.data) + first)
        self._start = np.concatenate([*starts, row_start[-1:]])
        self._extension = np.concatenate(extension_numbers)
        self._input_row = np.concatenate(input_rows)
        self._offset = np.concatenate([index.offset for index in indexes])
        self._size = np.concatenate([index.size for index in indexes])
        self._crc = np.concatenate([index.crc for index in indexes])

    def _fingerprint(self, indexes: Sequence[TarIndex], shards: Sequence[Shard]) -> str:
        contents = [
            [os.path.basename(name), index.sha256, len(index)]
            for name, index in zip(self.names, indexes, strict=True)
        ]
        identity = [contents, self.data.label, self.data.input, self.class_names]
        if any("inputs" in (shard.manifest or {}) for shard in shards) and self.recorded:
            identity.append(self.recorded.as_json())
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _take_over(self, other: ShardSet) -> None:
        """Become another set's samples, with no open files: for the constructors of subclasses."""
        self.__dict__.update(other.__dict__ | {"_descriptors": {}})

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
        return np.bincount(self.labels[self.labels >= 0], minlength=self.num_classes)

    @property
    def lost(self) -> int:
        """Samples that opening left out."""
        return sum(corruption.samples for corruption in self.corruption)

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
        """The samples' keys as webdataset gives them."""
        keys = []
        for sample, shard in zip(np.asarray(ids), self.shard_of(ids), strict=True):
            key = self._keys[shard][sample - self._shard_start[shard]]
            keys.append(key.decode("utf-8", "surrogateescape"))
        return keys

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        shard = int(self.shard_of([sample])[0])
        return f"{self.names[shard]}: sample {self.keys([sample])[0]}"

    def raw(self, ids: Ids) -> list[dict[str, bytes]]:
        """Every file of the samples, {extension: content}.  UserError if one is corrupt."""
        samples, unreadable = self.read_raw(ids)
        self._refuse(unreadable)
        return samples

    def read_raw(self, ids: Ids) -> tuple[list[dict[str, bytes]], dict[int, str]]:
        """As `read`: (every file of the samples, {id: reason} of the unreadable ones).

        An unreadable sample has no files, {}.
        """
        samples: list[dict[str, bytes]] = []
        unreadable: dict[int, str] = {}
        shards = self.shard_of(ids).tolist()
        for sample, shard in zip(np.asarray(ids).tolist(), shards, strict=True):
            try:
                samples.append(self._files_of(sample, shard))
            except _Corrupt as reason:
                samples.append({})
                unreadable[sample] = str(reason)
        self.check(unreadable)
        return samples, unreadable

    def _files_of(self, sample: int, shard: int) -> dict[str, bytes]:
        rows = range(self._start[sample], self._start[sample + 1])
        return {self.extensions[self._extension[row]]: self._content(shard, row) for row in rows}

    def input_file(self, sample: int) -> tuple[str, bytes]:
        """(extension, content) of a sample's input.  Raises ValueError if it is corrupt."""
        row = int(self._input_row[sample])
        try:
            content = self._content(int(self.shard_of([sample])[0]), row)
        except _Corrupt as reason:
            raise ValueError(str(reason)) from None
        return self.extensions[self._extension[row]], content

    def raw_bytes(self, ids: Ids) -> int:
        """Bytes that the samples' files take in a tar: contents and headers in whole blocks."""
        ids = np.asarray(ids)
        blocks = np.concatenate([[0], np.cumsum(1 + (self._size + 511) // 512)])
        return int(512 * (blocks[self._start[ids + 1]] - blocks[self._start[ids]]).sum())

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
        """As `read`, into `rows` (int64 [n]) of an array of the set's shape and dtype."""
        ids = np.asarray(ids, np.int64)
        shape, dtype = self._first_input()
        unreadable: dict[int, str] = {}
        shards, file_rows = self.shard_of(ids).tolist(), self._input_row[ids].tolist()
        for row, sample, shard, file_row in zip(
            rows.tolist(), ids.tolist(), shards, file_rows, strict=True
        ):
            try:
                inputs[row] = self._decode(shard, file_row, shape, dtype)
            except _Corrupt as reason:
                unreadable[sample] = str(reason)
        self.check(unreadable)
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

    def _decode(self, shard: int, row: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        content = self._content(shard, row)
        try:
            array = decode(self._decoders[int(self._extension[row])], content)
        except Exception as error:  # decoders, the user's too, raise what they like
            reason = f"cannot be decoded: {type(error).__name__}: {error}"
            raise _Corrupt(reason.replace("\n", " ")) from None
        if array.shape == shape and array.dtype == dtype:
            return array
        if len(shape) == 3 == array.ndim and array.shape[0] == 1 and array.shape[1:] == shape[1:]:
            return array  # a gray picture among RGB ones: assignment repeats its channel
        raise _Corrupt(
            f"is {array.dtype} {list(array.shape)}, the first sample {dtype} {list(shape)}; "
            "bring all to one size"
        )

    def _content(self, shard: int, row: int) -> bytes:
        size = int(self._size[row])
        try:
            if shard not in self._descriptors:
                if len(self._descriptors) >= OPEN_FILES:
                    self._close()
                self._descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            content = os.pread(self._descriptors[shard], size, int(self._offset[row]))
        except OSError as error:
            raise _Corrupt(f"cannot be read: {error.strerror}") from None
        if len(content) != size or zlib.crc32(content) != self._crc[row]:
            extension = self.extensions[self._extension[row]]
            raise _Corrupt(
                f"its member .{extension} has changed since the shard was indexed (checksum)"
            )
        return content

    def _first_input(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of the first readable input.  UserError if the first 100 are not."""
        if self._first is not None:
            return self._first
        reason = ""
        for sample in range(min(len(self), 100)):
            row = int(self._input_row[sample])
            try:
                content = self._content(int(self.shard_of([sample])[0]), row)
                array = decode(self._decoders[int(self._extension[row])], content)
            except Exception as error:  # as in _decode
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

    def __del__(self):
        if hasattr(self, "_descriptors"):
            self._close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptors": {}}


class _Corrupt(Exception):
    pass


def open_shards(pattern: str, data: Data, split: str) -> ShardSet:
    """Open the samples of one split.

    Parameters
    ----------
    pattern : str
        Tars with braces or globs, a directory of shards, URLs that webdataset opens; several are
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
        disagrees.  Under data.damage = strict also any corruption; under skip, corruption that
        cannot be counted or exceeds data.damage_share.
    """
    shards = expand(pattern, data, split)
    class_names = _class_names(shards, data, split)
    label_sets = {kind: LabelSet(class_names, kind) for kind in get_args(Kind)}
    corruption: list[Corruption] = []
    indexes: list[TarIndex] = []
    labels: list[np.ndarray] = []
    kept: list[Shard] = []
    for shard in shards:
        index = _open_shard(shard, data, corruption)
        if index is None:
            continue
        label_set = label_sets[label_kind(shard)]
        index, shard_labels = label_samples(shard, index, label_set, data, corruption)
        _check_counts(shard, shard_labels, class_names, corruption)
        indexes.append(index)
        labels.append(shard_labels)
        kept.append(shard)
    num_samples = sum(map(len, indexes))
    _check_corruption(corruption, num_samples, data)
    if not num_samples:
        raise UserError(f"{pattern}: the {split} shards hold no samples")
    return ShardSet(split, kept, indexes, labels, class_names, corruption, data)


def _class_names(shards: list[Shard], data: Data, split: str) -> list[str]:
    names = _manifest_classes(shards)
    if names is None:
        if not data.label:
            return []
        if data.classes is None:
            directory = shards[0].directory or "DIRECTORY"
            raise UserError(
                f"{shards[0].name} has no manifest; set data.classes, "
                f"or make one with `referral shards index {directory}`"
            )
        return [str(number) for number in range(data.classes)]
    if data.classes is not None and data.classes != len(names):
        raise UserError(
            f"data.classes = {data.classes}, but the manifest of the {split} shards "
            f"has {len(names)} classes"
        )
    return names


def _manifest_classes(shards: list[Shard]) -> list[str] | None:
    """The class names of the shards' manifests, which must agree; None where there is none."""
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


def _open_shard(shard: Shard, data: Data, corruption: list[Corruption]) -> TarIndex | None:
    """The index of the shard's intact samples; the others go to `corruption`.

    None if nothing of the shard is left.
    """
    if not os.path.exists(shard.path):
        if shard.entry is None or data.damage == "strict":
            raise UserError(f"{shard.name}: no such shard")
        corruption.append(Corruption(shard.name, "", "is absent", shard.entry["samples"]))
        return None
    try:
        stored, unchanged = load_index(shard.path) or (None, False)
        index = _stored_index(shard, stored, unchanged, data, corruption)
        if index is None:
            index = _scanned_index(shard, stored, data, corruption)
        return index
    except OSError as error:
        raise UserError(f"{shard.name}: cannot be read: {error.strerror or error}") from None


def expected_sha256(shard: Shard, stored: TarIndex | None) -> str | None:
    """What the manifest says of the whole file, or else the index beside it."""
    if shard.entry:
        return shard.entry["sha256"]
    return stored.sha256 if stored else None


def _stored_index(
    shard: Shard,
    stored: TarIndex | None,
    unchanged: bool,
    data: Data,
    corruption: list[Corruption],
) -> TarIndex | None:
    """The index kept beside the shard, where it may be used."""
    expected = expected_sha256(shard, stored)
    if stored is None or stored.label != data.label or stored.sha256 != expected:
        return None
    if unchanged:
        return stored
    if file_sha256(shard.path) == expected:
        save_index(shard.path, stored)
        return stored
    if data.damage == "strict":
        return None
    # The index was made when the shard was whole: its checksums say which samples still are.
    good = intact(shard.path, stored)
    for key in stored.keys.take(~good):
        corruption.append(Corruption(shard.name, key.decode(), "has changed (checksum)"))
    return stored.take(good)


def _scanned_index(
    shard: Shard, stored: TarIndex | None, data: Data, corruption: list[Corruption]
) -> TarIndex | None:
    """The index made by reading the whole shard; kept beside it where nothing is corrupt."""
    index = scan_tar(shard.path, data.label)
    found = scanned_corruption(shard.name, index)
    expected = expected_sha256(shard, stored)
    if expected and index.sha256 != expected:
        if data.damage == "strict" and found:
            raise UserError(refusal(found))
        reason = "is not the shard that was indexed (sha256)"
        if data.damage == "strict":
            raise UserError(
                f"{shard.name}: {reason}; fetch it again, or run `referral shards index` on it "
                "if the change was meant"
            )
        corruption.append(Corruption(shard.name, "", reason, _indexed_samples(shard, stored)))
        return None
    if not index.countable and data.damage == "skip":
        unreadable = next(item for item in found if not item.member)
        raise UserError(
            f"{unreadable}; without a manifest the loss cannot be counted: "
            "`referral shards from-webdataset` saves the rest"
        )
    corruption.extend(found)
    if not found:
        save_index(shard.path, index)
        if not len(index):
            raise UserError(f"{shard.name}: the shard is empty")
    return index


def scanned_corruption(name: str, index: TarIndex) -> list[Corruption]:
    """What `scan_tar` found unreadable in the shard called `name`."""
    return [
        Corruption(name, key, reason)
        for key, reason in zip(index.damaged.decoded(), index.reasons.decoded(), strict=True)
    ]


def _indexed_samples(shard: Shard, stored: TarIndex | None) -> int:
    if shard.entry:
        return shard.entry["samples"]
    assert stored is not None
    return len(stored)


def label_kind(shard: Shard) -> Kind:
    """What the labels of a shard are, by its manifest; the config's data.classes means indices."""
    if shard.manifest is None:
        return "indices"
    return (shard.entry or {}).get("labels") or "earlier"


def label_samples(
    shard: Shard,
    index: TarIndex,
    label_set: LabelSet,
    data: Data,
    corruption: list[Corruption],
) -> tuple[TarIndex, np.ndarray]:
    """(index, int64 labels) of the samples that have an input and a valid label."""
    has_input = _input_rows(index, data) >= 0
    reasons: dict[int, str] = {}
    if data.label:
        classes, reasons = label_set.read(list(index.label_texts), data.label)
        labels = classes[index.label_number]
        kept = (labels >= 0) & has_input
    else:
        labels = np.full(len(index), UNLABELLED, np.int64)
        kept = has_input
    for sample in np.flatnonzero(~kept).tolist():
        key = index.keys[sample].decode("utf-8", "replace")
        if has_input[sample]:
            reason = reasons[int(index.label_number[sample])]
        elif data.label and data.input:
            reason = f"has no member .{data.input}"
        else:
            reason = "has not one input member"
        corruption.append(Corruption(shard.name, key, reason))
    if kept.all():
        return index, labels
    return index.take(kept), labels[kept]


def _input_rows(index: TarIndex, data: Data) -> np.ndarray:
    """int64 [n]: the row of each sample's input; -1 where there is none, or several to choose."""
    extensions = [str(extension) for extension in index.extensions]
    if data.input:
        is_input = [extension == data.input.lower() for extension in extensions]
    else:
        # Unlabelled shards may carry labels that are not to be read.
        label = data.label.partition(":")[0] or "cls"
        is_input = [extension != label for extension in extensions]
    rows = np.flatnonzero(np.array(is_input, bool)[index.member_extension])
    samples = np.searchsorted(index.member_start, rows, side="right") - 1
    input_rows = np.full(len(index), -1, np.int64)
    input_rows[samples] = rows
    several = np.bincount(samples, minlength=len(index)) > 1
    if several.sum() * 2 > len(index):
        inputs = [e for e, chosen in zip(extensions, is_input, strict=True) if chosen]
        pictures = [extension for extension in inputs if extension in PICTURES]
        raise UserError(
            f"samples have the members {', '.join(inputs)}; say which is the input with data.input "
            f"(--input of `referral shards`), e.g. {(pictures or inputs)[0]}"
        )
    input_rows[several] = -1
    return input_rows


def _check_counts(
    shard: Shard, labels: np.ndarray, class_names: list[str], corruption: list[Corruption]
) -> None:
    """Compare with the manifest's counts, unless corruption explains a difference."""
    if shard.entry is None or any(item.shard == shard.name for item in corruption):
        return
    samples, class_counts = shard.entry["samples"], shard.entry["class_counts"]
    if (labels == UNLABELLED).all() and len(labels) == samples:
        return
    classes, numbers = np.unique(labels, return_counts=True)
    counts = {class_names[c]: int(n) for c, n in zip(classes, numbers, strict=True)}
    if len(labels) != samples or counts != class_counts:
        raise UserError(
            f"{shard.name}: manifest.json says {samples} samples of {len(class_counts)} classes, "
            f"it has {len(labels)} of {len(counts)}; "
            f"`referral shards index {shard.directory}` makes it anew"
        )


def _check_corruption(corruption: list[Corruption], intact_samples: int, data: Data) -> None:
    if not corruption:
        return
    if data.damage == "strict":
        raise UserError(refusal(corruption))
    lost = sum(item.samples for item in corruption)
    check_share(lost, intact_samples + lost, data, corruption[0])


def check_share(lost: int, samples: int, data: Data, example: object) -> None:
    """UserError if more than data.damage_share of the samples are lost."""
    if lost > data.damage_share * samples:
        raise UserError(
            f"{lost} of {samples} samples are corrupt, above "
            f"data.damage_share = {data.damage_share}; e.g. {example}"
        )


def refusal(corruption: list[Corruption]) -> str:
    """The message about corruption under data.damage = strict."""
    more = ""
    if len(corruption) > 1:
        more = f" (and {len(corruption) - 1} more)"
    return (
        f"{corruption[0]}{more}; `referral shards validate` lists all, "
        'data.damage = "skip" leaves them out and counts them'
    )
