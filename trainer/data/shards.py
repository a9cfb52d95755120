"""A set of shards as one array-like: labels, keys, raw members and decoded inputs of any samples, by number.

Opening finds structural damage: each tar is checked once against its manifest, its index and itself.  Reading checks
every member's checksum, so that no garbled byte reaches a decoder unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass

import numpy as np

from pipeline.config import Data, UserError

from .decoding import decode, decoder_table, find_decoder
from .patterns import Shard, expand
from .tars import TarIndex, file_sha256, intact, load_index, save_index, scan_tar
from .writing import ShardWriter, write_manifest

__all__ = ["Damage", "ShardSet", "ShardWriter", "open_shards", "write_manifest"]

OPEN_FILES = 256
UNLABELLED = -1  # the label of every sample where data.label = ""


@dataclass(frozen=True)
class Damage:
    """Something unreadable: where, why, and how many samples are lost by it."""

    shard: str
    member: str
    reason: str
    samples: int = 1

    def __str__(self) -> str:
        return f"{self.shard}: {self.member + ' ' if self.member else ''}{self.reason}"


class ShardSet:
    """Samples 0 .. num_samples - 1 of one split, in the order of the shards.

    labels: int64[N], UNLABELLED throughout where data.label is ""; class_names: C strings; class_counts: int64[C].
    damage: what opening left out (nothing under data.damage = strict).
    """

    def __init__(
        self,
        split: str,
        shards: list[Shard],
        indexes: list[TarIndex],
        labels,
        class_names,
        damage,
        data: Data,
    ):
        self.split, self.data, self.damage = split, data, list(damage)
        self.class_names = list(class_names)
        self.labels = np.concatenate(labels)
        self.paths = [shard.path for shard in shards]
        self.names = [shard.name for shard in shards]
        self.extensions = sorted(
            {str(extension) for index in indexes for extension in index.extensions}
        )
        numbers = {extension: number for number, extension in enumerate(self.extensions)}
        self._shard_start = np.cumsum([0] + [len(index) for index in indexes])
        self._keys = [index.keys for index in indexes]
        row_start = np.cumsum([0] + [len(index.offset) for index in indexes])
        self._start = np.concatenate(
            [
                index.member_start[:-1] + first
                for index, first in zip(indexes, row_start, strict=False)
            ]
            + [row_start[-1:]]
        )
        self._extension = np.concatenate(
            [
                np.array([numbers[str(extension)] for extension in index.extensions], np.int16)[
                    index.member_extension
                ]
                for index in indexes
            ]
        )
        self._offset = np.concatenate([index.offset for index in indexes])
        self._size = np.concatenate([index.size for index in indexes])
        self._crc = np.concatenate([index.crc for index in indexes])
        self._input_row = np.concatenate(
            [
                _input_rows(index, data) + first
                for index, first in zip(indexes, row_start, strict=False)
            ]
        )
        facts = [
            [os.path.basename(shard.name), index.sha256, len(index)]
            for shard, index in zip(shards, indexes, strict=True)
        ]
        identity = json.dumps([facts, data.label, data.input, self.class_names])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        table = decoder_table(data.decoders)
        used = np.unique(self._extension[self._input_row])
        self._decoders = {
            int(number): find_decoder(table, self.extensions[number]) for number in used
        }
        self.input_extensions = [self.extensions[number] for number in used]
        self._files: dict[int, int] = {}
        self._shape: tuple[tuple[int, ...], np.dtype] | None = None

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    __len__ = num_samples.fget

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_counts(self) -> np.ndarray:
        return np.bincount(self.labels[self.labels >= 0], minlength=self.num_classes)

    @property
    def lost(self) -> int:
        """Samples that opening left out."""
        return sum(damage.samples for damage in self.damage)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._first_input()[0]

    @property
    def input_dtype(self) -> np.dtype:
        return self._first_input()[1]

    def shard_of(self, ids) -> np.ndarray:
        return np.searchsorted(self._shard_start, ids, side="right") - 1

    def keys(self, ids) -> list[str]:
        """The samples' keys as webdataset gives them."""
        ids = np.asarray(ids)
        places = zip(self.shard_of(ids), ids, strict=True)
        return [
            self._keys[s][i - self._shard_start[s]].decode("utf-8", "surrogateescape")
            for s, i in places
        ]

    def raw(self, ids) -> list[dict[str, bytes]]:
        """Every member of the samples, {extension: bytes}.  UserError if one is damaged."""
        samples, unreadable = self.read_raw(ids)
        for sample, reason in unreadable.items():
            raise UserError(f"{self.where(sample)}: {reason}")
        return samples

    def read_raw(self, ids) -> tuple[list[dict[str, bytes]], dict[int, str]]:
        """As `read`: (every member of the samples, {id: reason} of the unreadable ones, whose members are {})."""
        samples, unreadable = [], {}
        for sample, shard in zip(
            np.asarray(ids).tolist(), self.shard_of(ids).tolist(), strict=True
        ):
            rows = range(self._start[sample], self._start[sample + 1])
            try:
                samples.append(
                    {
                        self.extensions[self._extension[row]]: self._member(shard, row)
                        for row in rows
                    }
                )
            except _Damaged as damage:
                samples.append({})
                unreadable[sample] = str(damage)
        self.check(unreadable)
        return samples, unreadable

    def raw_bytes(self, ids) -> int:
        """Bytes that the samples' members take in a tar: contents and headers in whole blocks."""
        ids = np.asarray(ids)
        blocks = np.concatenate([[0], np.cumsum(1 + (self._size + 511) // 512)])
        return int(512 * (blocks[self._start[ids + 1]] - blocks[self._start[ids]]).sum())

    def where(self, sample: int) -> str:
        return f"{self.names[int(self.shard_of(sample))]}: sample {self.keys([sample])[0]}"

    def inputs(self, ids) -> np.ndarray:
        """Decoded inputs [n, *input_shape].  UserError if one cannot be read."""
        inputs, unreadable = self.read(ids)
        for sample, reason in unreadable.items():
            raise UserError(f"{self.where(sample)}: {reason}")
        return inputs

    def read(self, ids) -> tuple[np.ndarray, dict[int, str]]:
        """(inputs [n, *input_shape], {id: reason} of the unreadable ones, whose rows are arbitrary).

        Under data.damage = strict an unreadable sample is a UserError that names shard, sample and reason.
        """
        inputs = np.empty((len(ids), *self.input_shape), self.input_dtype)
        return inputs, self.read_into(inputs, np.arange(len(ids)), ids)

    def read_into(self, inputs: np.ndarray, places, ids) -> dict[int, str]:
        """As `read`, into rows `places` (int64[n]) of an array of the set's shape and dtype."""
        ids = np.asarray(ids, np.int64)
        shape, dtype = self._first_input()
        unreadable: dict[int, str] = {}
        shards, rows = self.shard_of(ids).tolist(), self._input_row[ids].tolist()
        for place, sample, shard, row in zip(
            places.tolist(), ids.tolist(), shards, rows, strict=True
        ):
            try:
                inputs[place] = self._decode(shard, row, shape, dtype)
            except _Damaged as damage:
                unreadable[sample] = str(damage)
        self.check(unreadable)
        return unreadable

    def check(self, unreadable: dict[int, str]) -> None:
        """Raises UserError for the first of `unreadable` ({id: reason}) under data.damage = strict."""
        if unreadable and self.data.damage == "strict":
            sample, reason = next(iter(unreadable.items()))
            raise UserError(
                f'{self.where(sample)}: {reason}; data.damage = "skip" leaves such samples out and counts them'
            )

    def _decode(self, shard: int, row: int, shape, dtype) -> np.ndarray:
        content = self._member(shard, row)
        try:
            array = decode(self._decoders[int(self._extension[row])], content)
        except (
            Exception
        ) as mistake:  # decoders, the user's too, raise what they like about bytes they do not know
            raise _Damaged(
                f"cannot be decoded: {type(mistake).__name__}: {mistake}".replace("\n", " ")
            ) from None
        if array.shape == shape and array.dtype == dtype:
            return array
        if len(shape) == 3 == array.ndim and array.shape[0] == 1 and array.shape[1:] == shape[1:]:
            return array  # a gray picture among RGB ones: assignment repeats its channel
        raise _Damaged(
            f"is {array.dtype} {list(array.shape)}, the first sample {dtype} {list(shape)}; bring all to one size"
        )

    def _member(self, shard: int, row: int) -> bytes:
        size = int(self._size[row])
        try:
            if shard not in self._files:
                if len(self._files) >= OPEN_FILES:
                    self._close()
                self._files[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            content = os.pread(self._files[shard], size, int(self._offset[row]))
        except OSError as mistake:
            raise _Damaged(f"cannot be read: {mistake.strerror}") from None
        if len(content) != size or zlib.crc32(content) != self._crc[row]:
            extension = self.extensions[self._extension[row]]
            raise _Damaged(
                f"its member .{extension} has changed since the shard was indexed (checksum)"
            )
        return content

    def _first_input(self):
        if self._shape is None:
            reason = ""
            for sample in range(min(len(self), 100)):
                row = int(self._input_row[sample])
                try:
                    content = self._member(int(self.shard_of(sample)), row)
                    array = decode(self._decoders[int(self._extension[row])], content)
                    self._shape = array.shape, array.dtype
                    break
                except Exception as mistake:  # as in _decode
                    reason = reason or f"{self.where(sample)}: cannot be decoded: {mistake}"
                    if self.data.damage == "strict":
                        break
            if self._shape is None:
                raise UserError(reason)
        return self._shape

    def _close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def __del__(self):
        if hasattr(self, "_files"):
            self._close()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}


class _Damaged(Exception):
    pass


def open_shards(pattern: str, data: Data, split: str) -> ShardSet:
    """The samples of one split.

    pattern: tars with braces or globs, a directory of shards, URLs that webdataset opens, several joined by `::`.
    split: train, val or test; says which shards of a directory are meant.
    Raises UserError, one line: nothing matches, a shard is absent or empty, a label is no class, a manifest disagrees;
    under data.damage = strict any damage, under skip damage that cannot be counted or exceeds data.damage_share.
    """
    shards = expand(pattern, data, split)
    class_names = _class_names(shards, data, split)
    damage: list[Damage] = []
    indexes, labels, kept = [], [], []
    for shard in shards:
        index = _open_shard(shard, data, damage)
        if index is None:
            continue
        index, shard_labels = _label(shard, index, class_names, data, damage)
        _check_counts(shard, shard_labels, class_names, damage)
        indexes.append(index), labels.append(shard_labels), kept.append(shard)
    _judge(damage, sum(map(len, indexes)), data)
    if not sum(map(len, indexes)):
        raise UserError(f"{pattern}: the {split} shards hold no samples")
    return ShardSet(split, kept, indexes, labels, class_names, damage, data)


def _class_names(shards: list[Shard], data: Data, split: str) -> list[str]:
    manifests = {shard.directory: shard.manifest for shard in shards if shard.manifest}
    names = None
    for directory, manifest in manifests.items():
        if names is not None and manifest["classes"] != names:
            raise UserError(
                f"{directory} and {next(iter(manifests))} have different classes; one split needs one label set"
            )
        names = manifest["classes"]
    if names is None and not data.label:
        return []
    if names is None and data.classes is None:
        directory = shards[0].directory or "DIRECTORY"
        raise UserError(
            f"{shards[0].name} has no manifest; set data.classes, or make one with `referral shards index {directory}`"
        )
    if names is not None and data.classes is not None and data.classes != len(names):
        raise UserError(
            f"data.classes = {data.classes}, but the manifest of the {split} shards has {len(names)} classes"
        )
    return names if names is not None else [str(number) for number in range(data.classes)]


def _open_shard(shard: Shard, data: Data, damage: list[Damage]) -> TarIndex | None:
    """The index of the shard's intact samples; the others go to `damage`.  None if nothing of the shard is left."""
    if not os.path.exists(shard.path):
        if shard.facts is None or data.damage == "strict":
            raise UserError(f"{shard.name}: no such shard")
        damage.append(Damage(shard.name, "", "is absent", shard.facts["samples"]))
        return None
    try:
        return _check_shard(shard, data, damage)
    except OSError as mistake:
        raise UserError(f"{shard.name}: cannot be read: {mistake.strerror or mistake}") from None


def _check_shard(shard: Shard, data: Data, damage: list[Damage]) -> TarIndex | None:
    stored, unchanged = load_index(shard.path) or (None, False)
    expected = shard.facts["sha256"] if shard.facts else stored.sha256 if stored else None
    if stored and stored.label == data.label and stored.sha256 == expected:
        if unchanged or file_sha256(shard.path) == expected:
            if not unchanged:
                save_index(shard.path, stored)
            return stored
        if data.damage == "skip":
            # The index was made when the shard was whole: its checksums say which samples still are.
            good = intact(shard.path, stored)
            damage.extend(
                Damage(shard.name, key.decode(), "has changed (checksum)")
                for key in stored.keys[~good]
            )
            return stored.take(good)
    index = scan_tar(shard.path, data.label)
    found = [
        Damage(shard.name, str(k), str(r))
        for k, r in zip(index.damaged, index.reasons, strict=True)
    ]
    if expected and index.sha256 != expected:
        if data.damage == "strict" and found:
            raise UserError(_refusal(found))
        reason = "is not the shard that was indexed (sha256)"
        if data.damage == "strict":
            raise UserError(
                f"{shard.name}: {reason}; fetch it again, or run `referral shards index` on it if the change was meant"
            )
        damage.append(
            Damage(shard.name, "", reason, shard.facts["samples"] if shard.facts else len(stored))
        )
        return None
    if not index.countable and data.damage == "skip":
        what = next(item for item in found if not item.member)
        raise UserError(
            f"{what}; without a manifest the loss cannot be counted: `referral shards from-webdataset` saves the rest"
        )
    damage.extend(found)
    if not found:
        save_index(shard.path, index)
    if not len(index) and not found:
        raise UserError(f"{shard.name}: the shard is empty")
    return index


def _label(shard: Shard, index: TarIndex, class_names: list[str], data: Data, damage: list[Damage]):
    """(index, int64 labels) of the samples that have an input and a valid label."""
    without_input = _input_rows(index, data) < 0
    if not data.label:
        kept = ~without_input
        damage.extend(
            Damage(shard.name, key.decode("utf-8", "replace"), "has not one input member")
            for key in index.keys[without_input]
        )
        index = index if kept.all() else index.take(kept)
        return index, np.full(len(index), UNLABELLED, np.int64)
    labels = parse_labels(index.label_texts, class_names)
    for sample in np.flatnonzero((labels < 0) | without_input).tolist():
        key, text = (
            index.keys[sample].decode("utf-8", "replace"),
            index.label_texts[sample].decode("utf-8", "replace"),
        )
        if without_input[sample]:
            reason = f"has no member .{data.input}" if data.input else "has not one input member"
        else:
            reason = f"has label {text}, which is none of the {len(class_names)} classes"
        damage.append(Damage(shard.name, key, reason))
    kept = (labels >= 0) & ~without_input
    return (index, labels) if kept.all() else (index.take(kept), labels[kept])


def parse_labels(texts: np.ndarray, class_names: list[str]) -> np.ndarray:
    """int64[n]: class indices; -1 where the text is neither an index nor (in quotes, or no number) a class's name."""
    try:
        labels = texts.astype(np.int64)
    except (ValueError, OverflowError):
        numbers = {name: number for number, name in enumerate(class_names)}
        labels = np.array(
            [_parse_label(text.decode("utf-8", "replace"), numbers) for text in texts], np.int64
        )
    return np.where((labels >= 0) & (labels < len(class_names)), labels, -1)


def _parse_label(text: str, numbers: dict[str, int]) -> int:
    if text.startswith('"'):
        return numbers.get(json.loads(text), -1)
    try:
        return min(int(text), 2**62)
    except ValueError:
        return numbers.get(text, -1)


def _input_rows(index: TarIndex, data: Data) -> np.ndarray:
    """int64[n]: the row of each sample's input member, -1 where there is none, or several to choose from."""
    label = (
        data.label.partition(":")[0] or "cls"
    )  # unlabelled shards may carry labels that are not to be read
    extensions = [str(extension) for extension in index.extensions]
    wanted = [
        extension == data.input.lower() if data.input else extension != label
        for extension in extensions
    ]
    rows = np.flatnonzero(np.array(wanted, bool)[index.member_extension])
    samples = np.searchsorted(index.member_start, rows, side="right") - 1
    found = np.full(len(index), -1, np.int64)
    found[samples] = rows
    several = np.bincount(samples, minlength=len(index)) > 1
    if several.sum() * 2 > len(index):
        members = ", ".join(
            extension for extension, yes in zip(extensions, wanted, strict=True) if yes
        )
        raise UserError(
            f"samples have the members {members}; say which is the input with data.input"
        )
    found[several] = -1
    return found


def _check_counts(
    shard: Shard, labels: np.ndarray, class_names: list[str], damage: list[Damage]
) -> None:
    """The manifest's counts against what was found, unless damage explains the difference."""
    if shard.facts is None or any(item.shard == shard.name for item in damage):
        return
    if (labels == UNLABELLED).all() and len(labels) == shard.facts["samples"]:
        return
    counts = {
        class_names[c]: int(n) for c, n in zip(*np.unique(labels, return_counts=True), strict=True)
    }
    if len(labels) != shard.facts["samples"] or counts != shard.facts["class_counts"]:
        raise UserError(
            f"{shard.name}: manifest.json says {shard.facts['samples']} samples of {len(shard.facts['class_counts'])} "
            f"classes, it has {len(labels)} of {len(counts)}; `referral shards index {shard.directory}` makes it anew"
        )


def _judge(damage: list[Damage], intact_samples: int, data: Data) -> None:
    if not damage:
        return
    if data.damage == "strict":
        raise UserError(_refusal(damage))
    lost = sum(item.samples for item in damage)
    check_share(lost, intact_samples + lost, data, damage[0])


def check_share(lost: int, samples: int, data: Data, example) -> None:
    """UserError if more than data.damage_share of the samples are lost."""
    if lost > data.damage_share * samples:
        raise UserError(
            f"{lost} of {samples} samples are damaged, above data.damage_share = {data.damage_share}; e.g. {example}"
        )


def _refusal(damage: list[Damage]) -> str:
    more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
    return f'{damage[0]}{more}; `referral shards validate` lists all, data.damage = "skip" leaves them out and counts them'
