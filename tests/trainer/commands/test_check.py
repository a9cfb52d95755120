"""Errors that are found before a run is made: one line, exit code 2, nothing written."""

import os
import subprocess
import sys

import numpy as np
import pytest
import webdataset as wds
from toy import encode_png, images, toy_config, write_toy

from pipeline.config import UserError, save_config
from trainer.commands.check import check


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


def test_a_sound_config_passes_and_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(toy_config(data), 2)
    assert not list(tmp_path.iterdir())


INDIVISIBLE = "batch 95 is not divisible by 2 ranks x 1 accumulation steps; try 94 or 96"


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.batch_size=95", INDIVISIBLE),
        ("train.accumulation=7", "not divisible by 2 ranks x 7 accumulation steps"),
        ("model.options={widht=3}", "widht"),
        ("generalist.from=/tmp/no/such/run", "generalist.from = /tmp/no/such/run"),
        ("data.augment=no_such_module:view", "no_such_module"),
        ("model.name=no_such_module:build", "no_such_module"),
    ],
)
def test_an_error_is_found_before_anything_runs(data, override, message):
    with pytest.raises(UserError) as error:
        check(toy_config(data, override), 2)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_val_with_other_classes_is_refused(data, tmp_path):
    other = write_toy(tmp_path / "other", names=[f"another {c}" for c in range(24)])
    with pytest.raises(UserError, match="data.val has other classes than data.train"):
        check(toy_config(data, f"data.val={other}"), 1)


def test_a_class_index_out_of_range_leaves_no_run_behind(data, tmp_path):
    with wds.TarWriter(str(tmp_path / "wrong-000000.tar")) as tar:
        tar.write({"__key__": "a", "cls": b"99", "png": encode_png(images(np.array([0]), 1)[0])})
    config, run = tmp_path / "config.toml", tmp_path / "run"
    wrong = (f"data.train={tmp_path}/wrong-000000.tar", "data.classes=24")
    save_config(toy_config(data, *wrong), config)
    command = [sys.executable, "-m", "launch.cli", "run", str(config), "--run", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and not run.exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "has label 99, which is none of the 24 classes" in done.stderr
