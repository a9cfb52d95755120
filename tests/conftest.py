"""Helpers shared by the tests lie in tests/support."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is.
settings.register_profile("busy machines", deadline=None)
settings.load_profile("busy machines")

sys.path.insert(0, str(Path(__file__).parent / "support"))

# What the machine's terminal is like changes no result: tables are folded where COLUMNS says so.
for _variable in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_variable, None)


@pytest.fixture(autouse=True, scope="session")
def _own_records(tmp_path_factory):
    """Which runs were made here is noted below the tests' own directory, not the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
