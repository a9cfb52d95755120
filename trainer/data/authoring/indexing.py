"""Existing shards: give them a manifest, check every file in them, rewrite them."""

from __future__ import annotations

import codecs
import glob
import io
import lzma
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import numpy as np

from networks.pictures import PictureRules, encode_png, examine_picture
from pipeline.config import Data, UserError
from pipeline.redaction import redacted

from ..bounds import is_there
from ..decoding import (
    Decoder,
    decode,
    decoder_table,
    find_decoder,
    image,
    picture_rules,
    rgb,
)
from ..fetching import FetchDir
from ..label_files import is_label_file
from ..labels import NONE, Kind, LabelSet, readings, settle, settle_given
from ..opening import (
    Corruption,
    ShardPart,
    counts_by_name,
    counts_of_manifest,
    expected_sha256,
    is_the_machines,
    label_kind,
    label_samples,
    scanned_corruption,
)
from ..packing import is_packed, unpacked
from ..patterns import URL, Shard, braces, expand, url_name
from ..replacing import Replacement
from ..shards import ShardSet
from ..tars import TarIndex, load_index, save_index, scan_tar
from ..writing import (
    MANIFEST,
    ShardWriter,
    agreed_rules,
    read_manifest,
    recorded_rules,
    shard_entry,
    write_manifest,
)
from .foreign_files import refuse_foreign
from .members import choose_picture, first_sample, label_remedy
from .picture_sizes import suggested_size
from .reporting import Report, not_finite
from .split_names import split_called, split_within
from .splitting import split_by_class

Sample = dict[str, str | bytes]  # as webdataset gives it: "__key__", and content by extension
# Of a shard: train-000000, train-00000-of-00004.
NUMBER = re.compile(r"[-_.]?\d+([-_.]?of[-_.]?\d+)?$")
TEXTS = {"txt": "trainer.data.decoding:ngram_bag"}  # any text becomes one shape
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
FRACTIONS = {"val": 0.1, "test": 0.1}  # of each class, where a whole set has no such split

# Indexing


def index_directory(
    directory: str | Path,
    label: str = "cls",
    class_names: Sequence[str] | None = None,
    input_member: str = "",
    report: Report | None = None,
    max_pixels: int | None = None,
) -> Report:
    """Scan DIRECTORY/SPLIT-NUMBER.tar, write their indexes and the manifest anew.

    Parameters
    ----------
    directory : path
    label : str
        The member with the label, or "json:FIELD".
    class_names : sequence of str, optional
        By default the old manifest's, else what `trainer.data.labels` makes of all labels.
    input_member : str
        The member with the input, where there are several.
    report : Report, optional
        Its `skip` says whether corrupt samples are left out of the manifest.
    max_pixels : int, optional
        Of a picture, for the manifest's rules. By default as the old manifest has it.

    Returns
    -------
    Report

    Raises
    ------
    UserError
        For any corruption that is not to be skipped: a manifest vouches for what it describes.
    """
    directory = Path(directory)
    report = report or Report()
    tars = {tar.name: tar for tar in sorted(directory.glob("*.tar"))}
    if not tars:
        raise UserError(f"{directory} holds no .tar")
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        is_ours = path.name.endswith((".tar", ".index.npz", MANIFEST)) or is_label_file(path.name)
        if is_ours and not path.name.startswith("."):
            continue
        report.pass_over("files that are no .tar", path.name)
    old = _old_manifest(directory)
    data = Data(label=label, input=input_member)
    return _index(tars, directory, data, class_names, old, report, max_pixels)


def index_urls(
    pattern: str,
    out: str | Path,
    data: Data,
    class_names: Sequence[str] | None = None,
    report: Report | None = None,
    max_pixels: int | None = None,
) -> Report:
    """Like index_directory, for shards behind URLs.

    The manifest is written to the directory `out`, for data.manifest or to be put beside them.
    """
    urls = expand_locations(pattern)
    paths = FetchDir(data).shards(urls, [None] * len(urls))
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}") from None
    tars = {url_name(url): path for url, path in zip(urls, paths, strict=True)}
    return _index(tars, out, data, class_names, None, report or Report(), max_pixels)


def expand_locations(pattern: str) -> list[str]:
    """The files and URLs of several patterns joined by `::`."""
    locations: list[str] = []
    for part in map(str.strip, pattern.split("::")):
        if part.startswith(URL):
            locations += braces(part)
            continue
        for path in [part] if os.path.isdir(part) else braces(part):
            locations += _tars_at(path)
    return locations


