"""Arrays that an earlier stage kept: of the form that their readers expect, or damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clustering.array_files import Shape, check_form, map_npy, read_npz
from pipeline.files import damaged

Form = tuple[str, Shape]  # kinds of dtypes, and the shape


def kept_npz(path: Path, forms: dict[str, Form]) -> dict[str, np.ndarray]:
    """Those arrays of an .npz file.  Raises DamagedFile, with the file's name, and OSError."""
    try:
        arrays = read_npz(path)
        if absent := sorted(forms.keys() - arrays.keys()):
            raise ValueError(f"it has no {', '.join(absent)}")
        for name, form in forms.items():
            check_form(arrays[name], *form)
    except ValueError as error:
        raise damaged(path, str(error)) from None
    return {name: arrays[name] for name in forms}


def kept_npy(path: Path, kinds: str, shape: Shape) -> np.ndarray:
    """An .npy file, memory-mapped.  Raises DamagedFile, with the file's name, and OSError."""
    try:
        return map_npy(path, kinds, shape)
    except ValueError as error:
        raise damaged(path, str(error)) from None
