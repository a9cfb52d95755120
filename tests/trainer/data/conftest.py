import sys
from pathlib import Path

import pytest
from shardsets import write_uneven

# corrupt_sets.py, once.py and killed.py. --import-mode=importlib adds no directories.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def uneven(tmp_path_factory):
    """Seven shards of unlike sizes, 150 samples. Not to be changed."""
    return write_uneven(tmp_path_factory.mktemp("uneven"), [1, 40, 7, 13, 60, 2, 27])
