"""From a pattern to the shards it means, each with its entry of the manifest.

Shards behind URLs are fetched.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.config import Data, UserError
from pipeline.redaction import redacted

from .bounds import is_there
from .fetching import FetchDir
from .label_files import SplitLabels, open_labels
from .packing import is_packed
from .writing import MANIFEST, parse_manifest, read_manifest

URL = ("pipe:", "http:", "https:", "gs:", "s3:", "hf:", "ais:", "sftp:", "ftp:", "scp:", "htgs:")
KEPT_SHARE = 1 / 8  # of data.fetch_bytes: with data.stream_shards a smaller split is kept whole
REWRITE = "`referral shards from-webdataset` rewrites compressed or other shards"


@dataclass(frozen=True)
class Shard:
    """One tar.

    name:     as the user knows it.
    path:     where it is read.
    manifest: of its directory, if any.
    entry:    its own entry of the manifest, if any.
    labels:   of all samples of its split, where the manifest has them.
    first:    the place of its own first sample in them.
    url:      where it comes from, else "".
    streams:  it is fetched when it is read, and not kept.
    """

    name: str
    path: str
    directory: str = ""
    manifest: dict | None = None
    entry: dict | None = None
    labels: SplitLabels | None = None
    first: int = 0
    url: str = ""
    streams: bool = False

    @property
    def classes(self) -> np.ndarray | None:
        """int32 [n]: the class of each of its samples, where the manifest says it."""
        if self.labels is None or self.entry is None:
            return None
        return self.labels.classes[self.first : self.first + self.entry["samples"]]


def expand(pattern: str, data: Data, split: str) -> list[Shard]:
    """The shards that `pattern` means, in order.

    Raises UserError if the pattern is empty, or matches nothing or a shard twice.
    """
    if not pattern.strip():
        raise UserError(
            f"data.{split} is empty; give a directory, or DIR/{split}-{{000000..000007}}.tar"
        )
    manifests = _Manifests(data)
    shards: list[Shard] = []
    for part in map(str.strip, pattern.split("::")):
        if part.startswith(URL):
            shards += _shards_behind_urls(part, split, manifests)
        else:
            if part.startswith("file:"):
                part = part.removeprefix("file:").removeprefix("//")
            shards += _local_shards(part, split, manifests)
    _check_distinct(shards, split)
    return shards


def _check_distinct(shards: list[Shard], split: str) -> None:
    names = {os.path.realpath(shard.path): shard.name for shard in reversed(shards)}
    for path, times in Counter(os.path.realpath(shard.path) for shard in shards).items():
        if times > 1:
            raise UserError(
                f"data.{split} names {names[path]} {times} times; its samples would count as often"
            )


class _Manifest:
    """A manifest, where it lies, and its shards by name.

    content: as in manifest.json.  name: its path or URL.
    """

    def __init__(self, content: dict, name: str, data: Data):
        self.content = content
        self.name = name
        self.data = data
        self.entries: dict[str, tuple[dict, str, int]] = {}  # entry, split, first sample
        for split, value in content["splits"].items():
            first = 0
            for entry in value["shards"]:
                self.entries.setdefault(entry["name"], (entry, split, first))
                first += entry["samples"]
        self._labels: dict[str, SplitLabels | None] = {}

    def shard(self, name: str, path: str, directory: str, listed: str) -> Shard:
        """The shard that the manifest calls `listed`."""
        entry, split, first = self.entries[listed]
        return Shard(name, path, directory, self.content, entry, self.labels(split), first)

    def labels(self, split: str) -> SplitLabels | None:
        """The classes of a split's samples. None where the manifest only counts them."""
        if split not in self._labels:
            self._labels[split] = self._opened(split)
        return self._labels[split]

    def _opened(self, split: str) -> SplitLabels | None:
        said = self.content["splits"][split].get("labels")
        if said is None:
            return None
        if self.name.startswith(URL):
            url = f"{_directory_of(self.name)}/{said['file']}"
            path = FetchDir(self.data).label_file(url, said)
        else:
            path = Path(self.name).with_name(said["file"])
        return open_labels(path, self.content, split, self.name)


