"""What an attempt has written of a stage is gone on with by one later attempt, and by one alone."""

import copy
import json
import os
import subprocess
import sys

import pytest

from pipeline.config import load_config
from pipeline.files import birth
from pipeline.graph import RunDirectory
from pipeline.store import OWNER, write_json

BASE = {
    "data": {"train": "d/train-0.tar", "val": "d/val-0.tar", "test": "d/test-0.tar"},
    "train": {"steps": 100},
    "specialists": {"steps": 20},
}
NAME = "targets"


@pytest.fixture
def stage(tmp_path):
    return RunDirectory(tmp_path / "run", load_config(None, [], copy.deepcopy(BASE))).generalist


def begun(stage, name: str, owner: dict | None = None):
    """An attempt that has written half, by `owner`."""
    attempt = stage.begin(name)
    attempt.take_over(NAME)
    (attempt.unfinished(NAME) / "half").write_text("written")
    if owner is not None:
        write_json(attempt.unfinished(NAME) / OWNER, owner)
    return attempt


def here(pid: int, born: str | None) -> dict:
    return {"host": os.uname().nodename, "pid": pid, "born": born}


def names(stage) -> list[str]:
    return sorted(path.name for path in stage.checkpoints.iterdir())


def test_what_an_ended_process_wrote_is_gone_on_with_and_says_who_writes_now(stage):
    begun(stage, "first", here(2**22, "0:1"))
    second = stage.begin("second")
    second.take_over(NAME)
    assert names(stage) == ["targets-second"]
    assert (second.unfinished(NAME) / "half").read_text() == "written"
    assert json.loads((second.unfinished(NAME) / OWNER).read_text())["pid"] == os.getpid()


def test_a_living_process_keeps_what_it_writes_and_the_other_begins_anew(stage):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        first = begun(stage, "first", here(living.pid, birth(living.pid)))
        second = stage.begin("second")
        second.take_over(NAME)
        assert (first.unfinished(NAME) / "half").exists()
        assert os.listdir(second.unfinished(NAME)) == [OWNER]
        second.drop_unfinished(NAME)
        assert names(stage) == ["targets-first"]
        living.communicate(b"\n")
    second.drop_unfinished(NAME)
    assert names(stage) == []


def test_of_another_machine_it_is_taken_and_its_writer_fails_where_it_writes_next(stage):
    first = begun(stage, "first", {"host": "another", "pid": 1, "born": "0:1"})
    stage.begin("second").take_over(NAME)
    with pytest.raises(FileNotFoundError):
        write_json(first.unfinished(NAME) / "progress.json", {})


@pytest.mark.parametrize("owner", ["", "[]", "{", '{"host": 3}', '{"pid": 1}'])
def test_an_owner_that_says_nothing_is_none(stage, owner):
    first = begun(stage, "first")
    (first.unfinished(NAME) / OWNER).write_text(owner)
    stage.begin("second").take_over(NAME)
    assert names(stage) == ["targets-second"]


def test_what_earlier_versions_left_under_one_name_is_gone_on_with(stage):
    (stage.checkpoints / NAME).mkdir(parents=True)
    (stage.directory / "KEY").write_text(stage.key)
    (stage.checkpoints / NAME / "half").write_text("written")
    attempt = stage.begin("first")
    attempt.take_over(NAME)
    assert (attempt.unfinished(NAME) / "half").read_text() == "written"
