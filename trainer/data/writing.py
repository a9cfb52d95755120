"""Write webdataset tars and the manifest that says what is in them.  Nothing gets its name before it is complete."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from pipeline.config import UserError
from pipeline.store import read_json, write_json

from .tars import index_path, save_index, scan_tar

MANIFEST = "manifest.json"
SCHEMA = 1


class _Shard(BaseModel):
    name: str = Field(pattern=r"^[^/]+$")
    samples: int = Field(ge=0)
    bytes: int
    sha256: str
    class_counts: dict[str, int]


class _Split(BaseModel):
    samples: int
    shards: list[_Shard]


class _Manifest(BaseModel):
    classes: list[str] = Field(min_length=1)
    splits: dict[str, _Split]


class ShardWriter:
    """Write samples to DIRECTORY/SPLIT-000000.tar, ...; the tars get their names when the `with` block ends well.

    A sample is {"__key__": str without dots, "cls": bytes (the class index in decimal), "png" / "npy" / ...: bytes}.
    After the block `facts` is the split's part of the manifest: {"samples": N, "shards": [...]}; see write_manifest.
    Raises UserError if the split exists already (overwrite=True replaces it) or the directory cannot be written.
    """

    def __init__(
        self,
        directory,
        split: str,
        class_names: list[str],
        samples_per_shard: int = 10_000,
        overwrite=False,
    ):
        assert samples_per_shard > 0, samples_per_shard
        self.directory, self.split, self.class_names = Path(directory), split, list(class_names)
        self.samples_per_shard = samples_per_shard
        self.facts: dict = {}
        self._temporary: list[Path] = []
        self._tar = self._file = None
        self._written = 0
        self._mark = uuid.uuid4().hex[:8]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as mistake:
            raise UserError(f"{self.directory}: cannot be made: {mistake.strerror}") from None
        self._old = sorted(self.directory.glob(f"{split}-*.tar"))
        if self._old and not overwrite:
            raise UserError(
                f"{self.directory} already holds {split} shards; overwrite them, or give an empty directory"
            )

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, sample: dict) -> None:
        """Append one sample.  Raises UserError for a class index out of range, ValueError for a key with a dot."""
        key = sample["__key__"]
        if not key or "." in key or key.startswith("__"):
            raise ValueError(
                f"key {key!r}: webdataset cuts keys at dots; use letters, digits, '-', '_' and '/'"
            )
        label = int(sample["cls"])
        if not 0 <= label < len(self.class_names):
            raise UserError(f"sample {key}: class {label} is not in 0..{len(self.class_names) - 1}")
        if self._written % self.samples_per_shard == 0:
            self._next_tar()
        self._tar.write(sample)
        self._written += 1

    def _next_tar(self) -> None:
        from webdataset import TarWriter

        self._close_tar()
        path = self.directory / f".{self.split}-{len(self._temporary):06d}.tar.{self._mark}"
        try:
            self._file = open(path, "wb")
        except OSError as mistake:
            raise UserError(f"{self.directory}: cannot be written: {mistake.strerror}") from None
        self._temporary.append(path)
        self._tar = TarWriter(self._file, encoder=False, mtime=0)

    def _close_tar(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._tar = self._file = None

    def __exit__(self, kind, error, traceback) -> None:
        self._close_tar()
        try:
            if kind is None:
                self._publish()
        finally:
            for path in self._temporary:
                path.unlink(missing_ok=True)

    def _publish(self) -> None:
        indexes = [scan_tar(path) for path in self._temporary]
        for index in indexes:
            assert not len(index.damaged), (index.damaged, index.reasons)
        for path in self._old:
            path.unlink()
            index_path(path).unlink(missing_ok=True)
        shards = []
        for number, (path, index) in enumerate(zip(self._temporary, indexes, strict=True)):
            shard = self.directory / f"{self.split}-{number:06d}.tar"
            os.replace(path, shard)
            save_index(shard, index)
            labels = index.label_texts.astype(np.int64)
            shards.append(
                shard_facts(shard.name, index.bytes, index.sha256, labels, self.class_names)
            )
        self.facts = {"samples": self._written, "shards": shards}


def shard_facts(
    name: str, size: int, sha256: str, labels: np.ndarray, class_names: list[str]
) -> dict:
    """One shard's entry of the manifest.  labels: int64[n]."""
    classes, counts = np.unique(labels, return_counts=True)
    class_counts = {class_names[c]: int(n) for c, n in zip(classes, counts, strict=True)}
    return {
        "name": name,
        "samples": len(labels),
        "bytes": size,
        "sha256": sha256,
        "class_counts": class_counts,
    }


def write_manifest(
    directory, class_names: list[str], splits: dict[str, dict], made_by: dict | None = None
) -> Path:
    """Write DIRECTORY/manifest.json, or add `splits` ({"train": writer.facts, ...}) to the one that is there.

    Raises UserError if a split that stays has other classes, or if two classes have the same name.
    """
    path = Path(directory) / MANIFEST
    names = list(class_names)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two classes are called {twice!r}; class names must differ")
    old = read_manifest(directory) or {"splits": {}}
    kept = {split: facts for split, facts in old["splits"].items() if split not in splits}
    if kept and old["classes"] != names:
        raise UserError(
            f"{path} describes {', '.join(kept)} with other classes; give an empty directory"
        )
    manifest = {
        "schema": SCHEMA,
        "classes": names,
        "splits": kept | splits,
        "made_by": made_by or {},
    }
    try:
        write_json(path, manifest)
    except OSError as mistake:
        raise UserError(f"{path}: cannot be written: {mistake.strerror}") from None
    return path


def read_manifest(directory) -> dict | None:
    """The manifest of a directory of shards, or None.  Raises UserError if it is not one."""
    path = Path(directory) / MANIFEST
    try:
        return parse_manifest(
            path, path, f"; make it anew with `referral shards index {directory}`"
        )
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_manifest(path: Path, name, remedy: str = "") -> dict:
    """The manifest in the file `path`, which the user knows as `name`.  Raises UserError if it is not one."""
    try:
        manifest = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (json.JSONDecodeError, UnicodeDecodeError, OSError):
        raise UserError(f"{name} cannot be read as JSON{remedy}") from None
    if isinstance(manifest, dict) and manifest.get("schema") != SCHEMA:
        raise UserError(
            f"{name} has schema {manifest.get('schema')!r}, this program reads {SCHEMA}{remedy}"
        )
    try:
        names = _Manifest.model_validate(manifest).classes
    except ValidationError as mistakes:
        first = mistakes.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{name} is not a manifest of shards: {place}: {first['msg']}{remedy}"
        ) from None
    if len(set(names)) != len(names):
        raise UserError(f"{name} has two classes of the same name{remedy}")
    for split, facts in manifest["splits"].items():
        total = sum(shard["samples"] for shard in facts["shards"])
        if facts["samples"] != total:
            raise UserError(
                f"{name} says split {split} has {facts['samples']} samples, its shards {total}{remedy}"
            )
    return manifest
