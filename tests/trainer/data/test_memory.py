"""What a worker of a training stream holds in memory does not grow over the epochs."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest


@pytest.mark.slow
def test_a_worker_holds_no_more_in_its_last_epochs_than_in_the_middle_ones():
    program = Path(__file__).with_name("memory.py")
    # A process of its own: a worker forked from pytest would copy pytest's pages, one by one, as it
    # touches them.
    command = [sys.executable, program, "60"]
    ended = subprocess.run(command, capture_output=True, check=True, timeout=280)
    measured = json.loads(ended.stdout)
    # The allocator's own pages grow for some fifteen epochs, and an epoch's peak has up to a batch
    # more or less of what is on its way. 48 bytes a sample are more than a batch in twenty epochs.
    middle, last = median(measured["worker"][20:40]), median(measured["worker"][40:])
    batch = measured["batch"]
    assert last - middle < batch, f"{last - middle} bytes more, and a batch has {batch}"
