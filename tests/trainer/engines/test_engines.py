"""DDP and ZeRO 0 to 3 are one trainer: the same losses, resumed at any number of ranks."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import engine_overrides, losses, on_ranks, stage_on_ranks, start_stage, weights
from toy import toy_config, write_toy

from pipeline.config import save_config
from pipeline.graph import RunDirectory

pytestmark = pytest.mark.engines
TRAIN_ALL = Path(__file__).with_name("train_all.py")
RESUMED = ((2, 1), (1, 2), (2, 3), (2, 2))
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")


def train_all(ranks, data, out, *words):
    on_ranks(ranks, TRAIN_ALL, data, out, *words)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The generalist of every engine, by one, two and three ranks."""
    out = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2, 3):
        train_all(ranks, data, out / str(ranks), *ENGINES)
    return out


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """Runs of every engine, stopped at step 20 and resumed at another number of ranks."""
    out = tmp_path_factory.mktemp("resumed")
    for before, after in RESUMED:
        train_all(before, data, out / f"{before}-{after}", *ENGINES, "stop=20")
        train_all(after, data, out / f"{before}-{after}", *ENGINES)
    return out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_every_engine_logs_the_losses_of_one_process(runs, ranks, engine):
    alone = losses(runs / "1" / "ddp")
    assert len(alone) == 50 and alone[-1] < 0.7 * alone[0]
    np.testing.assert_allclose(losses(runs / str(ranks) / engine), alone, atol=1e-5)


@pytest.mark.slow
def test_accumulated_micro_batches_are_one_batch(runs, data, tmp_path):
    train_all(2, data, tmp_path, *ENGINES, "train.accumulation=2")
    for engine in ENGINES:
        np.testing.assert_allclose(losses(tmp_path / engine), losses(runs / "1" / "ddp"), atol=1e-5)


def test_a_job_of_one_rank_needs_no_torchrun(data, tmp_path):
    """As the local runner starts specialists, with keys of DeepSpeed's own, and blocks computed
    twice."""
    steps = ["train.steps=20", "specialists.steps=10"]
    further = [
        "engine.deepspeed={zero_optimization={round_robin_gradients=true}}",
        "engine.checkpoint_activations=true",
    ]
    config = toy_config(data, *engine_overrides("zero2"), *steps, *further)
    save_config(config, tmp_path / "config.toml")
    stages = ["generalist", "measure", "cluster", "route", "specialist", "--index", "0"]
    command = [sys.executable, "-P", "-m", "trainer", *stages, "--run", str(tmp_path)]
    subprocess.run(command, check=True, timeout=200)
    assert RunDirectory(tmp_path, config).specialists[0].is_done


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("before, after", RESUMED)
def test_a_run_resumes_at_another_number_of_ranks(runs, resumed, before, after, engine):
    run = resumed / f"{before}-{after}" / engine
    attempts = run.glob("generalist/attempts/*/metrics.jsonl")
    first, _ = sorted(attempts, key=lambda path: path.stat().st_mtime)
    assert '"step": 20' in first.read_text().splitlines()[-1]
    undisturbed = runs / "1" / "ddp"
    np.testing.assert_allclose(losses(run), losses(undisturbed), atol=1e-5)
    for name, value in weights(run).items():
        torch.testing.assert_close(value, weights(undisturbed)[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_resumed_at_the_same_number_of_ranks_the_weights_are_the_same(runs, resumed):
    """Bit for bit under DDP, within 1e-6 under DeepSpeed."""
    for engine in ENGINES:
        expected = weights(runs / "2" / engine)
        tolerance = 1e-6 * (engine != "ddp")
        for name, value in weights(resumed / "2-2" / engine).items():
            torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=0)


@pytest.mark.slow
def test_another_engine_resumes_in_the_middle(runs, data, tmp_path):
    """Adam's state, its step count too, passes between all engines: by two ranks, then by three."""
    adam = ("train.optimizer=adamw", "train.learning_rate=0.01")
    train_all(2, data, tmp_path / "whole", "ddp", *adam)
    train_all(2, data, tmp_path / "begun", *ENGINES, *adam, "stop=20")
    for before, after in zip(ENGINES, (*ENGINES[1:], ENGINES[0]), strict=True):
        (tmp_path / "changed").mkdir(exist_ok=True)
        (tmp_path / "begun" / before).rename(tmp_path / "changed" / after)
    train_all(3, data, tmp_path / "changed", *ENGINES, *adam)
    expected = losses(tmp_path / "whole" / "ddp")
    for engine in ENGINES:
        np.testing.assert_allclose(losses(tmp_path / "changed" / engine), expected, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1"])
def test_killed_workers_and_launchers_change_no_weight(engine, tmp_path):
    """Three of the thirty kills that `make soak` does to each engine."""
    spec = importlib.util.spec_from_file_location("killed", TRAIN_ALL.with_name("killed.py"))
    killed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(killed)
    assert killed.soak(engine, 3, tmp_path).startswith(f"{engine}: 3 kills in ")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["a rank", "the agent"])
def test_what_was_stopped_for_seconds_goes_on_to_the_same_weights(stopped, data, tmp_path):
    """As a debugger, a full swap or a suspended laptop does it.  The agent's heartbeat is 5 s."""
    whole, run = (tmp_path / name for name in ("whole", "run"))
    config = toy_config(data, "train.steps=300", "train.checkpoint_every=25")
    for root in (whole, run):
        root.mkdir()
        save_config(config, root / "config.toml")
    stage_on_ranks(2, "generalist", whole)
    process = start_stage(2, "generalist", run)
    while not list(run.glob("generalist/checkpoints/step-*/COMPLETE")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    victim = process.pid if stopped == "the agent" else int(Path(children).read_text().split()[0])
    os.kill(victim, signal.SIGSTOP)
    time.sleep(7)
    os.kill(victim, signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert len(os.listdir(run / "generalist" / "attempts")) == 1
    for name, value in weights(run).items():
        assert torch.equal(value, weights(whole)[name])
