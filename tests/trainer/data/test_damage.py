"""A few damaged sets of each kind; `make soak` judges a thousand."""

import pytest
from damage import KINDS, judge


@pytest.mark.parametrize("policy", ["strict", "skip"])
@pytest.mark.parametrize("manifest, indexed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damage_is_refused_or_its_loss_counted_exactly(tmp_path, kind, manifest, indexed, policy):
    for seed in range(2):
        directory = tmp_path / str(seed)
        directory.mkdir()
        verdict = judge(directory, kind, seed, manifest, indexed, policy)
        assert policy == "skip" or verdict in ("refused", "harmless")


STRUCTURAL = {
    "truncated", "cut_between_members", "missing_member", "duplicate_key", "duplicate_member", "one_dotted_key",
    "wrong_label", "not_a_picture", "empty_file", "empty_tar", "absent",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(STRUCTURAL))
def test_strict_refuses_damage_that_shows_without_manifest_or_index(tmp_path, name):
    (kind,) = (kind for kind in KINDS if kind.__name__ == name)
    assert judge(tmp_path, kind, 0, manifest=False, indexed=False, policy="strict") == "refused"
