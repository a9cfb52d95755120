"""torchrun and its ranks as forks of this process, which has torch and the engines loaded.

They are the processes that the command makes: an agent, and ranks in sessions of their own that die
with it.  What they lack is the start of an interpreter, which takes longer than a test's training.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import trainer.__main__ as trainer_main
from trainer.distributed import torchrun
from trainer.distributed.die_with_parent import die_with_parent
from trainer.distributed.exit import leave

FRESH = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)


class Forked:
    """A forked process with what callers use of subprocess.Popen."""

    def __init__(self, work: Callable[[], int], log: IO | None = None, environment=None):
        sys.stdout.flush()
        parent = os.getpid()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setsid()
            for number in FRESH:  # as after exec
                signal.signal(number, signal.SIG_DFL)
            if log is not None:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if environment is not None:
                os.environ.clear()
                os.environ.update(environment)
                die_with_parent()
                if os.getppid() != parent:
                    os._exit(1)
            # pytest's own streams, which the child inherits, write elsewhere.
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", closefd=False)
            leave(work)
        finally:
            os._exit(70)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (1e9 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode


class _Handler(subprocess_handler.SubprocessHandler):
    def _popen(self, args: tuple, env: dict[str, str]):
        words = list(args[args.index("trainer") + 1 :])
        return Forked(lambda: trainer_main.main(words), environment=env)


def start(arguments: list[str], log: IO) -> Forked:
    """`python -P -m trainer.distributed.torchrun ARGUMENTS`, its output appended to `log`."""
    return Forked(lambda: _agent(arguments), log)


def _agent(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import handlers

    handlers.SubprocessHandler = _Handler  # pyright: ignore
    os.environ["OMP_NUM_THREADS"] = "1"
    return torchrun.main(arguments)
