"""The stage that says what the generalist is short of, on toy runs."""

import json

import numpy as np
import pytest
import torch
from running import run_all
from toy import toy_config, write_toy

from ensemble import fit_temperature
from networks import load_classifier
from pipeline.advice.diagnosis_text import diagnosis_lines
from pipeline.store import read_json
from trainer.core.metrics import expected_calibration_error, reliability
from trainer.data.shards import open_shards

SHORT = ("clusters.num_groups=6", "controls.enabled=false", "students={}")
STAGES = {"generalist", "measure", "cluster", "diagnosis"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 12, "test": 4})


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """400 steps on 480 examples: the network knows them by heart."""
    root = tmp_path_factory.mktemp("run") / "run"
    return run_all(root, toy_config(data, *SHORT, "train.steps=400"), only=STAGES)


def found_in(run):
    return read_json(run.diagnosis.path("diagnosis.json"))


def predictions(run, split):
    shards = open_shards(getattr(run.config.data, split), run.config.data, split)
    network = load_classifier(run.generalist.path("model.json").parent)
    with torch.no_grad():
        logits = network(torch.from_numpy(shards.read(np.arange(len(shards)))[0]))
    return logits, torch.from_numpy(shards.labels).long()


def test_as_many_of_train_as_of_val_are_measured(run):
    found = found_in(run)
    assert found["train"]["n"] == found["val"]["n"] == 24 * 12
    assert found["train"]["top1"]["value"] > 0.99


def test_val_is_what_the_network_says_of_it(run):
    found = found_in(run)
    logits, labels = predictions(run, "val")
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    correct = (logits.argmax(1) == labels).double()
    assert found["val"]["top1"]["value"] == pytest.approx(float(correct.mean()))
    assert found["val"]["loss"]["value"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["errors"] == int((1 - correct).sum())
    top5 = logits.topk(5).indices == labels[:, None]
    wrong = ~top5[:, 0]
    assert found["among"]["5"] == pytest.approx(float(top5[wrong].any(1).double().mean()))
    assert list(found["among"]) == ["5", "20"]  # of 24 classes


def test_calibration_is_cross_fitted_on_every_second_example(run):
    found = found_in(run)["calibration"]
    logits, labels = predictions(run, "val")
    correct = (logits.argmax(1) == labels).numpy()
    raw = logits.softmax(1).amax(1).numpy()
    assert found["raw"]["ece"] == pytest.approx(
        expected_calibration_error(reliability(raw, correct)), abs=1e-6
    )
    even, odd = (fit_temperature(logits[k::2], labels[k::2]) for k in (0, 1))
    scaled = np.empty(len(labels), np.float32)
    scaled[0::2] = (logits[0::2] / odd).softmax(1).amax(1)
    scaled[1::2] = (logits[1::2] / even).softmax(1).amax(1)
    assert found["scaled"]["ece"] == pytest.approx(
        expected_calibration_error(reliability(scaled, correct)), abs=1e-5
    )
    assert found["temperature"] == pytest.approx((even * odd) ** 0.5, rel=1e-4)


def test_what_is_known_by_heart_is_short_of_data_and_speaks_against_specialists(run):
    found = found_in(run)
    assert found["state"] == "data" and found["trained_here"]
    assert found["augmented"] is None
    assert any("A second generalist usually gives more" in line for line in found["sentences"])


def test_the_sentences_are_of_the_numbers_alone(run):
    found = json.loads(json.dumps(found_in(run)))
    sentences = found.pop("sentences")
    assert diagnosis_lines(found) == sentences


def test_few_steps_are_not_yet_a_training(data, tmp_path):
    config = toy_config(data, *SHORT, "train.steps=15", "train.log_every=1")
    run = run_all(tmp_path / "run", config, only=STAGES)
    found = found_in(run)
    assert found["state"] == "steps"
    assert found["fall"]["split"] == "train" and found["fall"]["by_twice"] > 0.1


def test_augmentation_is_matched_on_both_sides(data, tmp_path):
    config = toy_config(data, *SHORT, "train.steps=100", "data.augment=shift")
    found = found_in(run_all(tmp_path / "run", config, only=STAGES))
    seen = found["augmented"]
    assert seen["augment"] == "shift"
    assert seen["train"]["n"] == seen["val"]["n"] == found["val"]["n"]
    # Pixels are shifted: the same examples are harder, in pairs.
    for split in ("train", "val"):
        change = seen["change"][split]["loss"]
        assert change["value"] == pytest.approx(
            seen[split]["loss"]["value"] - found[split]["loss"]["value"]
        )
        assert change["value"] > 0
    assert any("data.augment = 'shift'" in line for line in found["sentences"])


def test_how_a_given_generalist_learned_is_unknown(data, run, tmp_path, caplog):
    given = run.generalist.path("model.json").parent
    config = toy_config(data, *SHORT, f"generalist.from={given}")
    with caplog.at_level("INFO", logger="referral"):
        found = found_in(run_all(tmp_path / "run", config, only=STAGES))
    assert all(sentence in caplog.messages for sentence in found["sentences"])
    assert not found["trained_here"]
    assert found["fall"] is None and found["last_fifth"] is None
    assert found["state"] == "data"
    assert any("unknown" in line and "augmentation" in line for line in found["sentences"])
    assert found["val"] == found_in(run)["val"]