def _tars_at(path: str) -> list[str]:
    """The tars of a directory, or that a local pattern matches. A plain path is itself."""
    refuse_foreign(path)
    if os.path.isdir(path):
        found = [tar for tar in sorted(Path(path).rglob("*")) if tar.name.lower().endswith(TARS)]
        visible = [tar for tar in found if not tar.is_dir() and not tar.name.startswith(".")]
        tars = [str(tar) for tar in visible if is_there(tar)]
        if not tars:
            raise UserError(f"{path} holds no .tar")
        return tars
    if not glob.has_magic(path) or os.path.exists(path):
        return [path]
    matches = sorted(glob.glob(path))
    if not matches:
        raise UserError(f"{path}: no file matches")
    return matches


def _index(
    tars: Mapping[str, Path],
    out: Path,
    data: Data,
    class_names: Sequence[str] | None,
    old: dict | None,
    report: Report,
    max_pixels: int | None,
) -> Report:
    from rich.progress import track

    split_of = _splits_of_tars(tars)
    indexes = {
        name: scan_tar(tar, data.label) for name, tar in track(tars.items(), description="scanning")
    }
    for name, index in indexes.items():
        _check_label_member(name, tars[name], index, data.label)
    corruption = _scanned_corruption(indexes)
    label_set = _settle(indexes.values(), data.label, class_names, old)
    report.note(label_set.notes)
    splits: dict[str, dict] = {}
    for name, index in indexes.items():
        shard = Shard(name, str(tars[name]))
        index, labels = label_samples(shard, index, label_set, data, corruption)
        indexes[name] = index
        entry = splits.setdefault(split_of[name], {"samples": 0, "shards": []})
        kind = label_set.to_declare(index.label_texts)
        entry["shards"].append(shard_entry(name, index, labels, kind))
        entry["samples"] += len(labels)
    report.corrupt += map(str, corruption)
    report.refuse_corrupt("--classes FILE gives other classes" if class_names or old else "")
    report.samples = {split: entry["samples"] for split, entry in splits.items()}
    if not any(report.samples.values()):
        raise UserError(f"{out}: no sample is intact")
    for name, index in indexes.items():
        save_index(tars[name], index)
    (out / MANIFEST).unlink(missing_ok=True)
    made_by: dict[str, str | int] = {
        "command": "shards index",
        "label": data.label,
        "labels": label_set.kind,
    }
    if data.input:
        made_by["input"] = data.input
    if corruption:
        made_by["lost"] = len(corruption)
    rules = _with_limit(recorded_rules(old) if old else None, max_pixels)
    write_manifest(out, label_set.names, splits, made_by, rules, data.label)
    return report


def _check_label_member(name: str, path: Path, index: TarIndex, label: str) -> None:
    """Raises UserError, with what to say instead, where no sample has the label's member."""
    member = label.partition(":")[0]
    missing = f"has no member .{member}".encode()
    if len(index) or not len(index.reasons) or any(reason != missing for reason in index.reasons):
        return
    sample = first_sample(path)
    if sample:
        raise UserError(f"{name}: {label_remedy(sample, label)}")


def _with_limit(rules: PictureRules | None, max_pixels: int | None) -> PictureRules | None:
    """The rules with the limit that the user names, if any."""
    if max_pixels is None:
        return rules
    return replace(rules or PictureRules(), max_pixels=max_pixels)


def _splits_of_tars(names: Iterable[str]) -> dict[str, str]:
    """{name of a tar: its split}.  UserError where two spellings of one split occur."""
    splits: dict[str, str] = {}
    spelling_of: dict[str, str] = {}
    for name in names:
        stem = NUMBER.sub("", name.removesuffix(".tar")) or "train"
        split = split_called(stem) or split_within(stem) or stem
        spelling = spelling_of.setdefault(split, stem)
        if spelling != stem:
            raise UserError(
                f"tars called {spelling} and {stem} both are the split {split}; "
                "rename those that are another one"
            )
        splits[name] = split
    return splits


def _scanned_corruption(indexes: Mapping[str, TarIndex]) -> list[Corruption]:
    corruption: list[Corruption] = []
    for name, index in indexes.items():
        corruption += scanned_corruption(name, index)
    for name, index in indexes.items():
        if not len(index) and not len(index.damaged):
            corruption.append(Corruption(name, "", "the shard is empty"))
    return corruption


