"""Signals that come at any time, and stages that are asked for too early."""

import subprocess
import sys

import pytest

from trainer.__main__ import check_inputs
from trainer.config import UserError, load_config
from trainer.run_directory import RunDirectory


def test_a_signal_between_two_trainings_is_heeded_in_the_second():
    program = """
import os, signal
from trainer.distributed import ALONE, StopSignal
first = StopSignal()
assert not first.agreed(ALONE)
os.kill(os.getpid(), signal.SIGUSR2)
assert StopSignal().agreed(ALONE)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_a_stage_whose_inputs_are_not_done_is_refused_and_combine_judges_for_itself(tmp_path):
    """Slurm takes a dependency on a job that it has forgotten for fulfilled."""
    run = RunDirectory(tmp_path, load_config(None, ["train.steps=1", "clusters.num_groups=2"]))
    with pytest.raises(UserError, match="clusters/statistics needs generalist, which is not done: run it first"):
        check_inputs(run.measure)
    check_inputs(run.generalist)
    check_inputs(run.combine)
    run.generalist.begin().finish()
    check_inputs(run.measure)
