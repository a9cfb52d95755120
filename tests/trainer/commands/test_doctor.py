"""`referral doctor`: what it finds, and what only some ranks find."""

import pytest
from toy import toy_config, write_toy

from pipeline.config import save_config
from trainer.commands import doctor
from trainer.commands.doctor import Finding, RankFindings, compare_ranks


@pytest.fixture
def run(tmp_path):
    config = toy_config(write_toy(tmp_path / "data"))
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
