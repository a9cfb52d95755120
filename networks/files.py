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
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in classifier.state_dict().items()
    }
    unfinished = directory / f".{WEIGHTS}.{os.getpid()}"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, directory / WEIGHTS)
    classifier.spec.save(directory / SPEC)


def load_classifier(
    directory: str | Path,
    device: str | torch.device = "cpu",
    builders: dict[str, Callable] | None = None,
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


def adopt_weights(classifier: Classifier, path: str | Path, head: str) -> None:
    """Someone else's weights into `classifier`, in place: a safetensors file, or a state dict that torch.save wrote.

    head: what their linear classifier is called, say "fc": its rows are the classes, in the order of the label set, and
    every other tensor belongs to the trunk.  A dict around the state dict ("state_dict", "model") and a prefix
    "module." are taken off.  Nothing is unpickled into code.  Raises ValueError, naming the file, where it is unfit.
    """
    path = Path(path)
    found = _read_tensors(path) if path.suffix == ".safetensors" else _read_state_dict(path)
    found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    if f"{head}.weight" not in found:
        heads = sorted(
            name[:-7]
            for name, value in found.items()
            if name.endswith(".weight") and value.ndim == 2
        )
        raise ValueError(
            f"{path} has no {head}.weight; its linear layers are {_few(heads) or 'none'}"
        )
    renamed = {
        f"head.{name[len(head) + 1 :]}" if name.startswith(f"{head}.") else f"trunk.{name}": tensor
        for name, tensor in found.items()
    }
    if "head.bias" not in renamed:
        renamed["head.bias"] = torch.zeros(len(renamed["head.weight"]))
    _check_tensors(renamed, classifier.state_dict(), path)
    classifier.load_state_dict(renamed)


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as mistake:
        raise ValueError(f"{path}: cannot be read: {mistake.strerror or mistake}") from None
    except (
        Exception
    ) as mistake:  # pickle, zip and torch have a dozen kinds for a foreign or an unsafe file
        reason = str(mistake).splitlines()[0] if str(mistake) else type(mistake).__name__
        raise ValueError(f"{path}: not a state dict of plain tensors: {reason}") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(
        isinstance(value, torch.Tensor) for value in found.values()
    ):
        raise ValueError(f"{path}: not a state dict: {{name: tensor}} is needed")
    return found


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
        raise ValueError(f"{path} does not fit the network: {'; '.join(parts)}")
    wrong = [
        f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in needed.items()
        if found[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the network: {_few(wrong)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
