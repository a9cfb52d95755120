"""Write webdataset tars and the manifest that says what is in them.

Nothing gets its name before it is complete.  A manifest of schema 2 has an array of the classes of
all samples beside it (label_files.py). One of schema 1 has the counts of each shard's classes.
"""

from __future__ import annotations

import shlex
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from networks.pictures import PictureRules
from pipeline.config import UserError
from pipeline.failures import cannot_write, writing
from pipeline.store import read_json, write_json

from .bounds import is_there
from .label_files import LabelFile, remove_label_files, write_labels
from .labels import Kind, check_writable
from .replacing import Replacement, recover
from .tars import TarIndex, index_path, save_index, scan_tar

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

MANIFEST = "manifest.json"
SCHEMA = 2
READABLE = (1, SCHEMA)


NAME = r"^[^/\x00]+$"  # of a file in the manifest's own directory


class _Shard(BaseModel):
    name: str = Field(pattern=NAME)
    samples: int = Field(ge=0)
    bytes: int
    sha256: str
    class_counts: dict[str, int] | None = None  # of schema 1
    labels: Literal["indices", "names"] | None = None  # what `index` found them to be


class _Split(BaseModel):
    samples: int
    shards: list[_Shard]
    labels: LabelFile | None = None


class _Manifest(BaseModel):
    classes: list[str] = Field(min_length=1)
    splits: dict[Annotated[str, Field(pattern=NAME)], _Split]


