"""Read the state dict of someone else's checkpoint, without running pickled code."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import regular
from .choices import AVERAGED, BESIDE_WEIGHTS, PLAIN
from .integrity import blamed_on, check_file, read_content

Tensors = dict[str, Tensor]
INDEX = ".index.json"  # ends the name of an index of weights in several files
POINTER = b"version h"  # begins what Git keeps in place of a large file: "version https://git-lfs"
READ_AT_ONCE = 2**22  # bytes of a safetensors file
IN_RECIPE = ("state_dict_ema", "state_dict", "model")
REMEDY = 'say which are meant: generalist.weights = "..."'
RECIPE = """\
    import torch, safetensors.torch as st; c = {load}; i = isinstance(c, dict)
    w = next((c[k] for k in {keys} if i and k in c), c); w = getattr(w, "state_dict", lambda: w)()
    st.save_file({{k: v.clone() for k, v in w.items() if torch.is_tensor(v)}}, {out!r})"""


@dataclass
class Checkpoint:
    """tensors: the state dict's.  name: the key that it stands under, "" for the file's top.

    others: keys of further state dicts, which generalist.weights can name.
    """

    tensors: Tensors
    name: str = ""
    others: tuple[str, ...] = ()


def read_checkpoint(path: Path, weights: str | None = None) -> Checkpoint:
    """The weights in a file: a safetensors file, or what torch.save wrote of tensors.

    Of weights in several files the file is their index, as Hugging Face writes it.

    Parameters
    ----------
    path : Path
    weights : str, optional
        Key of the state dict to load, for a file that holds several. "a.b" is b under a. By default
        averaged weights (`networks.choices.AVERAGED`) come first, then the usual names (`PLAIN`).

    Raises
    ------
    ValueError
        If the file, which the message names, cannot be read, holds more than tensors, or leaves
        open which state dict is meant.
    """
    content = _read_split(path) if path.name.endswith(INDEX) else _read_file(path)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a {kind}, not a state dict: {{name: tensor}} is needed")
    inside = _state_dicts(content)
    names = tuple(sorted(inside))
    if weights is not None:
        if weights not in inside:
            listed = ", ".join(names) or "none; it is a state dict itself"
            raise ValueError(
                f"{path} has no weights {weights!r}; under keys of their own: {listed}"
            )
        return Checkpoint(inside[weights], weights, names)
    at_top = [value for key, value in content.items() if not is_beside_weights(key)]
    if any(isinstance(value, Tensor) and (value.dim() or not inside) for value in at_top):
        return Checkpoint(_tensors_beside(content, inside, path))
    chosen = _usual(inside, content, path)
    others = tuple(name for name in names if name != chosen)
    return Checkpoint(inside[chosen], chosen, others)


def _read_file(path: Path) -> Any:
    return read_safetensors(path) if _is_safetensors(path) else _load_plain(path)


def _read_split(path: Path) -> Tensors:
    """The tensors of all files that an index names, {"weight_map": {tensor: file beside it}}."""
    try:
        file_of = regular.read_json(path)["weight_map"]
        names = {str(name): str(file) for name, file in file_of.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: no index of weights, which has a weight_map") from None
    tensors: Tensors = {}
    for file in sorted(set(names.values())):
        if file != Path(file).name:
            raise ValueError(f"{path}: {file!r} is no file beside it")
        content = _read_file(path.parent / file)
        held = content if isinstance(content, dict) else {}
        for name in [name for name in names if names[name] == file]:
            if not isinstance(held.get(name), Tensor):
                raise ValueError(f"{path.parent / file}: has no {name}, which {path.name} names")
            tensors[name] = held[name]
    return tensors


def read_safetensors(path: Path, owned: bool = False) -> Tensors:
    """The tensors of a safetensors file. Raises ValueError if it is none, or truncated.

    owned: none of them views the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        with blamed_on(path):
            regular.check_regular(path)
            # Of thousands of small files each is opened once. A large one is mapped, not copied.
            if 0 < os.stat(path).st_size <= READ_AT_ONCE:
                return load(read_content(path))
            check_file(path)
            tensors = load_file(path)
            return {name: x.clone() for name, x in tensors.items()} if owned else tensors
    except OSError as error:
        check_file(path)  # what a manifest says of a file that is missing tells more
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def _is_safetensors(path: Path) -> bool:
    """Judged by its header, which is a length and a JSON object, or by its name."""
    if _head(path) == POINTER:
        raise ValueError(
            f"{path}: is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`, or "
            "with `hf download`"
        )
    return _head(path)[8:] == b"{" or path.suffix == ".safetensors"


