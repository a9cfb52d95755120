"""From a pattern to the list of shards it means, each with its line of the manifest; shards behind URLs are fetched."""

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
    """One tar.  name: as the user knows it; path: where it is read; facts: its entry of the manifest, if any."""

    name: str
    path: str
    directory: str = ""
    manifest: dict | None = None
    facts: dict | None = None


def expand(pattern: str, data: Data, split: str) -> list[Shard]:
    """The shards that `pattern` means, in order.  UserError if it is empty, or matches nothing or a shard twice."""
    if not pattern.strip():
        raise UserError(
            f"data.{split} is empty; give a directory, or DIR/{split}-{{000000..000007}}.tar"
        )
    manifests = _Manifests(data)
    shards: list[Shard] = []
    for part in pattern.split("::"):
        part = part.strip()
        if part.startswith("file:"):
            part = part.removeprefix("file:").removeprefix("//")
        shards.extend((_fetched if part.startswith(URL) else _found)(part, split, manifests))
    for place, times in Counter(os.path.realpath(shard.path) for shard in shards).items():
        if times > 1:
            name = next(shard.name for shard in shards if os.path.realpath(shard.path) == place)
            raise UserError(
                f"data.{split} names {name} {times} times; its samples would count as often"
            )
    return shards


class _Manifests:
    """The manifest of each place, read once: the one that lies there, else the one that data.manifest names."""

    def __init__(self, data: Data):
        self.data = data
        self._known: dict[str, dict | None] = {}

    def of(self, place: str) -> dict | None:
        """place: a directory, or a URL that shards' names are appended to; "" has none of its own."""
        if place not in self._known:
            if place.startswith(URL):
                found = FetchDir(self.data).manifest(f"{place}/{MANIFEST}", optional=True)
            else:
                found = read_manifest(place or ".")
            self._known[place] = found or self.given
        return self._known[place]

    @property
    def given(self) -> dict | None:
        name = self.data.manifest
        if name is None:
            return None
        if name not in self._known:
            try:
                read = (
                    FetchDir(self.data).manifest
                    if name.startswith(URL)
                    else lambda path: parse_manifest(path, path)
                )
                self._known[name] = read(name)
            except OSError:
                raise UserError(f"data.manifest = {name}: no such file") from None
        return self._known[name]


def _facts(manifest: dict | None, name: str) -> dict | None:
    """A shard's entry in a manifest."""
    for split in (manifest or {"splits": {}})["splits"].values():
        for shard in split["shards"]:
            if shard["name"] == name:
                return shard
    return None


def _listed(manifest: dict, split: str, place: str) -> list[str]:
    """Names of a split's shards."""
    if split not in manifest["splits"]:
        splits = ", ".join(manifest["splits"]) or "none"
        raise UserError(f"{place}/{MANIFEST} has no split {split!r} (it has {splits})")
    return [shard["name"] for shard in manifest["splits"][split]["shards"]]


def braces(pattern: str) -> list[str]:
    """The strings that a pattern with {a,b} or {000..007} stands for."""
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise UserError(f"{pattern}: the braces do not match") from None


# Files


def _found(pattern: str, split: str, manifests: _Manifests) -> list[Shard]:
    paths = [match for braced in braces(pattern) for match in _matches(braced, split, manifests)]
    if not any(
        os.path.exists(path) or _facts(manifests.of(os.path.dirname(path)), os.path.basename(path))
        for path in paths
    ):
        raise UserError(f"{pattern}: no {split} shard matches")
    return [_local(path, manifests) for path in paths]


def _matches(pattern: str, split: str, manifests: _Manifests) -> list[str]:
    """Local shards of one brace-free pattern.  Spelled-out and listed shards belong to it, present or not."""
    if os.path.isdir(pattern):
        manifest = manifests.of(pattern)
        if manifest is None:
            return sorted(glob.glob(f"{glob.escape(pattern)}/{split}-*.tar"))
        listed = [os.path.join(pattern, name) for name in _listed(manifest, split, pattern)]
        # Shards of the split's name that no split lists belong too, or they would be lost without a word.
        present = sorted(glob.glob(f"{glob.escape(pattern)}/{split}-*.tar"))
        return listed + [
            path for path in present if _facts(manifest, os.path.basename(path)) is None
        ]
    if not glob.has_magic(pattern):
        return [pattern]
    directory = os.path.dirname(pattern)
    found = set(glob.glob(pattern))
    for facts in (manifests.of(directory) or {"splits": {}})["splits"].values():
        paths = [os.path.join(directory, shard["name"]) for shard in facts["shards"]]
        found.update(path for path in paths if fnmatch.fnmatch(path, pattern))
    return sorted(found)


def _local(path: str, manifests: _Manifests) -> Shard:
    if not path.endswith(".tar"):
        raise UserError(f"{path} is not a .tar; {REWRITE}")
    directory = os.path.dirname(path)
    manifest = manifests.of(directory)
    facts = _facts(manifest, os.path.basename(path))
    if manifest and facts is None:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such shard")
        raise UserError(
            f"{path} is not in {directory}/{MANIFEST}; add it with `referral shards index {directory}`"
        )
    return Shard(path, path, directory, manifest, facts)


# URLs


def _fetched(pattern: str, split: str, manifests: _Manifests) -> list[Shard]:
    urls = [url for braced in braces(pattern) for url in _meant(braced, split, manifests)]
    described = [
        manifests.given if url.startswith("pipe:") else manifests.of(_place(url)) for url in urls
    ]
    facts = [_facts(manifest, url_name(url)) for url, manifest in zip(urls, described, strict=True)]
    for url, manifest, entry in zip(urls, described, facts, strict=True):
        if manifest and entry is None:
            raise UserError(f"{url}: its manifest has no shard {url_name(url)!r}")
    paths = FetchDir(manifests.data).shards(urls, facts)
    for url, path in zip(urls, paths, strict=True):
        if is_packed(path):
            raise UserError(
                f"{url} is compressed; `pipe:curl -sf URL | gunzip` unpacks it, or {REWRITE}"
            )
    return [
        Shard(url, str(path), _place(url), manifest, entry)
        for url, path, manifest, entry in zip(urls, paths, described, facts, strict=True)
    ]


def _meant(url: str, split: str, manifests: _Manifests) -> list[str]:
    """A shard's URL is itself; a directory's, one that does not end in .tar, means the split's shards there."""
    if url.startswith("pipe:") or ".tar" in url.rpartition("/")[2]:
        if "*" in url and not url.startswith("pipe:"):
            raise UserError(
                f"{url}: a URL cannot have *; write braces, {{000000..000007}}, or name the directory"
            )
        return [url]
    place = url.rstrip("/")
    manifest = manifests.of(place)
    if manifest is None:
        raise UserError(
            f"{url} has no {MANIFEST}: name its shards, {place}/{split}-{{000000..000007}}.tar"
        )
    return [f"{place}/{name}" for name in _listed(manifest, split, place)]


def _place(url: str) -> str:
    return "" if url.startswith("pipe:") else url.partition("?")[0].rpartition("/")[0]


def url_name(url: str) -> str:
    """The file name that a URL ends in, or that a pipe's command mentions last: what a manifest calls the shard."""
    mentioned = re.findall(r"[^\s/'\"=?&]+\.tar(?:\.\w+)?", url)
    return mentioned[-1] if mentioned else url
