"""New files take the places of old ones together, once all of them stand, else the old stay."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

OLD = ".replaced"  # how the hidden name of an old file ends while new ones get theirs


class Replacement:
    """A context manager: `commit` puts the new files in place, and what was not put is deleted.

    Until then, and where anything goes wrong, the old files keep their names.
    """

    def __init__(self):
        self._new: list[tuple[Path, Path]] = []
        self._old: list[Path] = []

    def put(self, temporary: Path, path: Path) -> None:
        """`temporary` is to be called `path`."""
        self._new.append((temporary, path))

    def retire(self, paths: Iterable[Path]) -> None:
        """Files that are to go."""
        self._old += [path for path in paths if path not in self._old]

    def commit(self, finish: Callable[[], object] = lambda: None) -> None:
        """Rename, then `finish`. An error of either brings the old files back."""
        mark = uuid.uuid4().hex[:8]
        aside: list[tuple[Path, Path]] = []
        placed: list[tuple[Path, Path]] = []
        try:
            for path in filter(Path.exists, self._old):
                hidden = path.with_name(f".{path.name}.{mark}{OLD}")
                os.rename(path, hidden)
                aside.append((hidden, path))
            for temporary, path in self._new:
                os.rename(temporary, path)
                placed.append((temporary, path))
            finish()
        except BaseException:
            for temporary, path in placed:
                os.rename(path, temporary)
            for hidden, path in aside:
                os.replace(hidden, path)
            raise
        for hidden, _ in aside:
            hidden.unlink(missing_ok=True)

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for temporary, _ in self._new:
            temporary.unlink(missing_ok=True)


def recover(directory: Path) -> None:
    """Undo what a process left that was ended between the names: old files get theirs back.

    Where the new file stands already the old one is deleted.
    """
    for hidden in directory.glob(f".*{OLD}"):
        path = hidden.with_name(hidden.name[1 : -len(OLD)].rpartition(".")[0])
        if path.exists():
            hidden.unlink(missing_ok=True)
        else:
            os.rename(hidden, path)
