"""A classifier on disk: model.json, which never names code, and safetensors, never a pickle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from . import checksums
from .builders import Builders
from .checkpoints import first_few, read_safetensors
from .classifier import Classifier, build_classifier
from .spec import ModelSpec
from .temporaries import temporary_beside

if TYPE_CHECKING:
    from .branches import Branch

SPEC = "model.json"
WEIGHTS = "model.safetensors"
Module = TypeVar("Module", bound=nn.Module)


def save_classifier(classifier: Classifier | Branch, directory: str | Path) -> None:
    """Write model.safetensors and then model.json, each under a temporary name first.

    Parameters
    ----------
    classifier : Classifier or Branch
        On any device.
    directory : path
        Made if it does not exist.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Clones: tensors that share memory cannot be written as they are.
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in classifier.state_dict().items()
    }
    write_safetensors(tensors, directory / WEIGHTS)
    classifier.spec.save(directory / SPEC)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors that share no memory.  The file appears whole or never."""
    from safetensors.torch import save_file

    unfinished = temporary_beside(path)
    try:
        save_file(dict(tensors), unfinished, metadata={"format": "pt"})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


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
        Naming the file, for one that is absent or corrupt (by its checksum, where a manifest has
        it), another schema, an unknown builder, and missing, unexpected or ill-shaped tensors.
    """
    return load_built(
        ModelSpec.load(Path(directory) / SPEC), directory, device, build_classifier, builders
    )


def load_built(
    spec: ModelSpec,
    directory: str | Path,
    device: str | torch.device,
    build: Callable[[ModelSpec, Builders | None], Module],
    builders: Builders | None,
) -> Module:
    """What `build` makes of a directory's spec, with the directory's weights, in eval mode.

    Raises ValueError, naming the file, as load_classifier does.
    """
    directory = Path(directory)
    checksums.check(directory / SPEC, directory / WEIGHTS)
    with torch.random.fork_rng(devices=[]):
        try:
            module = build(spec, builders)
        except ValueError as error:
            raise ValueError(f"{directory / SPEC}: {error}") from None
    tensors = read_safetensors(directory / WEIGHTS)
    check_tensors(tensors, module.state_dict(), directory / WEIGHTS)
    module.load_state_dict(tensors)
    return module.to(device).eval()


def check_tensors(tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor], path: Path) -> None:
    """ValueError unless `tensors` has the names and shapes of `needed`."""
    problems = []
    if missing := sorted(needed.keys() - tensors.keys()):
        problems.append(f"lacks {first_few(missing)}")
    if unexpected := sorted(tensors.keys() - needed.keys()):
        problems.append(f"has unexpected {first_few(unexpected)}")
    if not problems:
        wrong = [
            f"{name} is {list(tensors[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in needed.items()
            if tensors[name].shape != tensor.shape
        ]
        problems = [first_few(wrong)] if wrong else []
    if problems:
        raise ValueError(f"{path} does not fit the network: {'; '.join(problems)}")
