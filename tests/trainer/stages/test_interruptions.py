"""Signals that come at any time, and stages that are started too early."""

import subprocess
import sys

import pytest
from ranks import ENGINES, on_ranks

import trainer.__main__
from pipeline.config import UserError, load_config
from pipeline.graph import RunDirectory
from trainer.__main__ import check_inputs


def test_a_signal_between_two_trainings_is_heeded_in_the_second():
    program = """
import os, signal
from trainer.distributed.ranks import ALONE, StopSignal
first = StopSignal()
assert not first.agreed(ALONE)
os.kill(os.getpid(), signal.SIGUSR2)
assert StopSignal().agreed(ALONE)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_a_stage_whose_inputs_are_not_done_is_refused_but_for_the_ensemble(tmp_path):
    """Slurm counts a dependency on a job that it has forgotten as fulfilled.

    The ensemble decides by itself which specialists it can do without.
    """
    run = RunDirectory(tmp_path, load_config(None, ["train.steps=1", "clusters.num_groups=2"]))
    message = "clusters/statistics needs generalist, which is not done: run it first"
    with pytest.raises(UserError, match=message):
        check_inputs(run.measure)
    check_inputs(run.generalist)
    check_inputs(run.ensemble)
    run.generalist.begin().finish()
    check_inputs(run.measure)


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_an_error_of_all_ranks_is_printed_by_rank_0_while_the_others_wait(
    tmp_path, monkeypatch, capsys, rank
):
    """torchrun ends all ranks with the first that ends, so that rank 0 might print nothing."""
    waits = []

    def sleep(seconds):
        waits.append((seconds, capsys.readouterr().err))

    monkeypatch.setattr(trainer.__main__.time, "sleep", sleep)
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    assert trainer.__main__.main(["generalist", "--run", str(tmp_path / "none")]) == 2
    expected = [(trainer.__main__.RANK_0_FIRST_S, "")] if rank == "1" else []
    assert waits == expected
    assert "error:" in capsys.readouterr().err


@pytest.mark.slow
def test_all_ranks_stop_at_the_step_after_any_of_them_is_asked_to(tmp_path):
    on_ranks(2, ENGINES / "stops.py", tmp_path)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["4", "4"]