def _old_manifest(directory: Path) -> dict | None:
    try:
        return read_manifest(directory)
    except UserError:  # a broken manifest is what `index` is here to replace
        return None


def _settle(
    indexes: Iterable[TarIndex],
    label: str,
    class_names: Sequence[str] | None,
    old: dict | None = None,
    encoding: str = "utf-8",
) -> LabelSet:
    """The label set of several tars: from a list of classes, the old manifest, or the labels."""
    raw: dict[bytes, None] = {}
    for index in indexes:
        raw |= dict.fromkeys(index.label_texts)
    texts, unreadable = readings(raw, label, encoding)
    texts = [text for number, text in enumerate(texts) if number not in unreadable]
    if class_names:
        return settle_given(texts, class_names)
    if old:
        kind = _old_kind(old)
        known = kind and (LabelSet(old["classes"], kind).indices(texts) != NONE).all()
        return settle_given(texts, old["classes"], kind if known else None)
    return settle(texts)


def _old_kind(manifest: dict) -> Kind | None:
    """What the manifest's shards hold as labels. None where it is not known for all of them."""
    made_by = manifest.get("made_by") or {}
    unsaid = made_by.get("labels")
    if made_by.get("command") != "shards index":
        unsaid = "indices"  # every other command writes indices
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    kinds = {shard.get("labels") or unsaid for shard in shards}
    return cast(Kind | None, kinds.pop()) if len(kinds) == 1 else None


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

    # Texts are of any length. Whoever trains on them names what makes them of one.
    data = data.model_copy(update={"decoders": TEXTS | data.decoders})
    # Each shard is opened alone and leniently, so that one finding does not hide the next.
    shards = expand(pattern, data, split)
    unlisted = [
        scan_tar(shard.path, data.label)
        for shard in shards
        if shard.manifest is None and is_there(shard.path)
    ]
    label_set = None
    if unlisted and data.classes is None:
        label_set = _settle(unlisted, data.label, None)
    return [_validate(shard, data, label_set) for shard in track(shards, description="validating")]


def _validate(shard: Shard, data: Data, found: LabelSet | None) -> Finding:
    path = Path(shard.path)
    if not is_there(path):
        return Finding(shard.name, 0, 0, [Corruption(shard.name, "", "is absent")])
    stored, _ = load_index(path) or (None, False)
    index = scan_tar(path, data.label)
    finding = Finding(shard.name, len(index), index.bytes, scanned_corruption(shard.name, index))
    expected = expected_sha256(shard, stored)
    if expected and expected != index.sha256:
        finding.add("is not the shard that was indexed (sha256)")
    elif shard.entry and shard.entry["bytes"] != index.bytes:
        finding.add(f"has {index.bytes} bytes, manifest.json says {shard.entry['bytes']}")
    if not len(index):
        finding.add("holds no intact sample")
        return finding
    label_set = _label_set(shard, data, found)
    index, labels = label_samples(shard, index, label_set, data, finding.corruption)
    if shard.entry and not finding.corruption:
        counts = counts_by_name(labels, label_set.names)
        if len(labels) != shard.entry["samples"] or counts != counts_of_manifest(shard):
            finding.add("manifest.json counts it otherwise")
    if len(index):
        lenient = data.model_copy(update={"damage": "skip", "damage_share": 0.999999})
        part = ShardPart.of(shard, index, labels, lenient)
        shards = ShardSet("all", [part], label_set.names, [], lenient)
        _decode_all(shards, finding)
    return finding


def _label_set(shard: Shard, data: Data, found: LabelSet | None) -> LabelSet:
    if shard.manifest:
        return LabelSet(shard.manifest["classes"], label_kind(shard))
    if data.classes:
        return LabelSet([str(number) for number in range(data.classes)], "indices")
    assert found is not None
    return found


def _decode_all(shards: ShardSet, finding: Finding) -> None:
    for first in range(0, len(shards), 256):
        try:
            ids = np.arange(first, min(first + 256, len(shards)))
            inputs, unreadable = shards.read(ids)
        except UserError as error:  # not even the first sample can be decoded
            finding.add(str(error))
            return
        for row, sample in enumerate(ids.tolist()):
            reason = unreadable.get(sample) or not_finite(inputs[row])
            if reason:
                finding.add(reason, shards.keys([sample])[0], samples=1)


# Rewriting

