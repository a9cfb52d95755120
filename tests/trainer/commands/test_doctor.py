"""`referral doctor`: what it finds, and what only some ranks find."""

import importlib.metadata
import shutil
import subprocess
import sys

import pytest
import torch
from toy import toy_config, write_toy

from pipeline.config import save_config
from pipeline.extras import install
from trainer.commands import doctor, gpus
from trainer.commands.doctor import Finding, RankFindings, compare_ranks
from trainer.commands.gpus import Gpus, TorchBuild, gpus_of_machine, judge


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def run(toy, tmp_path):
    config = toy_config(shutil.copytree(toy, tmp_path / "data"))
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.toml")
    return tmp_path / "run"


def test_a_fit_machine_passes_and_the_runs_shards_are_listed(run, capsys):
    assert doctor.main(["--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "train: 960 samples of 24 classes" in printed
    assert "gloo: all-reduce on cpu" in printed and "MISSING" not in printed


def test_a_shard_that_is_gone_is_found(run, capsys):
    (run.parent / "data" / "train-000001.tar").unlink()
    assert doctor.main(["--run", str(run)]) == 1
    assert "MISSING  " in capsys.readouterr().out


# Whatever is missing or broken is a finding


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with no devices and no commands but those that a test writes into bin/."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "dev").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(gpus, "DEVICES", tmp_path / "dev")
    for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", *doctor.TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write_command(bare, name, text):
    path = bare / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def no_torch(monkeypatch):
    version = importlib.metadata.version

    def absent(package):
        if package == "torch":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setitem(sys.modules, "torch", None)


def missing(printed):
    return [line for line in printed.splitlines() if line.startswith("MISSING")]


def test_without_torch_the_rest_is_looked_at_and_one_command_installs_it(
    bare, no_torch, run, capsys
):
    assert doctor.main(["--run", str(run)]) == 1
    printed = capsys.readouterr().out
    assert missing(printed) == [f"MISSING  not installed: torch; {install('train')}"]
    assert "GiB free under" in printed and "numpy" in printed


def test_on_a_login_node_a_missing_torch_is_no_fault(bare, no_torch, monkeypatch, capsys):
    write_command(bare, "sbatch", "exit 0")
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert f"a login node needs none, jobs do: {install('train')}" in printed
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert doctor.main([]) == 1


def test_a_torch_that_cannot_be_used_is_a_finding(bare, monkeypatch, capsys):
    def broken():
        raise OSError("libcudart.so.12:\n cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert doctor.main([]) == 1
    assert missing(capsys.readouterr().out) == [
        "MISSING  torch cannot be used: OSError: libcudart.so.12: cannot open shared object file; "
        "install it again"
    ]


def test_a_collective_that_fails_is_a_finding(bare, monkeypatch, capsys):
    def refused(*_, **__):
        raise RuntimeError("no interface")

    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    assert doctor.main([]) == 1
    assert missing(capsys.readouterr().out) == ["MISSING  gloo: RuntimeError: no interface"]


@pytest.mark.parametrize("what", ["absent", "invalid"])
def test_a_config_that_cannot_be_read_is_a_finding(bare, run, capsys, what):
    path = run / "config.toml"
    path.unlink()
    if what == "invalid":
        path.write_text("[engine]\nnmae = 'ddp'\n")
    assert doctor.main(["--run", str(run)]) == 1
    (line,) = missing(capsys.readouterr().out)
    assert ("nmae" if what == "invalid" else str(path)) in line


@pytest.mark.parametrize(
    "option, package, extra",
    [
        ("engine.name=deepspeed", "deepspeed", "deepspeed"),
        ('engine.track=["wandb"]', "wandb", "wandb"),
        ("model.name=timm:resnet10t", "timm", "timm"),
    ],
)
def test_what_the_runs_config_needs_is_missed(
    run, bare, monkeypatch, capsys, option, package, extra
):
    save_config(toy_config(run.parent / "data", option), run / "config.toml")
    monkeypatch.setitem(sys.modules, package, None)
    assert doctor.main(["--run", str(run)]) == 1
    (line,) = missing(capsys.readouterr().out)
    assert line.endswith(f"{package} is not installed; {install(extra)}")


def test_a_rank_variable_of_another_launcher_starts_no_process_group(bare, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert doctor.main([]) == 0
    assert "all-reduce over" not in capsys.readouterr().out


# GPUs


def test_gpus_are_those_that_nvidia_smi_lists(bare):
    assert gpus_of_machine() is None
    write_command(bare, "nvidia-smi", "echo 'NVIDIA H200, 550.54'; echo 'NVIDIA H200, 550.54'")
    assert gpus_of_machine() == Gpus("NVIDIA", "2 x NVIDIA H200, driver 550.54")


@pytest.mark.parametrize(
    "answer",
    ["echo 'No devices were found'", "exit 9", "exec /nowhere", r"printf '\377\376 no text'"],
)
def test_an_nvidia_smi_without_a_gpu_is_none(bare, answer):
    write_command(bare, "nvidia-smi", answer)
    assert gpus_of_machine() is None


def test_an_nvidia_smi_that_hangs_is_given_up(bare, monkeypatch):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    write_command(bare, "nvidia-smi", "exit 0")
    monkeypatch.setattr(subprocess, "run", hang)
    assert gpus_of_machine() is None


@pytest.mark.parametrize("device, maker", [("nvidia0", "NVIDIA"), ("kfd", "AMD")])
def test_a_device_file_alone_tells_of_a_gpu(bare, device, maker):
    (bare / "dev" / device).touch()
    present = gpus_of_machine()
    assert present is not None and present.maker == maker and device in present.text


CPU = TorchBuild("2.13.0+cpu", None, None, [])
CUDA = TorchBuild("2.13.0+cu130", "13.0", None, [])
ROCM = TorchBuild("2.13.0+rocm7", None, "7.0", [])
H200 = Gpus("NVIDIA", "1 x NVIDIA H200, driver 550.54")
INSTINCT = Gpus("AMD", "an AMD GPU (/dev/kfd)")


@pytest.mark.parametrize(
    "build, present, is_fine, words",
    [
        (CPU, None, True, "no GPU (torch is built for CPUs alone)"),
        (CUDA, None, True, "no GPU (torch is built for CUDA 13.0)"),
        (ROCM, None, True, "no GPU (torch is built for ROCm 7.0)"),
        (CPU, H200, False, "torch 2.13.0+cpu is built for CPUs alone; pip install"),
        (ROCM, H200, False, "is built for ROCm 7.0; pip install --force-reinstall --index-url"),
        (CUDA, H200, False, "built for CUDA 13.0, sees none; take a newer driver"),
        (CPU, INSTINCT, False, "is built for CPUs alone; pip install --force-reinstall torch from"),
        (CUDA, INSTINCT, False, "torch 2.13.0+cu130 is built for CUDA 13.0; pip install"),
        (ROCM, INSTINCT, False, "torch for an older ROCm"),
        (ROCM._replace(devices=["cuda:0 MI300X"]), INSTINCT, True, "cuda:0 MI300X (ROCm 7.0)"),
        (CUDA._replace(devices=["cuda:0 H200"]), H200, True, "cuda:0 H200 (CUDA 13.0)"),
    ],
)
def test_a_gpu_that_torch_cannot_use_comes_with_what_to_install(
    bare, build, present, is_fine, words
):
    ((ok, text),) = judge(build, present)
    assert ok == is_fine and words in text


def test_a_gpu_that_nobody_asks_for_is_no_fault(bare, monkeypatch):
    assert judge(CPU, H200, "cpu")[0][0]
    assert not judge(CPU, None, "cuda")[0][0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert judge(CUDA, H200)[0][0]


def test_a_cpu_torch_beside_a_gpu_is_found_by_the_command(bare, monkeypatch, capsys):
    (bare / "dev" / "nvidia0").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.main([]) == 1
    (line,) = missing(capsys.readouterr().out)
    assert "nvidia0" in line and "https://pypi.org/simple torch" in line


def test_a_driver_that_fails_is_a_finding_with_torchs_words(bare, monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("HIP error:\ninvalid device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    assert doctor.main([]) == 1
    (line,) = missing(capsys.readouterr().out)
    assert "cannot ask its GPUs: RuntimeError: HIP error: invalid device" in line


# Ranks

SAME = [
    Finding(True, "torch 2.13"),
    Finding(True, "train: 10 samples of 2 classes (abcd)"),
    Finding(True, "5.0 GiB free under /run"),
]
RANK_0 = RankFindings("a", "cpu", SAME)


def test_ranks_that_see_the_same_pass():
    other = RankFindings("b", "cpu", [*SAME[:2], Finding(True, "9.0 GiB free under /run")])
    lines = compare_ranks([RANK_0, other], 2.0)
    assert all(ok for ok, _ in lines) and (True, "rank 1 on b, cpu, sees the same") in lines


def test_a_rank_that_does_not_see_the_shards_is_named():
    other = RankFindings("b", "cpu", [SAME[0], Finding(False, "/data: no shards"), SAME[2]])
    lines = compare_ranks([RANK_0, other], 2.0)
    assert (False, "rank 1 on b, cpu, sees other things than rank 0:") in lines
    assert (False, "    /data: no shards") in lines


def test_a_sum_that_misses_a_rank_is_found():
    lines = compare_ranks([RANK_0, RankFindings("b", "cpu", SAME)], 1.0)
    assert (False, "all-reduce over 2 ranks: 1") in lines
