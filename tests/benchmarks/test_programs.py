"""Every program under benchmarks/ and examples/ still runs: its quick form ends with its metrics.

The quick forms need no shared data.  Those that `make test` runs take less than a minute together
on an idle core. The others are marked slow.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = [
    "benchmarks.advice",
    "benchmarks.characters --rows generalist branches shortlist",
    "benchmarks.characters.data",
    "benchmarks.characters.headline",
    "benchmarks.clustering",
    "benchmarks.data",
    "benchmarks.finetuning",
    "benchmarks.head",
    "benchmarks.many_specialists",
    "benchmarks.opening",
    "benchmarks.papers.diversity",
    "benchmarks.papers.hydra --regression",
    "benchmarks.papers.mnist --table5",
    "benchmarks.papers.multiview",
    "benchmarks.papers.one_to_one",
    "benchmarks.places",
    "benchmarks.rerank",
    "benchmarks.shortlist",
    "benchmarks.slurm",
    "benchmarks.thin_val",
]
SLOW = [
    "benchmarks.branches",
    "benchmarks.branches --latency",
    "benchmarks.characters",
    "benchmarks.characters.generalist",
    "benchmarks.characters.groups",
    "benchmarks.characters.later",
    "benchmarks.characters.omniglot",
    "benchmarks.characters.questions",
    "benchmarks.characters.tails",
    "benchmarks.combiner",
    "benchmarks.durability",
    "benchmarks.gpu",
    "benchmarks.head run",
    "benchmarks.huge",
    "benchmarks.limited",
    "benchmarks.lookalikes",
    "benchmarks.papers.hydra",
    "benchmarks.papers.mnist",
    "benchmarks.papers.specialists",
    "benchmarks.ranks",
    "benchmarks.scaling",
    "benchmarks.training",
]
PROGRAMS = [*QUICK, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)]


def programs_in(folder: Path) -> set[str]:
    """The modules and packages that can be started."""
    modules = set()
    for path in folder.rglob("*.py"):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            modules.add(".".join(parts).removesuffix(".__main__"))
    return modules


def no_number(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


# tests/test_serving_example.py starts these.
SERVING = {"examples.serving.app", "examples.serving.load"}


def test_every_program_is_in_the_list():
    listed = {words.split()[0] for words in (*QUICK, *SLOW)}
    assert listed | SERVING == programs_in(ROOT / "benchmarks") | programs_in(ROOT / "examples")


@pytest.mark.parametrize("words", PROGRAMS)
def test_a_quick_form_ends_with_one_json_object(words, tmp_path):
    module, *options = words.split()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "REFERRAL_DATA": str(tmp_path / "absent"),
    }
    command = [sys.executable, "-m", module, *options, "--quick"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(done.stdout.splitlines()[-1], parse_constant=no_number)
    assert isinstance(measured, dict) and measured
