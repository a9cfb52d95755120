"""From what data are to a config: a pure function, held to its rules by tables of data."""

import dataclasses
import math

import pytest
from summaries import GIB, GRAY, LAPTOP, SERVER, with_classes

from pipeline.config import load_config
from trainer.commands.init import config_of
from trainer.proposal.data_summary import LONG_TEXT_DECODERS, TEXT_DECODERS, DataSummary
from trainer.proposal.document import document
from trainer.proposal.settings import Hardware, choose_groups, propose

COLOUR = with_classes(
    20, 400, shape=(3, 64, 64), mean=(0.4,) * 3, std=(0.2,) * 3, gray=False, drawn=False
)
VECTORS = with_classes(
    6, 30, kind="numbers", shape=(12,), dtype="float32", mean=(0.5,), std=(2.0,), gray=False
)
TEXT = with_classes(
    1_055, 13, kind="text", shape=(256,), dtype="int32", decoders=TEXT_DECODERS, gray=False
)
LONG_TEXT = dataclasses.replace(
    TEXT, shape=(2_048,), dtype="float32", decoders=LONG_TEXT_DECODERS, mean=(0.0,), std=(0.02,)
)
DATA = {
    "gray": GRAY,
    "colour": COLOUR,
    "large pictures": with_classes(10, 50, shape=(3, 224, 300), mean=(0.4,) * 3, std=(0.2,) * 3),
    "tiny pictures": with_classes(10, 50, shape=(1, 6, 5), drawn=False),
    "vectors": VECTORS,
    "maps": with_classes(4, 40, kind="numbers", shape=(20, 30), dtype="float32", gray=False),
    "text": TEXT,
    "long texts": LONG_TEXT,
    "26,386 places": dataclasses.replace(TEXT, num_classes=26_386, present=26_386),
    "texts of 3 million classes": dataclasses.replace(TEXT, num_classes=3_000_000),
    "two classes": with_classes(2, 20),
    "three classes": with_classes(3, 20),
    "two examples": with_classes(2, 1),
    "five examples each": with_classes(30, 5),
    "20,000 classes": with_classes(20_000, 5),
    "3 million classes": with_classes(3_000_000, 10),
    "one class in five seen": with_classes(50, 20, present=10),
    "imbalance": with_classes(10, 100, smallest=3, largest=500),
    "a million pictures": with_classes(1_000, 1_200, shape=(3, 64, 64)),
}
MACHINES = {"laptop": LAPTOP, "server": SERVER, "small": Hardware(1, GIB)}


def values_of(data: DataSummary, hardware: Hardware = LAPTOP) -> dict:
    return {setting.key: setting.value for setting in propose(data, hardware)}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", DATA)
def test_every_proposal_is_a_config_with_a_reason_for_each_key(name, machine):
    settings = propose(DATA[name], MACHINES[machine])
    assert all(setting.why for setting in settings)
    assert len({setting.key for setting in settings}) == len(settings)
    config = config_of(settings)
    ranks = config.launch.processes
    assert ranks is not None and config.train.batch_size % ranks == 0
    assert config.train.batch_size >= 2 * ranks
    assert config.clusters.num_groups <= DATA[name].present


@pytest.mark.parametrize("name", DATA)
def test_the_text_of_a_proposal_is_the_proposal(name, tmp_path):
    settings = propose(DATA[name], LAPTOP)
    text = document(["a header", "", "  of three lines"], settings)
    assert all(len(line) <= 100 for line in text.splitlines())
    (tmp_path / "c.toml").write_text(text)
    assert load_config(tmp_path / "c.toml") == config_of(settings)
    assert text.startswith("# a header\n#\n#   of three lines\n")


@pytest.mark.parametrize(
    "name, network, augment",
    [
        ("gray", "convnet", "shift"),
        ("colour", "convnet", "flip-crop"),
        ("tiny pictures", "convnet", "none"),
        ("vectors", "mlp", "none"),
        ("maps", "mlp", "none"),
        ("text", "embedding_bag", "drop_ngrams"),
        ("long texts", "mlp", "none"),
    ],
)
def test_the_network_and_the_views_suit_the_kind_of_input(name, network, augment):
    values = values_of(DATA[name])
    assert (values["model.name"], values["data.augment"]) == (network, augment)


