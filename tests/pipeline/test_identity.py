"""A stage's key lasts: a config key that comes later, at its default, stales no finished run."""

import json

import pytest

from pipeline.choices import LOSSES, LossKind
from pipeline.config import Config, ConfigFile, frozen, load_config, save_config
from pipeline.config.sections import Clusters
from pipeline.graph import RunDirectory
from pipeline.identity import SCHEMA

BASE = {
    "data": {
        "train": "d/train-{0..3}.tar",
        "val": "d/val-0.tar",
        "test": "d/test-0.tar",
    },
    "train": {"steps": 100, "learning_rate": 0.01},
    "clusters": {"num_groups": 3},
    "specialists": {"steps": 20},
    "students": {
        "main": {"steps": 50, "temperature": 2.0},
        "views": {"steps": 5, "views": 2, "augment": "shift"},
    },
}
# The key of the last stage, in which all others' keys are, as commit f4c96cd (schema 1) computed
# it, as schema 2 did before controls kept their best step, and as it is today.
KEYS = {
    (): (
        "4d9b86eeccf30e67ece00d6997e0d1ffcf083e951f56837bafbbcb983729f1e1",
        "602e7900f2847eb07cfe5a1b6385303e98729b089b274610900791eebfaa6147",
        "246f074ca3a4b1dd2ff48e6b6cb3d6d611223a09ffbc085c551fe5ca403f4d6d",
    ),
    ("ensemble.kind=deep", "ensemble.members=2"): (
        "66ce57440758492d088087a1aa98b332bf73cf706553935b041c47eecb39e52f",
        "7513b1bf600037946d2a42240d4ce797819f80a8992f427bf5598dd3f904af3c",
        "1cf310eaa884c68491d8d6f48c0451b0c553236cebf29adff2c25d543a124017",
    ),
    (
        "specialists.dustbin=full",
        "train.balance=0.5",
        "data.augment=shift",
        "students.main.start=scratch",
    ): (
        "98c689d83c98ed247600f16ba79d417d976795be6d1883521b6c4d465ef408b9",
        "37640e24b39d42917b41025efede37582a03de59a6ff2bac66da11c21070bf9c",
        "ee4934ec9747e598103928dab4329a982ffa76a9527ba2c7193363b3e016397d",
    ),
}


class LaterClusters(Clusters):
    sharpness: float = 1.0  # a key that a later version has


class LaterFile(ConfigFile):
    clusters: LaterClusters = LaterClusters()


class LaterConfig(Config):
    clusters: LaterClusters = LaterClusters()


def later(config: Config, **clusters) -> LaterConfig:
    """The same config as a version with that key reads it."""
    sections = {key: getattr(config, key) for key in Config.model_fields}
    sections["clusters"] = LaterClusters(**config.clusters.model_dump(), **clusters)
    return LaterConfig(**sections)


@pytest.fixture
def a_key_more(monkeypatch):
    """That key, with the default that it was born with."""
    since = {**frozen.SINCE_SCHEMA_1, "clusters": {"sharpness": 1.0}}
    monkeypatch.setattr("pipeline.identity.SINCE_SCHEMA_1", since)


def finished(root, schema: int) -> RunDirectory:
    """A run whose every stage is done, as that schema's version leaves it."""
    run = RunDirectory(root, load_config(None, [], json.loads(json.dumps(BASE))))
    root.mkdir()
    save_config(run.config, root / "config.toml")
    for stage in run.stages:
        stage.begin("attempt").finish()
        key = stage.keys[0] if schema == SCHEMA else stage.keys[-1]
        done = json.loads((stage.directory / "DONE").read_text())
        text = json.dumps({**done, "schema": schema, "hash": key})
        (stage.directory / "DONE").write_text(text)
        (stage.directory / "KEY").write_text(key)
    return run


@pytest.mark.parametrize("overrides", KEYS)
def test_keys_are_those_that_earlier_versions_wrote(overrides):
    config = load_config(None, list(overrides), json.loads(json.dumps(BASE)))
    report = RunDirectory("/nowhere", config).report
    new, old = report.former
    assert (old, new, report.key) == KEYS[overrides]
    assert not {new, old} & {*report.keys}


def made_before(run: RunDirectory) -> RunDirectory:
    """The run as the version before this one left it: keys that were, and one twin alone."""
    for stage in run.stages:
        if stage.address == "views_hard":
            continue
        stage.begin("attempt").finish()
        done = json.loads((stage.directory / "DONE").read_text())
        (stage.directory / "DONE").write_text(json.dumps({**done, "hash": stage.former[0]}))
        (stage.directory / "KEY").write_text(stage.former[0])
    return run


