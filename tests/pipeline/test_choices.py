"""What a user chooses by name is one dict each: the config accepts it, the trainer resolves it."""

import subprocess
import sys

import pytest

from pipeline.choices import (
    AUGMENTATIONS,
    COMBINERS,
    ENGINES,
    LOSSES,
    METHODS,
    NETWORKS,
    STUDENT_METHODS,
    resolve,
)
from pipeline.config import load_config

KEYS = {
    "model.name": NETWORKS,
    "clusters.method": METHODS,
    "ensemble.combine": COMBINERS,
    "data.augment": AUGMENTATIONS,
    "engine.name": ENGINES,
    "train.loss": LOSSES,
    "students.main.method": STUDENT_METHODS,
}


@pytest.mark.parametrize("key", KEYS)
def test_the_config_accepts_every_choice(key):
    for name in KEYS[key]:
        assert load_config(None, [f"{key}={name}"])


def targets():
    for choices in (NETWORKS, METHODS, COMBINERS, AUGMENTATIONS):
        yield from filter(None, choices.values())
    yield from (engine.engine for engine in ENGINES.values())
    yield from (engine.sharded_head for engine in ENGINES.values() if engine.sharded_head)
    yield from (loss.function for loss in LOSSES.values())
    yield from (method.objective for method in STUDENT_METHODS.values())


@pytest.mark.parametrize("target", list(targets()))
def test_every_choice_names_something_that_can_be_called(target):
    assert callable(resolve(target))


def test_reading_the_choices_imports_nothing_heavy():
    program = "import sys, pipeline.choices, pipeline.graph; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "scipy", "sklearn", "PIL"} & set(ended.stdout.split())
