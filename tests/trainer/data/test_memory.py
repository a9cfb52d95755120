import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_worker_holds_no_more_after_50_epochs_than_after_10():
    program = Path(__file__).with_name("memory.py")
    # A process of its own: a worker forked from pytest would copy pytest's pages, one by one, as it touches them.
    found = json.loads(
        subprocess.run(
            [sys.executable, program], capture_output=True, check=True, timeout=280
        ).stdout
    )
    early, late = max(found["worker"][:10]), max(found["worker"][40:])
    assert late - early < found["batch"], (
        f"{late - early} bytes more, and a batch has {found['batch']}"
    )
