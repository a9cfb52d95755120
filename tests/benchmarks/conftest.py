"""The benchmarks are no installed package: they are found where the checkout is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
