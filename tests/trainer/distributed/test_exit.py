"""How a rank's process ends: with its work's exit code, its words said, and nothing tidied behind it."""

import subprocess
import sys

import pytest


def ended(work: str):
    program = f"import atexit, sys\nfrom trainer.distributed.exit import leave\natexit.register(print, 'tidied')\n{work}"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "work, code, said, complained",
    [
        ("leave(lambda: print('done'))", 0, "done", ""),
        ("leave(lambda: 75)", 75, "", ""),
        ("leave(lambda: sys.exit(3))", 3, "", ""),
        ("leave(lambda: sys.exit())", 0, "", ""),
        ("leave(lambda: sys.exit('no such stage'))", 1, "", "no such stage"),
        ("leave(lambda: [].pop())", 1, "", "IndexError: pop from empty list"),
    ],
)
def test_the_code_and_the_words_are_those_of_the_work(work, code, said, complained):
    found = ended(work)
    assert (found.returncode, found.stdout.strip()) == (code, said)
    assert complained in found.stderr and ("Traceback" in found.stderr) == (
        "IndexError" in complained
    )
