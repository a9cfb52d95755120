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
# it, and as it is today.
KEYS = {
    (): (
        "4d9b86eeccf30e67ece00d6997e0d1ffcf083e951f56837bafbbcb983729f1e1",
        "602e7900f2847eb07cfe5a1b6385303e98729b089b274610900791eebfaa6147",
    ),
    ("ensemble.kind=deep", "ensemble.members=2"): (
        "66ce57440758492d088087a1aa98b332bf73cf706553935b041c47eecb39e52f",
        "7513b1bf600037946d2a42240d4ce797819f80a8992f427bf5598dd3f904af3c",
    ),
    (
        "specialists.dustbin=full",
        "train.balance=0.5",
        "data.augment=shift",
        "students.main.start=scratch",
    ): (
        "98c689d83c98ed247600f16ba79d417d976795be6d1883521b6c4d465ef408b9",
        "37640e24b39d42917b41025efede37582a03de59a6ff2bac66da11c21070bf9c",
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
    new, old = RunDirectory("/nowhere", config).report.keys
    assert (old, new) == KEYS[overrides]


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
