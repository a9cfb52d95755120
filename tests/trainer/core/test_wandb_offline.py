"""Weights & Biases as it is, offline, in a Python of its own: what it keeps is what was sent."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from venvs import python_with

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests" / "support" / "tracked_offline.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("wandb")
    python = Path(sys.executable)
    if importlib.util.find_spec("wandb") is None:
        python = python_with(root, "wandb>=0.17")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [python, SCRIPT, root], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generalist", "report"])
def test_every_stage_has_the_config_and_its_name_in_the_runs_group(found, stage):
    config = found[stage]["config"]
    assert config.pop("_wandb") is not None
    assert config == {
        "seed": 0,
        "train.steps": 20,
        "model.name": "mlp",
        "controls.enabled": False,
    }
    assert found[stage]["run"] == ["mine", stage]


@pytest.mark.slow
def test_rows_of_metrics_arrive_at_their_steps(found):
    history = found["generalist"]["history"]
    assert [(row["_step"], row["loss"]) for row in history] == [(10, 0.1), (20, 0.05)]
    assert history[-1]["val/top1"] == 0.5  # of the same step


@pytest.mark.slow
def test_the_final_table_arrives_as_a_table_and_in_the_summary(found):
    (table,) = found["report"]["tables"]
    assert table["columns"][:4] == ["row", "n", "top1", "top5"]
    assert [row[:3] for row in table["data"]] == [
        ["ensemble", 10, 0.75],
        ["student main", 10, 0.5],
    ]
    summary = found["report"]["summary"]
    assert summary["results/ensemble/nll"] == 1.5
    assert summary["results/student main/top1"] == 0.5
