"""A damaged run directory is answered or named in one line."""

import json

import pytest
from mutated_runs import campaign

from launch.journal import read_journal
from pipeline.config import UserError, load_config
from pipeline.files import DamagedFile


def test_eight_damaged_runs_end_in_answers_or_in_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("launch.cli.FAKE", None)
    assert campaign(range(8), tmp_path) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"runner": "elsewhere"},
        {"aim": "x"},
        {"jobs": {"a": {"state": "flying"}}},
        {"jobs": {"a": {"pid": -1}}},
        {"jobs": {"a": {"pid": 1}}},
        {"jobs": {"a": {"id": "--user=somebody"}}},
        {"jobs": {"a": {"started": float("inf")}}},
        {"jobs": []},
    ],
)
def test_a_journal_of_another_form_is_damaged_and_its_key_is_named(tmp_path, changes):
    content = {"schema": 1, "jobs": {}, "host": "h", "pid": 7, "started": 1.0} | changes
    (tmp_path / "jobs.json").write_text(json.dumps(content))
    with pytest.raises(DamagedFile, match=f"jobs.json is damaged .{next(iter(changes))}"):
        read_journal(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"attempt": "../../x"}, {"attempt": ".."}, {"attempt": 3}, {"finished": 1e300}]
)
def test_a_done_that_leads_out_of_its_stage_is_damaged(ward, changes):
    run = ward.run()
    ward.finish([run.generalist])
    path = run.generalist.directory / "DONE"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DamagedFile, match=f"generalist/DONE is damaged .{next(iter(changes))}"):
        run.generalist.done()


def test_a_config_that_is_nested_too_deep_is_one_line(tmp_path):
    (tmp_path / "config.toml").write_text("a = " + "[" * 50_000)
    with pytest.raises(UserError, match="config.toml: not valid TOML") as error:
        load_config(tmp_path / "config.toml")
    assert "\n" not in str(error.value)