# Of a tar's label texts: (the class of each, why it has none).
LabelTexts: TypeAlias = tuple[np.ndarray, dict[int, str]]


def from_webdataset(
    urls: str,
    out: str | Path,
    split: str | None = None,
    label: str = "cls",
    input_member: str = "",
    class_names: Sequence[str] | None = None,
    report: Report | None = None,
    data: Data | None = None,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    max_pixels: int | None = None,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    rules: PictureRules | None = None,
    encoding: str = "utf-8",
) -> Report:
    """Rewrite whatever webdataset reads as shards with a manifest.

    Parameters
    ----------
    urls : str
        Files and URLs, compressed or not, with braces, several joined by `::`. They are one split.
        A directory or a pattern with * is a whole set: its tars are the splits that they are
        called.
    out : path
    split : str, optional
        By default the one that the tars are named after, else train.
    label : str
        The member cls with a number or a name, or "json:FIELD".
    input_member : str
        Which other member to keep. By default the only one that can be decoded, or the only
        picture.
    class_names : sequence of str, optional
        By default those of the splits that are there already, else what `trainer.data.labels`
        makes of all labels.
    report : Report, optional
        Its `skip` says whether unreadable samples are left out.
    data : Data, optional
        Its decoders and fetch_dir are used.
    samples_per_shard : int
    overwrite : bool
    max_pixels : int, optional
        Of a picture, for the manifest's rules. By default as the tars' manifest has it.
    fractions : {split: fraction}, optional
        Of each class for val and test, taken from train where there is no such split.  By default
        a tenth each of a whole set, nothing of one split.
    seed : int
        Of that division.
    rules : PictureRules, optional
        What pictures are made by. By default they stay as they are.
    encoding : str
        Of the labels.

    Returns
    -------
    Report

    Raises
    ------
    UserError
        If nothing can be read, and for unreadable samples that are not to be skipped.
    """
    data = (data or Data()).model_copy(update={"label": label, "input": input_member})
    report = report or Report()
    _check_encoding(encoding)
    locations = expand_locations(urls)
    is_whole = not split and _is_whole_set(urls)
    split_of = _splits_of_locations(locations, split, is_whole)
    if fractions is None:
        fractions = FRACTIONS if is_whole else {}
    # The classes are needed before the first sample is written.
    indexes = _scan_locations(locations, data, report)
    others = _other_splits(out, set(split_of.values()))
    given = bool(class_names or others)
    label_set = _settle(indexes.values(), label, class_names, others, encoding)
    is_made = rules is not None
    rules = rules or _rules_of_locations(locations, out, set(split_of.values()))
    rules = _with_limit(rules, max_pixels)
    if not label_set.names:
        report.refuse_corrupt()
        raise UserError(f"{urls}: no sample has a label {label}")
    report.note(label_set.notes)
    missing = _missing_splits(fractions, set(split_of.values()), out, overwrite)
    texts = {
        name: label_set.read(list(index.label_texts), label, encoding)
        for name, index in indexes.items()
    }
    divided = _divide(indexes, split_of, texts, missing, seed)
    with ExitStack() as stack:
        replacement = stack.enter_context(Replacement())
        writing = stack.enter_context(ExitStack())
        writers: dict[str, ShardWriter] = {}
        for name in sorted(set(np.concatenate(list(divided.values())).tolist()), key=_order):
            writer = ShardWriter(
                out, name, label_set.names, samples_per_shard, overwrite, replacement
            )
            writers[name] = writing.enter_context(writer)
        samples = _labelled_samples(indexes, divided, texts, data, report)
        report.samples = _rewrite(samples, writers, data, rules, is_made, report)
        report.refuse_corrupt("--classes FILE gives other classes" if given else "")
        if not sum(report.samples.values()):
            raise UserError(f"{urls}: no readable sample")
        writing.close()
        made_by = _made_by(urls, out, writers.keys(), missing.keys(), report)
        entries = {name: writer.facts for name, writer in writers.items()}
        replacement.commit(lambda: write_manifest(out, label_set.names, entries, made_by, rules))
    _note_absent_splits(out, urls, report)
    return report


def _made_by(
    urls: str, out: str | Path, written: Collection[str], taken_now: Collection[str], report: Report
) -> dict:
    """What the manifest says of the command."""
    taken = set(_taken_of_train(read_manifest(out) or {})) - set(written) | set(taken_now)
    made_by = {
        "command": "shards from-webdataset",
        "urls": redacted(urls),
        "lost": len(report.corrupt),
    }
    return made_by | ({"taken_of_train": sorted(taken)} if taken else {})