class ShardWriter:
    """Write samples to DIRECTORY/SPLIT-000000.tar, ...

    A context manager: the tars get their names when the `with` block ends well.

    Parameters
    ----------
    directory : path
    split : str
    class_names : sequence of str
    samples_per_shard : int
    overwrite : bool
        Replace the split if it is there.
    replacement : Replacement, optional
        Whose commit puts the tars in place, with those of others. By default the block's end does.

    Attributes
    ----------
    facts : dict
        After the block, the split's entry of the manifest: {"samples": N, "shards": [...]}. See
        write_manifest.

    Raises
    ------
    UserError
        If the split exists already, or the directory cannot be written.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        class_names: Sequence[str],
        samples_per_shard: int = 10_000,
        overwrite: bool = False,
        replacement: Replacement | None = None,
    ):
        assert samples_per_shard > 0, samples_per_shard
        self._replacement = replacement
        self.directory = Path(directory)
        self.split = split
        self.class_names = list(class_names)
        self.samples_per_shard = samples_per_shard
        self.facts: dict = {}
        self._temporary: list[Path] = []
        self._tar: TarWriter | None = None
        self._file: BinaryIO | None = None
        self._written = 0
        self._mark = uuid.uuid4().hex[:8]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be made: {error.strerror}") from None
        recover(self.directory)
        self._old = sorted(self.directory.glob(f"{split}-*.tar"))
        if self._old and not overwrite:
            raise UserError(
                f"{self.directory} already holds {split} shards; overwrite them, "
                "or give an empty directory"
            )

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, sample: Mapping[str, str | bytes]) -> None:
        """Append one sample.

        sample: {"__key__": str without dots, "cls": bytes (the class index in decimal), "png" /
        "npy" / ...: bytes}.
        Raises UserError for a class index out of range, ValueError for a key with a dot.
        """
        key = sample["__key__"]
        assert isinstance(key, str), key
        if not key or "." in key or key.startswith("__"):
            raise ValueError(
                f"key {key!r}: webdataset cuts keys at dots; use letters, digits, '-', '_' and '/'"
            )
        label = int(sample["cls"])
        if not 0 <= label < len(self.class_names):
            raise UserError(f"sample {key}: class {label} is not in 0..{len(self.class_names) - 1}")
        if self._tar is None or self._written % self.samples_per_shard == 0:
            self._tar = self._next_tar()
        with writing(self.directory):
            self._tar.write(dict(sample))
        self._written += 1

    def _next_tar(self) -> TarWriter:
        from webdataset.writer import TarWriter

        self._close_tar()
        path = self.directory / f".{self.split}-{len(self._temporary):06d}.tar.{self._mark}"
        try:
            self._file = open(path, "wb")
        except OSError as error:
            raise cannot_write(self.directory, error) from None
        self._temporary.append(path)
        return TarWriter(self._file, encoder=False, mtime=0)

    def _close_tar(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with writing(self.directory):
                self._close_tar()
                if kind is None:
                    self._publish()
        finally:
            if kind is not None or self._replacement is None:
                for path in self._temporary:
                    path.unlink(missing_ok=True)

    def _publish(self) -> None:
        """Give the tars and their indexes their names, or leave that to the replacement."""
        replacement = self._replacement or Replacement()
        shards = []
        for number, path in enumerate(self._temporary):
            index = scan_tar(path)
            assert not len(index.damaged), (index.damaged, index.reasons)
            shard = self.directory / f"{self.split}-{number:06d}.tar"
            replacement.put(path, shard)
            if save_index(path, index):  # it has the tar's size and time, which a name is not
                replacement.put(index_path(path), index_path(shard))
            labels = np.array([int(text) for text in index.label_texts], np.int64)
            shards.append(shard_entry(shard.name, index, labels[index.label_number]))
        for path in self._old:
            replacement.retire([path, index_path(path)])
        self.facts = {"samples": self._written, "shards": shards}
        if self._replacement is None:
            with replacement:
                replacement.commit()


def shard_entry(name: str, index: TarIndex, labels: np.ndarray, kind: Kind | None = None) -> dict:
    """One shard's entry, as `write_manifest` takes it.

    labels: int [n], the class of each sample.  kind: what the shard's label members are. None is
    not written, and means the indices that ShardWriter writes.
    """
    used = index.extensions[np.unique(index.member_extension)]
    entry = {
        "name": name,
        "samples": len(labels),
        "bytes": index.bytes,
        "sha256": index.sha256,
        "classes": np.asarray(labels, np.int32),
        "extensions": used.tolist(),
    }
    return entry | {"labels": kind} if kind else entry


def write_manifest(
    directory: str | Path,
    class_names: Sequence[str],
    splits: dict[str, dict],
    made_by: dict | None = None,
    pictures: PictureRules | None = None,
    label: str = "cls",
) -> Path:
    """Write DIRECTORY/manifest.json, or add splits to the one that is there.

    Parameters
    ----------
    directory : path
    class_names : sequence of str
    splits : {split: entry}
        Entries are ShardWriter.facts.
    made_by : dict, optional
        The command that made them, and its options.
    pictures : PictureRules, optional
        How pictures became what the shards hold. They are read by these rules.
    label : str
        The member that the labels were read from, or "json:FIELD".

    Returns
    -------
    Path
        Of the manifest.

    Raises
    ------
    UserError
        If a split that stays has other classes or other rules of pictures, or if two classes have
        the same name.
    """
    path = Path(directory) / MANIFEST
    names = list(class_names)
    check_writable(names, path)
    if len(set(names)) != len(names):
        twice, _ = Counter(names).most_common(1)[0]
        raise UserError(f"two classes are called {twice!r}; class names must differ")
    old = read_manifest(directory) or {"splits": {}}
    kept = {split: entry for split, entry in old["splits"].items() if split not in splits}
    if kept and old["classes"] != names:
        raise UserError(
            f"{path} describes {', '.join(kept)} with other classes; give an empty directory"
        )
    if kept:
        pictures = agreed_rules(
            {", ".join(kept): recorded_rules(old), "what is added": pictures}, path
        )
    manifest: dict = {
        "schema": SCHEMA,
        "classes": names,
        "splits": dict(kept),
        "made_by": made_by or {},
    }
    if pictures is not None:
        manifest["inputs"] = {"pictures": pictures.as_json()}
    try:
        for split, entry in splits.items():
            manifest["splits"][split] = _with_label_file(path.parent, split, entry, label)
        write_json(path, manifest)
        remove_label_files(path.parent, manifest["splits"])
    except OSError as error:
        raise cannot_write(path, error) from None
    return path


def _with_label_file(directory: Path, split: str, entry: dict, label: str) -> dict:
    """A split's entry as it is written: the classes of its samples go to a file of their own.

    Shards whose entries have `class_counts` stay as they are, as schema 1 has them.
    """
    shards = entry["shards"]
    if not all("classes" in shard for shard in shards):
        assert not any("classes" in shard for shard in shards), "shards of two kinds"
        return entry
    beside = ("classes", "extensions")
    extensions = [extension for shard in shards for extension in shard["extensions"]]
    classes = [shard["classes"] for shard in shards]
    kept = [{key: shard[key] for key in shard if key not in beside} for shard in shards]
    said = write_labels(directory, split, classes, label, extensions)
    return {"samples": entry["samples"], "shards": kept, "labels": said}


def recorded_rules(manifest: dict) -> PictureRules | None:
    """How the pictures of a manifest's shards were made. None where it does not say.

    Raises ValueError for rules that cannot be.
    """
    inputs = manifest.get("inputs")
    if isinstance(inputs, dict) and "pictures" in inputs:
        return PictureRules.from_json(inputs["pictures"])
    # Before rules were recorded, `shards folder` cut and scaled in this one way.
    made_by = manifest.get("made_by") or {}
    size, gray = made_by.get("size"), made_by.get("gray")
    if made_by.get("command") != "shards folder" or not (size or gray):
        return None
    return PictureRules(
        size=(size, size) if size else None,
        channels=1 if gray else 3,
    )


def agreed_rules(
    rules: Mapping[str, PictureRules | None], where: str | Path
) -> PictureRules | None:
    """The one way in which the pictures of several sets were made. None of no sets.

    rules: by the name of the set.  UserError, which says `where`, if they were made differently.
    """
    (first, agreed), *others = rules.items() or [("", None)]
    for name, one in others:
        joined = agreed.joined(one) if agreed and one else None
        if joined is None and agreed is not one:
            raise UserError(
                f"{where}: pictures of {first} and of {name} were made by different rules "
                f"({describe(agreed)}; {describe(one)}); make all by one"
            )
        agreed = joined
    return agreed


def describe(rules: PictureRules | None) -> str:
    """Rules of pictures in a message."""
    if rules is None:
        return "none recorded"
    return ", ".join(f"{key} {value}" for key, value in rules.as_json().items())


def read_manifest(directory: str | Path) -> dict | None:
    """The manifest of a directory of shards, or None.  Raises UserError if it is not one."""
    path = Path(directory) / MANIFEST
    remedy = f"; make it anew with `referral shards index {shlex.quote(str(directory))}`"
    try:
        return parse_manifest(path, path, remedy)
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_manifest(path: str | Path, name: str | Path, remedy: str = "") -> dict:
    """The manifest in the file `path`, which the user knows as `name`.

    Raises UserError if it is not one, FileNotFoundError or NotADirectoryError if it is not there.
    """
    try:
        is_there(path)  # refuses what is no regular file
        manifest = read_json(Path(path))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{name} cannot be read as JSON{remedy}") from None
    if isinstance(manifest, dict) and manifest.get("schema") not in READABLE:
        readable = " and ".join(map(str, READABLE))
        raise UserError(
            f"{name} has schema {manifest.get('schema')!r}, this program reads {readable}{remedy}"
        )
    try:
        class_names = _Manifest.model_validate(manifest).classes
    except ValidationError as errors:
        first = errors.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{name} is not a manifest of shards: {key}: {first['msg']}{remedy}"
        ) from None
    if len(set(class_names)) != len(class_names):
        raise UserError(f"{name} has two classes of the same name{remedy}")
    check_writable(class_names, name)
    try:
        recorded_rules(manifest)
    except ValueError as error:
        raise UserError(f"{name}: inputs.{error}{remedy}") from None
    for split, entry in manifest["splits"].items():
        total = sum(shard["samples"] for shard in entry["shards"])
        if entry["samples"] != total:
            raise UserError(
                f"{name} says split {split} has {entry['samples']} samples, "
                f"its shards {total}{remedy}"
            )
        if "labels" not in entry and any("class_counts" not in each for each in entry["shards"]):
            raise UserError(f"{name} does not say the classes of split {split}{remedy}")
    return manifest