class _Manifests:
    """The manifest of each directory, read once.

    It is the one that lies there, else the one that data.manifest names.
    """

    def __init__(self, data: Data):
        self.data = data
        self._known: dict[str, _Manifest | None] = {}

    def of(self, directory: str) -> _Manifest | None:
        """directory: local, or a URL that shards' names are appended to. "" has none of its own."""
        if directory not in self._known:
            self._known[directory] = self._read(directory) or self.given
        return self._known[directory]

    def _read(self, directory: str) -> _Manifest | None:
        name = f"{directory}/{MANIFEST}" if directory else MANIFEST
        if directory.startswith(URL):
            content = FetchDir(self.data).manifest(name, optional=True)
        else:
            content = read_manifest(directory or ".")
        return _Manifest(content, name, self.data) if content else None

    @property
    def given(self) -> _Manifest | None:
        """The manifest that data.manifest names, or None."""
        name = self.data.manifest
        if name is None:
            return None
        if name not in self._known:
            try:
                if name.startswith(URL):
                    content = FetchDir(self.data).manifest(name)
                else:
                    content = parse_manifest(name, name)
            except OSError:
                raise UserError(f"data.manifest = {name}: no such file") from None
            assert content is not None
            self._known[name] = _Manifest(content, name, self.data)
        return self._known[name]


def _listed(manifest: dict, split: str, directory: str) -> list[str]:
    """Names of a split's shards."""
    if split not in manifest["splits"]:
        splits = ", ".join(manifest["splits"]) or "none"
        raise UserError(f"{directory}/{MANIFEST} has no split {split!r} (it has {splits})")
    return [shard["name"] for shard in manifest["splits"][split]["shards"]]


def braces(pattern: str) -> list[str]:
    """The strings that a pattern with {a,b} or {000..007} stands for."""
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"{pattern}: the braces do not match") from None


# Files


def _local_shards(pattern: str, split: str, manifests: _Manifests) -> list[Shard]:
    paths: list[str] = []
    for braced in braces(pattern):
        paths += _matches(braced, split, manifests)
    if not any(_is_known(path, manifests) for path in paths):
        kind = "" if split == "*" else f"{split} "
        raise UserError(f"{pattern}: no {kind}shard matches")
    return [_local(path, manifests) for path in paths]


def _is_known(path: str, manifests: _Manifests) -> bool:
    if is_there(path):
        return True
    manifest = manifests.of(os.path.dirname(path))
    return manifest is not None and os.path.basename(path) in manifest.entries


def _matches(pattern: str, split: str, manifests: _Manifests) -> list[str]:
    """Local shards of one pattern without braces.

    Shards that are spelled out or listed in a manifest belong to it, present or not.
    """
    if os.path.isdir(pattern):
        found = _directory_shards(pattern, split, manifests.of(pattern))
        if found or not pattern.endswith(".tar"):
            return found
        return [pattern]  # called like a shard, it is refused as none
    if not glob.has_magic(pattern):
        return [pattern]
    directory = os.path.dirname(pattern)
    matches = set(glob.glob(pattern))
    manifest = manifests.of(directory)
    if manifest is not None:
        paths = [os.path.join(directory, name) for name in manifest.entries]
        matches.update(path for path in paths if fnmatch.fnmatch(path, pattern))
    return sorted(matches)


def _directory_shards(directory: str, split: str, manifest: _Manifest | None) -> list[str]:
    present = sorted(glob.glob(f"{glob.escape(directory)}/{split}-*.tar"))
    if manifest is None:
        return present
    names = _listed(manifest.content, split, directory)
    listed = [os.path.join(directory, name) for name in names]
    # Shards of the split's name that no split lists belong too, or they would be lost without a
    # word.
    unlisted = [path for path in present if os.path.basename(path) not in manifest.entries]
    return listed + unlisted


def _local(path: str, manifests: _Manifests) -> Shard:
    if not path.endswith(".tar"):
        raise UserError(f"{path} is not a .tar; {REWRITE}")
    is_there(path)  # refuses what is no regular file before anything reads it
    directory, name = os.path.split(path)
    manifest = manifests.of(directory)
    if manifest is None:
        return Shard(path, path, directory)
    if name not in manifest.entries:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such shard")
        raise UserError(
            f"{path} is not in {directory}/{MANIFEST}; "
            f"add it with `referral shards index {shlex.quote(str(directory))}`"
        )
    return manifest.shard(path, path, directory, name)


