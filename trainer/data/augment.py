"""Training views: pure functions of the inputs and of uniform numbers that belong to their positions in the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.config import UserError

from .decoding import import_function


@dataclass(frozen=True)
class Augment:
    """function(inputs [n, ...], uniforms float64 [n, numbers]) -> views [n, ...]; numbers: the uniforms per example.

    A view depends on its own input and numbers alone: how many come in one call is not part of the promise.
    """

    function: Callable[[np.ndarray, np.ndarray], np.ndarray]
    numbers: int

    def __call__(self, inputs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        return self.function(inputs, uniforms)


@dataclass(frozen=True)
class Views:
    """A fixed number of views of each sample, so that a teacher can answer them once.

    Which view a sample is seen in is a function of (seed, source, id, number of the view) alone.
    """

    count: int
    seed: int

    def uniforms(self, source: int, ids: np.ndarray, view: np.ndarray, numbers: int) -> np.ndarray:
        """float64 [n, numbers] in [0, 1) for samples `ids` of a stream's source, in their `view`s; both int64 [n]."""
        words = np.uint64(
            np.random.SeedSequence([self.seed, source]).generate_state(1, np.uint64)[0]
        )
        counter = ids.astype(np.uint64) * np.uint64(self.count) + view.astype(np.uint64)
        # A hash of a hash: neighbours in (id, view) and in the number's place have nothing in common.
        each = _mixed(_mixed(counter ^ words)[:, None] + np.arange(numbers, dtype=np.uint64)[None])
        return (each >> np.uint64(11)) * 2.0**-53


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele et al. 2014): a bijection of 64-bit words that passes BigCrush as a
    counter's."""
    z = words * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shift(inputs: np.ndarray, uniforms: np.ndarray, mode: str = "edge") -> np.ndarray:
    """Pictures [n, C, H, W] moved by up to an eighth of their size.  uniforms: [n, 2]."""
    _need_pictures(inputs, "shift")
    height, width = inputs.shape[2:]
    reach = np.array([height // 8, width // 8])
    padded = np.pad(inputs, ((0, 0), (0, 0), (reach[0], reach[0]), (reach[1], reach[1])), mode=mode)
    top, left = np.floor(uniforms[:, :2] * (2 * reach + 1)).astype(int).T
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return windows[np.arange(len(inputs)), :, top, left]


def flip_crop(inputs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Pictures [n, C, H, W], half of them mirrored, then moved as by `shift`, edges reflected.  uniforms: [n, 3]."""
    _need_pictures(inputs, "flip-crop")
    mirrored = np.where((uniforms[:, 2] < 0.5)[:, None, None, None], inputs[..., ::-1], inputs)
    return shift(mirrored, uniforms, mode="reflect")


def _need_pictures(inputs: np.ndarray, name: str) -> None:
    if inputs.ndim != 4:
        shape = list(inputs.shape[1:])
        raise UserError(f'data.augment = "{name}" needs pictures [C, H, W], the inputs are {shape}')


BUILT_IN = {"shift": Augment(shift, 2), "flip-crop": Augment(flip_crop, 3)}


def find_augment(name: str | None) -> Augment | None:
    """The augmentation that data.augment names; None for "none".

    A user's module:function may have an attribute `numbers`, the uniforms that it wants per example (8 without).
    """
    if name is None or name == "none":
        return None
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" not in name:
        raise UserError(f"data.augment = {name!r}: none, {', '.join(BUILT_IN)}, or module:function")
    function = import_function(name, "data.augment")
    return Augment(function, int(getattr(function, "numbers", 8)))