def _check_encoding(encoding: str) -> None:
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise UserError(f"--encoding {encoding}: there is no such encoding") from None


def _note_absent_splits(out: str | Path, urls: str, report: Report) -> None:
    """Say what a run will miss, and how it is made."""
    manifest = read_manifest(out)
    assert manifest is not None
    absent = [split for split in FRACTIONS if split not in manifest["splits"]]
    if absent and "train" in report.samples:
        options = " ".join(f"--{split} 0.1" for split in absent)
        report.note(
            f"there is no {' and no '.join(absent)} yet: rewrite tars of them to {out} too, or "
            f"take them of train: {options} --overwrite"
        )


def _is_whole_set(urls: str) -> bool:
    """Whether tars of a whole set are named: a directory, or a pattern with * of several splits."""
    parts = [part.strip() for part in urls.split("::") if not part.strip().startswith(URL)]
    if any(map(os.path.isdir, parts)):
        return True
    matched = [path for part in parts if glob.has_magic(part) for path in _tars_at(part)]
    named = set(map(_split_named, matched))
    return len(named) > 1 or named == {None}


def _split_named(location: str, is_whole: bool = True) -> str | None:
    """The split that a tar is named after. Of a whole set, else the one of its directory."""
    named = split_within(url_name(location).rpartition("/")[2])
    if named or not is_whole:
        return named
    return split_called(location.rpartition("/")[0].rpartition("/")[2])


def _splits_of_locations(
    locations: Sequence[str], split: str | None, is_whole: bool
) -> dict[str, str]:
    """{tar: its split}: the given one, or the one that it is named after. Train without a name."""
    if split:
        return dict.fromkeys(locations, split)
    named = {location: _split_named(location, is_whole) for location in locations}
    splits = list(dict.fromkeys(named.values()))
    if len(splits) > 1 and (None in splits or not is_whole):
        first, second = splits[:2]
        raise UserError(
            f"the tars are of several splits ({first or 'none named'}, {second or 'none named'}); "
            "name their directory, of which all splits are rewritten, or say with --split what "
            "they become together"
        )
    return {location: name or "train" for location, name in named.items()}


def _order(split: str) -> tuple[int, str]:
    """Sorts train before val before test before others."""
    known = ("train", "val", "test")
    return (known.index(split) if split in known else len(known)), split


def _missing_splits(
    fractions: Mapping[str, float], splits: set[str], out: str | Path, overwrite: bool
) -> dict[str, float]:
    """The fractions of splits to be taken of train: those that neither the tars nor `out` have.

    With `overwrite` what `out` has does not count: it may have been taken of train before.
    Raises UserError where samples that were taken of train would stay and come back to train.
    """
    if "train" not in splits:
        return {}
    old = read_manifest(out) or {"splits": {}}
    there = splits if overwrite else splits | set(old["splits"])
    missing = {split: part for split, part in fractions.items() if part and split not in there}
    kept = set(_taken_of_train(old)) - splits - missing.keys()
    if kept:
        options = " ".join(f"--{split} 0.1" for split in sorted(kept, key=_order))
        raise UserError(
            f"{out}: {' and '.join(sorted(kept, key=_order))} were taken of train, which would now "
            f"hold the same samples; take them anew ({options}), or give an empty directory"
        )
    return missing


def _taken_of_train(manifest: dict) -> list[str]:
    return (manifest.get("made_by") or {}).get("taken_of_train", [])


def _divide(
    indexes: Mapping[str, TarIndex],
    split_of: Mapping[str, str],
    texts: Mapping[str, LabelTexts],
    missing: Mapping[str, float],
    seed: int,
) -> dict[str, np.ndarray]:
    """{tar: the split of each sample, object [n]}: its tar's, or one that is taken of train."""
    divided = {
        name: np.full(len(index), split_of[name], dtype=object) for name, index in indexes.items()
    }
    tars = [name for name in indexes if split_of[name] == "train"]
    if not missing or not tars:
        return divided
    labels = []
    for name in tars:
        classes, _ = texts[name]
        labels.append(classes[indexes[name].label_number])
    joined = np.concatenate(labels)
    known = np.flatnonzero(joined != NONE)
    joined_splits = np.concatenate([divided[name] for name in tars])
    for split, ids in split_by_class(joined[known], missing, seed).items():
        joined_splits[known[ids]] = split
    starts = np.cumsum([len(indexes[name]) for name in tars])[:-1]
    divided |= dict(zip(tars, np.split(joined_splits, starts), strict=True))
    return divided


