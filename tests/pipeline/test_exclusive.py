"""Of two keys that exclude each other the command line's word replaces the file's."""

import pytest

from pipeline.config import UserError, load_config
from pipeline.config.exclusive import EXCLUSIVE, replaced_by

VALUES = {
    "steps": 7,
    "epochs": 3.0,
    "negatives": 5,
    "label_smoothing": 0.1,
    "views": 2,
    "perturb": "ods",
    "dustbin_rows": 4,
    "hard_negatives": 0.5,
    "from": "weights.pth",
    "run": "runs/old",
    "groups_file": "groups.json",
}
# What else the keys of a row need.
BESIDE = {"negatives": {"engine": {"shard_head": True}}}


def name_of(pattern: str) -> str:
    """A key that a pattern stands for: of [train], or of a student."""
    name = "main" if pattern.startswith("students.") else "train"
    return pattern.replace("*", name)


def nested(*keys: str) -> dict:
    values: dict = {}
    for key in keys:
        *sections, last = key.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = VALUES[last]
    return values


def value_at(config, key: str):
    content = config.dump()
    for part in key.split("."):
        content = content.get(part, {}) if isinstance(content, dict) else {}
    return content


@pytest.mark.parametrize("row", EXCLUSIVE)
def test_a_file_that_sets_both_is_refused(row):
    values = nested(*map(name_of, row)) | BESIDE.get(row[0].rpartition(".")[2], {})
    with pytest.raises(UserError) as error:
        load_config(None, [], values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("row", EXCLUSIVE)
@pytest.mark.parametrize("order", [1, -1])
def test_set_of_one_replaces_the_other_that_the_file_has(row, order):
    own, other = map(name_of, row[::order])
    values = nested(other) | BESIDE.get(row[0].rpartition(".")[2], {})
    last = own.rpartition(".")[2]
    config = load_config(None, [f"{own}={VALUES[last]}"], values)
    assert value_at(config, own) == VALUES[last]
    assert value_at(config, other) != VALUES[other.rpartition(".")[2]]


def test_two_on_one_command_line_are_refused():
    with pytest.raises(UserError, match="steps"):
        load_config(None, ["train.steps=5", "train.epochs=2"], {"train": {"steps": 7}})


def test_a_value_that_asks_for_nothing_replaces_nothing():
    config = load_config(None, ["extend.run="], {"generalist": {"from": "weights.pth"}})
    assert config.generalist.init == "weights.pth"


def test_keys_of_other_sections_stay():
    assert replaced_by("specialists.steps") == ["specialists.epochs"]
    assert replaced_by("students.main.steps") == ["students.main.epochs"]
    assert replaced_by("data.train") == []


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.std=[0.2, 0]", "data.std = [0.2, 0]: every deviation must be greater than 0"),
        ("data.mean=[]", "data.mean = []: is empty"),
        ("data.mean=0.5", "data.mean = 0.5: must be a list"),
        ("train.epochs=inf", "train.epochs = inf: must be a finite number"),
        ("train.optimizer=adam", "must be one of adamw, sgd; did you mean adamw?"),
        ("train.steps=1.5", "train.steps = 1.5: must be a whole number"),
        ("train=3", "train = 3: is a section: set the keys in it"),
        ("data.train=3", 'data.train = 3: must be a text; write it in quotes: "3"'),
        ("DATA.train=x", "unknown key DATA; did you mean data?"),
        ("train..steps=3", "train..steps has an empty part"),
        ("slurm.default.memory=3GB", 'without B: "16G"'),
        ("students.main.model={widht=3}", "students.main.model.widht; did you mean width?"),
        ("students.main.model={width=-3}", "students.main.model.width = -3: must be greater"),
        ("controls.learning_rates=[-1]", "must be greater than 0"),
    ],
)
def test_a_value_that_cannot_be_is_told_in_the_configs_words(override, message):
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "Input should" not in str(error.value)


def test_mean_and_deviations_of_different_numbers_of_channels_are_refused():
    with pytest.raises(UserError, match=r"data.mean has 3 values and data.std 2"):
        load_config(None, ["data.mean=[1, 2, 3]", "data.std=[1, 2]"])


def test_mean_is_another_name_of_the_arithmetic_combiner():
    assert load_config(None, ["ensemble.combine=mean"]).ensemble.combine == "arithmetic"
