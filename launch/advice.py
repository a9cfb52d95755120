"""What `referral advise` prints."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from pipeline.graph import RunDirectory
from pipeline.store import read_json


def show_advice(run: RunDirectory, console: Console) -> None:
    """The sentence of a finished advice."""
    content = read_json(run.advice.advice.path("advice.json"))
    console.print(Text(content["sentence"]), soft_wrap=True)