def _other_splits(out: str | Path, splits: set[str]) -> dict | None:
    """The manifest that is in `out`, where it has other splits: their classes are the set's."""
    manifest = read_manifest(out)
    if manifest is None or not set(manifest["splits"]) - splits:
        return None
    # What is rewritten may hold names where those shards hold indices.
    return {"classes": manifest["classes"], "splits": {}}


def _rules_of_locations(
    locations: Sequence[str], out: str | Path, splits: set[str]
) -> PictureRules | None:
    """What the manifests beside the tars say of their pictures, else those of other splits."""
    directories = {os.path.dirname(each) for each in locations if not each.startswith(URL)}
    manifests = {directory: read_manifest(directory or ".") for directory in sorted(directories)}
    rules = {key: recorded_rules(manifest) for key, manifest in manifests.items() if manifest}
    agreed = agreed_rules(rules, "the tars")
    manifest = read_manifest(out)
    if agreed is None and manifest is not None and set(manifest["splits"]) - splits:
        return recorded_rules(manifest)
    return agreed


@contextmanager
def unpacked_tar(location: str, data: Data) -> Iterator[tuple[Path, str]]:
    """(a local, uncompressed tar, "") with the content of a file or URL.

    Of one whose compression breaks off: (what comes before, why it breaks off).

    Raises UserError if it cannot be read or fetched.
    """
    path = Path(location)
    if location.startswith(URL):
        (path,) = FetchDir(data).shards([location], [None])
    try:
        packed = is_packed(path)
    except OSError as error:
        raise UserError(f"{location}: cannot be read: {error.strerror or error}") from None
    if not packed:
        yield path, ""
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        try:
            broken = _unpack(path, cast(BinaryIO, file))
        except OSError as error:
            raise UserError(
                f"{location}: cannot be unpacked to {tempfile.gettempdir()}: "
                f"{error.strerror or error}"
            ) from None
        yield Path(file.name), broken


def _unpack(path: Path, file: BinaryIO) -> str:
    """Decompress into `file` as far as it goes.  Returns why it ends early, or ""."""
    size = 0
    with unpacked(path) as content:
        while True:
            try:
                # In small steps: a step that fails takes what it has read with it.
                block = cast(io.BufferedIOBase, content).read1(1 << 14)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                file.flush()
                return f"its compression is corrupt behind byte {size} of the content: {error}"
            if not block:
                file.flush()
                return ""
            file.write(block)
            size += len(block)


def _scan_locations(locations: Sequence[str], data: Data, report: Report) -> dict[str, TarIndex]:
    """The index of each tar. What is corrupt in them goes to the report."""
    from rich.progress import track

    indexes: dict[str, TarIndex] = {}
    for location in track(locations, description="labels"):
        with unpacked_tar(location, data) as (path, broken):
            if broken:
                report.corrupt.append(f"{location}: {broken}")
            try:
                index = scan_tar(path, data.label)
            except OSError as error:
                raise UserError(f"{location}: cannot be read: {error.strerror}") from None
            _check_label_member(location, path, index, data.label)
        report.corrupt += map(str, scanned_corruption(location, index))
        indexes[location] = index
    return indexes


def _labelled_samples(
    indexes: Mapping[str, TarIndex],
    divided: Mapping[str, np.ndarray],
    texts: Mapping[str, LabelTexts],
    data: Data,
    report: Report,
) -> Iterator[tuple[str, str, Sample, int]]:
    """(tar, split, files, class) of each sample. Those without a class go to the report.

    webdataset itself stops at corruption without a word.
    """
    from rich.progress import track

    for location, index in track(indexes.items(), description="samples"):
        classes, reasons = texts[location]
        with unpacked_tar(location, data) as (path, _), open(path, "rb") as file:
            for number, raw_key in enumerate(index.keys):
                key = raw_key.decode("utf-8", "replace")
                label_number = int(index.label_number[number])
                if label_number in reasons:
                    report.corrupt.append(f"{location}: {key} {reasons[label_number]}")
                    continue
                files: Sample = {"__key__": key}
                for row in range(index.member_start[number], index.member_start[number + 1]):
                    extension = str(index.extensions[index.member_extension[row]])
                    size, offset = int(index.size[row]), int(index.offset[row])
                    files[extension] = os.pread(file.fileno(), size, offset)
                yield location, divided[location][number], files, int(classes[label_number])


