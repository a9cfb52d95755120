"""What a worker of a training stream holds in memory does not grow over the epochs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_worker_holds_no_more_after_50_epochs_than_after_10():
    program = Path(__file__).with_name("memory.py")
    # A process of its own: a worker forked from pytest would copy pytest's pages, one by one, as it
    # touches them.
    command = [sys.executable, program]
    ended = subprocess.run(command, capture_output=True, check=True, timeout=280)
    measured = json.loads(ended.stdout)
    batch = measured["batch"]
    more = max(measured["worker"][40:]) - max(measured["worker"][:10])
    assert more < batch, f"{more} bytes more, and a batch has {batch}"
