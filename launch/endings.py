"""Why a job ended, by its exit code, and whether another try may help."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pipeline.failures import USER_ERROR
from pipeline.store import Stage

AGAIN = 75  # a checkpoint is written. Start the same command again
# Of one process, and of several ranks or a shell, which add 128.
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


def is_repeatable(code: int) -> bool:
    """Whether a failed job may succeed as it is: not after a mistake, nor for want of memory."""
    return code not in (USER_ERROR, AGAIN, *KILLED)


def reason(code: int, missing: Sequence[Stage]) -> str:
    """missing: the stages that the job did not finish."""
    if code == 0:
        return f"it ended without finishing {', '.join(stage.place for stage in missing)}"
    if code == AGAIN:
        return "it asked to be started again but had made no progress"
    if code in KILLED:
        remedy = memory_remedy(missing, "lower launch.pool")
        return f"killed by signal 9 (SIGKILL), probably out of memory; {remedy}"
    if code == -signal.SIGBUS:
        return "killed by signal 7 (SIGBUS), probably a disk that is full"
    if code < 0:
        return f"killed by {_signal_name(-code)}"
    return f"exit code {code}"


def memory_remedy(stages: Sequence[Stage], other: str) -> str:
    """What makes a job smaller, or else leaves it more memory."""
    training = [stage for stage in stages if stage.kind.trains]
    if not training:
        return other
    section = training[0].kind.schedule
    if section == "students":
        section = f"students.{training[0].address}"
    return f"lower {section}.batch_size (or raise {section}.accumulation), or {other}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
