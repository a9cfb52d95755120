"""The configs in examples/: they load, and naics.toml does what its header says, made small."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"
NAICS = Path(os.environ.get("REFERRAL_DATA", Path(__file__).parents[2] / "shared/data")) / "naics"
MODULES = {"referral shards": ["trainer", "shards"], "referral run": ["launch.cli", "run"]}


def commands(config: Path) -> list[list[str]]:
    """The commands of a config's header, words split as a shell does. Continued lines joined."""
    header = "".join(
        line[1:] for line in config.read_text().splitlines(True) if line.startswith("#")
    )
    lines = re.sub(r"\\\n\s*", "", header).splitlines()
    return [
        shlex.split(line, comments=True) for line in lines if line.strip().startswith("referral ")
    ]


def run(words: list[str], directory: Path, *more: str) -> str:
    command = [sys.executable, "-m", *MODULES[" ".join(words[:2])], *words[2:], *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_example_loads_and_says_how_it_is_run(config):
    load_config(config)
    assert any(words[:2] == ["referral", "run"] for words in commands(config))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not NAICS.is_dir(), reason=f"{NAICS} is absent: set REFERRAL_DATA")
def test_phrases_are_learned_and_specialised_on(tmp_path):
    make, train = (
        words for words in commands(EXAMPLES / "naics.toml") if words[1] in ("shards", "run")
    )
    make = [str(NAICS / Path(word).name) if word.endswith(".csv.gz") else word for word in make]
    assert "14051 train, 3003 val, 3003 test" in run(make, tmp_path)
    train = [
        str(EXAMPLES / "naics.toml") if word.endswith("naics.toml") else word for word in train
    ]
    small = [
        "train.epochs=3",
        "clusters.num_groups=3",
        "specialists.epochs=0.5",
        "students.main.epochs=0.5",
        "controls.enabled=false",
        "model.width=64",
        "specialists.per_job=3",
    ]
    output = run(train, tmp_path, *(word for key in small for word in ("--set", key)))
    results = json.loads((tmp_path / train[train.index("--run") + 1] / "results.json").read_text())
    assert results["generalist"]["n"] == 3003 and results["generalist"]["top1"] > 100 / 1055
    assert len(results["specialists"]) == 3 and sum(results["clusters"]["sizes"]) >= 1055
    assert results["student"] is not None and np.isfinite(results["ensemble"]["nll"])
    assert "report: " in output
    page = (tmp_path / train[train.index("--run") + 1] / "report.html").read_text()
    assert "the inputs are no 8-bit gray or RGB images, but float32 of shape [2048]" in page
