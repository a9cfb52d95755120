"""What opening learns of one shard: its intact samples, its index, and what is corrupt of it."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config import Data, UserError
from pipeline.failures import MEMORY_REMEDY, explain
from pipeline.redaction import printable

from .bounds import is_there
from .choices import PICTURES
from .label_files import SplitLabels
from .labels import Kind, LabelSet
from .patterns import Shard
from .tars import (
    TarIndex,
    file_sha256,
    index_path,
    intact,
    is_fresh,
    load_index,
    save_index,
    scan_tar,
)

UNLABELLED = -1  # the label of every sample where data.label = ""


@dataclass(frozen=True)
class Corruption:
    """Something unreadable: where, why, and how many samples are lost by it."""

    shard: str
    member: str
    reason: str
    samples: int = 1

    def __str__(self) -> str:
        text = f"{self.shard}: {self.member} {self.reason}"
        if not self.member:
            text = f"{self.shard}: {self.reason}"
        return printable(text)  # one line, whatever the member is called


@dataclass(frozen=True)
class ShardPart:
    """What opening learned of one shard.

    samples: those that are intact.  sha256: of the whole file.
    extensions, input_extensions: of all its files, and of its inputs.
    labels: int [n], the class of each sample. None: as the manifest has them.
    index: where it cannot be mapped from the file beside the shard, else None.
    """

    shard: Shard
    samples: int
    sha256: str
    extensions: frozenset[str]
    input_extensions: frozenset[str]
    labels: np.ndarray | None = None
    index: TarIndex | None = None

    @classmethod
    def of(
        cls, shard: Shard, index: TarIndex, labels: np.ndarray, data: Data, is_beside: bool = False
    ) -> ShardPart:
        """The part with the samples in `index`, which all have a label and an input.

        is_beside: the index lies beside the shard as it is here, so it need not be kept.
        """
        rows = _input_rows(index, data)
        used = np.unique(index.member_extension[rows[rows >= 0]])
        known = shard.classes
        as_listed = known is not None and bool(data.label) and np.array_equal(known, labels)
        return cls(
            shard,
            len(index),
            index.sha256,
            frozenset(index.extensions.tolist()),
            frozenset(index.extensions[used].tolist()),
            None if as_listed else labels,
            None if is_beside else index,
        )

    def own_labels(self) -> np.ndarray:
        """int [n]."""
        labels = self.shard.classes if self.labels is None else self.labels
        assert labels is not None, self.shard
        return labels


class OpenedShard:
    """The index of a shard that is being read.

    index: None where nothing of the shard is readable.  reason: why.
    """

    def __init__(self, index: TarIndex | None, data: Data, reason: str = ""):
        self.index = index
        self.reason = reason
        self._extensions: list[str] = []
        if index is not None:
            self._extensions = index.extensions.tolist()
            inputs = set(_input_extensions(self._extensions, data))
            self._no_input = no_input(data)
            self._is_input = [each in inputs for each in self._extensions]

    def rows(self, place: int) -> range:
        """The rows of the files of the sample at `place`.  Raises Corrupt."""
        if self.index is None:
            raise Corrupt(self.reason)
        first, end = self.index.member_start[place : place + 2].tolist()
        return range(first, end)

    def input_row(self, place: int) -> int:
        """The row of a sample's input.  Raises Corrupt where there is none, or several."""
        rows = self.rows(place)
        assert self.index is not None
        numbers = self.index.member_extension[rows.start : rows.stop].tolist()
        inputs = [row for row, each in zip(rows, numbers, strict=True) if self._is_input[each]]
        if len(inputs) != 1:
            raise Corrupt(self._no_input)
        return inputs[0]

    def input_rows(self) -> np.ndarray:
        """int64 [n]: `input_row` of every sample. -1 where there is none, or several."""
        if self.index is None:
            return np.zeros(0, np.int64)
        start = self.index.member_start
        rows = np.flatnonzero(np.asarray(self._is_input, bool)[self.index.member_extension])
        first = np.searchsorted(rows, start[:-1])
        count = np.searchsorted(rows, start[1:]) - first
        found = np.full(len(count), -1, np.int64)
        found[count == 1] = rows[first[count == 1]]
        return found

    def extension(self, row: int) -> str:
        assert self.index is not None
        return self._extensions[self.index.member_extension[row]]


class Corrupt(Exception):
    """A sample that cannot be read, with the reason."""


def is_the_machines(error: BaseException) -> bool:
    """Whether the machine fails and not the data: such an error counts no sample as corrupt.

    Decoders raise OSErrors of their own, without a number, about broken bytes.
    """
    if isinstance(error, MemoryError):
        return True
    absent = (errno.ENOENT, errno.ENOTDIR)
    return isinstance(error, OSError) and bool(error.errno) and error.errno not in absent


def unread(where: str, error: BaseException) -> UserError:
    """The error with which a machine that cannot read ends a run, under data.damage = skip too."""
    if isinstance(error, OSError) and error.errno:
        code = explain(error)
        reason = code[1] if code else str(error)
        return UserError(f"{where}: cannot be read: {reason}; this is no corruption of the data")
    reason = " ".join(str(error).split()) or "out of memory"
    return UserError(f"{where}: cannot be read: {reason}; {MEMORY_REMEDY}")


