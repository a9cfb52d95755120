"""`referral run` on a toy from nothing to the report: once quietly, and once killed again and again."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from toy import toy_config, write_toy

from pipeline.config import save_config

SMALL = (
    "clusters.num_groups=3",
    "specialists.per_job=3",
    "train.steps=200",
    "train.checkpoint_every=20",
    "students.main.steps=60",
)


def start(config, run, *more):
    command = [sys.executable, "-m", "launch.cli", "run", str(config), "--run", str(run), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )


def finish(process):
    output, _ = process.communicate(timeout=250)
    return process.returncode, output


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    save_config(toy_config(write_toy(root / "data"), *SMALL), root / "config.toml")
    return root / "config.toml"


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    code, output = finish(start(config, run))
    assert code == 0, output
    return run, output


def figures(run):
    """results.json but for what depends on the machine's mood."""

    def without_cost(value):
        if isinstance(value, dict):
            return {key: without_cost(each) for key, each in value.items() if key != "cost"}
        return [without_cost(each) for each in value] if isinstance(value, list) else value

    return without_cost(json.loads((run / "results.json").read_text()))


def test_a_run_ends_with_results_a_report_and_the_verdict_on_the_terminal(finished):
    run, output = finished
    results = figures(run)
    assert {
        "generalist",
        "ensemble",
        "controls",
        "students",
        "student",
        "clusters",
        "specialists",
    } <= set(results)
    assert set(results["controls"]) == {"control_wall", "control_compute", "student_hard"}
    assert len(results["specialists"]) == 3
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert "The ensemble makes" in output and str(run / "report.html") in output


def test_the_same_command_on_a_finished_run_changes_nothing(config, finished):
    run, _ = finished

    def state():
        return {
            path: (path.lstat().st_mtime_ns, path.lstat().st_size)
            for path in run.rglob("*")
            if path.is_file()
        }

    before = state()
    code, output = finish(start(config, run))
    assert code == 0, output
    changed = {
        str(path.relative_to(run)) for path, facts in state().items() if before.get(path) != facts
    }
    assert changed <= {".lock"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_of_everything_at_any_moment_ends_with_the_same_figures(config, finished, tmp_path):
    moments, run, killed = random.Random(1), tmp_path / "run", 0
    while True:
        process = start(config, run)
        try:
            patience = 1.2**killed  # so that a machine on which a start takes a minute gets on too
            output, _ = process.communicate(timeout=moments.uniform(2, 6) * patience)
            assert process.returncode == 0, output
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # its children go with it
            process.communicate()
            killed += 1
            assert killed < 30, "it does not get on"
    assert killed >= 2
    assert figures(run) == figures(finished[0])
    assert not survivors(run)


def survivors(run):
    """Processes that still work on `run`, a second later."""
    time.sleep(1)
    return subprocess.run(
        ["pgrep", "-f", f"--run {run}"], capture_output=True, text=True
    ).stdout.split()
