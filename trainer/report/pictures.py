"""What examples look like: small pictures as data: URIs, or their texts."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ..data.shards import ShardSet

LONGEST = 160  # characters of a text
# Pixels of a side: with the page's limits on how many are shown, the file stays below some 4 MB.
LARGEST = 64


def why_no_pictures(images: ShardSet | None) -> str | None:
    """Why this ShardSet has no pictures to show, or None if it has."""
    if images is None:
        return "the test shards could not be opened"
    shape, dtype = tuple(images.input_shape), np.dtype(images.input_dtype)
    is_gray = len(shape) == 2
    has_channels = len(shape) == 3 and shape[0] in (1, 3)
    if dtype != np.uint8 or not (is_gray or has_channels):
        return f"the inputs are no 8-bit gray or RGB images, but {dtype} of shape {list(shape)}"
    return None


def data_uri(pixels: np.ndarray) -> str:
    """A picture as a data: URI, gray as PNG, colour as JPEG, no side above LARGEST.

    pixels: uint8 [H, W], [1, H, W] or [3, H, W].
    """
    if pixels.ndim == 3:
        pixels = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if picture.mode == "L":
        kind = "png"
        picture.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.save(buffer, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pictures(images: ShardSet | None, rows: Iterable[int], ids: np.ndarray) -> dict[int, str]:
    """Rows of the test predictions -> data: URIs. None where there are no pictures.

    ids: int [n], the sample of each row.
    """
    rows = sorted({int(row) for row in rows})
    if images is None or why_no_pictures(images) is not None or not rows:
        return {}
    pixels = images.inputs(ids[rows])
    return {row: data_uri(one) for row, one in zip(rows, pixels, strict=True)}


def phrases(images: ShardSet | None, rows: Iterable[int], ids: np.ndarray) -> dict[int, str]:
    """Rows of the test predictions -> their texts, where the inputs are txt files, else none."""
    if images is None or getattr(images, "input_extensions", None) != ["txt"]:
        return {}
    rows = sorted({int(row) for row in rows})
    texts = [files["txt"].decode("utf-8", "replace") for files in images.raw(ids[rows])]
    return {row: _shortened(text) for row, text in zip(rows, texts, strict=True)}


def _shortened(text: str) -> str:
    if len(text) > LONGEST:
        return f"{text[:LONGEST]}…"
    return text
