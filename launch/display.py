"""What the launcher shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from rich.console import Group
from rich.live import Live
from rich.text import Text

from pipeline.graph import RunDirectory
from pipeline.terminal import Console

from .forecast import seconds_to_go
from .journal import Journal
from .plan import Job
from .status import progress, statuses, summary, table

# Seconds between two looks at the run.
LIVE_S = 1.0
PLAIN_S = 30.0


class Display(AbstractContextManager):
    """Events scroll by. The running stages stand below them."""

    def __init__(self, console: Console | None = None, errors: Console | None = None):
        self.console = console or Console()
        self.errors = errors or Console(stderr=True)
        self.live: Live | None = None
        self.period_s = PLAIN_S
        self.last_look = time.monotonic()
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.period_s = LIVE_S
            self.last_look = 0.0

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def event(self, text: str) -> None:
        """One line that stays."""
        line = Text.assemble((time.strftime("%H:%M:%S "), "dim"), text)
        self.console.print(line, soft_wrap=not self.console.is_terminal)

    def error(self, *lines: str) -> None:
        """Lines for stderr."""
        for line in lines:
            self.errors.print(Text(line), soft_wrap=True)

    def tick(self, run: RunDirectory, jobs: list[Job], journal: Journal, slots: int) -> None:
        """Look at the run again, if the last look is old enough.  slots: jobs side by side."""
        if time.monotonic() - self.last_look < self.period_s:
            return
        self.last_look = time.monotonic()
        stages = statuses(run, jobs, journal)
        running = [stage for stage in stages if stage.state == "running"]
        counts = summary(stages, seconds_to_go(run, jobs, stages, slots))
        if self.live:
            counts = Text(counts, style="dim")
            rows = table(running, width=self.console.width)
            self.live.update(Group(Text(""), rows, counts), refresh=True)
            return
        for stage in running:
            self.event(f"{stage.stage} running  {progress(stage)}".rstrip())
        self.event(counts)
