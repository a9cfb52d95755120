"""What identifies a stage: the config that it reads, its data and its inputs.

The identity is a hash, a stage's key.  It holds what differs from frozen defaults, so that a key
of the config that a later version adds stales nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from .config import Config
from .config.frozen import IN_A_KEY_OTHERWISE, IN_NO_KEY, SCHEMA_1, SINCE_SCHEMA_1

SCHEMA = 2
SPLITS = ("train", "val", "test", "transfer", "ood")


def digest(value) -> str:
    """Hash of a JSON-able value, the same for equal values whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Identity:
    """The config as stages' keys see it: shards by content, without what changes no metric."""

    def __init__(self, config: Config):
        values = config.dump()
        for split in SPLITS:
            values["data"][split] = shard_identities(values["data"][split])
        self.ood = values["data"].pop("ood")  # of evaluation alone
        values["ensemble"].pop("networks")  # by what they hold, wherever they lie
        for key in IN_A_KEY_OTHERWISE["controls"]:  # each of the stage that it makes
            values["controls"].pop(key)
        if config.specialists.given_start:
            values["specialists"]["from"] = classifier_identity(config.specialists.given_start)
        for section, keys in IN_NO_KEY.items():
            tables = values[section].values() if section == "students" else [values[section]]
            for table in tables:
                for key in keys:
                    table.pop(key, None)
        self.values = values

    def section(self, name: str):
        """The value of "section" or "students.NAME"."""
        value = self.values
        for part in name.split("."):
            value = value[part]
        return value

    def difference(self, name: str):
        """What of a section differs from the frozen defaults."""
        value, kind = self.section(name), name.partition(".")[0]
        if not isinstance(value, dict):
            return value
        frozen = {**SCHEMA_1.get(kind, {}), **SINCE_SCHEMA_1.get(kind, {})}
        return {key: each for key, each in value.items() if each != frozen.get(key)}

    def in_schema_1(self, name: str):
        """A section as version 1 hashed it: all of the keys that it had."""
        value, kind = self.section(name), name.partition(".")[0]
        if not isinstance(value, dict):
            return value
        later = SINCE_SCHEMA_1.get(kind, {})
        return {key: each for key, each in value.items() if later.get(key, ...) != each}

    def keys(
        self,
        names: tuple[str, str],
        sections: Iterable[str],
        inputs: Iterable[tuple[str, str]],
        extra: dict,
    ) -> tuple[str, str]:
        """A stage's key, and the one that version 1 gave the same stage.

        names: of its kind, today's and version 1's.  inputs: the same pair of each stage that it
        waits for.  extra: what enters beside config and inputs.
        """
        now, before = zip(*inputs, strict=True) if inputs else ((), ())
        new = {section: self.difference(section) for section in sections}
        old = {section: self.in_schema_1(section) for section in sections}
        return (
            digest([SCHEMA, names[0], new, list(now), extra]),
            digest([1, names[1], old, list(before), extra]),
        )


def file_hash(path: Path | None) -> str | None:
    """sha256 of a file's content. None without one."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path else None
    except OSError:
        return None


def network_identity(directory: str) -> list[str | None]:
    """What identifies a teacher from elsewhere: the contents of its files."""
    folder = Path(directory)
    return [
        file_hash(folder / "ensemble.json"),
        weights_hash(folder / "generalist"),
        file_hash(folder / "model.json"),
        weights_hash(folder),
    ]


def classifier_identity(directory: str) -> list[str | None]:
    """Identifies one network, of a run its generalist, by the contents of its files."""
    folder = classifier_folder(Path(directory))
    return [file_hash(folder / "model.json"), weights_hash(folder)]


def weight_files(folder: Path) -> list[Path]:
    """Files with a saved network's weights: one, or one for each rank that split its head.

    [] where there is none, or the index of several is not there yet.
    """
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if not (folder / "model.safetensors.index.json").is_file():
        return []
    return sorted(folder.glob("model-*-of-*.safetensors"))


def weights_hash(folder: Path) -> str | None:
    """sha256 of the file of a network's weights, or of all files' one after the other."""
    hashes = [file_hash(path) for path in weight_files(folder)]
    if len(hashes) < 2:
        return next(iter(hashes), None)
    return hashlib.sha256("".join(map(str, hashes)).encode()).hexdigest()


def classifier_folder(path: Path) -> Path:
    """Where the network of a path lies: of a run it is the generalist."""
    if (path / "generalist").is_dir():
        return path / "generalist"
    return path


def is_saved_network(path: str | Path) -> bool:
    """Whether a directory is a run, or a network that Referral saved. Else it may be a hub's."""
    folder = Path(path)
    return (folder / "generalist").is_dir() or (folder / "model.json").is_file()


def shard_identities(pattern: str) -> list:
    """What a split's shards are, whatever directory they lie in.

    Per source: its file names and its manifest's hash.  Data made anew under the same name is other
    data, data moved elsewhere the same.  Without a manifest the path counts.
    """
    identities = []
    for source in pattern.split("::"):
        path = Path(source)
        directory, files = (path, "") if path.is_dir() else (path.parent, path.name)
        manifest = file_hash(directory / "manifest.json")
        identities.append([files, manifest] if manifest else source)
    return identities
