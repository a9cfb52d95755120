"""A classifier on disk: model.json, which never names code, and safetensors, never a pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .builders import Builders
from .classifier import Classifier, build_classifier
from .spec import ModelSpec

SPEC = "model.json"
WEIGHTS = "model.safetensors"


def save_classifier(classifier: Classifier, directory: str | Path) -> None:
    """Write model.safetensors and then model.json, each under a temporary name first.

    Parameters
    ----------
    classifier : Classifier
        On any device.
    directory : path
        Made if it does not exist.
    """
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
    builders: Builders | None = None,
) -> Classifier:
    """The classifier that save_classifier wrote, in eval mode.

    Torch's random generators are left as they were.

    Parameters
    ----------
    directory : path
        With model.json and model.safetensors.
    device : str or torch.device
        Where the classifier goes.
    builders : mapping, optional
        As of build_classifier.

    Returns
    -------
    Classifier

    Raises
    ------
    ValueError
        Naming the file, for one that is absent or corrupt, another schema, an unknown builder, and
        missing, unexpected or ill-shaped tensors.
    """
    directory = Path(directory)
    spec = ModelSpec.load(directory / SPEC)
    with torch.random.fork_rng(devices=[]):
        try:
            classifier = build_classifier(spec, builders)
        except ValueError as error:
            raise ValueError(f"{directory / SPEC}: {error}") from None
    tensors = _read_tensors(directory / WEIGHTS)
    _check_tensors(tensors, classifier.state_dict(), directory / WEIGHTS)
    classifier.load_state_dict(tensors)
    return classifier.to(device).eval()


def adopt_weights(classifier: Classifier, path: str | Path, head: str) -> None:
    """Put someone else's weights into `classifier`, in place.  Nothing is unpickled into code.

    Parameters
    ----------
    classifier : Classifier
        Every tensor of the file but the head's belongs to its trunk.
    path : path
        A safetensors file, or a state dict that torch.save wrote.  A dict around the state dict
        ("state_dict", "model") and a prefix "module." are taken off.
    head : str
        Name of their linear classifier, say "fc".  Its rows are the classes, in the order of the
        label set.

    Raises
    ------
    ValueError
        Naming the file, where it cannot be read or does not fit; `classifier` is unchanged then.
    """
    path = Path(path)
    tensors = _read_tensors(path) if path.suffix == ".safetensors" else _read_state_dict(path)
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if f"{head}.weight" not in tensors:
        raise ValueError(f"{path} has no {head}.weight; its linear layers are {_heads(tensors)}")
    renamed = {_our_name(name, head): tensor for name, tensor in tensors.items()}
    if "head.bias" not in renamed:
        renamed["head.bias"] = torch.zeros(len(renamed["head.weight"]))
    _check_tensors(renamed, classifier.state_dict(), path)
    classifier.load_state_dict(renamed)


def _our_name(name: str, head: str) -> str:
    if name.startswith(f"{head}."):
        return f"head.{name.removeprefix(f'{head}.')}"
    return f"trunk.{name}"


def _heads(tensors: Mapping[str, Tensor]) -> str:
    """The names of what may be a linear layer, for an error."""
    weights = [
        name for name, value in tensors.items() if name.endswith(".weight") and value.ndim == 2
    ]
    return _first_few(sorted(name.removesuffix(".weight") for name in weights)) or "none"


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # pickle, zip and torch have a dozen kinds for a foreign or an unsafe file.
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: not a state dict of plain tensors: {first_line}") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    is_dict = isinstance(content, dict)
    if not is_dict or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: not a state dict: {{name: tensor}} is needed")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def _check_tensors(tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor], path: Path) -> None:
    """ValueError unless `tensors` has the names and shapes of `needed`."""
    problems = []
    if missing := sorted(needed.keys() - tensors.keys()):
        problems.append(f"lacks {_first_few(missing)}")
    if unexpected := sorted(tensors.keys() - needed.keys()):
        problems.append(f"has unexpected {_first_few(unexpected)}")
    if not problems:
        wrong = [
            f"{name} is {list(tensors[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in needed.items()
            if tensors[name].shape != tensor.shape
        ]
        problems = [_first_few(wrong)] if wrong else []
    if problems:
        raise ValueError(f"{path} does not fit the network: {'; '.join(problems)}")


def _first_few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
