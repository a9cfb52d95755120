"""The time that a config's header states is counted from the config, not guessed."""

import dataclasses

import pytest
import torch
from summaries import GRAY, LAPTOP

from networks import InputSpec, ModelSpec, build_classifier
from trainer.commands.init import config_of
from trainer.proposal.estimate import START_S, in_words, run_seconds, seconds_per_example
from trainer.proposal.settings import propose


def test_twice_the_seconds_of_an_example_are_twice_the_training():
    config = config_of(propose(GRAY, LAPTOP))
    starts = run_seconds(config, GRAY, 0.0, pool=2)
    one, two = (run_seconds(config, GRAY, of_one, pool=2) - starts for of_one in (1e-3, 2e-3))
    assert 0 < starts < 20 * START_S and two == pytest.approx(2 * one)


def test_more_jobs_side_by_side_and_no_controls_take_less():
    config = config_of(propose(GRAY, LAPTOP))
    without = config.model_copy(
        update={"controls": config.controls.model_copy(update={"enabled": False})}
    )
    seconds = run_seconds(config, GRAY, 1e-3, pool=2)
    assert run_seconds(config, GRAY, 1e-3, pool=8) < seconds
    assert run_seconds(without, GRAY, 1e-3, pool=2) < seconds


def test_reading_counts_only_where_decoded_inputs_are_not_kept():
    config = config_of(propose(GRAY, LAPTOP))
    slow = dataclasses.replace(GRAY, reading_s=1.0)
    assert run_seconds(config, slow, 1e-3, 2) == run_seconds(config, GRAY, 1e-3, 2)
    large = dataclasses.replace(slow, shape=(1, 800, 800))
    assert run_seconds(config, large, 1e-3, 2) > run_seconds(config, slow, 1e-3, 2)


def test_timing_leaves_no_gradient_and_changes_no_weight():
    spec = ModelSpec("mlp", 5, InputSpec((4,), "float32"), {"width": 8, "depth": 1})
    network = build_classifier(spec)
    before = [parameter.clone() for parameter in network.parameters()]
    assert seconds_per_example(network, 8, torch.device("cpu")) > 0
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize(
    "seconds, words",
    [
        (20, "about a minute"),
        (130, "about 3 minutes"),
        (13 * 60, "about 15 minutes"),
        (5000, "about 85 minutes"),
        (3 * 3600, "about 3 hours"),
        (72 * 3600, "about 3 days"),
    ],
)
def test_times_are_said_in_round_words(seconds, words):
    assert in_words(seconds) == words