def vouched(shard: Shard, data: Data) -> ShardPart | None:
    """The shard by its manifest alone. None where it must be opened.

    Its size and time are those that its index was compared with, and the manifest has the labels.
    """
    labels, entry = shard.labels, shard.entry
    if shard.streams and labels is not None and entry is not None:
        return _streaming(shard, labels, entry, data)
    if labels is None or entry is None or not data.label or labels.member != data.label:
        return None
    inputs = _input_extensions(labels.extensions, data)
    if not inputs or not is_fresh(shard.path, entry["bytes"]):
        return None
    return ShardPart(
        shard, entry["samples"], entry["sha256"], frozenset(labels.extensions), frozenset(inputs)
    )


def _streaming(shard: Shard, labels: SplitLabels, entry: dict, data: Data) -> ShardPart:
    """A shard that is fetched when it is read, by its manifest alone."""
    if data.label not in ("", labels.member):
        raise UserError(
            f"{shard.name}: its manifest has the labels of {labels.member!r}, data.label is "
            f"{data.label!r}; shards that stream are not read for others"
        )
    inputs = _input_extensions(labels.extensions, data)
    if not inputs:
        raise UserError(f"{shard.name}: no sample {no_input(data)}")
    unlabelled = None if data.label else np.full(entry["samples"], UNLABELLED, np.int32)
    return ShardPart(
        shard,
        entry["samples"],
        entry["sha256"],
        frozenset(labels.extensions),
        frozenset(inputs),
        unlabelled,
    )


def read_shard(
    shard: Shard, label_set: LabelSet, data: Data, corruption: list[Corruption]
) -> ShardPart | None:
    """The shard's intact samples. None if nothing of it is left."""
    before = len(corruption)
    found = _open_shard(shard, data, corruption)
    if found is None:
        return None
    index, is_beside = found
    whole = len(index)
    index, labels = label_samples(shard, index, label_set, data, corruption)
    if len(corruption) == before:  # else corruption explains a difference
        _check_counts(shard, labels, label_set.names)
    return ShardPart.of(shard, index, labels, data, is_beside and len(index) == whole)


def reopened(part: ShardPart, class_names: list[str], data: Data, first: bool) -> OpenedShard:
    """The index of a shard that opening left closed.

    first: in this process, so it is compared with what opening took from the manifest.

    Raises UserError where it is another one. Under data.damage = skip the shard is unreadable.
    """
    index, reason = _index_beside(part, data, first), ""
    if index is None:
        corruption: list[Corruption] = []
        found = _open_shard(part.shard, data, corruption)
        if corruption and data.damage == "strict":
            raise UserError(refusal(corruption))
        if corruption:
            return OpenedShard(None, data, corruption[0].reason)
        assert found is not None, part.shard
        index, _ = found
        if index.sha256 != part.sha256:
            reason = "is not the shard that was opened (sha256)"
    elif len(index) != part.samples:
        reason = f"has {len(index)} samples, manifest.json says {part.samples}"
    if reason and data.damage == "strict":
        raise UserError(f"{part.shard.name}: {reason}; {_anew(part.shard)}")
    if reason:
        return OpenedShard(None, data, reason)
    if first:
        _input_rows(index, data)  # refuses several inputs a sample
        if part.labels is None:
            _check_labels(part, index, class_names, data)
    return OpenedShard(index, data)


def _index_beside(part: ShardPart, data: Data, check: bool) -> TarIndex | None:
    """The index beside a shard. None where it is absent or of another shard or label."""
    if not os.path.exists(index_path(part.shard.path)) or not is_there(part.shard.path):
        return None
    index, _ = load_index(part.shard.path, check) or (None, False)
    if index is None or (index.label, index.sha256) != (data.label, part.sha256):
        return None
    return index


def _anew(shard: Shard) -> str:
    directory = shlex.quote(str(shard.directory or "DIRECTORY"))
    return f"`referral shards index {directory}` makes the manifest anew"


def _check_labels(part: ShardPart, index: TarIndex, class_names: list[str], data: Data) -> None:
    """UserError where the manifest's classes are not those of the shard's label members."""
    known = part.own_labels()
    present = np.unique(known)
    kind = label_kind(part.shard)
    names, places = class_names, known
    if kind == "names":  # a table of a few names in place of one of all
        names = [class_names[c] for c in present]
        places = np.searchsorted(present, known)
    classes, _ = LabelSet(names, kind).read(list(index.label_texts), data.label)
    if not np.array_equal(classes[index.label_number], places):
        raise UserError(
            f"{part.shard.name}: its labels are not those beside manifest.json; {_anew(part.shard)}"
        )


