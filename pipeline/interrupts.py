"""Ctrl-C and SIGTERM while a command loads its modules: one line, and no traceback.

It imports nothing, so that a command can ask for this first.
"""

import os
import signal

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_at_once(numbers=SIGNALS) -> None:
    """Until other handlers are set, these signals end the process, which has nothing to clear."""
    for number in numbers:
        # What is ignored stays ignored: nohup and a shell's `&` rely on it.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(*_) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(INTERRUPTED)
