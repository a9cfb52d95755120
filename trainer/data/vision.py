"""Augmentations of torchvision.transforms.v2, as pure functions of inputs and uniform numbers.

torchvision draws from torch's global generator.  Each view is made with that generator seeded by
the view's own uniform number, and put back behind it. So a view is a function of its input and its
number alone, as trainer.data.augment asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import UserError
from pipeline.extras import remedy

from .augment import draws, need_pictures

SEEDS = 2.0**53  # different float64 in [0, 1)


@draws(1)
def random_resized_crop(
    inputs: np.ndarray,
    uniforms: np.ndarray,
    scale: Sequence[float],
    ratio: Sequence[float],
    flip: float,
    interpolation: str,
) -> np.ndarray:
    """Views of pictures [n, C, H, W]: a part, made as large as the picture, perhaps mirrored.

    Parameters
    ----------
    inputs : array [n, C, H, W]
    uniforms : float64 array [n, 1]
    scale : (least, most)
        The share of the picture's area that is cut out.
    ratio : (least, most)
        Width to height of what is cut out.
    flip : float
        The share of views that are mirrored.
    interpolation : {"bilinear", "bicubic", "nearest"}

    References
    ----------
    Szegedy et al. 2015, "Going deeper with convolutions", section 6.
    """
    need_pictures(inputs, "rrc")
    size = inputs.shape[2:]
    return _views(inputs, uniforms, _crop(size, tuple(scale), tuple(ratio), flip, interpolation))


@draws(1)
def crop_and_randaugment(
    inputs: np.ndarray,
    uniforms: np.ndarray,
    scale: Sequence[float],
    ratio: Sequence[float],
    flip: float,
    interpolation: str,
    num_ops: int,
    magnitude: int,
) -> np.ndarray:
    """Like random_resized_crop, then `num_ops` operations drawn from RandAugment's list.

    inputs: uint8 pictures of 1 or 3 channels.  magnitude: 0 to 30.
    Cubuk et al. 2020, "RandAugment: Practical automated data augmentation".
    """
    need_pictures(inputs, "rrc-randaugment")
    if inputs.dtype != np.uint8 or inputs.shape[1] not in (1, 3):
        raise UserError(
            'data.augment = "rrc-randaugment" needs pictures of uint8 with 1 or 3 channels; the '
            f'inputs are {inputs.dtype} {list(inputs.shape[1:])}: take "rrc"'
        )
    crop = _crop(inputs.shape[2:], tuple(scale), tuple(ratio), flip, interpolation)
    operations = _randaugment(num_ops, magnitude)
    return _views(inputs, uniforms, lambda picture: operations(crop(picture)))


def _views(
    inputs: np.ndarray, uniforms: np.ndarray, transform: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """transform of each input, with torch's generator seeded by the input's first uniform."""
    pictures = torch.from_numpy(np.ascontiguousarray(inputs))
    seeds = np.floor(uniforms[:, 0] * SEEDS).astype(np.int64).tolist()
    views = torch.empty_like(pictures)
    with torch.random.fork_rng(devices=[]):
        for view, picture, seed in zip(views, pictures, seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            view.copy_(transform(picture))
    return views.numpy()


@lru_cache
def _crop(
    size: tuple[int, ...],
    scale: tuple[float, ...],
    ratio: tuple[float, ...],
    flip: float,
    interpolation: str,
) -> Callable[[Tensor], Tensor]:
    def build(v2: Any) -> Callable[[Tensor], Tensor]:
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale = {list(scale)}: two shares of the area, 0 < least <= most")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio = {list(ratio)}: width to height, 0 < least <= most")
        mode = v2.InterpolationMode(interpolation)
        crop = v2.RandomResizedCrop(list(size), scale, ratio, mode, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(flip)])

    return _built(build)


@lru_cache
def _randaugment(num_ops: int, magnitude: int) -> Callable[[Tensor], Tensor]:
    def build(v2: Any) -> Callable[[Tensor], Tensor]:
        if not 0 <= magnitude <= 30 or num_ops < 1:
            raise ValueError(f"num_ops = {num_ops}, magnitude = {magnitude}: at least 1, 0 to 30")
        return v2.RandAugment(num_ops, magnitude)

    return _built(build)


def _built(build: Callable[[Any], Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """What `build` makes of torchvision.transforms.v2. A UserError without it, or for an option."""
    try:
        v2 = import_module("torchvision.transforms.v2")
    except ImportError as error:
        raise UserError(
            f'data.augment = "rrc" and "rrc-randaugment" need torchvision ({error}); '
            f"{remedy('torchvision')}"
        ) from None
    except RuntimeError as error:  # torch's, of operators that it cannot load
        raise UserError(
            f"torchvision was built for another torch than {torch.__version__} ({error}); take "
            "both from one index: https://pytorch.org/get-started/locally"
        ) from None
    try:
        return build(v2)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.augment_options: {error}") from None
