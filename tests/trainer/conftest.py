"""One finished toy run for the tests of the commands that read a run. They must not write to it."""

import pytest
from running import run_all
from toy import toy_config, write_toy


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Four specialists and a student, a few steps each. The gate opens more than one."""
    data = write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 10, "test": 6})
    config = toy_config(
        data, "controls.enabled=false", "clusters.num_groups=4", "ensemble.gate=2", "train.steps=40"
    )
    return run_all(tmp_path_factory.mktemp("small_run"), config)
