"""How a rank's process ends: with its work's exit code and output, and nothing tidied behind it."""

import subprocess
import sys

import pytest

PROGRAM = """\
import atexit, sys
from trainer.distributed.exit import leave
atexit.register(print, 'tidied')
"""


def run(work: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM + work]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "work, code, stdout, stderr",
    [
        ("leave(lambda: print('done'))", 0, "done", ""),
        ("leave(lambda: 75)", 75, "", ""),
        ("leave(lambda: sys.exit(3))", 3, "", ""),
        ("leave(lambda: sys.exit())", 0, "", ""),
        ("leave(lambda: sys.exit('no such stage'))", 1, "", "no such stage"),
        ("leave(lambda: [].pop())", 1, "", "IndexError: pop from empty list"),
    ],
)
def test_exit_code_and_output_are_those_of_the_work(work, code, stdout, stderr):
    ended = run(work)
    assert (ended.returncode, ended.stdout.strip()) == (code, stdout)
    assert stderr in ended.stderr
    assert ("Traceback" in ended.stderr) == ("IndexError" in stderr)
