"""One finished toy run for the tests of the commands that read a run; they must not write to it."""

import pytest
from toy import toy_config, write_toy

from trainer.config import save_config
from trainer.distributed import process_group
from trainer.run_directory import RunDirectory
from trainer.session import Session
from trainer.stages import STAGES


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Four specialists and a student, a few steps each; the gate opens more than one."""
    data = write_toy(tmp_path_factory.mktemp("data"), {"train": 20, "val": 10, "test": 6})
    config = toy_config(data, "controls.enabled=false", "clusters.num_groups=4", "ensemble.gate=2", "train.steps=40")
    run = RunDirectory(tmp_path_factory.mktemp("small_run"), config)
    save_config(config, run.root / "config.toml")
    with process_group(config.engine) as ranks:
        session = Session(run, ranks)
        for stage in run.stages:
            extra = (int(stage.directory.name),) if stage.name == "specialist" else ()
            extra = (stage.directory.name,) if stage.name == "student" else extra
            STAGES[stage.name](session, stage, *extra)
    return run
