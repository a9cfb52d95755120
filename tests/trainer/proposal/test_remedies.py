"""Shards without val: the command that is proposed for each kind of source works as it stands."""

import shlex

import pytest
import userdata

from pipeline.config import UserError
from trainer.commands.shards import main as shards
from trainer.proposal.data_summary import find_shards, summarise

MADE = {
    "folder": lambda here: [
        *("folder", userdata.picture_folder(here / "my photos", 1), "--size", "24", "--gray"),
    ],
    "table": lambda here: ["table", userdata.text_table(here / "t.csv"), "--text", "text"],
    "arrays": lambda here: ["arrays", userdata.vectors(here / "v.npz")],
}


@pytest.mark.parametrize("kind", MADE)
def test_the_proposed_command_makes_the_missing_splits(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*map(str, MADE[kind](tmp_path)), "--out", "s", "--val", "0", "--test", "0"]
    shards(words)
    with pytest.raises(UserError, match="has no val and no test split") as error:
        summarise(find_shards("s"))
    command = shlex.split(str(error.value).split("`")[1])
    assert command[:3] == ["referral", "shards", kind]
    shards(command[2:])
    summary = summarise(find_shards("s"))
    assert summary.examples == {"train": 100, "val": 10, "test": 10}
    assert kind != "folder" or summary.shape == (1, 24, 24)
