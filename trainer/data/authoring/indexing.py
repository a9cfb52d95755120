"""Existing shards: give them a manifest, check every member, rewrite them."""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.config import Data, UserError

from ..decoding import decoder_table, find_decoder
from ..fetching import FetchDir, is_packed, unpacked
from ..patterns import URL, Shard, braces, expand, url_name
from ..shards import Damage, ShardSet, _label, _refusal, parse_labels
from ..tars import load_index, read_label, save_index, scan_tar
from ..writing import MANIFEST, ShardWriter, read_manifest, shard_facts, write_manifest


def index_directory(
    directory, label: str = "cls", class_names: list[str] | None = None
) -> dict[str, int]:
    """Scan DIRECTORY/SPLIT-NUMBER.tar, write their indexes and the manifest anew.  Returns {split: samples}.

    class_names: by default the old manifest's, else the numbers up to the largest label, or the names found, sorted.
    Raises UserError for any damage: a manifest vouches for what it describes.
    """
    directory = Path(directory)
    tars = {tar.name: tar for tar in sorted(directory.glob("*.tar"))}
    if not tars:
        raise UserError(f"{directory} holds no .tar")
    return _index(tars, directory, label, class_names or _old_classes(directory))


def index_urls(
    pattern: str, out, data: Data, class_names: list[str] | None = None
) -> dict[str, int]:
    """The same of shards behind URLs; the manifest is written to OUT, for data.manifest or to be put beside them."""
    urls = [url for part in pattern.split("::") for url in braces(part.strip())]
    paths = FetchDir(data).shards(urls, [None] * len(urls))
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as mistake:
        raise UserError(f"{out}: cannot be made: {mistake.strerror}") from None
    return _index(
        {url_name(url): path for url, path in zip(urls, paths, strict=True)},
        out,
        data.label,
        class_names,
    )


def _index(
    tars: dict[str, Path], out: Path, label: str, class_names: list[str] | None
) -> dict[str, int]:
    from rich.progress import track

    indexes = {
        name: scan_tar(tar, label) for name, tar in track(tars.items(), description="scanning")
    }
    damage = [
        Damage(name, str(key), str(reason))
        for name, index in indexes.items()
        for key, reason in zip(index.damaged, index.reasons, strict=True)
    ]
    damage += [
        Damage(name, "", "the shard is empty")
        for name, index in indexes.items()
        if not len(index) and not len(index.damaged)
    ]
    if damage:
        raise UserError(_refusal(damage))
    names = class_names or _found_classes(
        np.concatenate([index.label_texts for index in indexes.values()])
    )
    splits: dict[str, dict] = {}
    for name, index in indexes.items():
        _, labels = _label(Shard(name, str(tars[name])), index, names, Data(label=label), damage)
        split = re.sub(r"[-_.]?\d+$", "", name.removesuffix(".tar")) or "train"
        facts = splits.setdefault(split, {"samples": 0, "shards": []})
        facts["shards"].append(shard_facts(name, index.bytes, index.sha256, labels, names))
        facts["samples"] += len(labels)
    if damage:
        raise UserError(f"{_refusal(damage)}; --classes FILE gives other classes")
    for name, index in indexes.items():
        save_index(tars[name], index)
    (out / MANIFEST).unlink(missing_ok=True)
    write_manifest(out, names, splits, {"command": "shards index", "label": label})
    return {split: facts["samples"] for split, facts in splits.items()}


def _old_classes(directory: Path) -> list[str] | None:
    try:
        manifest = read_manifest(directory)
    except UserError:  # a broken manifest is what `index` is here to replace
        return None
    return manifest["classes"] if manifest else None


def _found_classes(texts: np.ndarray) -> list[str]:
    try:
        return [str(number) for number in range(int(texts.astype(np.int64).max()) + 1)]
    except (ValueError, OverflowError):
        found = {text.decode("utf-8", "replace") for text in texts.tolist()}
        return sorted(json.loads(text) if text.startswith('"') else text for text in found)


@contextmanager
def _plain(place: str, data: Data) -> Iterator[Path]:
    """A local, uncompressed tar with the content of a file or URL.  UserError if it cannot be read or fetched."""
    (path,) = FetchDir(data).shards([place], [None]) if place.startswith(URL) else (Path(place),)
    try:
        if not is_packed(path):
            yield path
            return
        with tempfile.NamedTemporaryFile(suffix=".tar") as file, unpacked(path) as content:
            shutil.copyfileobj(content, file)
            file.flush()
            yield Path(file.name)
    except (OSError, EOFError, lzma.LZMAError) as mistake:
        raise UserError(
            f"{place}: cannot be read: {getattr(mistake, 'strerror', None) or mistake}"
        ) from None


def _read_tar(
    name: str, path: Path, label: str, skip: Callable[[Exception], bool]
) -> Iterator[dict]:
    """The intact samples of a tar as webdataset gives them; itself it stops at damage without a word."""
    index = scan_tar(path, label)
    for key, reason in zip(index.damaged, index.reasons, strict=True):
        skip(ValueError(str(Damage(name, str(key), str(reason)))))
    with open(path, "rb") as file:
        for number, key in enumerate(index.keys):
            rows = range(index.member_start[number], index.member_start[number + 1])
            sample = {"__key__": key.decode("utf-8", "replace")}
            for row in rows:
                content = os.pread(file.fileno(), int(index.size[row]), int(index.offset[row]))
                sample[str(index.extensions[index.member_extension[row]])] = content
            yield sample


@dataclass
class Finding:
    """What `validate` says of one shard."""

    shard: str
    samples: int
    bytes: int
    damage: list[Damage] = field(default_factory=list)


