"""A run that an older version made can be looked at, and is told from one of another config."""

import json

import pytest

from launch.journal import Journal
from launch.plan import plan
from launch.prepare import check
from launch.status import statuses
from pipeline.config import UserError


def test_a_run_whose_keys_cannot_be_compared_is_older_readable_and_named_so(ward):
    run = ward.run()
    ward.finish(run.stages)
    for stage in run.stages:
        done = json.loads((stage.directory / "DONE").read_text())
        text = json.dumps({**done, "schema": 0, "hash": "of another age"})
        (stage.directory / "DONE").write_text(text)
        (stage.directory / "KEY").write_text("of another age")
    path = run.root / "config.toml"
    path.write_text(path.read_text().replace('loss = "cross_entropy"\n', "", 1))
    assert all(stage.is_older and not stage.is_done for stage in run.stages)
    shown = statuses(run, plan(run), Journal())
    assert {(each.state, each.detail) for each in shown} == {("done", "made by an older version")}
    with pytest.raises(UserError) as error:
        check(run.config, run.root)
    lines = str(error.value).splitlines()
    assert "was made by an older version of referral" in lines[0]
    assert lines[0].endswith("it has no train.loss")
