"""Training views: pure functions of the inputs and of uniform numbers.

The numbers belong to positions in the stream, so a view does not depend on who makes it or when.

The contract of a function behind `pipeline.choices.AUGMENTATIONS`, or of a user's own:
function(inputs [n, ...], uniforms float64 [n, K]) -> views [n, ...].  A view is a pure function of
its own input and its own K numbers in [0, 1), however many come in one call.  K is the function's
attribute `numbers` (see `draws`, 8 where it has none).  Views may differ from the inputs in shape
and dtype, but must agree with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np

from networks.user_code import blame
from pipeline.choices import AUGMENT_OPTIONS, AUGMENTATIONS, TAKE_SHARE, resolve
from pipeline.config import UserError

from .decoding import import_function

ViewFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
Function = TypeVar("Function", bound=Callable)

CONTRACT = (
    "an augmentation is function(inputs [n, ...], uniforms [n, K]) -> views [n, ...], arrays of "
    "numpy (docs/extending.md)"
)
DEFAULT_NUMBERS = 8  # uniforms per example of a function without the attribute `numbers`
DEFAULT_SHARE = 0.2  # data.augment_share


# What may be no mistake of the function's: a device, a disk, memory.
MACHINES = (OSError, RuntimeError, MemoryError)


def failure(name: str, error: BaseException) -> str:
    """The error about an augmentation of the user's that raises."""
    return f"data.augment = {name!r} fails: {blame(error)}; {CONTRACT}"


