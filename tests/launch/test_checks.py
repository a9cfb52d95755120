"""prepare, run and --dry-run check alike, with the ranks that the run will have."""

import os

import pytest

import launch.cli
from launch.machine import Machine
from launch.plan import plan
from launch.prepare import check_batches, lay_out
from pipeline.files import probe
from pipeline.store import UNCHECKED

COMMANDS = [("prepare",), ("run",), ("run", "--dry-run")]


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(launch.cli, "this_machine", lambda config: Machine(2))


def settings(*overrides):
    return [word for override in overrides for word in ("--set", override)]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.batch_size=33", "launch.processes=1", "specialists.batch_size=16"], None),
        (["train.batch_size=33"], "batch 33 is not divisible by 2 ranks x 1 accumulation"),
        (["train.batch_size=16", "launch.processes=3"], "batch 16 is not divisible by 3 ranks"),
        (["specialists.accumulation=3"], "batch 256 is not divisible by 1 ranks x 3 accumulation"),
        (["clusters.overlap=5"], "clusters.overlap = 5: with clusters.num_groups = 4"),
        (["data.input=unlucky"], ""),  # which the fake trainer's check refuses
    ],
)
def test_each_command_refuses_the_same(ward, referral, two_cores, command, overrides, words):
    name, *options = command
    arguments = [*settings(*overrides), *options]
    code, _, err = referral(name, ward.write_config(), "--run", "run", *arguments)
    assert (code == 0) == (words is None), err
    assert (words or "") in err
    if words is not None:
        assert not ward.run_path.exists()


def test_a_groups_file_for_other_classes_is_refused(ward, referral):
    (ward.root / "g.json").write_text('{"schema": 1, "num_classes": 9, "members": [[0], [1]]}')
    given = settings('clusters.groups_file="g.json"')
    code, _, err = referral("prepare", ward.write_config(), "--run", "run", *given)
    assert code == 2 and "g.json is for 9 classes" in err and "has 8" in err


def test_batches_of_what_is_done_or_given_are_not_asked_about(ward):
    run = ward.run("train.batch_size=33", "specialists.batch_size=8", "students.main.batch_size=8")
    ward.finish([run.generalist])
    check_batches(run, plan(run, 2), [])
    given = ward.config(
        "train.batch_size=33",
        "generalist.from=w.pt",
        "generalist.head=fc",
        "specialists.batch_size=8",
        "students.main.batch_size=8",
    )
    run = type(run)(ward.root / "another", given)
    check_batches(run, plan(run, 2), [])


def test_a_file_system_that_cannot_finish_a_stage_is_refused(ward, referral, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    code, _, err = referral("prepare", ward.write_config(), "--run", "run")
    assert code == 2 and not ward.run_path.exists()
    assert "its file system cannot let one of two writers be first" in err
    assert len(err.splitlines()) == 1


def test_a_run_below_directories_that_are_not_there_is_probed_where_it_will_be(tmp_path):
    probe(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torch_here", [True, False])
def test_without_torch_the_first_job_is_told_to_check(ward, referral, monkeypatch, torch_here):
    find = launch.cli.importlib.util.find_spec
    monkeypatch.setattr(
        launch.cli.importlib.util,
        "find_spec",
        lambda name, *rest: find(name, *rest) if torch_here or name != "torch" else None,
    )
    assert referral("prepare", ward.write_config(), "--run", "run")[0] == 0
    assert (ward.run_path / UNCHECKED).exists() != torch_here


def test_laying_out_again_asks_for_no_second_check(ward):
    run = ward.run()
    lay_out(run, plan(run), [], unchecked=False)
    assert not (ward.run_path / UNCHECKED).exists()
