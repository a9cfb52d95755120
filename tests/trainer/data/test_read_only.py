"""Shards on a read-only file system, where no index can be kept, are read all the same."""

import subprocess

import pytest
from filesystems import in_memory, why_not
from shardsets import write_uneven

from pipeline.config import Data
from trainer.data import open_shards

pytestmark = pytest.mark.skipif(why_not("tmpfs") != "", reason=why_not("tmpfs"))


def test_shards_without_an_index_are_read_where_none_can_be_written():
    with in_memory(8192) as place:
        write_uneven(place, [5, 4], True, False)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        shards = open_shards(str(place), Data(cache="none"), "train")
        assert len(shards.inputs([0, 8])) == 2
        assert not list(place.glob(".*")) and not list(place.glob("*.npz"))
        del shards
