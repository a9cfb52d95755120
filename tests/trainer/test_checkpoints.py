import torch

from trainer.checkpoints import complete_checkpoints, load_checkpoint, newest_step, save_checkpoint


def test_the_last_k_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, {"value": torch.tensor(step)}, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
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


def test_a_failed_write_leaves_nothing_and_keeps_the_earlier_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"value": 1}, keep=2)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    try:
        save_checkpoint(tmp_path, 2, {"value": 2}, keep=2)
    except OSError:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
