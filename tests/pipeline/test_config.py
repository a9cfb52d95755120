"""The config: inheritance between sections, files that load back equal, errors of one line."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline.config import Config, Schedule, Student, UserError, load_config, save_config


def test_a_saved_config_loads_back_equal(tmp_path):
    overrides = ["seed=3", "train.steps=10", "specialists.epochs=2", "students.main.temperature=4"]
    config = load_config(None, overrides)
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


def test_specialists_and_students_inherit_the_training_schedule():
    train = ["train.steps=10", "train.batch_size=64"]
    config = load_config(None, [*train, "specialists.steps=5", "students.a.epochs=1"])
    assert config.specialists.batch_size == 64 and config.specialists.steps == 5
    assert config.students["a"].epochs == 1 and config.students["a"].steps is None


def test_control_wall_tries_three_rates_around_the_specialists():
    config = load_config(None, ["specialists.learning_rate=0.003"])
    assert config.controls.learning_rates == pytest.approx([0.001, 0.003, 0.009])


COMBINERS = "must be one of kl, reverse_kl, arithmetic, log_ratio, mixture"


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.trian=x", "unknown key data.trian; did you mean data.train?"),
        ("clusters.num_group=3", "did you mean clusters.num_groups?"),
        ("train.lr=0.1", "did you mean train.learning_rate?"),
        ("students.main.tempratur=3", "did you mean students.main.temperature?"),
        ("train.steps=abc", "train.steps = 'abc'"),
        ("clusters.num_groups=0", "clusters.num_groups = 0"),
        ("specialists.fraction=1.5", "specialists.fraction = 1.5"),
        ("ensemble.combine=kll", f"{COMBINERS}; did you mean kl?"),
        ("clusters.method=kmean", "did you mean kmeans?"),
        ("model.name=resnett", "did you mean resnet?"),
        (
            "data.augment=flip",
            "must be one of none, shift, flip-crop, drop_ngrams, rrc, rrc-randaugment or module:",
        ),
        ("specialists.trainable=last-0-blocks", "must be one of all, head or last-N-blocks"),
        ("students.main.balance=0.5", "students learn at natural frequencies"),
        ("train.steps", "write section.key=value"),
        ("seed.x=1", "seed"),
        ("students.a b.steps=1", "a student's name is letters"),
        ("students.control_wall.steps=1", "this name has a meaning of its own"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_line(override, message):
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[data\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(tmp_path / "broken.toml")


def test_the_documented_config_is_valid_and_names_every_key():
    text = (Path(__file__).parents[2] / "docs" / "config.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```toml\n")[1:]]
    documented, shortlist, further = map(tomllib.loads, blocks)
    assert all(load_config(None, [], each) for each in (documented, shortlist, further))
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    sections["students"] = Student
    written = documented | {
        "students": documented["students"]["main"] | further["students"]["heads"],
        "ensemble": documented["ensemble"] | shortlist["ensemble"],
    }
    inherited = dict.fromkeys(sections, set(Schedule.model_fields)) | {"train": {"epochs"}}
    for name, section in sections.items():
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        keys = {field.alias or key for key, field in section.model_fields.items()}
        assert keys - inherited[name] <= set(written[name]), name


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["ensemble.order=0.5"], 'is of kind = "shortlist" and "rerank"; this is "specialists"'),
        (['ensemble.networks=["a"]'], 'ensemble.networks is of kind = "deep", "shortlist"'),
        (["ensemble.kind=deep", "ensemble.shortlist=5"], "ensemble.shortlist is of kind"),
        (["ensemble.shortlist=2", "ensemble.gate=3"], "ensemble.shortlist = 2 is shorter than"),
        (["ensemble.shortlist=9", "ensemble.combine=mean"], "is not solved on a shortlist: take"),
        (["ensemble.shortlist=9", 'ensemble.networks=["runs/a"]'], "ensemble.networks is of kind"),
        (["ensemble.kind=shortlist", "ensemble.order=2.0"], "2.0 is no order of a mean: 0"),
        (["ensemble.kind=shortlist", "ensemble.order=best"], "ensemble.order"),
        (["ensemble.kind=shortlist", "ensemble.members=1"], "asks a second network"),
        (["ensemble.combine=geometric"], 'ensemble.combine = "geometric" is not of kind'),
        (["ensemble.kind=deep", "ensemble.combine=mixture"], "a deep ensemble arithmetic"),
        (["ensemble.kind=shortlist", "ensemble.combine=geometric"], "ensemble.order says it"),
        (["ensemble.kind=shortlist", "extend.run=old"], 'ensemble.kind = "shortlist" has none'),
    ],
)
def test_keys_of_another_kind_of_ensemble_are_named(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(None, overrides)


def test_a_shortlists_config_comes_back_as_it_was_saved(tmp_path):
    networks = ["a/b", "c"]
    base = {"ensemble": {"kind": "shortlist", "order": "fit", "networks": networks}}
    for overrides in ([], ["ensemble.order=0.25", "ensemble.shortlist=7"]):
        config = load_config(None, overrides, base)
        save_config(config, tmp_path / "config.toml")
        assert load_config(tmp_path / "config.toml") == config


def test_a_path_whose_bytes_are_no_text_is_one_line():
    name = b"shards-\xff".decode("utf-8", "surrogateescape")
    base = {"data": {"train": name, "val": name, "test": name}}
    with pytest.raises(UserError, match=r"config: data.train = .* is no UTF-8; rename it") as error:
        load_config(None, [], base)
    assert str(error.value).isascii() and "\n" not in str(error.value)
