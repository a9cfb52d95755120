"""ensemble.json: what is written and what is read."""

import json

import pytest

from ensemble import EnsembleSettings


def test_settings_come_back_as_they_were_saved(tmp_path):
    settings = EnsembleSettings(
        gate=2,
        max_specialists=3,
        combine="mixture",
        temperatures=[1.0, 2.0],
        weights=[1.0, 0.5],
        missing=[0],
        shared={"0": ["trunk.weight"]},
    )
    settings.save(tmp_path)
    assert EnsembleSettings.load(tmp_path) == settings


def test_the_keys_on_disk_are_those_of_the_kind(tmp_path):
    EnsembleSettings().save(tmp_path)
    keys = "schema gate max_specialists combine temperatures weights skipped missing shared"
    assert list(json.loads((tmp_path / "ensemble.json").read_text())) == keys.split()
    EnsembleSettings(kind="deep", members=4).save(tmp_path)
    content = json.loads((tmp_path / "ensemble.json").read_text())
    assert content == {"schema": 1, "kind": "deep", "members": 4}


def test_without_a_file_the_defaults_hold(tmp_path):
    assert EnsembleSettings.load(tmp_path) == EnsembleSettings()


def test_a_file_may_leave_keys_out_and_have_others(tmp_path):
    (tmp_path / "ensemble.json").write_text('{"schema": 1, "gate": 5, "later": true}')
    assert EnsembleSettings.load(tmp_path) == EnsembleSettings(gate=5)


@pytest.mark.parametrize("content", ["[1]", "{}", '{"schema": 7}'])
def test_another_schema_is_named(tmp_path, content):
    (tmp_path / "ensemble.json").write_text(content)
    with pytest.raises(ValueError, match="ensemble.json has schema .*; this version reads 1"):
        EnsembleSettings.load(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "ensemble.json").write_text("{")
    with pytest.raises(ValueError, match="ensemble.json: not valid JSON"):
        EnsembleSettings.load(tmp_path)
