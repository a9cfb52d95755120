"""Networks of timm through a whole run: in a Python of their own, which pip can make or not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from venvs import python_with, site_of

ROOT = Path(__file__).parent.parent
SUPPORT = ROOT / "tests" / "support"
PACKAGES = ("timm", "torchvision")


def torchvision_of(torch_version: str) -> str:
    """The release of torchvision that belongs to a torch: 0.28 to 2.13, and so on."""
    minor = int(torch_version.split(".")[1])
    return f"torchvision=={0}.{minor + 15}.*"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with what is installed here, timm and torchvision."""
    if all(importlib.util.find_spec(package) for package in PACKAGES):
        return Path(sys.executable)
    root = tmp_path_factory.mktemp("timm")
    wanted = ("timm>=1.0", torchvision_of(torch.__version__))
    python = python_with(root, *wanted, needs=False)
    # An index may have the wheel for CUDA alone.  Beside a torch for CPUs its operators are not
    # loaded, and what registers them fails. Transforms need neither.
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        (site_of(python) / "torchvision" / "_meta_registrations.py").write_text("")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_network_of_timm_goes_from_a_hubs_directory_to_a_report_and_onnx(python, tmp_path, kind):
    paths = os.pathsep.join(map(str, (ROOT, SUPPORT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, SUPPORT / "finetuned.py", kind, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["head_rows"] == 24 and measured["report"]
    assert measured["frozen_tensors"] > 0 and measured["unmoved"] == (kind == "vit")
    assert {"specialists/000", "ensemble", "report"} <= set(measured["stages"])
    assert measured["bundle"] == 0
    programs = {name: value for name, value in measured["differences"].items() if "." in name}
    assert any(name.endswith(".onnx") for name in programs)
    assert max(programs.values()) <= 1e-4, programs
    if kind == "vit":  # a branch has the last transformer block and the norm behind it
        own = {name.removeprefix("blocks.0.") for name in measured["branch_tensors"]}
        blocks = {name.rpartition(".")[0] for name in own if "blocks." in name}
        layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        assert blocks == {f"blocks.2.{layer}" for layer in layers} and "norm.weight" in own