@dataclass(frozen=True)
class Augment:
    """An augmentation and how many uniform numbers it needs for each example.

    function: (inputs [n, ...], uniforms float64 [n, numbers]) -> views [n, ...].  A view depends on
    its own input and numbers alone: how many come in one call is not part of the promise.
    """

    function: ViewFunction
    numbers: int
    own: str = field(default="", compare=False)  # module:function, where it is the user's

    def __call__(self, inputs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        if not self.own:
            return self.function(inputs, uniforms)
        return self._views_of_own(inputs, uniforms)

    def _views_of_own(self, inputs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Raises UserError, one line, for a user's function that fails or gives something else.

        What the machine raises passes: a job that fails for it may be tried again.
        """
        name = f"data.augment = {self.own!r}"
        try:
            views = self.function(inputs, uniforms)
        except MACHINES:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(failure(self.own, error)) from None
        if not isinstance(views, np.ndarray):
            raise UserError(f"{name} gives {type(views).__name__}; {CONTRACT}")
        if len(views.shape) < 1 or len(views) != len(inputs):
            shape = list(views.shape)
            raise UserError(f"{name} gives shape {shape} for {len(inputs)} inputs; {CONTRACT}")
        return views


@dataclass(frozen=True)
class Views:
    """A fixed number of views of each sample, so that a teacher can predict them once.

    Which view it is depends on (seed, source, id, index of the view) alone.
    """

    count: int
    seed: int

    def uniforms(self, source: int, ids: np.ndarray, view: np.ndarray, numbers: int) -> np.ndarray:
        """float64 [n, numbers] in [0, 1) for samples `ids` of a source, in their `view`s.

        ids, view: int64 [n].
        """
        sequence = np.random.SeedSequence([self.seed, source])
        key = np.uint64(sequence.generate_state(1, np.uint64)[0])
        counter = ids.astype(np.uint64) * np.uint64(self.count) + view.astype(np.uint64)
        return _hashed(counter ^ key, numbers) * 2.0**-53


def _hashed(words: np.ndarray, numbers: int) -> np.ndarray:
    """uint64 [n, numbers] below 2^53, `numbers` of each word [n]."""
    # A hash of a hash: neighbours among the words and in the column have nothing in common.
    columns = np.arange(numbers, dtype=np.uint64)
    return _mixed(_mixed(words)[:, None] + columns[None]) >> np.uint64(11)


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: a bijection of 64-bit words.  A counter's passes BigCrush.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    z = words * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draws(numbers: int) -> Callable[[Function], Function]:
    """Decorator: the function needs `numbers` uniforms for each example."""

    def mark(function: Function) -> Function:
        setattr(function, "numbers", numbers)  # noqa: B010 - a type checker knows no such attribute
        return function

    return mark


@draws(2)
def shift(
    inputs: np.ndarray, uniforms: np.ndarray, mode: Literal["edge", "reflect"] = "edge"
) -> np.ndarray:
    """Pictures [n, C, H, W] moved by up to an eighth of their size.  uniforms: [n, 2]."""
    need_pictures(inputs, "shift")
    height, width = inputs.shape[2:]
    reach = np.array([height // 8, width // 8])
    padding = ((0, 0), (0, 0), (reach[0], reach[0]), (reach[1], reach[1]))
    padded = np.pad(inputs, padding, mode=mode)
    top, left = np.floor(uniforms[:, :2] * (2 * reach + 1)).astype(int).T
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return windows[np.arange(len(inputs)), :, top, left]


@draws(3)
def flip_crop(inputs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Pictures [n, C, H, W], half of them mirrored, then moved as by `shift`, edges reflected.

    uniforms: [n, 3].
    """
    need_pictures(inputs, "flip-crop")
    mirror = (uniforms[:, 2] < 0.5)[:, None, None, None]
    mirrored = np.where(mirror, inputs[..., ::-1], inputs)
    return shift(mirrored, uniforms, mode="reflect")


@draws(1)
def drop_ngrams(
    inputs: np.ndarray, uniforms: np.ndarray, share: float = DEFAULT_SHARE
) -> np.ndarray:
    """Bags of indices [n, L] with about a `share` of each bag's indices left out, made -1.

    Each is left out or not by itself, but one of a bag stays.  Negative indices are padding.
    uniforms: [n, 1]. Each bag's one number is hashed to one for each of its indices.
    """
    _need_bags(inputs, "drop_ngrams")
    real = inputs >= 0
    length = int(np.flatnonzero(real.any(0)).max(initial=-1)) + 1  # behind it is padding alone
    real = real[:, :length]
    words = np.floor(uniforms[:, 0] * 2.0**53).astype(np.uint64)
    drawn = _hashed(words, length)
    kept = real & (drawn >= np.uint64(share * 2.0**53))
    emptied = np.flatnonzero(real.any(1) & ~kept.any(1))
    if len(emptied):
        last = np.where(real[emptied], drawn[emptied], np.uint64(0)).argmax(1)
        kept[emptied, last] = True
    views = inputs.copy()
    views[:, :length][~kept] = -1
    return views


def _need_bags(inputs: np.ndarray, name: str) -> None:
    if inputs.ndim != 2 or inputs.dtype.kind != "i":
        shape = list(inputs.shape[1:])
        raise UserError(
            f'data.augment = "{name}" needs bags of indices, int32 [L], as the decoder ngram_bag '
            f"makes them; the inputs are {inputs.dtype} {shape}"
        )


def need_pictures(inputs: np.ndarray, name: str) -> None:
    if inputs.ndim != 4:
        shape = list(inputs.shape[1:])
        raise UserError(f'data.augment = "{name}" needs pictures [C, H, W], the inputs are {shape}')


def find_augment(
    name: str | None,
    share: float = DEFAULT_SHARE,
    options: Mapping[str, Any] | None = None,
) -> Augment | None:
    """The augmentation that data.augment names.

    Parameters
    ----------
    name : str or None
        A name in `AUGMENTATIONS`, or a user's module:function.
    share : float
        augment_share, for a function in `TAKE_SHARE`.
    options : mapping, optional
        data.augment_options, of which a name in `AUGMENT_OPTIONS` reads its own.

    Returns
    -------
    Augment or None
        None for "none" and for None.

    Raises
    ------
    UserError
        If the name is unknown, or the function cannot be imported.
    """
    if name is None:
        return None
    target = AUGMENTATIONS.get(name, name)
    if not target:
        return None
    if ":" not in target:
        known = ", ".join(AUGMENTATIONS)
        raise UserError(f"data.augment = {name!r}: {known}, or module:function")
    own = "" if name in AUGMENTATIONS else name
    function = import_function(own, "data.augment") if own else resolve(target)
    numbers = int(getattr(function, "numbers", DEFAULT_NUMBERS))
    if name in TAKE_SHARE:
        function = partial(function, share=share)
    if name in AUGMENT_OPTIONS:
        given = options or {}
        settled = {key: given.get(key, usual) for key, usual in AUGMENT_OPTIONS[name].items()}
        function = partial(function, **settled)
    return Augment(function, numbers, own)
