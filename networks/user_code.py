"""A user's own builder: what it has to be, and what went wrong in it, in one line."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

CONTRACT = (
    "a builder is build(shape, **options) -> nn.Module that maps [B, *shape] to features [B, D], "
    "without the layer to the classes (docs/extending.md)"
)
_ROOT = Path(__file__).resolve().parents[1]
_OURS = tuple(
    f"{_ROOT / room}{os.sep}"
    for room in ("clustering", "ensemble", "launch", "networks", "pipeline", "trainer")
)
_LIBRARIES = tuple(
    f"{path}{os.sep}"
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def blame(error: BaseException) -> str:
    """Type and message of an error and where in the user's code it arose, in one line."""
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message}{place_of(error)}"


def place_of(error: BaseException) -> str:
    """ " (FILE:LINE)" of the innermost frame that is the user's. "" where there is none."""
    place = ""
    if isinstance(error, SyntaxError) and error.filename:
        return ""  # its message has them
    for frame in traceback.extract_tb(error.__traceback__):
        if _is_users(frame.filename):
            place = f" ({frame.filename}:{frame.lineno})"
    return place


def _is_users(file: str) -> bool:
    """Whether a frame's file is neither ours nor a library's."""
    path = os.path.abspath(file)
    return os.path.exists(path) and not path.startswith((*_OURS, *_LIBRARIES))
