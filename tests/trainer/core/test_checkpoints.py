"""Checkpoints: complete or absent, the last few and the best, one clear error on a full disk."""

import pytest
import torch

from pipeline.config import UserError
from pipeline.store import complete_checkpoints
from trainer.core import checkpoints
from trainer.core.checkpoints import Saver, load_checkpoint, newest_step, save_checkpoint
from trainer.distributed.ranks import ALONE


def test_the_last_k_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, {"value": torch.tensor(step)}, keep=2)
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == ["step-00000003", "step-00000010"]
    assert newest_step(tmp_path) == 10
    assert load_checkpoint(tmp_path, 10)["value"] == 10


def test_a_directory_without_its_marker_is_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {}, keep=2)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "state.pt").write_bytes(b"half")
    (tmp_path / ".step-00000003.abcd").mkdir()
    assert newest_step(tmp_path) == 1


def test_no_checkpoint_is_none(tmp_path):
    assert newest_step(tmp_path / "absent") is None


def test_two_copies_of_one_job_may_write_the_same_step(tmp_path):
    save_checkpoint(tmp_path, 5, {"writer": 1}, keep=2)
    save_checkpoint(tmp_path, 5, {"writer": 2}, keep=2)
    assert load_checkpoint(tmp_path, 5)["writer"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
    ],
    ids=["OSError", "torch's writer"],
)
def test_a_full_disk_is_one_error_and_loses_no_earlier_checkpoint(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path, 1, {"value": 1}, keep=1)

    def full_disk(*_):
        raise error

    monkeypatch.setattr(torch, "save", full_disk)
    message = "checkpoint of step 2 cannot be written .* that of step 1 stands"
    with pytest.raises(UserError, match=message):
        save_checkpoint(tmp_path, 2, {"value": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_an_error_of_ours_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def bug(*_):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(torch, "save", bug)
    with pytest.raises(RuntimeError, match="size mismatch"):
        save_checkpoint(tmp_path, 2, {"value": 2}, keep=1)


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {}, keep=1, best=2)
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == ["step-00000002", "step-00000004"]


def test_a_save_in_the_background_raises_at_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "in_background", lambda ranks: True)
    saver = Saver(tmp_path / "run", 2, ALONE)
    saver.save(1, {"value": torch.ones(3)}, None)
    saver.wait()
    assert newest_step(tmp_path / "run") == 1
    (tmp_path / "file").touch()
    saver.directory = tmp_path / "file"
    saver.save(2, {}, None)
    with pytest.raises(UserError, match="checkpoint of step 2"):
        saver.save(3, {}, None)
