"""What the benchmark of durable ends puts in the place of fsync and checksums."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.durability import compared, environment, interval

PROGRAM = """
import os, sys
from networks import checksums
from pathlib import Path
file = Path(sys.argv[1])
with open(file, "wb") as opened:
    opened.write(b"content")
    opened.flush()
    os.fsync(opened.fileno())
entry = checksums.entries_of(file.parent, lambda name: name == file.name)[file.name]
file.write_bytes(b"changed")
print(entry["bytes"], entry["xxh3_128"], checksums.differs(file, entry))
"""


def said(tmp_path, form: str, end: str = "") -> list[str]:
    command = [sys.executable, "-P", "-c", PROGRAM + end, str(tmp_path / "file")]
    own = environment(tmp_path, form)
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    return done.stdout.split(maxsplit=2)


def test_with_both_a_changed_file_is_noticed_and_with_neither_it_is_not(tmp_path):
    size, digest, reason = said(tmp_path, "both")
    assert size == "7" and len(set(digest)) > 1 and reason.strip() == "its checksum is another"
    assert said(tmp_path, "neither") == ["7", "0" * 32]


@pytest.mark.parametrize("end", ["", "sys.stdout.flush(); os._exit(0)"])
def test_the_account_counts_every_fsync_and_every_checksum(tmp_path, end):
    """Also of a process that ends without the interpreter's finalisation, as the trainer's do."""
    notes = tmp_path / "notes"
    assert said(tmp_path, f"timed:{notes}", end)[2].strip() == "its checksum is another"
    (line,) = notes.read_text().splitlines()
    spent = json.loads(line)
    assert spent["fsync"][0] == 1 and spent["checksums"][0] == 2
    assert all(seconds > 0 for _, seconds in spent.values())


@pytest.mark.parametrize(
    "count, low, high",
    [(1, 0, 0), (5, 0, 4), (6, 0, 5), (10, 1, 8), (20, 5, 14)],  # tables of the sign test
)
def test_the_interval_is_that_of_the_sign_test(count, low, high):
    assert interval([float(value) for value in range(count)]) == (low, high)


def test_a_ratio_is_taken_within_each_pair_by_hand():
    both = [{"s": 11.0}, {"s": 20.0}, {"s": 44.0}]
    neither = [{"s": 10.0}, {"s": 20.0}, {"s": 40.0}]
    result = compared({"both": both, "neither": neither}, "s")
    assert result == {"both": 20.0, "neither": 20.0, "ratio": 1.1, "low": 1.0, "high": 1.1}
    assert os.fsync.__module__ in ("posix", None)  # nothing was replaced here
