"""Replace this process by a command that dies with its parent.

    python -I die_with_parent.py PARENT_PID COMMAND...

A killed launcher or torchrun agent must leave no process that trains on alone.  The kernel keeps
the request over exec, and it is made here, before the command's slow imports begin.  Linux only.
Elsewhere the command just runs.
"""

import ctypes
import os
import signal
import sys


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    die_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:  # it died before the request
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
