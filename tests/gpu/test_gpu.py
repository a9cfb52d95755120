"""One tiny run on a GPU, stage by stage and engine by engine, against the same on the CPU.

    make gpu
    REFERRAL_GPU_SUITE_DEVICE=cpu python -m pytest -m gpu tests/gpu    do the tests work?

On a GPU the order of sums is another, in float32 (no TF32). Losses agree to 1e-4. Metrics of later
stages, whose groups and temperatures follow from them, agree as stated at each.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ranks import (
    ENGINES,
    gloo_environment,
    kill_after_a_checkpoint,
    losses,
    on_ranks,
    weights,
)
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from pipeline.config import save_config
from pipeline.graph import RunDirectory
from pipeline.store import read_json
from trainer.__main__ import main
from trainer.core import loop
from trainer.data.shards import open_shards

DEVICE = os.environ.get("REFERRAL_GPU_SUITE_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        ON_GPU and not torch.cuda.is_available(), reason="torch sees no CUDA device here"
    ),
]
# Adam divides by the size of a gradient and so would make much of its last digit.
STEADY = (
    "train.optimizer=sgd",
    "train.learning_rate=0.1",
    "specialists.learning_rate=0.03",
    "students.main.learning_rate=0.03",
    "clusters.num_groups=3",
    "train.log_every=1",
    "controls.enabled=false",
)
SHORT = ("train.steps=20", "train.validate_every=10", "train.patience=9")


def device_words(device: str, precision: str = "fp32") -> list[str]:
    return [f"engine.device={device}", f"engine.precision={precision}"]


@contextmanager
def on_this_device():
    """What runs inside computes on the GPU: no run may fall back to the CPU unseen."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    yield
    if ON_GPU:
        assert torch.cuda.max_memory_allocated() > torch.cuda.memory_allocated()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 12, "test": 12})


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, RunDirectory]:
    """Every stage on the CPU, and on the device under test."""
    root = tmp_path_factory.mktemp("runs")
    configs = {
        name: toy_config(data, *STEADY, *device_words(device))
        for name, device in (("cpu", "cpu"), ("device", DEVICE))
    }
    cpu = run_all(root / "cpu", configs["cpu"])
    with on_this_device():
        return {"cpu": cpu, "device": run_all(root / "device", configs["device"])}


def engines_on(device: str, data, out, *words: str) -> None:
    """The generalist by some engines, in one process of its own."""
    command = [sys.executable, str(ENGINES / "train_all.py"), str(data), str(out), *words]
    ended = subprocess.run(
        [*command, *SHORT, *device_words(device)],
        env=gloo_environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The generalist by DDP on the CPU."""
    out = tmp_path_factory.mktemp("alone")
    engines_on("cpu", data, out, "ddp")
    return out / "ddp"


def test_the_generalist_logs_the_losses_of_the_cpu(runs):
    cpu, device = (losses(run.root) for run in runs.values())
    assert len(cpu) == 60 and cpu[-1] < 0.8 * cpu[0]
    np.testing.assert_allclose(device, cpu, atol=1e-4)


@pytest.mark.parametrize("row", ["generalist", "ensemble", "main"])
def test_metrics_are_those_of_the_cpu(runs, row):
    """Within two of 288 test examples, and .02 nats."""
    both = []
    for run in runs.values():
        results = read_json(run.root / "results.json")
        both.append(results["students"]["main"] if row == "main" else results[row])
    cpu, device = both
    assert cpu["n"] == device["n"] == 12 * NUM_CLASSES
    assert device["top1"] == pytest.approx(cpu["top1"], abs=2.01 / cpu["n"])
    assert device["nll"] == pytest.approx(cpu["nll"], abs=0.02)


@pytest.mark.parametrize("options", [[], ["--student", "main"], ["--generalist"]])
def test_predictions_of_one_run_are_the_same_on_both(runs, tmp_path, capsys, options):
    """The network's float32 weights, asked on the CPU and on the device: within 1e-5."""
    split = runs["device"].config.data
    shards = open_shards(split.test, split, "test")
    np.save(tmp_path / "test.npy", shards.inputs(np.arange(40)))
    rows = []
    for device in ("cpu", DEVICE):
        command = ["predict", str(runs["device"].root), str(tmp_path / "test.npy"), "--json"]
        capsys.readouterr()
        assert main([*command, "--top", str(NUM_CLASSES), "--device", device, *options]) == 0
        rows.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(rows[0]) == 40
    for cpu, other in zip(*rows, strict=True):
        order = np.argsort(other["classes"])
        expected = np.array(cpu["probabilities"])[np.argsort(cpu["classes"])]
        np.testing.assert_allclose(np.array(other["probabilities"])[order], expected, atol=1e-5)


def test_what_is_exported_predicts_what_the_run_does(runs, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(runs["device"].root), "--to", str(out), "--programs"]) == 0
    differences = read_json(out / "export.json")["largest_difference"]
    assert differences["bundle"] == 0
    assert max(differences.values()) <= 1e-5


