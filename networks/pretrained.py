"""Directories as Hugging Face's hub has them: config.json beside model.safetensors."""

from __future__ import annotations

from pathlib import Path

from . import regular

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def pretrained_file(directory: Path) -> Path:
    """The file of weights in a directory that a hub's snapshot is.

    Raises ValueError where there is none, or where several files hold one network.
    """
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    split = sorted(directory.glob("*.index.json"))
    if split:
        raise ValueError(
            f"{split[0].name}: its weights lie in several files; load them where they were made "
            "and save them as one (save_pretrained(..., max_shard_size='100GB'))"
        )
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


def _read(path: Path) -> dict:
    try:
        content = regular.read_json(path)
    except (OSError, ValueError):  # it only says what the file of weights does not need
        return {}
    return content if isinstance(content, dict) else {}
