"""The sweeps in docs/integrations.md run as they stand there."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomli_w
import typer
from toy import toy_config, write_toy

import launch.cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
# What the snippet asks of Optuna, where it is not installed: trials that take the middle.
OPTUNA = """
class Trial:
    def __init__(self, number):
        self.number, self.params = number, {}
    def suggest_float(self, name, low, high, log=False):
        self.params[name] = (low * high) ** 0.5 * (1 + self.number)
        return self.params[name]
class Study:
    def optimize(self, objective, n_trials):
        trials = [Trial(number) for number in range(n_trials)]
        self.best_params = min(trials, key=objective).params
def create_study(study_name, storage, load_if_exists):
    return Study()
"""


def block(language: str, name: str) -> str:
    """The code block whose first line names the file."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    (found,) = [text for text in blocks if text.startswith(f"# {name}:")]
    return found


def run(words: list[str], directory: Path, *path: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *path])),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        words, cwd=directory, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(directory: Path, name: str, text: str) -> None:
    path = directory / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_loop_starts_a_run_for_each_rate_and_seed_and_compares_them(tmp_path):
    """With a `referral` that notes how it is called, and leaves a summary."""
    command(tmp_path, "python", f'exec {shlex.quote(sys.executable)} "$@"')
    summary = '{\\"val\\": {\\"loss\\": 1.5}}'
    note = 'echo "$@" >> calls\n[ $1 = run ] || exit 0\n'
    note += f'mkdir -p $4/generalist && echo "{summary}" > $4/generalist/summary.json'
    command(tmp_path, "referral", note)
    printed = run(["sh", "-e", "-c", block("sh", "sweep.sh")], tmp_path)
    calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    known = typer.main.get_command(launch.cli.app).commands
    for name, *arguments in calls:
        known[name].make_context(name, list(arguments))  # raises for an unknown option
    assert [call[0] for call in calls] == ["run"] * 6 + ["compare"]
    assert len({call[3] for call in calls[:6]}) == 6
    assert printed.count("{'loss': 1.5}") == 6
    assert len([word for word in calls[-1] if word.startswith("runs/sweep/rate-")]) == 6


@pytest.mark.slow
def test_the_study_trains_generalists_and_chooses_on_val(tmp_path):
    data = write_toy(tmp_path / "shards", {"train": 8, "val": 4, "test": 4})
    config = toy_config(data, "train.steps=5").dump()
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(config))
    command(tmp_path, "referral", f'exec {shlex.quote(sys.executable)} -P -m launch "$@"')
    text = block("python", "sweep.py").replace("n_trials=20", "n_trials=2")
    assert "n_trials=2)" in text
    (tmp_path / "sweep.py").write_text(text)
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "optuna.py").write_text(OPTUNA)
    fakes = [] if find_spec("optuna") else [tmp_path / "fakes"]
    printed = run([sys.executable, "-P", "sweep.py"], tmp_path, *fakes)
    losses = [
        json.loads((tmp_path / f"runs/sweep/{trial:03d}/generalist/summary.json").read_text())
        for trial in range(2)
    ]
    assert all(summary["val"]["loss"] > 0 for summary in losses)
    assert "train.learning_rate" in printed.splitlines()[-1]
