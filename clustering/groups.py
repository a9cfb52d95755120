"""Groups of classes: they may overlap, and need not cover every class."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .array_files import check_regular

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SCHEMA = 1


class ClassGroups:
    """The classes of each specialist, S_0 ... S_{G-1}.

    Parameters
    ----------
    members : iterable of G collections of int
        The classes of each group, in 0 ... num_classes - 1, in any order. Lists, sets, arrays and
        tensors of integers will do. Each group has at least one class and none twice.
    num_classes : int
        C, the number of all classes, in groups or not.

    Attributes
    ----------
    members : list of int64 arrays
        The classes of each group, sorted and read-only. Groups keep the order given.
    num_classes : int

    Raises
    ------
    ValueError
        For no groups, an empty group, a class out of range, a class twice in a group, or a class
        that is no integer.

    Examples
    --------
    >>> groups = ClassGroups([[0, 1], [2, 1]], num_classes=4)
    >>> groups.sizes
    array([2, 2])
    """

    members: list[NDArray[np.int64]]
    num_classes: int

    def __init__(self, members: Iterable[Iterable[int] | ArrayLike], num_classes: int):
        if isinstance(num_classes, bool) or int(num_classes) != num_classes or num_classes < 1:
            raise ValueError(f"num_classes is {num_classes!r}; it must be a positive integer")
        self.num_classes = int(num_classes)
        self.members = [
            _checked_classes(classes, group, self.num_classes)
            for group, classes in enumerate(members)
        ]
        if not self.members:
            raise ValueError("there are no groups; give at least one")

    def __len__(self) -> int:
        return len(self.members)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassGroups):
            return NotImplemented
        if self.num_classes != other.num_classes or len(self) != len(other):
            return False
        pairs = zip(self.members, other.members, strict=True)
        return all(np.array_equal(mine, others) for mine, others in pairs)

    def __repr__(self) -> str:
        smallest, largest = self.sizes.min(), self.sizes.max()
        sizes = f"{smallest} to {largest} of {self.num_classes} classes"
        return f"ClassGroups({len(self)} groups of {sizes})"

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Classes per group, int64 [G]."""
        return np.array([len(classes) for classes in self.members], dtype=np.int64)

    def membership(self) -> csr_array:
        """Which class is in which group, scipy.sparse csr_array of bool [C, G]."""
        from scipy.sparse import csc_array

        pointers = np.concatenate([[0], np.cumsum(self.sizes)])
        indices = np.concatenate(self.members)
        values = np.ones(len(indices), dtype=bool)
        by_group = csc_array((values, indices, pointers), shape=(self.num_classes, len(self)))
        return by_group.tocsr()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the groups as JSON. The file appears whole or never.

        Parameters
        ----------
        path : path of the file
            It will hold {"schema": 1, "num_classes": C, "members": [[class, ...], ...]}.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_text(self.to_json())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()

    def to_json(self) -> str:
        """What `save` writes."""
        lists = ",\n  ".join(json.dumps(classes.tolist()) for classes in self.members)
        head = f'"schema": {SCHEMA}, "num_classes": {self.num_classes}'
        return f'{{{head}, "members": [\n  {lists}\n]}}\n'

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassGroups:
        """Read what `save` wrote, or a user's own file of the same form.

        Parameters
        ----------
        path : path of the file

        Returns
        -------
        ClassGroups

        Raises
        ------
        ValueError
            If it is no such file, or holds groups that the constructor refuses.
        FileNotFoundError
            If there is no file.
        """
        content = _read_json(path)
        if not isinstance(content, dict) or not {"schema", "num_classes", "members"} <= set(
            content
        ):
            form = f'{{"schema": {SCHEMA}, "num_classes": C, "members": [[class, ...], ...]}}'
            raise ValueError(f"{path} is no groups file; it needs {form}")
        if content["schema"] != SCHEMA:
            raise ValueError(
                f"{path} has schema {content['schema']!r}, this version reads {SCHEMA}; "
                "group the classes again"
            )
        if not isinstance(content["members"], list) or not isinstance(content["num_classes"], int):
            raise ValueError(
                f"{path}: num_classes must be an integer and members a list of lists of classes"
            )
        try:
            return cls(content["members"], content["num_classes"])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from None


def as_groups(
    groups: ClassGroups | Iterable[Iterable[int] | ArrayLike], num_classes: int
) -> ClassGroups:
    """Groups as ClassGroups, whatever lists or arrays of class indices they are given as.

    num_classes: of lists, which do not say it.
    """
    if hasattr(groups, "members"):
        return cast(ClassGroups, groups)
    return ClassGroups(cast(Iterable[Iterable[int]], groups), num_classes)


def _read_json(path: str | os.PathLike[str]) -> object:
    try:
        check_regular(path)
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); a groups file is written by ClassGroups.save"
        ) from None


def _checked_classes(
    classes: Iterable[int] | ArrayLike, group: int, num_classes: int
) -> NDArray[np.int64]:
    """One group's classes as a sorted read-only array. ValueError where they are no group."""
    array = _as_array(classes, group)
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
        bounds = f"with {num_classes} classes they go from 0 to {num_classes - 1}"
        raise ValueError(f"group {group} holds class {outside[0]}; {bounds}")
    repeated = array[1:][array[1:] == array[:-1]]
    if repeated.size:
        raise ValueError(
            f"group {group} holds class {repeated[0]} more than once; "
            "list each class once per group"
        )
    array.setflags(write=False)
    return array


def _as_array(classes: Iterable[int] | ArrayLike, group: int) -> np.ndarray:
    try:
        if hasattr(classes, "__array__"):
            return np.asarray(classes)
        # numpy would not open a set.
        return np.asarray(list(cast(Iterable[int], classes)))
    except (TypeError, ValueError):
        raise ValueError(
            f"group {group} is {classes!r}; it must be a list of class indices"
        ) from None
