"""A classifier on disk: model.json, which never names code, and model.safetensors, which never unpickles."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from .classifier import Classifier, build_classifier
from .spec import ModelSpec

SPEC, WEIGHTS = "model.json", "model.safetensors"


def save_classifier(classifier: Classifier, directory: str | Path) -> None:
    """Write model.safetensors and then model.json into `directory`, each under a temporary name first."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Clones: tensors that share memory cannot be written as they are.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in classifier.state_dict().items()}
    unfinished = directory / f".{WEIGHTS}.{os.getpid()}"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, directory / WEIGHTS)
    classifier.spec.save(directory / SPEC)


def load_classifier(
    directory: str | Path, device: str | torch.device = "cpu", builders: dict[str, Callable] | None = None
) -> Classifier:
    """The classifier that save_classifier wrote, on `device`, in eval mode; torch's generators are left as they were.

    Raises ValueError, naming the file, for one that is absent or damaged, another schema, an unknown builder, and
    missing, unexpected or ill-shaped tensors.
    """
    directory = Path(directory)
    spec = ModelSpec.load(directory / SPEC)
    with torch.random.fork_rng(devices=[]):
        try:
            classifier = build_classifier(spec, builders)
        except ValueError as mistake:
            raise ValueError(f"{directory / SPEC}: {mistake}") from None
    tensors = _read_tensors(directory / WEIGHTS)
    _check_tensors(tensors, classifier.state_dict(), directory / WEIGHTS)
    classifier.load_state_dict(tensors)
    return classifier.to(device).eval()


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as mistake:
        raise ValueError(f"{path}: cannot be read: {mistake.strerror or mistake}") from None
    except SafetensorError as mistake:
        raise ValueError(f"{path}: not a whole safetensors file: {mistake}") from None


def _check_tensors(found: dict, needed: dict, path: Path) -> None:
    missing, unexpected = sorted(needed.keys() - found.keys()), sorted(found.keys() - needed.keys())
    if missing or unexpected:
        found_wrong = (("lacks", missing), ("has unexpected", unexpected))
        parts = [f"{word} {_few(names)}" for word, names in found_wrong if names]
        raise ValueError(f"{path} does not fit {SPEC}: {'; '.join(parts)}")
    wrong = [
        f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in needed.items()
        if found[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit {SPEC}: {_few(wrong)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
