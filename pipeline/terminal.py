"""rich's console for texts that others wrote: a class may be called ESC [ 2 J."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment
from rich.text import Text

from .redaction import printable, redacted


class Console(rich.console.Console):
    """Prints no control sequence but its own, and no secret of a URL."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(_redacted, objects), **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*arguments, **options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield segment._replace(text=printable(segment.text, keep="\n"))


def _redacted(item: Any) -> Any:
    if isinstance(item, str):
        return redacted(item)
    if isinstance(item, Text) and redacted(item.plain) != item.plain:
        return Text(redacted(item.plain), style=item.style)
    return item
