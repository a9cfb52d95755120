"""From a pattern to the shards it means, each with its entry of the manifest.

Shards behind URLs are fetched.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import Counter
from dataclasses import dataclass

from pipeline.config import Data, UserError

from .fetching import FetchDir, is_packed
from .writing import MANIFEST, parse_manifest, read_manifest

URL = ("pipe:", "http:", "https:", "gs:", "s3:", "hf:", "ais:", "sftp:", "ftp:", "scp:", "htgs:")
REWRITE = "`referral shards from-webdataset` rewrites compressed or other shards"


@dataclass(frozen=True)
class Shard:
    """One tar.

    name:     as the user knows it.
    path:     where it is read.
    manifest: of its directory, if any.
    entry:    its own entry of the manifest, if any.
    """

    name: str
    path: str
    directory: str = ""
    manifest: dict | None = None
    entry: dict | None = None


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


class _Manifests:
    """The manifest of each directory, read once.

    It is the one that lies there, else the one that data.manifest names.
    """

    def __init__(self, data: Data):
        self.data = data
        self._known: dict[str, dict | None] = {}

    def of(self, directory: str) -> dict | None:
        """directory: local, or a URL that shards' names are appended to; "" has none of its own."""
        if directory not in self._known:
            self._known[directory] = self._read(directory) or self.given
        return self._known[directory]

    def _read(self, directory: str) -> dict | None:
        if directory.startswith(URL):
            return FetchDir(self.data).manifest(f"{directory}/{MANIFEST}", optional=True)
        return read_manifest(directory or ".")

    @property
    def given(self) -> dict | None:
        """The manifest that data.manifest names, or None."""
        name = self.data.manifest
        if name is None:
            return None
        if name not in self._known:
            try:
                if name.startswith(URL):
                    self._known[name] = FetchDir(self.data).manifest(name)
                else:
                    self._known[name] = parse_manifest(name, name)
            except OSError:
                raise UserError(f"data.manifest = {name}: no such file") from None
        return self._known[name]


def _entry(manifest: dict | None, name: str) -> dict | None:
    """A shard's entry in a manifest."""
    if manifest is None:
        return None
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if shard["name"] == name:
                return shard
    return None


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
    if os.path.exists(path):
        return True
    return _entry(manifests.of(os.path.dirname(path)), os.path.basename(path)) is not None


def _matches(pattern: str, split: str, manifests: _Manifests) -> list[str]:
    """Local shards of one pattern without braces.

    Shards that are spelled out or listed in a manifest belong to it, present or not.
    """
    if os.path.isdir(pattern):
        return _directory_shards(pattern, split, manifests.of(pattern))
    if not glob.has_magic(pattern):
        return [pattern]
    directory = os.path.dirname(pattern)
    matches = set(glob.glob(pattern))
    manifest = manifests.of(directory) or {"splits": {}}
    for entry in manifest["splits"].values():
        paths = [os.path.join(directory, shard["name"]) for shard in entry["shards"]]
        matches.update(path for path in paths if fnmatch.fnmatch(path, pattern))
    return sorted(matches)


def _directory_shards(directory: str, split: str, manifest: dict | None) -> list[str]:
    present = sorted(glob.glob(f"{glob.escape(directory)}/{split}-*.tar"))
    if manifest is None:
        return present
    listed = [os.path.join(directory, name) for name in _listed(manifest, split, directory)]
    # Shards of the split's name that no split lists belong too, or they would be lost without a
    # word.
    unlisted = [path for path in present if _entry(manifest, os.path.basename(path)) is None]
    return listed + unlisted


def _local(path: str, manifests: _Manifests) -> Shard:
    if not path.endswith(".tar"):
        raise UserError(f"{path} is not a .tar; {REWRITE}")
    directory = os.path.dirname(path)
    manifest = manifests.of(directory)
    entry = _entry(manifest, os.path.basename(path))
    if manifest and entry is None:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such shard")
        raise UserError(
            f"{path} is not in {directory}/{MANIFEST}; "
            f"add it with `referral shards index {directory}`"
        )
    return Shard(path, path, directory, manifest, entry)


# URLs


def _shards_behind_urls(pattern: str, split: str, manifests: _Manifests) -> list[Shard]:
    urls: list[str] = []
    for braced in braces(pattern):
        urls += _meant(braced, split, manifests)
    shards_manifests = [_manifest_of(url, manifests) for url in urls]
    entries: list[dict | None] = []
    for url, manifest in zip(urls, shards_manifests, strict=True):
        entry = _entry(manifest, url_name(url))
        if manifest and entry is None:
            raise UserError(f"{url}: its manifest has no shard {url_name(url)!r}")
        entries.append(entry)
    paths = FetchDir(manifests.data).shards(urls, entries)
    shards: list[Shard] = []
    for url, path, manifest, entry in zip(urls, paths, shards_manifests, entries, strict=True):
        if is_packed(path):
            raise UserError(
                f"{url} is compressed; `pipe:curl -sf URL | gunzip` unpacks it, or {REWRITE}"
            )
        shards.append(Shard(url, str(path), _directory_of(url), manifest, entry))
    return shards


def _manifest_of(url: str, manifests: _Manifests) -> dict | None:
    if url.startswith("pipe:"):
        return manifests.given
    return manifests.of(_directory_of(url))


def _meant(url: str, split: str, manifests: _Manifests) -> list[str]:
    """A shard's URL is itself; a directory's means the split's shards there.

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
    return [f"{directory}/{name}" for name in _listed(manifest, split, directory)]


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
