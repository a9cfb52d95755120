"""From a pattern to the list of shards it means, each with its line of the manifest; shards behind URLs are fetched."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..config import Data, UserError
from .writing import MANIFEST, read_manifest

ATTEMPTS = 3
URL = ("pipe:", "http:", "https:", "gs:", "s3:", "hf:", "ais:", "sftp:", "ftp:", "scp:", "file:", "htgs:")


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
        raise UserError(f"data.{split} is empty; give a directory, or DIR/{split}-{{000000..000007}}.tar")
    manifests: dict[str, dict | None] = {}
    shards: list[Shard] = []
    for part in pattern.split("::"):
        part = part.strip()
        if part.startswith("file:"):
            part = part.removeprefix("file:").removeprefix("//")
        if part.startswith(URL):
            shards.extend(_fetch_all(_braces(part), data))
            continue
        paths = [match for braced in _braces(part) for match in _matches(braced, split, manifests)]
        if not any(os.path.exists(path) or _facts(path, manifests) for path in paths):
            raise UserError(f"{part}: no {split} shard matches")
        shards.extend(_local(path, manifests) for path in paths)
    for place, times in Counter(os.path.realpath(shard.path) for shard in shards).items():
        if times > 1:
            raise UserError(f"data.{split} names {place} {times} times; its samples would count as often")
    return shards


def _braces(pattern: str) -> list[str]:
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise UserError(f"{pattern}: the braces do not match") from None


def _matches(pattern: str, split: str, manifests: dict) -> list[str]:
    """Local shards of one brace-free pattern.  Spelled-out and listed shards belong to it, present or not."""
    if os.path.isdir(pattern):
        manifest = _manifest(pattern, manifests)
        if manifest is None:
            return sorted(glob.glob(f"{glob.escape(pattern)}/{split}-*.tar"))
        if split not in manifest["splits"]:
            splits = ", ".join(manifest["splits"]) or "none"
            raise UserError(f"{pattern}/{MANIFEST} has no split {split!r} (it has {splits})")
        return [os.path.join(pattern, shard["name"]) for shard in manifest["splits"][split]["shards"]]
    if not glob.has_magic(pattern):
        return [pattern]
    directory = os.path.dirname(pattern)
    found = set(glob.glob(pattern))
    for facts in (_manifest(directory, manifests) or {"splits": {}})["splits"].values():
        paths = [os.path.join(directory, shard["name"]) for shard in facts["shards"]]
        found.update(path for path in paths if fnmatch.fnmatch(path, pattern))
    return sorted(found)


def _manifest(directory: str, manifests: dict) -> dict | None:
    if directory not in manifests:
        manifests[directory] = read_manifest(directory or ".")
    return manifests[directory]


def _facts(path: str, manifests: dict) -> dict | None:
    directory, name = os.path.split(path)
    for facts in (_manifest(directory, manifests) or {"splits": {}})["splits"].values():
        for shard in facts["shards"]:
            if shard["name"] == name:
                return shard
    return None


def _local(path: str, manifests: dict) -> Shard:
    if not path.endswith(".tar"):
        raise UserError(f"{path} is not a .tar; `referral shards from-webdataset` rewrites compressed or other shards")
    directory = os.path.dirname(path)
    manifest, facts = _manifest(directory, manifests), _facts(path, manifests)
    if manifest and facts is None:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such shard")
        raise UserError(f"{path} is not in {directory}/{MANIFEST}; add it with `referral shards index {directory}`")
    return Shard(path, path, directory, manifest, facts)


def _fetch_all(urls: list[str], data: Data) -> list[Shard]:
    directory = Path(data.fetch_dir or "~/.cache/referral/shards").expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as mistake:
        raise UserError(f"data.fetch_dir = {directory}: cannot be made: {mistake.strerror}") from None
    shards, total = [], 0
    for url in urls:
        path = directory / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
        if not path.exists():
            _fetch(url, path, data.fetch_bytes - total)
        total += path.stat().st_size
        if total > data.fetch_bytes:
            raise UserError(f"{url}: the fetched shards take more than data.fetch_bytes = {data.fetch_bytes}")
        shards.append(Shard(url, str(path)))
    return shards


def _fetch(url: str, path: Path, limit: int) -> None:
    """Copy a URL's whole content to `path`, in up to ATTEMPTS attempts."""
    from webdataset.gopen import gopen

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    for attempt in range(ATTEMPTS):
        try:
            with gopen(url, "rb") as stream, open(temporary, "wb") as file:
                while block := stream.read(1 << 20):
                    file.write(block)
                    if file.tell() > limit:
                        raise UserError(f"{url}: the fetched shards take more than data.fetch_bytes = {limit}")
            if not temporary.stat().st_size:
                raise OSError("it is empty")
            os.replace(temporary, path)
            return
        except (OSError, ValueError, ImportError) as mistake:
            if attempt == ATTEMPTS - 1:
                raise UserError(f"{url}: cannot be fetched: {mistake}".replace("\n", " ")) from None
            time.sleep(0.2 * 4**attempt)
        finally:
            temporary.unlink(missing_ok=True)
