"""Directories as Hugging Face's hub has them: config.json beside model.safetensors."""

from __future__ import annotations

from pathlib import Path

from . import regular
from .checkpoints import INDEX

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def pretrained_file(directory: Path) -> Path:
    """The file of weights in a directory that a hub's snapshot is, or the index of several.

    Raises ValueError where there is none.
    """
    for name in (*WEIGHTS, *(f"{whole}{INDEX}" for whole in WEIGHTS)):
        if (directory / name).is_file():
            return directory / name
    raise ValueError(
        f"no network is saved there: neither model.json, a run's generalist/, nor {WEIGHTS[0]}"
    )


def normalisation(directory: Path) -> tuple[list[float], list[float]] | None:
    """(mean, std) of inputs in 0..1 that the network learned from, where the directory says so.

    timm writes them into config.json, transformers into preprocessor_config.json.
    """
    timm = _read(directory / "config.json").get("pretrained_cfg", {})
    transformers = _read(directory / "preprocessor_config.json")
    for table, mean, std in ((timm, "mean", "std"), (transformers, "image_mean", "image_std")):
        if isinstance(table, dict) and table.get(mean) and table.get(std):
            return list(table[mean]), list(table[std])
    return None


def class_names(directory: Path) -> list[str] | None:
    """The names of the head's rows in their order, where the directory's config.json has them.

    transformers writes them as id2label, timm as label_names.  Names that only count (LABEL_0) say
    nothing.
    """
    config = _read(directory / "config.json")
    names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if not isinstance(names, list):
        table = config.get("id2label")
        if not isinstance(table, dict):
            return None
        names = [table.get(str(row)) for row in range(len(table))]
    texts = [name for name in names if isinstance(name, str)]
    counted = [f"LABEL_{row}" for row in range(len(names))]
    return None if len(texts) < len(names) or texts == counted else texts


def _read(path: Path) -> dict:
    try:
        content = regular.read_json(path)
    except (OSError, ValueError):  # it only says what the file of weights does not need
        return {}
    return content if isinstance(content, dict) else {}