@pytest.mark.parametrize("precision, off", [("bf16", 0.05), ("fp16", 0.02)])
def test_low_precision_learns_what_float32_does(data, alone, tmp_path, precision, off):
    """The loss of the last step. Weights are float32, products are not."""
    if precision == "fp16" and not ON_GPU:
        pytest.skip("fp16 needs a GPU")
    words = ("train.momentum=0.9", *SHORT, *device_words(DEVICE, precision))
    config = toy_config(data, *STEADY, *words)
    with on_this_device():
        run = run_all(tmp_path / precision, config, ["generalist"])
    assert losses(run.root)[-1] == pytest.approx(losses(alone)[-1], abs=off)
    assert all(value.dtype != torch.bfloat16 for value in weights(run.root).values())


def test_ddp_zero_and_a_sharded_head_log_the_losses_of_the_cpu(data, alone, tmp_path):
    engines_on(DEVICE, data, tmp_path / "whole", "ddp", "zero1", "zero2", "zero3")
    engines_on(DEVICE, data, tmp_path / "split", "ddp", "engine.shard_head=true")
    expected = losses(alone)
    assert len(expected) == 20
    for run in (*(tmp_path / "whole").iterdir(), tmp_path / "split" / "ddp"):
        np.testing.assert_allclose(losses(run), expected, atol=1e-4, err_msg=str(run))
        for name, value in weights(run).items():
            torch.testing.assert_close(value, weights(alone)[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_run_that_stopped_resumes_on_the_device(data, alone, tmp_path, engine):
    engines_on(DEVICE, data, tmp_path, engine, "stop=9")
    assert not (tmp_path / engine / "generalist" / "model.safetensors").exists()
    engines_on(DEVICE, data, tmp_path, engine)
    np.testing.assert_allclose(losses(tmp_path / engine), losses(alone), atol=1e-4)


def ranks_at_hand() -> int:
    """As many as there are GPUs, of those that divide a batch of 96. Two on the CPU."""
    count = torch.cuda.device_count() if ON_GPU else 2
    return max((ranks for ranks in (2, 4, 6, 8) if ranks <= count), default=1)


@pytest.mark.parametrize(
    "words",
    [("ddp", "zero1", "zero2", "zero3"), ("ddp", "engine.shard_head=true")],
    ids=["engines", "sharded_head"],
)
def test_ranks_with_a_gpu_each_log_the_losses_of_one_process(data, alone, tmp_path, words):
    """By NCCL, stopped and resumed once. On one GPU there is nothing to exchange."""
    ranks = ranks_at_hand()
    if ranks == 1:
        pytest.skip("several ranks need several GPUs")
    options = (*words, *SHORT, *device_words(DEVICE))
    on_ranks(ranks, ENGINES / "train_all.py", data, tmp_path, *options, "stop=9")
    on_ranks(ranks, ENGINES / "train_all.py", data, tmp_path, *options)
    runs = list(tmp_path.iterdir())
    assert len(runs) == len([word for word in words if "=" not in word])
    for run in runs:
        np.testing.assert_allclose(losses(run), losses(alone), atol=1e-4, err_msg=str(run))


def test_after_kill_9_the_same_command_ends_with_the_same_weights(data, tmp_path):
    """Checkpoints are written by a thread beside the training on a GPU."""
    words = ("train.steps=1500", "train.checkpoint_every=50", *device_words(DEVICE))
    config = toy_config(data, *STEADY, *words)
    undisturbed = run_all(tmp_path / "undisturbed", config, ["generalist"])
    killed = RunDirectory(tmp_path / "killed", config)
    killed.root.mkdir()
    save_config(config, killed.root / "config.toml")
    kill_after_a_checkpoint(1, killed)
    run_all(killed.root, config, ["generalist"])
    assert len(list((killed.generalist.directory / "attempts").iterdir())) == 2
    for name, value in weights(killed.root).items():
        torch.testing.assert_close(value, weights(undisturbed.root)[name], atol=1e-6, rtol=0)


def test_a_resumed_run_holds_on_the_device_what_it_held_before(data, tmp_path, monkeypatch):
    """Within half a byte a weight: the checkpoint itself does not stay."""
    if not ON_GPU:
        pytest.skip("tests/trainer/core/test_resuming_memory.py counts it on the CPU")
    words = ("model.width=2000", "train.steps=12", "train.checkpoint_every=5", "train.ema=0.9")
    config = toy_config(data, *words, *device_words(DEVICE))
    held = []
    plain = loop.Trainer.train_step

    def train_step(trainer, batch, rate):
        if trainer.progress.step == 8:
            held.append(torch.cuda.memory_allocated())
            if len(held) == 1:
                raise KeyboardInterrupt
        plain(trainer, batch, rate)

    monkeypatch.setattr(loop.Trainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "run", config, ["generalist"])
    run = run_all(tmp_path / "run", config, ["generalist"])
    count = sum(value.numel() for value in weights(run.root).values())
    assert abs(held[1] - held[0]) <= 0.5 * count
