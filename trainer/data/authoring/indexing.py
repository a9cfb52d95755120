"""Existing shards: give them a manifest, check every file in them, rewrite them."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.config import Data, UserError

from ..decoding import Decoder, decoder_table, find_decoder
from ..fetching import FetchDir, is_packed, unpacked
from ..patterns import URL, Shard, braces, expand, url_name
from ..shards import (
    Corruption,
    ShardSet,
    expected_sha256,
    label_samples,
    parse_labels,
    refusal,
    scanned_corruption,
)
from ..tars import TarIndex, load_index, read_label, save_index, scan_tar
from ..writing import MANIFEST, ShardWriter, read_manifest, shard_entry, write_manifest

Sample = dict[str, str | bytes]  # as webdataset gives it: "__key__", and content by extension
Skip = Callable[[str], None]  # told why something is left out; may raise UserError

# Indexing


def index_directory(
    directory: str | Path, label: str = "cls", class_names: Sequence[str] | None = None
) -> dict[str, int]:
    """Scan DIRECTORY/SPLIT-NUMBER.tar, write their indexes and the manifest anew.

    Parameters
    ----------
    directory : path
    label : str
        The member with the label, or "json:FIELD".
    class_names : sequence of str, optional
        By default the old manifest's, else the numbers up to the largest label, or the names found,
        sorted.

    Returns
    -------
    {split: number of samples}

    Raises
    ------
    UserError
        For any corruption: a manifest vouches for what it describes.
    """
    directory = Path(directory)
    tars = {tar.name: tar for tar in sorted(directory.glob("*.tar"))}
    if not tars:
        raise UserError(f"{directory} holds no .tar")
    return _index(tars, directory, label, class_names or _old_classes(directory))


def index_urls(
    pattern: str, out: str | Path, data: Data, class_names: Sequence[str] | None = None
) -> dict[str, int]:
    """As index_directory, of shards behind URLs.

    The manifest is written to the directory `out`, for data.manifest or to be put beside them.
    """
    urls = _expand_locations(pattern)
    paths = FetchDir(data).shards(urls, [None] * len(urls))
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}") from None
    tars = {url_name(url): path for url, path in zip(urls, paths, strict=True)}
    return _index(tars, out, data.label, class_names)


def _expand_locations(pattern: str) -> list[str]:
    """The files and URLs of several patterns joined by `::`."""
    locations: list[str] = []
    for part in pattern.split("::"):
        locations += braces(part.strip())
    return locations


def _index(
    tars: Mapping[str, Path], out: Path, label: str, class_names: Sequence[str] | None
) -> dict[str, int]:
    from rich.progress import track

    indexes = {
        name: scan_tar(tar, label) for name, tar in track(tars.items(), description="scanning")
    }
    _refuse_corruption(indexes)
    names = list(class_names or ())
    if not names:
        names = _found_classes(np.concatenate([index.label_texts for index in indexes.values()]))
    corruption: list[Corruption] = []
    splits: dict[str, dict] = {}
    for name, index in indexes.items():
        shard = Shard(name, str(tars[name]))
        _, labels = label_samples(shard, index, names, Data(label=label), corruption)
        split = re.sub(r"[-_.]?\d+$", "", name.removesuffix(".tar")) or "train"
        entry = splits.setdefault(split, {"samples": 0, "shards": []})
        entry["shards"].append(shard_entry(name, index.bytes, index.sha256, labels, names))
        entry["samples"] += len(labels)
    if corruption:
        raise UserError(f"{refusal(corruption)}; --classes FILE gives other classes")
    for name, index in indexes.items():
        save_index(tars[name], index)
    (out / MANIFEST).unlink(missing_ok=True)
    write_manifest(out, names, splits, {"command": "shards index", "label": label})
    return {split: entry["samples"] for split, entry in splits.items()}


def _refuse_corruption(indexes: Mapping[str, TarIndex]) -> None:
    corruption: list[Corruption] = []
    for name, index in indexes.items():
        corruption += scanned_corruption(name, index)
    for name, index in indexes.items():
        if not len(index) and not len(index.damaged):
            corruption.append(Corruption(name, "", "the shard is empty"))
    if corruption:
        raise UserError(refusal(corruption))


def _old_classes(directory: Path) -> list[str] | None:
    try:
        manifest = read_manifest(directory)
    except UserError:  # a broken manifest is what `index` is here to replace
        return None
    return manifest["classes"] if manifest else None


def _found_classes(texts: np.ndarray) -> list[str]:
    """Class names of label texts: numbers up to the largest, or the names, sorted."""
    try:
        return [str(number) for number in range(int(texts.astype(np.int64).max()) + 1)]
    except (ValueError, OverflowError):
        distinct = {text.decode("utf-8", "replace") for text in texts.tolist()}
        return sorted(json.loads(text) if text.startswith('"') else text for text in distinct)


# Validating


@dataclass
class Finding:
    """What `validate` says of one shard."""

    shard: str
    samples: int
    bytes: int
    corruption: list[Corruption] = field(default_factory=list)

    def add(self, reason: str, key: str = "", samples: int = 0) -> None:
        """Note that the shard, or its sample `key`, is corrupt."""
        self.corruption.append(Corruption(self.shard, key, reason, samples))


def validate(pattern: str, data: Data, split: str) -> list[Finding]:
    """Check every shard against its manifest and itself, and decode every input.

    Raises UserError only for the pattern.
    """
    from rich.progress import track

    # Each shard is opened alone and leniently, so that one finding does not hide the next.
    shards = expand(pattern, data, split)
    return [_validate(shard, data) for shard in track(shards, description="validating")]


def _validate(shard: Shard, data: Data) -> Finding:
    path = Path(shard.path)
    if not path.exists():
        return Finding(shard.name, 0, 0, [Corruption(shard.name, "", "is absent")])
    stored, _ = load_index(path) or (None, False)
    index = scan_tar(path, data.label)
    finding = Finding(shard.name, len(index), index.bytes, scanned_corruption(shard.name, index))
    expected = expected_sha256(shard, stored)
    if expected and expected != index.sha256:
        finding.add("is not the shard that was indexed (sha256)")
    if not len(index):
        finding.add("holds no intact sample")
        return finding
    names = _class_names(shard, index, data)
    index, labels = label_samples(shard, index, names, data, finding.corruption)
    if shard.entry and not finding.corruption:
        now = shard_entry(path.name, index.bytes, index.sha256, labels, names)
        if any(now[key] != shard.entry[key] for key in ("samples", "class_counts")):
            finding.add("manifest.json counts it otherwise")
    if len(index):
        lenient = data.model_copy(update={"damage": "skip", "damage_share": 0.999999})
        _decode_all(ShardSet("all", [shard], [index], [labels], names, [], lenient), finding)
    return finding


def _class_names(shard: Shard, index: TarIndex, data: Data) -> list[str]:
    if shard.manifest:
        return shard.manifest["classes"]
    if data.classes:
        return [str(number) for number in range(data.classes)]
    return _found_classes(index.label_texts)


def _decode_all(shards: ShardSet, finding: Finding) -> None:
    for first in range(0, len(shards), 256):
        try:
            _, unreadable = shards.read(np.arange(first, min(first + 256, len(shards))))
        except UserError as error:  # not even the first sample can be decoded
            finding.add(str(error))
            return
        for sample, reason in unreadable.items():
            finding.add(reason, shards.keys([sample])[0], samples=1)


# Rewriting


def from_webdataset(
    urls: str,
    out: str | Path,
    split: str = "train",
    label: str = "cls",
    input_member: str = "",
    class_names: Sequence[str] | None = None,
    damage: Literal["strict", "skip"] = "strict",
    data: Data | None = None,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
) -> tuple[int, list[str]]:
    """Rewrite whatever webdataset reads as one split of shards with a manifest.

    Parameters
    ----------
    urls : str
        Files and URLs, compressed or not, with braces, several joined by `::`.
    out : path
    split : str
    label : str
        The member cls with a number or a name, or "json:FIELD".
    input_member : str
        Which other member to keep; by default the only one that can be decoded.
    class_names : sequence of str, optional
        By default what is found.
    damage : "strict" or "skip"
        "skip" leaves unreadable samples out.
    data : Data, optional
        Its decoders and fetch_dir are used.
    samples_per_shard : int
    overwrite : bool

    Returns
    -------
    written : int
        Samples.
    lost : list of str
        What was left out and why, one line for each sample or location in a tar.

    Raises
    ------
    UserError
        If nothing can be read, and under "strict" for the first unreadable sample.
    """
    data = data or Data()
    locations = _expand_locations(urls)
    lost: list[str] = []

    def skip(reason: str) -> None:
        if damage == "strict":
            raise UserError(f"{reason}; --damage skip leaves it out".replace("\n", " "))
        lost.append(reason)

    # Two passes: class names, if they are to be found, are needed before the first sample is
    # written.
    names = list(class_names or ())
    if class_names is None:
        names = _names_of_labels(_read_samples(locations, data, label, skip, "labels"), label)
        if not names:
            raise UserError(f"{urls}: no sample has a label {label}")
        lost.clear()
    table = decoder_table(data.decoders)
    written = 0
    with ShardWriter(out, split, names, samples_per_shard, overwrite) as writer:
        for sample in _read_samples(locations, data, label, skip, split):
            try:
                class_index = _class_of(sample, label, names)
                extension, content = _choose_input(sample, label, input_member, table)
            except UserError:
                raise
            except Exception as error:  # a decoder's
                skip(f"{sample['__key__']}: {error}")
                continue
            key = f"{written:08d}"
            writer.write({"__key__": key, extension: content, "cls": b"%d" % class_index})
            written += 1
        if not written:
            raise UserError(f"{urls}: no readable sample")
    made_by = {"command": "shards from-webdataset", "urls": urls, "lost": len(lost)}
    write_manifest(out, names, {split: writer.facts}, made_by)
    return written, lost


def _read_samples(
    locations: Sequence[str], data: Data, label: str, skip: Skip, description: str
) -> Iterator[Sample]:
    """The intact samples of several tars."""
    from rich.progress import track

    for location in track(locations, description=description):
        with _plain_tar(location, data) as path:
            yield from _read_tar(location, path, label, skip)


@contextmanager
def _plain_tar(location: str, data: Data) -> Iterator[Path]:
    """A local, uncompressed tar with the content of a file or URL.

    Raises UserError if it cannot be read or fetched.
    """
    path = Path(location)
    if location.startswith(URL):
        (path,) = FetchDir(data).shards([location], [None])
    try:
        if not is_packed(path):
            yield path
            return
        with tempfile.NamedTemporaryFile(suffix=".tar") as file, unpacked(path) as content:
            shutil.copyfileobj(content, file)
            file.flush()
            yield Path(file.name)
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{location}: cannot be read: {reason}") from None


def _read_tar(name: str, path: Path, label: str, skip: Skip) -> Iterator[Sample]:
    """The intact samples of a tar as webdataset gives them.

    webdataset itself stops at corruption without a word.
    """
    index = scan_tar(path, label)
    for corruption in scanned_corruption(name, index):
        skip(str(corruption))
    with open(path, "rb") as file:
        for number, key in enumerate(index.keys):
            sample: Sample = {"__key__": key.decode("utf-8", "replace")}
            for row in range(index.member_start[number], index.member_start[number + 1]):
                extension = str(index.extensions[index.member_extension[row]])
                size, offset = int(index.size[row]), int(index.offset[row])
                sample[extension] = os.pread(file.fileno(), size, offset)
            yield sample


def _label_text(sample: Sample, label: str) -> str:
    """Raises ValueError if the sample has no label."""
    member = label.partition(":")[0]
    content = sample.get(member)
    if not isinstance(content, bytes):
        raise ValueError(f"no member .{member}")
    return read_label(content, label)


def _names_of_labels(samples: Iterator[Sample], label: str) -> list[str]:
    texts: list[bytes] = []
    for sample in samples:
        try:
            texts.append(_label_text(sample, label).encode())
        except ValueError:
            continue
    return _found_classes(np.array(texts)) if texts else []


def _class_of(sample: Sample, label: str, class_names: list[str]) -> int:
    """Raises ValueError if the label is none of the classes."""
    text = _label_text(sample, label)
    (class_index,) = parse_labels(np.array([text.encode()]), class_names)
    if class_index < 0:
        raise ValueError(f"label {text} is none of the {len(class_names)} classes")
    return int(class_index)


def _choose_input(
    sample: Sample, label: str, input_member: str, table: Mapping[str, Decoder]
) -> tuple[str, bytes]:
    """(extension, content) of the sample's input.  Raises what its decoder raises."""
    label_member = label.partition(":")[0]
    names = [name for name in sample if not name.startswith("__") and name != label_member]
    if input_member:
        chosen = [name for name in names if name == input_member]
    else:
        chosen = [name for name in names if name in table or name.rpartition(".")[2] in table]
    if len(chosen) != 1:
        raise ValueError(
            f"sample {sample['__key__']} has the members {', '.join(names)}; "
            "choose one with --input"
        )
    (name,) = chosen
    content = sample[name]
    assert isinstance(content, bytes), name
    find_decoder(table, name)(content)
    return name.rpartition(".")[2], content
