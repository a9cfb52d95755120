"""What a launch is for: the run's results, or an advice.

Each has its jobs, the run in which they run, and what is shown at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.graph import RunDirectory
from pipeline.store import Stage
from pipeline.terminal import Console

from .advice import show_advice
from .journal import AimName
from .results import show_results


@dataclass(frozen=True)
class Aim:
    """name: the command that asks for it, as RUN/jobs.json has it.

    run: the run whose stages they are: of an advice the one with groups.
    check: raises UserError for what it cannot be asked of.
    stages: those of the jobs.  last: the stage whose end is the launch's.
    show: what is printed then.
    spares_run: whether what another config made of the run's own stages is no matter: it is not
        redone, and fits again once the run is gone on with.
    """

    name: AimName
    run: Callable[[RunDirectory], RunDirectory]
    check: Callable[[RunDirectory], None]
    stages: Callable[[RunDirectory], list[Stage]]
    last: Callable[[RunDirectory], Stage]
    show: Callable[[RunDirectory, Console], None]
    spares_run: bool = False


RUN = Aim(
    "run",
    run=lambda run: run,
    check=lambda run: None,
    stages=lambda run: run.stages,
    last=lambda run: run.report,
    show=show_results,
)
ADVISE = Aim(
    "advise",
    run=lambda run: run.advice.run,
    check=lambda run: run.advice.check(),
    stages=lambda run: run.advice.stages,
    last=lambda run: run.advice.advice,
    show=show_advice,
)
AIMS: dict[str, Aim] = {aim.name: aim for aim in (RUN, ADVISE)}
