"""benchmarks.slurm, as far as it runs without a Slurm."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_plans_200_specialists_as_one_array_and_ends_with_one_json_object():
    command = [sys.executable, "-m", "benchmarks.slurm", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout.splitlines()[-1])
    assert results["planning"]["specialists"] == 200
    assert results["planning"]["submissions"] == 11
    assert results["slurm"] is None and "overhead" not in results
