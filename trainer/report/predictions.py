"""What `evaluate` keeps of one network's predictions on the test split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clustering.array_files import check_form, read_npz
from pipeline.files import damaged

FORMS = {
    "ids": ("iu", (None,)),
    "labels": ("iu", (None,)),
    "top5": ("iu", (None, None)),
    "top5_probability": ("f", (None, None)),
    "label_probability": ("f", (None,)),
    "asked": ("iu", (None, None)),
    "active": ("b", (None, None)),
}


@dataclass(frozen=True)
class Predictions:
    """A row for each of n test examples.

    ids: int64 [n], the sample of each row. Corrupt samples have none. labels: int64 [n].
    top5, top5_probability: [n, 5]. label_probability: [n]. Of an ensemble of specialists, else
    None: asked, int32 [n, most], the numbers of those that were asked about each example, then -1.
    Of earlier versions active, bool [n, M], in its place.
    """

    ids: np.ndarray
    labels: np.ndarray
    top5: np.ndarray
    top5_probability: np.ndarray
    label_probability: np.ndarray
    asked: np.ndarray | None = None
    active: np.ndarray | None = None

    @classmethod
    def read(cls, path: Path) -> Predictions | None:
        """The predictions in an .npz file. None where there is no such file."""
        try:
            arrays = read_npz(path)
            for name in arrays.keys() & FORMS.keys():
                check_form(arrays[name], *FORMS[name])
            rows = {len(arrays[name]) for name in arrays.keys() & FORMS.keys()}
            if len(rows) != 1:
                raise ValueError("its arrays are of different lengths")
            return cls(**{name: arrays[name] for name in FORMS if name in arrays})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise damaged(path, str(error)) from None

    def was_asked(self, specialist: int) -> np.ndarray | None:
        """Whether a specialist was asked about each example, bool [n]. None where nothing says."""
        if self.asked is not None:
            return (self.asked == specialist).any(axis=1)
        return None if self.active is None else self.active[:, specialist].astype(bool)

    @property
    def correct(self) -> np.ndarray:
        """bool [n]"""
        return self.top5[:, 0] == self.labels