def test_controls_of_the_version_before_can_be_read_and_not_gone_on_with(tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    config = load_config(None, [], json.loads(json.dumps(BASE)))
    save_config(config, root / "config.toml")
    run = made_before(RunDirectory(root, config))
    older = {stage.place for stage in run.stages if stage.is_older}
    walls = {f"controls/control_wall-{index}" for index in range(3)}
    assert older == walls | {"controls/control_compute", "evaluation", "report"}
    done = {stage.place for stage in run.stages if stage.is_done}
    missing = {"controls/views_hard"}
    assert done == {stage.place for stage in run.stages} - older - missing


@pytest.mark.parametrize("override", ['controls.rows=["wider"]', "controls.twins=none"])
def test_rows_and_twins_stale_no_other_control(override):
    before, after = (
        RunDirectory("/nowhere", load_config(None, words, json.loads(json.dumps(BASE))))
        for words in ([], [override])
    )
    same = before.controls.keys() & after.controls.keys()
    assert "control_compute" in same
    assert all(before.controls[name].key == after.controls[name].key for name in same)
    assert before.evaluate.key != after.evaluate.key


def test_controls_wait_for_specialists_only_where_these_may_stop_early():
    for patience, waits in {0: False, 2: True}.items():
        words = [f"specialists.patience={patience}"]
        run = RunDirectory("/nowhere", load_config(None, words, json.loads(json.dumps(BASE))))
        for name in ("control_wall-0", "control_compute"):
            behind = {stage.name for stage in run.controls[name].inputs}
            assert ("specialist" in behind) == waits


def test_the_second_generalist_is_the_member_that_a_deep_ensemble_would_have():
    rows = 'controls.rows=["average", "shortlist"]'
    base = json.loads(json.dumps(BASE))
    alone = RunDirectory("/nowhere", load_config(None, [rows], base))
    deep = RunDirectory("/nowhere", load_config(None, ["ensemble.kind=deep", rows], base))
    assert alone.second.place == "members/001" == deep.second.place
    assert alone.second.key == deep.second.key == deep.members[0].key
    places = [stage.place for stage in deep.stages]
    assert len(places) == len(set(places))
    assert alone.second in alone.stages and alone.members == []


@pytest.mark.parametrize("schema", [1, SCHEMA])
def test_a_new_key_at_its_default_stales_nothing(tmp_path, schema, a_key_more):
    run = finished(tmp_path / "run", schema)
    again = RunDirectory(run.root, later(run.config))
    assert again.config.clusters.sharpness == 1.0
    assert all(stage.is_done and not stage.is_stale for stage in again.stages)


@pytest.mark.parametrize("schema", [1, SCHEMA])
def test_a_new_key_at_another_value_stales_what_reads_it(tmp_path, schema, a_key_more):
    run = finished(tmp_path / "run", schema)
    again = RunDirectory(run.root, later(run.config, sharpness=2.0))
    done = {stage.name for stage in again.stages if stage.is_done}
    assert done == {"generalist", "measure"} | {"control"} & done
    assert not again.cluster.is_done and again.cluster.is_stale
    assert not again.report.is_done


def test_a_loss_is_such_a_key(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "focal", LossKind("somewhere:focal"))
    run = finished(tmp_path / "run", 1)
    overrides = ["specialists.loss=focal"]
    changed = load_config(None, overrides, json.loads(json.dumps(BASE)))
    again = RunDirectory(run.root, changed)
    assert again.generalist.is_done and again.cluster.is_done
    assert again.specialists[0].is_stale and not again.specialists[0].is_done


def test_every_key_of_the_config_has_a_frozen_default_or_enters_no_key():
    config = ConfigFile.model_fields.keys() - {"engine", "launch", "slurm"}
    for name in config:
        section = ConfigFile.model_fields[name].annotation
        if name == "students":
            section = section.__args__[1]
        if name == "seed":
            continue
        keys = {field.alias or key for key, field in section.model_fields.items()}
        known = {
            *frozen.SCHEMA_1.get(name, {}),
            *frozen.SINCE_SCHEMA_1.get(name, {}),
            *frozen.IN_NO_KEY.get(name, []),
            *frozen.IN_A_KEY_OTHERWISE.get(name, []),
        }
        assert keys == known, f"[{name}]: add {keys ^ known} to pipeline/config/frozen.py"