def test_colour_pictures_get_a_resnet_on_a_gpu_where_it_is_not_too_dear():
    assert values_of(COLOUR, SERVER)["model.name"] == "resnet"
    assert values_of(DATA["large pictures"], SERVER)["model.name"] == "convnet"


def test_letters_in_three_channels_are_not_mirrored():
    letters = dataclasses.replace(COLOUR, drawn=True)
    photographs_without_colour = dataclasses.replace(COLOUR, gray=True)
    for data in (letters, photographs_without_colour):
        assert values_of(data)["data.augment"] == "shift"


def test_short_texts_become_bags_of_letter_groups_and_long_ones_counts():
    short, long = values_of(TEXT), values_of(LONG_TEXT)
    assert short["data.decoders"] == TEXT_DECODERS and "data.mean" not in short
    assert (short["train.learning_rate"], short["train.batch_size"]) == (3e-2, 256)
    assert short["model.embedding"] == 64 and "model.dropout" not in short
    assert long["data.decoders"] == LONG_TEXT_DECODERS and long["data.std"] == [0.02]
    assert "data.decoders" not in values_of(VECTORS)


def test_texts_that_are_cut_are_counted_in_the_reason():
    settings = propose(dataclasses.replace(TEXT, cut=0.043), LAPTOP)
    reason = next(setting.why for setting in settings if setting.key == "data.decoders")
    assert "4.3% of the texts are read up to their 85th character" in reason


def test_memory_bounds_the_embedding_of_texts_and_never_their_bins():
    values = values_of(DATA["texts of 3 million classes"])
    assert (values["model.embedding"], values["model.width"]) == (32, 8192)


@pytest.mark.parametrize(
    "classes, groups",
    [(2, 1), (3, 1), (4, 2), (10, 2), (100, 5), (626, 12), (3_755, 31), (20_000, 100)],
)
def test_groups_hold_about_twice_the_root_of_the_classes(classes, groups):
    assert abs(choose_groups(classes) - groups) <= 1
    assert math.ceil(classes / choose_groups(classes)) <= 200


@pytest.mark.parametrize("name", ["two examples", "two classes", "five examples each", "gray"])
def test_a_batch_is_no_larger_than_the_data(name):
    data = DATA[name]
    assert values_of(data)["train.batch_size"] <= max(2, data.examples["train"])


def test_a_small_set_is_trained_enough_and_a_large_one_ends():
    small, large = DATA["five examples each"], DATA["a million pictures"]
    for data, least, most in ((small, 300, 1_000), (large, 300, 30_000)):
        values = values_of(data)
        steps = values["train.epochs"] * data.examples["train"] / values["train.batch_size"]
        assert least <= steps <= most
    assert values_of(large)["train.epochs"] < values_of(large, SERVER)["train.epochs"] <= 20


def test_memory_bounds_batch_and_width():
    many = DATA["3 million classes"]
    small, large = values_of(many), values_of(many, Hardware(2, 600 * GIB))
    assert small["train.batch_size"] < large["train.batch_size"]
    assert small["model.embedding"] * 3_000_000 * 16 <= 8 * GIB
    # logits, their softmax and its gradient, of both ranks
    assert 12 * 3_000_000 * small["train.batch_size"] <= 8 * GIB


def test_rare_classes_are_seen_more_often_only_where_classes_differ_tenfold():
    assert values_of(DATA["imbalance"])["train.balance"] == 0.5
    assert "train.balance" not in values_of(GRAY)


def test_a_constant_column_is_named_beside_its_std():
    data = dataclasses.replace(VECTORS, constant=(3,), mean=(0.0,) * 12, std=(1.0,) * 12)
    (std,) = (setting for setting in propose(data, LAPTOP) if setting.key == "data.std")
    assert "1 for columns that never change (3, counted from 0)" in std.why


def test_what_does_not_fit_the_cache_is_read_by_workers():
    large = with_classes(10, 10_000, shape=(3, 224, 224))
    assert values_of(large, Hardware(8, 64 * GIB))["data.workers"] > 0
    assert values_of(GRAY, Hardware(8, 64 * GIB))["data.workers"] == 0


def test_where_the_label_lies_is_in_the_config_only_where_it_is_not_the_default():
    indexed = dataclasses.replace(GRAY, label="json:label", input="jpg")
    values = values_of(indexed)
    assert (values["data.label"], values["data.input"]) == ("json:label", "jpg")
    assert not {"data.label", "data.input"} & values_of(GRAY).keys()
