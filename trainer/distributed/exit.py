"""How a rank's process ends."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def leave(work: Callable[[], int | None]) -> NoReturn:
    """Do the work and end this process with its exit code, without the interpreter's finalisation.

    gloo's threads outlive the process group (torch 2.13).  Now and then a rank that has done
    everything aborts in its finalisation beside them (exit codes -6 and -11), and the launcher
    takes the whole job for failed.
    """
    try:
        code = work() or 0
    except SystemExit as error:
        code = _exit_code(error)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has closed its end
            pass
    os._exit(code)


def _exit_code(error: SystemExit) -> int:
    """The exit code that the interpreter makes: 0 of None, 1 of a message."""
    if isinstance(error.code, int):
        return error.code
    return int(error.code is not None)