def validate(pattern: str, data: Data, split: str) -> list[Finding]:
    """Check every shard against its manifest and itself, and decode every input.  UserError only for the pattern."""
    from rich.progress import track

    # Each shard is opened alone and leniently, so that one finding does not hide the next.
    return [
        _validate(shard, data)
        for shard in track(expand(pattern, data, split), description="validating")
    ]


def _validate(shard: Shard, data: Data) -> Finding:
    path = Path(shard.path)
    if not path.exists():
        return Finding(shard.name, 0, 0, [Damage(shard.name, "", "is absent")])
    stored, _ = load_index(path) or (None, False)
    index = scan_tar(path, data.label)
    finding = Finding(shard.name, len(index), index.bytes)
    finding.damage = [
        Damage(shard.name, str(k), str(r))
        for k, r in zip(index.damaged, index.reasons, strict=True)
    ]
    expected = shard.facts["sha256"] if shard.facts else stored.sha256 if stored else None
    if expected and expected != index.sha256:
        finding.damage.append(
            Damage(shard.name, "", "is not the shard that was indexed (sha256)", 0)
        )
    if not len(index):
        finding.damage.append(Damage(shard.name, "", "holds no intact sample", 0))
        return finding
    names = shard.manifest["classes"] if shard.manifest else None
    if names is None:
        names = (
            [str(number) for number in range(data.classes)]
            if data.classes
            else _found_classes(index.label_texts)
        )
    index, labels = _label(shard, index, names, data, finding.damage)
    if shard.facts and not finding.damage:
        now = shard_facts(path.name, index.bytes, index.sha256, labels, names)
        if any(now[key] != shard.facts[key] for key in ("samples", "class_counts")):
            finding.damage.append(Damage(shard.name, "", "manifest.json counts it otherwise", 0))
    if len(index):
        lenient = data.model_copy(update={"damage": "skip", "damage_share": 0.999999})
        _decode_all(ShardSet("all", [shard], [index], [labels], names, [], lenient), finding)
    return finding


def _decode_all(shards: ShardSet, finding: Finding) -> None:
    for first in range(0, len(shards), 256):
        try:
            _, unreadable = shards.read(np.arange(first, min(first + 256, len(shards))))
        except UserError as mistake:  # not even the first sample can be decoded
            finding.damage.append(Damage(finding.shard, "", str(mistake), 0))
            return
        for sample, reason in unreadable.items():
            finding.damage.append(Damage(finding.shard, shards.keys([sample])[0], reason))


def from_webdataset(
    urls: str,
    out,
    split: str = "train",
    label: str = "cls",
    input_member: str = "",
    class_names: list[str] | None = None,
    damage: str = "strict",
    data: Data | None = None,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
) -> tuple[int, list[str]]:
    """Rewrite whatever webdataset reads (URLs, compressed tars) as one split of shards with a manifest.

    label: the member cls with a number or a name, or "json:FIELD".  input_member: which other member to keep;
    by default the only one that can be decoded.  damage "skip" leaves unreadable samples out.
    Returns (samples written, what was left out and why, one line per sample or place in a tar).
    """
    from rich.progress import track

    data = data or Data()
    table = decoder_table(data.decoders)
    places = [place for part in urls.split("::") for place in braces(part.strip())]
    lost: list[str] = []

    def skip(mistake: Exception) -> bool:
        if damage == "strict":
            raise UserError(
                f"{str(mistake) or type(mistake).__name__}; --damage skip leaves it out".replace(
                    "\n", " "
                )
            )
        lost.append(str(mistake))
        return True

    member, texts = label.partition(":")[0], []

    def samples(description: str) -> Iterator[dict]:
        for place in track(places, description=description):
            with _plain(place, data) as path:
                yield from _read_tar(place, path, label, skip)

    def inputs(sample: dict) -> tuple[str, bytes]:
        found = [name for name in sample if not name.startswith("__") and name != member]
        chosen = (
            [name for name in found if name == input_member]
            if input_member
            else [name for name in found if name in table or name.rpartition(".")[2] in table]
        )
        if len(chosen) != 1:
            raise ValueError(
                f"sample {sample['__key__']} has the members {', '.join(found)}; choose one with --input"
            )
        find_decoder(table, chosen[0])(sample[chosen[0]])
        return chosen[0].rpartition(".")[2], sample[chosen[0]]

    # Two passes: class names, if they are to be found, are needed before the first sample is written.
    names = class_names
    if names is None:
        for sample in samples("labels"):
            try:
                texts.append(read_label(sample[member], label).encode())
            except (KeyError, ValueError):
                continue
        if not texts:
            raise UserError(f"{urls}: no sample has a label {label}")
        names = _found_classes(np.array(texts))
        lost.clear()
    number = 0
    with ShardWriter(out, split, names, samples_per_shard, overwrite) as writer:
        for sample in samples(split):
            try:
                text = read_label(sample[member], label)
                (found,) = parse_labels(np.array([text.encode()]), names)
                if found < 0:
                    raise ValueError(f"label {text} is none of the {len(names)} classes")
                extension, content = inputs(sample)
            except UserError:
                raise
            except Exception as mistake:  # a decoder's
                reason = f"no member .{member}" if isinstance(mistake, KeyError) else str(mistake)
                skip(ValueError(f"{sample['__key__']}: {reason}"))
                continue
            writer.write({"__key__": f"{number:08d}", extension: content, "cls": b"%d" % found})
            number += 1
        if not number:
            raise UserError(f"{urls}: no readable sample")
    made_by = {"command": "shards from-webdataset", "urls": urls, "lost": len(lost)}
    write_manifest(out, names, {split: writer.facts}, made_by)
    return number, lost
