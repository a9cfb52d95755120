"""`referral run` on a toy from nothing to the report: once undisturbed, once killed repeatedly."""

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
    command = [
        sys.executable,
        "-P",
        "-m",
        "launch.cli",
        "run",
        str(config),
        "--run",
        str(run),
        *more,
    ]
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


def without_cost(value):
    if isinstance(value, dict):
        return {key: without_cost(each) for key, each in value.items() if key != "cost"}
    if isinstance(value, list):
        return [without_cost(each) for each in value]
    return value


def metrics_of(run):
    """results.json but for the costs, which depend on how busy the machine is."""
    return without_cost(json.loads((run / "results.json").read_text()))


def test_a_run_ends_with_results_a_report_and_the_verdict_on_the_terminal(finished):
    run, output = finished
    results = metrics_of(run)
    sections = "generalist ensemble controls students student clusters specialists"
    assert set(sections.split()) <= set(results)
    assert set(results["controls"]) == {"control_wall", "control_compute", "student_hard"}
    assert len(results["specialists"]) == 3
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert "The ensemble makes" in output and str(run / "report.html") in output


def test_the_same_command_on_a_finished_run_changes_nothing(config, finished):
    run, _ = finished

    def state():
        """{(path, time of its last change, size) of every file}."""
        files = [path for path in run.rglob("*") if path.is_file()]
        stats = [path.lstat() for path in files]
        return {(p, s.st_mtime_ns, s.st_size) for p, s in zip(files, stats, strict=True)}

    before = state()
    code, output = finish(start(config, run))
    assert code == 0, output
    changed = {str(path.relative_to(run)) for path, *_ in state() - before}
    assert changed <= {".lock"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_of_everything_at_any_moment_ends_with_the_same_metrics(config, finished, tmp_path):
    moments, run, kills = random.Random(1), tmp_path / "run", 0
    while True:
        process = start(config, run)
        try:
            # The patience grows, so that a machine on which a start takes a minute progresses too.
            output, _ = process.communicate(timeout=moments.uniform(2, 6) * 1.2**kills)
            assert process.returncode == 0, output
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # its children die with it
            process.communicate()
            kills += 1
            assert kills < 30, "the run makes no progress"
    assert kills >= 2
    assert metrics_of(run) == metrics_of(finished[0])
    assert not survivors(run)


def survivors(run):
    """Processes that still work on `run`, a second later."""
    time.sleep(1)
    search = subprocess.run(["pgrep", "-f", f"--run {run}"], capture_output=True, text=True)
    return search.stdout.split()
