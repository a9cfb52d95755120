"""A command that an error proposes can be pasted, whatever the directory is called."""

import re
import shlex

import pytest
from shardsets import tar_files, write_tar

from pipeline.compare import read_runs
from pipeline.config import Data, UserError
from pipeline.graph import open_run
from trainer.data import open_shards

ASKED = {
    "a run that is none": lambda place: open_run(place),
    "shards without a manifest": lambda place: open_shards(str(place), Data(), "train"),
    "runs that are not finished": lambda place: read_runs([place, place]),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_proposed_command_quotes_the_directory(tmp_path, asked):
    place = tmp_path / "my runs; 1"
    place.mkdir()
    if asked.startswith("shards"):
        write_tar(place / "train-000000.tar", tar_files([0, 1]))
    if asked.startswith("runs"):
        text = '[data]\ntrain = "s"\nval = "s"\ntest = "s"\n[model]\nname = "mlp"\n'
        (place / "config.toml").write_text(text)
    with pytest.raises(UserError) as error:
        ASKED[asked](place)
    command = re.search(r"referral (?:run|prepare|shards)[^`]*", str(error.value))
    assert command and str(place) in shlex.split(command[0]), str(error.value)
