"""Start the trainer for a command of the launcher. Ctrl-C ends both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pipeline
from pipeline.failures import INTERRUPTED


def python(module: str, interpreter: str = sys.executable) -> list[str]:
    """argv that runs a module of ours.

    Without -P the working directory, which is the user's, would come first on the path of imports:
    a trainer.py or a numpy.py there would run instead.
    """
    return [interpreter, "-P", "-m", module]


TRAINER = python("trainer")
TETHER = Path(pipeline.__file__).parents[1] / "trainer" / "distributed" / "die_with_parent.py"
ASKED = 10  # times, once a second, that a child is asked to end before it is killed


def tethered(command: list[str]) -> list[str]:
    """The command, made to die with this process."""
    return [sys.executable, "-I", str(TETHER), str(os.getpid()), *command]


def call_trainer(command: list[str], text: str | None = None) -> int:
    """Run a command of the trainer's and return its exit code.  text: its standard input.

    Raises KeyboardInterrupt where this process is interrupted and the child has not said so.
    """
    stdin = None if text is None else subprocess.PIPE
    # In a session of its own Ctrl-C does not reach it, and one process says that it ended.
    child = subprocess.Popen(tethered(command), stdin=stdin, text=True, start_new_session=True)
    try:
        child.communicate(text)
    except KeyboardInterrupt:
        if _ended(child) == INTERRUPTED:
            return INTERRUPTED  # it printed the line
        raise
    return child.returncode


def _ended(child: subprocess.Popen) -> int:
    """Ask a child to end.  Returns its exit code."""
    for _ in range(ASKED):
        child.terminate()
        try:
            return child.wait(1)
        except subprocess.TimeoutExpired:  # a library that was being loaded has swallowed it
            continue
    child.kill()
    return child.wait()
