"""A few corrupt sets of each kind. `make soak` checks a thousand."""

import subprocess
import sys

import pytest
from corrupt_sets import KINDS, READERS, judge, judge_commands

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize("policy", ["strict", "skip"])
@pytest.mark.parametrize("manifest, indexed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_corruption_is_refused_or_its_loss_counted_exactly(
    tmp_path, kind, manifest, indexed, policy
):
    for seed in range(2):
        directory = tmp_path / str(seed)
        directory.mkdir()
        verdict = judge(directory, kind, seed, manifest, indexed, policy)
        assert policy == "skip" or verdict in ("refused", "harmless")


@pytest.mark.parametrize("policy", ["strict", "skip"])
@pytest.mark.parametrize("reader", READERS[1:])
@pytest.mark.parametrize("name", ["rotten", "not_a_picture"])
def test_workers_and_the_decoded_cache_give_the_same_verdict(tmp_path, name, reader, policy):
    (kind,) = (kind for kind in KINDS if kind.__name__ == name)
    for seed in range(2):
        here, there = tmp_path / "here", tmp_path / "there"
        here.mkdir()
        there.mkdir()
        verdict = judge(here, kind, seed, True, True, policy)
        assert judge(there, kind, seed, True, True, policy, reader) == verdict
        here.rename(tmp_path / f"here {seed}")
        there.rename(tmp_path / f"there {seed}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_check_and_validate_end_with_an_exit_code_and_lines(tmp_path, kind):
    judge_commands(tmp_path, True, "strict", judge(tmp_path, kind, 0, True, True, "strict"))


def test_as_a_process_validate_lists_the_corruption_and_exits_with_1(tmp_path):
    (kind,) = (kind for kind in KINDS if kind.__name__ == "truncated")
    judge(tmp_path, kind, 0, True, True, "strict")
    words = [sys.executable, "-P", "-m", "trainer", "shards", "validate", tmp_path]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "is cut off" in ended.stderr and "1 of 3 shards are corrupt" in ended.stderr


# What the bytes of the shard alone give away.
STRUCTURAL = {
    "truncated",
    "cut_between_members",
    "missing_member",
    "duplicate_key",
    "duplicate_member",
    "one_dotted_key",
    "wrong_label",
    "not_a_picture",
    "empty_file",
    "empty_tar",
    "absent",
}


@pytest.mark.parametrize("name", sorted(STRUCTURAL))
def test_strict_refuses_corruption_that_shows_without_manifest_or_index(tmp_path, name):
    (kind,) = (kind for kind in KINDS if kind.__name__ == name)
    assert judge(tmp_path, kind, 0, manifest=False, indexed=False, policy="strict") == "refused"