def _is_torch_file(path: Path) -> bool:
    """Whether its head is a zip's or a pickle's, which torch.save writes."""
    return _head(path).startswith((b"PK\x03\x04", b"\x80"))


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(9)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def _load_plain(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, of programs, which it refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # pickle, zip and torch have a dozen kinds
        raise ValueError(_refusal(path, str(error))) from None


def _refusal(path: Path, message: str) -> str:
    """The message for a file that torch does not load as plain tensors."""
    refused = re.search(r"GLOBAL ([\w.]+)", message)
    if "TorchScript" in message:
        held, load = "a TorchScript program", "torch.jit.load({!r}, 'cpu')"
    elif _is_torch_file(path) and (refused or "Weights only load failed" in message):
        kind = f" ({refused[1]})" if refused else ""
        held, load = f"more than tensors{kind}", "torch.load({!r}, 'cpu', weights_only=False)"
    else:
        return f"{path}: neither safetensors nor a whole file that torch.save wrote; cut short?"
    out = str(path.with_suffix(".safetensors"))
    recipe = RECIPE.format(load=load.format(str(path)), keys=IN_RECIPE, out=out)
    return (
        f"{path}: it holds {held}, and reading these can run code, so they are not read; if you "
        f"trust the file, write its weights to {out} by this, and name that:\n{recipe}"
    )


def _state_dicts(content: Mapping[str, Any], within: str = "") -> dict[str, Tensors]:
    """Each nested {name: tensor} of a checkpoint by its dotted key, without training state."""
    found: dict[str, Tensors] = {}
    for key, value in content.items():
        if not isinstance(value, dict) or is_beside_weights(key):
            continue
        tensors = {str(name): each for name, each in value.items() if isinstance(each, Tensor)}
        if tensors:
            found[f"{within}{key}"] = tensors
        else:
            found |= _state_dicts(value, f"{within}{key}.")
    return found


def _tensors_beside(content: Mapping[str, Any], inside: Mapping[str, Tensors], path: Path):
    """The tensors of a state dict that also holds other values."""
    if inside:
        raise ValueError(
            f"{path} holds tensors at its top and more under {first_few(list(inside))}; {REMEDY}"
        )
    return {
        str(key): value
        for key, value in content.items()
        if isinstance(value, Tensor) and not is_beside_weights(key)
    }


def _usual(inside: Mapping[str, Tensors], content: Mapping[str, Any], path: Path) -> str:
    """Choose the state dict's key: averaged weights, else the usual names, else the only one."""
    if not inside:
        listed = first_few([str(key) for key in content]) or "nothing"
        raise ValueError(f"{path}: not a state dict, {{name: tensor}} is needed; it has {listed}")
    if len(inside) == 1:
        return next(iter(inside))
    strange = [key for key in inside if not set(key.split(".")) <= {*AVERAGED, *PLAIN}]
    averaged = [key for key in inside if set(key.split(".")) & set(AVERAGED)]
    candidates = averaged or list(inside)
    if strange or len(candidates) > 1:
        raise ValueError(f"{path} has weights under {first_few(list(inside))}; {REMEDY}")
    return candidates[0]


def is_beside_weights(key: object) -> bool:
    """Whether a checkpoint keeps under this key what training needs and a network does not."""
    return re.fullmatch(BESIDE_WEIGHTS, str(key)) is not None


def first_few(names: list[str]) -> str:
    """The first three, and how many more."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
