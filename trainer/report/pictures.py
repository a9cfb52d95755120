"""What examples look like: small pictures as data: URIs, or their texts."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

LONGEST = 160  # characters of a text
LARGEST = 64  # pixels: with the page's limits on how many are shown, the file stays below some 4 MB


def why_no_pictures(images) -> str | None:
    """Why this ShardSet has no pictures to show, or None if it has."""
    if images is None:
        return "the test shards could not be opened"
    shape, dtype = tuple(images.input_shape), np.dtype(images.input_dtype)
    if dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))):
        return f"the inputs are no 8-bit gray or RGB images, but {dtype} of shape {list(shape)}"
    return None


def data_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W], [1, H, W] or [3, H, W] -> data: URI, gray as PNG, colour as JPEG, no side above LARGEST."""
    if pixels.ndim == 3:
        pixels = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, -1)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if picture.mode == "L":
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=85)
    kind = "png" if picture.mode == "L" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pictures(images, rows, ids) -> dict[int, str]:
    """Rows of the test predictions -> data: URIs.  ids: int [n], the sample of each row."""
    rows = sorted({int(row) for row in rows})
    pixels = images.inputs(ids[rows]) if rows else []
    return {row: data_uri(one) for row, one in zip(rows, pixels, strict=True)}


def phrases(images, rows, ids) -> dict[int, str]:
    """Rows of the test predictions -> their texts, where the inputs are txt members; none otherwise."""
    if images is None or getattr(images, "input_extensions", None) != ["txt"]:
        return {}
    rows = sorted({int(row) for row in rows})
    texts = [members["txt"].decode("utf-8", "replace") for members in images.raw(ids[rows])]
    return {
        row: f"{text[:LONGEST]}…" if len(text) > LONGEST else text
        for row, text in zip(rows, texts, strict=True)
    }
