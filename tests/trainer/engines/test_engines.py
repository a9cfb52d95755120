"""DDP and ZeRO 0 to 3 are one trainer: the same losses, resumed at any number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import write_toy

from networks import load_classifier

pytestmark = pytest.mark.engines
TRAIN_ALL = Path(__file__).with_name("train_all.py")
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")


def train_all(ranks, data, out, *words, code=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    found = subprocess.run([*command, str(TRAIN_ALL), str(data), str(out), *words], env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=280)  # fmt: skip
    assert (found.returncode == 0) == (code == 0), found.stdout[-5000:]
    return found.stdout


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


def losses(run: Path):
    rows = map(json.loads, (run / "generalist" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def weights(run: Path):
    return load_classifier(run / "generalist").state_dict()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_every_engine_logs_the_losses_of_one_process(runs, ranks, engine):
    alone = losses(runs / "1" / "ddp")
    assert len(alone) == 50 and alone[-1] < 0.7 * alone[0]
    np.testing.assert_allclose(losses(runs / str(ranks) / engine), alone, atol=1e-5)