def _rewrite(
    samples: Iterable[tuple[str, str, Sample, int]],
    writers: Mapping[str, ShardWriter],
    data: Data,
    rules: PictureRules | None,
    is_made: bool,
    report: Report,
) -> dict[str, int]:
    """Write the samples whose input can be decoded.  Returns {split: how many there are}.

    is_made: whether pictures are written as the rules make them, not as they came.

    Once one is to be refused the others are only looked at: all that are corrupt get listed.
    """
    table = decoder_table(data.decoders)
    table |= {
        extension: _counting(decoder, rules, report)
        for extension, decoder in table.items()
        if decoder in (image, rgb)
    }
    written = dict.fromkeys(writers, 0)
    shapes: Counter[tuple[str, tuple[int, ...]]] = Counter()
    beside: set[str] = set()
    for location, split, sample, class_index in samples:
        unchanged = report.changes.total()
        try:
            extension, content, array = _choose_input(sample, data, table)
        except Exception as error:  # a decoder's
            if is_the_machines(error):
                raise
            report.corrupt.append(f"{location}: {sample['__key__']}: {error}")
            continue
        if report.corrupt and not report.skip:
            continue
        beside.update(name for name in sample if name.rpartition(".")[2] != extension)
        if is_made and report.changes.total() > unchanged:
            extension, content = "png", encode_png(array)
        shapes[str(array.dtype), array.shape] += 1
        key = f"{written[split]:08d}"
        writers[split].write({"__key__": key, extension: content, "cls": b"%d" % class_index})
        written[split] += 1
    if len(shapes) > 1 and extension != "txt":
        report.note(f"warning: {_unlike(shapes)}")
    beside -= {"__key__", data.label.partition(":")[0]}
    if beside:
        report.note(f"members beside the input are left out: {', '.join(sorted(beside))}")
    return written


def _unlike(shapes: Counter[tuple[str, tuple[int, ...]]]) -> str:
    """What is said of inputs of several types and shapes, [C, H, W] of pictures."""
    common = shapes.most_common(4)
    shown = ", ".join(f"{dtype} {list(shape)} ({count})" for (dtype, shape), count in common)
    said = f"inputs of {len(shapes)} shapes, and a batch needs one: {shown}"
    if all(len(shape) == 3 and shape[0] in (1, 3) for _, shape in shapes):
        sizes: Counter[tuple[int, int]] = Counter()
        for (_, (_, height, width)), count in shapes.items():
            sizes[width, height] += count
        said += f"; --size {suggested_size(sizes)} --overwrite brings all pictures to one"
    return said


def _counting(decoder: Decoder, rules: PictureRules | None, report: Report) -> Decoder:
    """A decoder of pictures that counts what the rules change, whenever they are read."""
    applied = picture_rules(decoder, rules) or PictureRules()

    def counting(content: bytes) -> np.ndarray:
        pixels, changes = examine_picture(content, applied)
        report.changes.update(changes)
        return pixels

    return counting


def _choose_input(
    sample: Sample, data: Data, table: Mapping[str, Decoder]
) -> tuple[str, bytes, np.ndarray]:
    """(extension, content, decoded) of the sample's input.  Raises what its decoder raises."""
    label_member = data.label.partition(":")[0]
    names = [name for name in sample if not name.startswith("__") and name != label_member]
    known = [name for name in names if name in table or name.rpartition(".")[2] in table]
    chosen = known
    if data.input:
        chosen = [name for name in names if name == data.input.lower()]
    if not known:
        raise ValueError(
            f"has the members {', '.join(names) or 'none'}, and none has a decoder "
            f"(known: {', '.join(sorted(table))}); bring inputs to one of these"
        )
    picture = choose_picture(chosen)
    if len(chosen) > 1 and picture:
        chosen = [picture]
    if len(chosen) != 1:
        raise ValueError(
            f"has the members {', '.join(names)}; choose one with --input, e.g. --input {known[0]}"
        )
    (name,) = chosen
    content = sample[name]
    assert isinstance(content, bytes), name
    array = decode(find_decoder(table, name), content)
    reason = not_finite(array)
    if reason:
        raise ValueError(reason)
    return name.rpartition(".")[2], content, array
