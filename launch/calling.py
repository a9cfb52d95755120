"""Start the trainer for a command of the launcher, and end it with Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pipeline
from pipeline.failures import INTERRUPTED

TRAINER = [sys.executable, "-m", "trainer"]
TETHER = Path(pipeline.__file__).parents[1] / "trainer" / "distributed" / "die_with_parent.py"
# Seconds that a child has to end after Ctrl-C, which reaches it too, and after a signal of ours.
ITSELF_S = 0.5
ASKED_S = 5.0


def tethered(command: list[str]) -> list[str]:
    """The command, made to die with this process."""
    return [sys.executable, "-I", str(TETHER), str(os.getpid()), *command]


def call_trainer(command: list[str], text: str | None = None) -> int:
    """Run a command of the trainer's and return its exit code.  text: its standard input.

    Raises KeyboardInterrupt where this process is interrupted and the child has not said so.
    """
    stdin = None if text is None else subprocess.PIPE
    child = subprocess.Popen(tethered(command), stdin=stdin, text=True)
    try:
        child.communicate(text)
    except KeyboardInterrupt:
        if _ended(child) == INTERRUPTED:
            return INTERRUPTED  # it printed the line
        raise
    if child.returncode == -2:
        raise KeyboardInterrupt
    return child.returncode


def _ended(child: subprocess.Popen) -> int:
    """The exit code of a child that is to end."""
    for seconds, harder in ((ITSELF_S, child.terminate), (ASKED_S, child.kill)):
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            harder()
    return child.wait()
