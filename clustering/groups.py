"""Groups of classes: they may overlap, and need not cover every class."""

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

SCHEMA = 1


class ClassGroups:
    """The classes of each specialist, S_0 ... S_{G-1}.

    members: G collections of class indices in 0 ... num_classes - 1, each non-empty and without duplicates.
    .members are sorted, read-only int64 arrays, groups in the order given.
    Raises ValueError for no groups, an empty group, a class out of range, a duplicate or a member that is no integer.
    """

    def __init__(self, members: Iterable, num_classes: int):
        if isinstance(num_classes, bool) or int(num_classes) != num_classes or num_classes < 1:
            raise ValueError(f"num_classes is {num_classes!r}; it must be a positive integer")
        self.num_classes = int(num_classes)
        self.members = [_checked(classes, g, self.num_classes) for g, classes in enumerate(members)]
        if not self.members:
            raise ValueError("there are no groups; give at least one")

    def __len__(self) -> int:
        return len(self.members)

    def __eq__(self, other) -> bool:
        if not isinstance(other, ClassGroups):
            return NotImplemented
        return (
            self.num_classes == other.num_classes
            and len(self) == len(other)
            and all(np.array_equal(a, b) for a, b in zip(self.members, other.members, strict=True))
        )

    __hash__ = None

    def __repr__(self) -> str:
        sizes = self.sizes
        return f"ClassGroups({len(self)} groups of {sizes.min()} to {sizes.max()} of {self.num_classes} classes)"

    @property
    def sizes(self) -> np.ndarray:
        """Classes per group, int64 [G]."""
        return np.array([len(classes) for classes in self.members], dtype=np.int64)

    @property
    def covered(self) -> np.ndarray:
        """Which classes are in any group, bool [C]."""
        covered = np.zeros(self.num_classes, dtype=bool)
        covered[np.concatenate(self.members)] = True
        return covered

    def membership(self):
        """Which class is in which group, scipy.sparse csr_array of bool [C, G]; .toarray() is dense."""
        from scipy.sparse import csc_array

        pointers = np.concatenate([[0], np.cumsum(self.sizes)])
        indices = np.concatenate(self.members)
        shape = (self.num_classes, len(self))
        return csc_array(
            (np.ones(len(indices), dtype=bool), indices, pointers), shape=shape
        ).tocsr()

    def groups_of(self, label: int) -> np.ndarray:
        """The groups that hold class `label`, ascending, int64; empty where none does."""
        if not 0 <= label < self.num_classes:
            raise ValueError(f"class {label} is not in 0 ... {self.num_classes - 1}")
        return np.array(
            [g for g, classes in enumerate(self.members) if _holds(classes, label)], dtype=np.int64
        )

    def save(self, path) -> None:
        """Write JSON: {"schema", "num_classes", "members": [[class, ...], ...]}; the file appears whole or never."""
        path = Path(path)
        lines = ",\n  ".join(json.dumps(classes.tolist()) for classes in self.members)
        text = f'{{"schema": {SCHEMA}, "num_classes": {self.num_classes}, "members": [\n  {lines}\n]}}\n'
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.write_text(text)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path) -> "ClassGroups":
        """Read what save wrote, or a user's own file of the same form.

        Raises ValueError if it is not such a file, FileNotFoundError if there is none.
        """
        try:
            content = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not JSON ({error}); a groups file is written by ClassGroups.save"
            ) from None
        if (
            not isinstance(content, dict)
            or not {"schema", "num_classes", "members"} <= content.keys()
        ):
            form = f'{{"schema": {SCHEMA}, "num_classes": C, "members": [[class, ...], ...]}}'
            raise ValueError(f"{path} is no groups file; it needs {form}")
        if content["schema"] != SCHEMA:
            raise ValueError(
                f"{path} has schema {content['schema']!r}, this version reads {SCHEMA}; group the classes again"
            )
        if not isinstance(content["members"], list) or not isinstance(content["num_classes"], int):
            raise ValueError(
                f"{path}: num_classes must be an integer and members a list of lists of classes"
            )
        try:
            return cls(content["members"], content["num_classes"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _checked(classes, group: int, num_classes: int) -> np.ndarray:
    try:
        array = np.asarray(classes if hasattr(classes, "__array__") else list(classes))
    except (TypeError, ValueError):
        raise ValueError(
            f"group {group} is {classes!r}; it must be a list of class indices"
        ) from None
    if array.size == 0:
        raise ValueError(
            f"group {group} is empty; every group needs at least one class, so leave it out"
        )
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"group {group} has dtype {array.dtype} and shape {array.shape}; "
            "it must be a flat list of class indices (integers)"
        )
    array = np.sort(array.astype(np.int64))
    outside = array[(array < 0) | (array >= num_classes)]
    if outside.size:
        range_ = f"with {num_classes} classes they go from 0 to {num_classes - 1}"
        raise ValueError(f"group {group} holds class {outside[0]}; {range_}")
    twice = array[1:][array[1:] == array[:-1]]
    if twice.size:
        raise ValueError(
            f"group {group} holds class {twice[0]} more than once; list each class once per group"
        )
    array.setflags(write=False)
    return array


def _holds(classes: np.ndarray, label: int) -> bool:
    position = np.searchsorted(classes, label)
    return bool(position < len(classes) and classes[position] == label)
