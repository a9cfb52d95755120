"""`referral doctor`: what it finds, and what only some ranks find."""

import pytest
from toy import toy_config, write_toy

from pipeline.config import save_config
from trainer.commands import doctor
from trainer.commands.doctor import compared


@pytest.fixture
def run(tmp_path):
    config = toy_config(write_toy(tmp_path / "data"))
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.toml")
    return tmp_path / "run"


def test_a_fit_machine_is_told_so_with_the_runs_shards(run, capsys):
    assert doctor.main(["--run", str(run)]) == 0
    told = capsys.readouterr().out
    assert (
        "train: 960 samples of 24 classes" in told
        and "gloo: all-reduce on cpu" in told
        and "MISSING" not in told
    )


def test_a_shard_that_is_gone_is_found(run, capsys):
    (run.parent / "data" / "train-000001.tar").unlink()
    assert doctor.main(["--run", str(run)]) == 1
    assert "MISSING  " in capsys.readouterr().out


SAME = [
    (True, "torch 2.13"),
    (True, "train: 10 samples of 2 classes (abcd)"),
    (True, "5.0 GiB free under /run"),
]


def test_ranks_that_see_the_same_are_well():
    others = [*SAME[:2], (True, "9.0 GiB free under /run")]
    lines = compared([("a", "cpu", SAME), ("b", "cpu", others)], 2.0)
    assert all(good for good, _ in lines) and (True, "rank 1 on b, cpu, sees the same") in lines


def test_a_rank_that_does_not_see_the_shards_is_named():
    lines = compared(
        [("a", "cpu", SAME), ("b", "cpu", [SAME[0], (False, "/data: no shards"), SAME[2]])], 2.0
    )
    assert (False, "rank 1 on b, cpu, sees other things than rank 0:") in lines
    assert (False, "    /data: no shards") in lines


def test_a_sum_that_misses_a_rank_is_found():
    assert (False, "all-reduce over 2 ranks: 1") in compared(
        [("a", "cpu", SAME), ("b", "cpu", SAME)], 1.0
    )
