"""rich's console for texts that others wrote: a class may be called ESC [ 2 J."""

from __future__ import annotations

import os
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

    @property
    def has_width(self) -> bool:
        """Whether lines are to fit: on a terminal, or where COLUMNS says how wide one is."""
        return self.is_terminal or "COLUMNS" in os.environ

    def say(self, text: str, style: str = "") -> None:
        """One sentence or more: wrapped between words on a terminal, one line elsewhere."""
        self.print(Text(text, style=style), soft_wrap=not self.has_width)

    def say_next(self, command: str, why: str = "") -> None:
        """What is typed next: `next: COMMAND`, never wrapped, so that it can be copied.

        why: what it does, on a line before it.
        """
        if why:
            self.say(f"{why}:")
        self.print(Text(f"next: {command}"), soft_wrap=True)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*arguments, **options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield segment._replace(text=printable(segment.text, keep="\n"))


def wide_console() -> Console:
    """A console as wide as the terminal or COLUMNS, else wide enough for any table."""
    console = Console()
    return console if console.has_width else Console(width=200)


def _redacted(item: Any) -> Any:
    if isinstance(item, str):
        return redacted(item)
    if isinstance(item, Text) and redacted(item.plain) != item.plain:
        return Text(redacted(item.plain), style=item.style)
    return item