def _open_shard(
    shard: Shard, data: Data, corruption: list[Corruption]
) -> tuple[TarIndex, bool] | None:
    """(the index of the shard's intact samples, whether it lies beside the shard as it is here).

    The others go to `corruption`.  None if nothing of the shard is left.
    """
    if not _is_there(shard):
        if shard.entry is None or data.damage == "strict":
            raise UserError(f"{shard.name}: no such shard")
        corruption.append(Corruption(shard.name, "", "is absent", shard.entry["samples"]))
        return None
    try:
        stored, unchanged = load_index(shard.path) or (None, False)
        found = _stored_index(shard, stored, unchanged, data, corruption)
        return found or _scanned_index(shard, stored, data, corruption)
    except OSError as error:
        raise unread(shard.name, error) from None


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
) -> tuple[TarIndex, bool] | None:
    """Like _open_shard, from the index kept beside the shard. None if it may not be used."""
    expected = expected_sha256(shard, stored)
    if stored is None or stored.label != data.label or stored.sha256 != expected:
        return None
    if unchanged:
        return stored, True
    if file_sha256(shard.path) == expected:
        return stored, save_index(shard.path, stored)
    if data.damage == "strict":
        return None
    # The index was made when the shard was whole: its checksums say which samples still are.
    good = intact(shard.path, stored)
    for key in stored.keys.take(~good):
        corruption.append(Corruption(shard.name, key.decode(), "has changed (checksum)"))
    return stored.take(good), False


def _scanned_index(
    shard: Shard, stored: TarIndex | None, data: Data, corruption: list[Corruption]
) -> tuple[TarIndex, bool] | None:
    """Like _open_shard, by reading the whole shard. Kept beside it if nothing is corrupt."""
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
    if found:
        return index, False
    is_beside = save_index(shard.path, index)
    if not len(index):
        raise UserError(f"{shard.name}: the shard is empty")
    return index, is_beside


def _is_there(shard: Shard) -> bool:
    try:
        return is_there(shard.path)
    except OSError as error:
        raise unread(shard.name, error) from None


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
    """What the labels of a shard are, by its manifest. The config's data.classes means indices."""
    if shard.manifest is None:
        return "indices"
    unsaid = "earlier" if shard.labels is None else "indices"
    return (shard.entry or {}).get("labels") or unsaid


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
        else:
            reason = no_input(data)
        corruption.append(Corruption(shard.name, key, reason))
    if kept.all():
        return index, labels
    return index.take(kept), labels[kept]


def _input_extensions(extensions: Iterable[str], data: Data) -> list[str]:
    """The extensions of members that may be a sample's input."""
    if data.input:
        return [extension for extension in extensions if extension == data.input.lower()]
    # Unlabelled shards may carry labels that are not to be read.
    label = data.label.partition(":")[0] or "cls"
    return [extension for extension in extensions if extension != label]


def _input_rows(index: TarIndex, data: Data) -> np.ndarray:
    """int64 [n]: the row of each sample's input. -1 where there is none, or several to choose."""
    extensions = [str(extension) for extension in index.extensions]
    inputs = _input_extensions(extensions, data)
    is_input = [extension in inputs for extension in extensions]
    rows = np.flatnonzero(np.array(is_input, bool)[index.member_extension])
    samples = np.searchsorted(index.member_start, rows, side="right") - 1
    input_rows = np.full(len(index), -1, np.int64)
    input_rows[samples] = rows
    several = np.bincount(samples, minlength=len(index)) > 1
    if several.sum() * 2 > len(index):
        pictures = [extension for extension in inputs if extension in PICTURES]
        raise UserError(
            f"samples have the members {', '.join(inputs)}; say which is the input with data.input "
            f"(--input of `referral shards`), e.g. {(pictures or inputs)[0]}"
        )
    input_rows[several] = -1
    return input_rows


def _check_counts(shard: Shard, labels: np.ndarray, class_names: list[str]) -> None:
    """UserError where the manifest, if there is one, counts other classes."""
    if shard.entry is None:
        return
    samples = shard.entry["samples"]
    if (labels == UNLABELLED).all() and len(labels) == samples:
        return
    expected, counts = counts_of_manifest(shard), counts_by_name(labels, class_names)
    if len(labels) != samples or counts != expected:
        raise UserError(
            f"{shard.name}: manifest.json says {samples} samples of {len(expected)} classes, "
            f"it has {len(labels)} of {len(counts)}; {_anew(shard)}"
        )


def counts_of_manifest(shard: Shard) -> dict[str, int]:
    """{class name: samples} of a shard, as its manifest has it."""
    assert shard.entry is not None and shard.manifest is not None, shard
    classes = shard.classes
    if classes is None:
        return shard.entry["class_counts"]
    return counts_by_name(classes, shard.manifest["classes"])


def counts_by_name(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, int]:
    """{class name: samples} of those that there are.  labels: int [n]."""
    classes, numbers = np.unique(labels, return_counts=True)
    names = (str(class_names[c]) for c in classes)
    return dict(zip(names, numbers.tolist(), strict=True))


def no_input(data: Data) -> str:
    """Why a sample that has no input, or several, cannot be read."""
    if data.label and data.input:
        return f"has no member .{data.input}"
    return "has not one input member"


def check_corruption(corruption: list[Corruption], intact_samples: int, data: Data) -> None:
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
