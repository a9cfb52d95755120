import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # shardsets.py; --import-mode=importlib adds no directories

from shardsets import write_uneven  # noqa: E402


@pytest.fixture(scope="session")
def uneven(tmp_path_factory):
    """Seven shards of unlike sizes, 150 samples; not to be changed."""
    return write_uneven(tmp_path_factory.mktemp("uneven"), [1, 40, 7, 13, 60, 2, 27])