# URLs


def _shards_behind_urls(pattern: str, split: str, manifests: _Manifests) -> list[Shard]:
    urls: list[str] = []
    for braced in braces(pattern):
        urls += _meant(braced, split, manifests)
    found = [_manifest_of(url, manifests) for url in urls]
    entries: list[dict | None] = []
    for url, manifest in zip(urls, found, strict=True):
        if manifest and url_name(url) not in manifest.entries:
            raise UserError(f"{url}: its manifest has no shard {url_name(url)!r}")
        entries.append(manifest.entries[url_name(url)][0] if manifest else None)
    fetch_dir = FetchDir(manifests.data)
    size = sum(fetch_dir.taken(entry) for entry in entries if entry)
    if manifests.data.stream_shards and size > KEPT_SHARE * fetch_dir.limit:
        return [_streaming(url, each, fetch_dir) for url, each in zip(urls, found, strict=True)]
    paths = fetch_dir.shards(urls, entries)
    shards: list[Shard] = []
    for url, path, manifest in zip(urls, paths, found, strict=True):
        if is_packed(path):
            raise UserError(
                f"{url} is compressed; `pipe:curl -sf URL | gunzip` unpacks it, or {REWRITE}"
            )
        # What a shard is called is for messages, logs and reports.
        name, directory = redacted(url), redacted(_directory_of(url))
        shard = Shard(name, str(path), directory)
        if manifest is not None:
            shard = manifest.shard(name, str(path), directory, url_name(url))
        shards.append(replace(shard, url=url))
    return shards


def _streaming(url: str, manifest: _Manifest | None, fetch_dir: FetchDir) -> Shard:
    """A shard that is fetched when it is read.  UserError where it cannot be."""
    name, data = url_name(url), fetch_dir.data
    labels = manifest.labels(manifest.entries[name][1]) if manifest else None
    if manifest is None or labels is None:
        raise UserError(
            f"data.stream_shards = {data.stream_shards}: {url} needs a manifest with the classes "
            "of its samples (schema 2); `referral shards index URLS --out DIR` makes one, for "
            "data.manifest or to be put beside the shards"
        )
    entry = manifest.entries[name][0]
    if fetch_dir.taken(entry) > fetch_dir.limit:
        raise UserError(
            f"{url}: one shard of {entry['bytes']} bytes and its index take more than "
            f"data.fetch_bytes = {fetch_dir.limit}; raise it, or write smaller shards with "
            "`referral shards from-webdataset`"
        )
    path = str(fetch_dir.place_of(url, entry))
    shard = manifest.shard(redacted(url), path, redacted(_directory_of(url)), name)
    return replace(shard, url=url, streams=True)


def _manifest_of(url: str, manifests: _Manifests) -> _Manifest | None:
    if url.startswith("pipe:"):
        return manifests.given
    return manifests.of(_directory_of(url))


def _meant(url: str, split: str, manifests: _Manifests) -> list[str]:
    """A shard's URL is itself. A directory's means the split's shards there.

    A directory's is one that does not end in .tar.
    """
    is_pipe = url.startswith("pipe:")
    if is_pipe or ".tar" in url.rpartition("/")[2]:
        if "*" in url and not is_pipe:
            raise UserError(
                f"{url}: a URL cannot have *; write braces, {{000000..000007}}, "
                "or name the directory"
            )
        return [url]
    directory = url.rstrip("/")
    manifest = manifests.of(directory)
    if manifest is None:
        raise UserError(
            f"{url} has no {MANIFEST}: name its shards, {directory}/{split}-{{000000..000007}}.tar"
        )
    return [f"{directory}/{name}" for name in _listed(manifest.content, split, directory)]


def _directory_of(url: str) -> str:
    if url.startswith("pipe:"):
        return ""
    return url.partition("?")[0].rpartition("/")[0]


def url_name(url: str) -> str:
    """What a manifest calls the shard behind a URL.

    The file name that the URL ends in, or that a pipe's command mentions last.
    """
    mentioned = re.findall(r"[^\s/'\"=?&]+\.tar(?:\.\w+)?", url)
    return mentioned[-1] if mentioned else url
