"""Checkpoints: complete or absent, the last few and the best, one clear error on a full disk."""

import pytest
import torch

from pipeline.config import UserError
from pipeline.store import complete_checkpoints
from trainer.core import checkpoints
from trainer.core.checkpoints import (
    Saver,
    load_checkpoint,
    newest_step,
    save_checkpoint,
    whole_step,
)
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


def flip(path, place=-20):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def without_checksum(checkpoint):
    """As earlier versions wrote it."""
    (checkpoint / "COMPLETE").write_text("")


STEPS = {step: torch.arange(1000) * step for step in (1, 2, 3)}


def saved(directory, keep=3):
    for step, value in STEPS.items():
        save_checkpoint(directory, step, {"value": value}, keep=keep)
    return directory


@pytest.mark.parametrize(
    "harm", [flip, cut, lambda path: path.unlink()], ids=["bit", "cut", "gone"]
)
@pytest.mark.parametrize("version", ["today's", "an earlier one's"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_older_whole_one(
    tmp_path, caplog, harm, version
):
    saved(tmp_path)
    for path in complete_checkpoints(tmp_path):
        if version != "today's":
            without_checksum(path)
    newest = tmp_path / "step-00000003"
    place = newest / "state.pt"
    if harm is flip:
        flip(place, place.stat().st_size // 2)
    else:
        harm(place)
    assert whole_step([tmp_path]) == 2
    assert torch.equal(load_checkpoint(tmp_path, 2)["value"], STEPS[2])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{newest} is damaged (state.pt: ") and line.endswith("from step 2")
    assert not newest.exists()  # training writes it again
    save_checkpoint(tmp_path, 3, {"value": STEPS[3]}, keep=2)
    assert whole_step([tmp_path]) == 3


def test_a_damaged_checkpoint_is_not_loaded(tmp_path):
    saved(tmp_path)
    flip(tmp_path / "step-00000003" / "state.pt", 700)
    with pytest.raises(UserError, match=r"step-00000003 is damaged .*checksum"):
        load_checkpoint(tmp_path, 3)


@pytest.mark.parametrize("marker", ["{", "[]", '{"files": []}', '{"files": {"state.pt": 1}}', "{}"])
def test_a_marker_that_says_nothing_is_damage(tmp_path, marker):
    saved(tmp_path)
    (tmp_path / "step-00000003" / "COMPLETE").write_text(marker)
    assert whole_step([tmp_path]) == 2


def test_where_no_checkpoint_is_whole_one_line_says_what_to_remove(tmp_path):
    saved(tmp_path)
    for path in complete_checkpoints(tmp_path):
        cut(path / "state.pt")
    with pytest.raises(UserError) as error:
        whole_step([tmp_path])
    said = str(error.value)
    assert "\n" not in said and f"no checkpoint in {tmp_path} is whole" in said
    assert "remove that directory and run the same command again" in said
    assert len(complete_checkpoints(tmp_path)) == 3


def test_several_networks_resume_at_the_newest_step_that_is_whole_of_all(tmp_path):
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other")
    flip(one / "step-00000003" / "state.pt", 700)
    save_checkpoint(other, 4, {}, keep=4)
    assert whole_step([one, other]) == 2
    assert whole_step([one, tmp_path / "absent"]) is None
