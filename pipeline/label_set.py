"""How many classes there are, as far as it is known without reading shards."""

from __future__ import annotations

from pathlib import Path

from .config import Config, UserError
from .files import read_json

SPLITS = ("train", "val", "test")


def num_classes(config: Config) -> tuple[int | None, str]:
    """Size of the label set, and what says so.

    Raises UserError if a manifest names more classes than data.classes.
    """
    declared = config.data.classes
    for split in SPLITS:
        manifest = manifest_of(getattr(config.data, split))
        if manifest is None:
            continue
        path, content = manifest
        count = len(content["classes"])
        if declared is not None and declared < count:
            raise UserError(
                f"data.classes = {declared}, but {path} names {count} classes: class index "
                f"{count - 1} is out of range; set data.classes = {count} or leave it out"
            )
        return declared or count, str(path)
    return declared, "data.classes"


def manifest_of(pattern: str) -> tuple[Path, dict] | None:
    """The manifest beside a split's first shard, and what it holds. None where there is none."""
    first = Path(pattern.split("::")[0])
    directory = first if first.is_dir() else first.parent
    path = directory / "manifest.json"
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        content["classes"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{path}: not a readable manifest with the names of its classes") from None
    return path, content
