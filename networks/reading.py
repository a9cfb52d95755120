"""Turn files, bytes, pictures, arrays and texts into the raw inputs of a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .npy import MAGIC as NPY
from .npy import read_npy
from .pictures import PLAIN, PictureRules, read_picture
from .spec import InputSpec
from .texts import TEXTS

# bytes, a path, a PIL.Image.Image, an array or a tensor, a text, or a list of them.
Inputs: TypeAlias = Any
Functions: TypeAlias = Mapping[str, Callable[..., Any]]

FLOATS = "floats are read from 0 to 1 (not yet normalised), or whole numbers from 0 to 255"


def read_inputs(
    inputs: Inputs,
    spec: InputSpec,
    functions: Functions | None = None,
    resize: bool = False,
    max_pixels: int | None = None,
) -> Tensor:
    """Raw inputs [B, *spec.shape] in spec.dtype, prepared as the training inputs were.

    Parameters
    ----------
    inputs : one input, a batch, or a list of inputs
        Pictures: bytes, paths, PIL images, arrays [H, W], [H, W, C] or [C, H, W].  They get the
        rules of `spec.pictures`: pictures of other sizes are brought to the one that was learned.
        Texts: str, where the network reads texts. A str is a path otherwise.
        Arrays and tensors: one input [*shape], or a batch [B, *shape].
    spec : InputSpec
    functions : dict of callables, optional
        {name: callable}: the user's own decoders that `spec.decoders` names.
    resize : bool
        Resize pictures even where no rule was recorded: a centre crop, scaled bicubically.
    max_pixels : int, optional
        Overrides the limit of the rules.

    Returns
    -------
    Tensor [B, *spec.shape]
        A tensor that fits already is returned as it is, on its device.

    Raises
    ------
    ValueError
        For input that could only be read by guessing, and for NaN. The message says what the
        network reads.

    Notes
    -----
    A network of uint8 reads integers from 0 to 255.  Floats of pictures that all lie from 0 to 1,
    in all inputs of one call, are multiplied by 255 and rounded, as in torchvision. Other
    floats must be whole numbers from 0 to 255.  A network of float32 reads numbers as they are,
    one of int32 whole numbers.
    """
    if isinstance(inputs, Tensor) and _fits(inputs, spec):
        return inputs
    return torch.from_numpy(InputReader(spec, functions, resize, max_pixels).batch(inputs))


def _fits(inputs: Tensor, spec: InputSpec) -> bool:
    """Whether a batch is what the network reads.  ValueError where it holds NaN or infinity."""
    dtypes = {"uint8": torch.uint8, "float32": torch.float32, "int32": torch.int32}
    if tuple(inputs.shape[1:]) != spec.shape or inputs.dtype != dtypes[spec.dtype]:
        return False
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise ValueError("holds NaN or infinity; the network reads finite numbers")
    return True


class InputReader:
    """Reads inputs for one network.

    Parameters
    ----------
    spec, functions, resize, max_pixels
        As in read_inputs.

    Attributes
    ----------
    rules : PictureRules, optional
        Rules for pictures. None if the network reads no pictures.
    decoders : dict
        {extension: callable} of files that are neither pictures nor .npy.
    """

    def __init__(
        self,
        spec: InputSpec,
        functions: Functions | None = None,
        resize: bool = False,
        max_pixels: int | None = None,
    ):
        self.spec = spec
        self.rules = _rules_for(spec, resize, max_pixels)
        self.decoders: dict[str, Callable[..., Any]] = {}
        for extension, name in (spec.decoders or {}).items():
            known = {**TEXTS, **(functions or {})}
            self.decoders[extension] = known.get(name) or _absent(name)

    @property
    def reads_texts(self) -> bool:
        return "txt" in (self.spec.decoders or {})

    @property
    def needed(self) -> str:
        """What the network reads, for messages."""
        values = ", 0 to 255" if self.spec.dtype == "uint8" else ""
        return f"{self.spec.dtype} {list(self.spec.shape)}{values}"

    def _no_input(self, value: object) -> str:
        kind = type(value).__name__
        return f"an object of type {kind} is no input; the network reads {self.needed}"

    def batch(self, inputs: Inputs) -> np.ndarray:
        """[B, *shape] of one input, a batch or a list of inputs."""
        if _is_array(inputs):
            return self.arrays(_as_numpy(inputs))[0]
        if _is_source(inputs):
            return self.source(inputs)[0]
        if isinstance(inputs, Mapping) or not isinstance(inputs, Iterable):
            raise ValueError(self._no_input(inputs))
        listed = list(inputs)
        if not listed:
            raise ValueError(f"no inputs are given; the network reads {self.needed}")
        if not any(_is_array(item) or _is_source(item) for item in listed):
            return self.arrays(_numbers(listed))[0]
        return np.stack(self._each(listed))

    def _each(self, listed: list[Any]) -> list[np.ndarray]:
        """One array [*shape] of each input of a list."""
        arrays = [_as_numpy(item) for item in listed if _is_array(item)]
        unit = _are_unit_floats(arrays)
        rows = []
        for number, item in enumerate(listed):
            try:
                if _is_array(item):
                    read, is_one = self.arrays(_as_numpy(item), unit)
                else:
                    read, is_one = self.source(item)
            except ValueError as error:
                raise ValueError(f"input {number}: {error}") from None
            if not is_one:
                raise ValueError(f"input {number} holds {len(read)} inputs; give each by itself")
            rows.append(read[0])
        return rows

    # Files

    def source(self, source: Any) -> tuple[np.ndarray, bool]:
        """([n, *shape], whether it is one input) of bytes, a path, a PIL image or a text."""
        if isinstance(source, str):
            return self._named(source)
        if isinstance(source, os.PathLike):
            return self.file(Path(source))
        if isinstance(source, (bytes, bytearray, memoryview)):
            return self.content(bytes(source), self._kind_of_bytes(source))
        if not _is_source(source):
            raise ValueError(self._no_input(source))
        if self.spec.decoders:
            names = ", ".join(self.spec.decoders.values())
            raise ValueError(
                f"the network learned from files that {names} decodes; give bytes or paths"
            )
        return self._picture(source), True

    def _named(self, text: str) -> tuple[np.ndarray, bool]:
        """A text itself, or the file of that name."""
        if self.reads_texts:
            return self.content(text.encode("utf-8"), "txt")
        # Not pathlib's: that raises for what is too long to be a name.
        if self.rules is None and not os.path.isfile(text):
            raise ValueError(
                f"{text!r} is no file; the network reads {self.needed}, and its model.json names "
                "nothing that makes them of texts"
            )
        return self.file(Path(text))

    def file(self, path: Path) -> tuple[np.ndarray, bool]:
        """([n, *shape], whether it is one input) of a file. ValueError names it."""
        try:
            return self.content(path.read_bytes(), path.suffix[1:].lower())
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:
            is_sentence = str(error).startswith(("has ", "holds ", "is "))
            raise ValueError(f"{path}{'' if is_sentence else ':'} {error}") from None

    def content(self, content: bytes, extension: str) -> tuple[np.ndarray, bool]:
        """([n, *shape], whether it is one input) of a file's content."""
        if extension == "npy" and extension not in self.decoders:
            return self.arrays(_decoded(read_npy, content))
        if extension not in self.decoders and self.reads_texts:
            extension = "txt"
        if extension in self.decoders:
            return self._exact(_decoded(self.decoders[extension], content))
        return self._picture(content), True

    def one(self, content: bytes, extension: str) -> np.ndarray:
        """[*shape] of a file's content that is one input."""
        rows, is_one = self.content(content, extension)
        if not is_one:
            raise ValueError(f"holds {len(rows)} inputs; one is needed")
        return rows[0]

    def _kind_of_bytes(self, content: bytes | bytearray | memoryview) -> str:
        """An extension that files with such a content have."""
        if bytes(content[: len(NPY)]) == NPY:
            return "npy"
        return next(iter(self.spec.decoders or {}), "")

    def _picture(self, source: Any) -> np.ndarray:
        """[1, *shape] of a picture."""
        if self.rules is None:
            raise ValueError(f"is a picture; the network reads arrays, {self.needed}")
        try:
            pixels = read_picture(source, self.rules)
        except ValueError as error:
            raise ValueError(f"cannot be decoded: {error}") from None
        return self._exact(pixels)[0]

    def _exact(self, array: np.ndarray) -> tuple[np.ndarray, bool]:
        """What a decoder gives: one input or several, in the network's shape."""
        is_one = array.shape == self.spec.shape
        if not is_one and array.shape[1:] != self.spec.shape:
            raise ValueError(self._wrong_shape(array.shape))
        array = self._as_dtype(array, unit=False)
        return (array[None] if is_one else array), is_one

    def _wrong_shape(self, shape: tuple[int, ...]) -> str:
        remedy = ""
        if self.rules is not None and self.rules.size is None and 2 <= len(shape) <= 4:
            remedy = "; --resize (resize=True) brings pictures to it"
        return f"has shape {list(shape)}; the network reads {list(self.spec.shape)}{remedy}"

    # Arrays

    def arrays(self, array: np.ndarray, unit: bool | None = None) -> tuple[np.ndarray, bool]:
        """([n, *shape], whether it is one input) of an array.

        unit: whether floats from 0 to 1 are meant. None asks the array itself.
        """
        shape = self.spec.shape
        if unit is None:
            unit = _are_unit_floats([array])
        if array.shape == shape or (array.ndim == len(shape) + 1 and array.shape[1:] == shape):
            is_one = array.shape == shape
            array = self._as_dtype(array, unit)
            return (array[None] if is_one else array), is_one
        if self.rules is None or not 2 <= array.ndim <= 4:
            raise ValueError(self._wrong_shape(array.shape))
        pictures, is_one = self._channels_last(array)
        if self.rules.size is None and pictures.shape[1:3] != shape[1:]:
            raise ValueError(self._wrong_shape(array.shape))
        pictures = self._as_dtype(pictures, unit)
        rows = [self._picture(_as_pil(picture))[0] for picture in pictures]
        if not rows:
            raise ValueError(self._wrong_shape(array.shape))
        return np.stack(rows), is_one

    def _channels_last(self, array: np.ndarray) -> tuple[np.ndarray, bool]:
        """([n, H, W, 1, 3 or 4], whether it is one picture).

        ValueError where its axes could be taken in two ways.
        """
        if array.ndim == 2:
            return array[None, :, :, None], True
        if array.ndim == 4:
            if self._are_channels_last(array.shape[1:]):
                return array, False
            return array.transpose(0, 2, 3, 1), False
        height, width = array.shape[1:]
        if self.spec.shape[0] == 1 and array.shape[0] not in (1, 3) and width not in (1, 3, 4):
            return array[:, :, :, None], False
        if self.spec.shape[0] == 1 and array.shape[0] == 3:
            raise ValueError(
                f"has shape {list(array.shape)}, three gray pictures or one in colour: give "
                f"[3, 1, {height}, {width}] or [1, 3, {height}, {width}]"
            )
        if self._are_channels_last(array.shape):
            return array[None], True
        return array.transpose(1, 2, 0)[None], True

    def _are_channels_last(self, shape: tuple[int, ...]) -> bool:
        """Whether the last of a picture's three axes holds the channels, else the first does.

        ValueError where neither can, and where both can and neither gives the network's size.
        """
        can_be_first, can_be_last = shape[0] in (1, 3), shape[2] in (1, 3, 4)
        if not can_be_first and not can_be_last:
            raise ValueError(
                f"{self._wrong_shape(shape)}; of pictures the first axis may have 1 or 3 channels, "
                "or the last 1, 3 or 4"
            )
        if can_be_first != can_be_last:
            return can_be_last
        size = self.spec.shape[1:]
        if (shape[:2] == size) == (shape[1:] == size):
            raise ValueError(
                f"has shape {list(shape)}, and its first or its last axis could hold the channels: "
                f"give {list(self.spec.shape)}"
            )
        return shape[:2] == size

    def _as_dtype(self, array: np.ndarray, unit: bool) -> np.ndarray:
        """The array in the network's dtype, where no number changes its meaning."""
        if array.dtype.kind not in "iuf":
            raise ValueError(f"holds {array.dtype}; the network reads {self.needed}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("holds NaN or infinity; the network reads finite numbers")
        if self.spec.dtype == "float32":
            return self._as_float(array)
        is_picture = len(self.spec.shape) == 3
        if array.dtype.kind == "f" and unit and is_picture:
            return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
        is_whole = array.dtype.kind != "f" or bool((array == np.rint(array)).all())
        lowest, highest = (array.min(), array.max()) if array.size else (0, 0)
        limits = np.iinfo(self.spec.dtype)
        if not is_whole or lowest < limits.min or highest > limits.max:
            remedy = f"; {FLOATS}" if is_picture else ""
            raise ValueError(
                f"holds {array.dtype} from {lowest} to {highest}; the network reads "
                f"{self.needed}{remedy}"
            )
        return array.astype(self.spec.dtype)

    def _as_float(self, array: np.ndarray) -> np.ndarray:
        if array.dtype == np.uint8 and len(self.spec.shape) == 3:
            raise ValueError(
                f"holds uint8; the network reads {self.needed} in the units of the arrays that it "
                "learned from: convert the pictures as those were"
            )
        with np.errstate(over="ignore"):
            converted = array.astype(np.float32)
        if not np.isfinite(converted).all():
            raise ValueError("holds numbers too large for float32, which the network reads")
        return converted


def _rules_for(spec: InputSpec, resize: bool, max_pixels: int | None) -> PictureRules | None:
    """The rules that the network's pictures were made by. None where it reads none."""
    if spec.dtype != "uint8" or len(spec.shape) != 3 or spec.shape[0] not in (1, 3):
        return None
    rules = replace(spec.pictures or PLAIN, channels=spec.shape[0])
    if resize and rules.size is None:
        rules = replace(rules, size=spec.shape[1:])
    if max_pixels is not None:
        rules = replace(rules, max_pixels=max_pixels)
    return rules


def _absent(name: str) -> Callable[..., Any]:
    """A decoder that says how to give the one that it stands for."""

    def decoder(content: bytes) -> np.ndarray:
        raise ValueError(
            f"the network learned from files that a function of your own decodes, {name!r}: give "
            f"it, builders={{{name!r}: function}} in Python or --builder {name}"
        )

    return decoder


def _decoded(decoder: Callable[..., Any], content: bytes) -> np.ndarray:
    try:
        array = decoder(content)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like about bytes that they do not know
        raise ValueError(f"cannot be decoded: {' '.join(str(error).split())}") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"its decoder gives {type(array).__name__}; a numpy array is needed")
    return array


def _is_array(value: object) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _is_source(value: object) -> bool:
    if isinstance(value, (bytes, bytearray, memoryview, str, os.PathLike)):
        return True
    # A PIL image, without importing Pillow where there is none.
    return any(each.__module__.startswith("PIL.") for each in type(value).__mro__)


def _as_numpy(value: Tensor | np.ndarray) -> np.ndarray:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()


def _numbers(listed: list[Any]) -> np.ndarray:
    try:
        return np.asarray(listed)
    except ValueError as error:
        raise ValueError(f"a list of {type(listed[0]).__name__} is no array: {error}") from None


def _are_unit_floats(arrays: list[np.ndarray]) -> bool:
    """Whether the floats among the arrays all lie from 0 to 1."""
    floats = [array for array in arrays if array.dtype.kind == "f" and array.size]
    return all(bool(array.min() >= 0 and array.max() <= 1) for array in floats)


def _as_pil(pixels: np.ndarray) -> Any:
    """uint8 [H, W, 1, 3 or 4] as gray, RGB or RGBA."""
    from PIL import Image

    if pixels.shape[2] == 1:
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]))
    return Image.fromarray(np.ascontiguousarray(pixels))
