"""A stage is done, or it is not: whatever kills it, loses power under it, or flips its bits."""

import copy
import json
import logging
import os
import shutil
import stat
from pathlib import Path

import pytest
from killing import Killed, operations

from networks import checksums
from pipeline import store
from pipeline.config import UserError, load_config
from pipeline.files import WINNER, DamagedFile
from pipeline.graph import RunDirectory
from pipeline.store import COMPLETE, blaming_unchecked, complete_checkpoints, write_json

BASE = {
    "data": {"train": "d/train-0.tar", "val": "d/val-0.tar", "test": "d/test-0.tar"},
    "train": {"steps": 100},
    "specialists": {"steps": 20},
}
real_iterdir, real_link = Path.iterdir, os.link


def generalist(root, *overrides):
    return RunDirectory(root, load_config(None, list(overrides), copy.deepcopy(BASE))).generalist


OTHER = "train.learning_rate=0.5"


@pytest.fixture(autouse=True)
def nothing_read_yet(monkeypatch):
    monkeypatch.setattr(store, "_unchecked", {})


def checkpoint(stage, step):
    path = stage.checkpoints / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.pt").write_text(f"weights of {step}")
    (path / COMPLETE).touch()


def trained(root, finished=True):
    """A generalist with two checkpoints, done or half trained."""
    stage = generalist(root)
    attempt = stage.begin("first")
    for step in (10, 20):
        checkpoint(stage, step)
    attempt.path("model.json").write_text("{}")
    attempt.path("part/weights.npy").write_text("1 2 3")
    attempt.path("metrics.jsonl").touch()
    attempt.path("log-0.txt").write_text("started")
    if finished:
        assert attempt.finish(published=["model.json"])
    return stage


def is_as_new(root, *overrides):
    """Whether what goes on under this config finds nothing of an earlier one."""
    attempt = generalist(root, *overrides).begin()
    return not list(attempt.stage.checkpoints.glob("*")) and not attempt.stage.is_done


def killed(action, last):
    """Whether `action` was killed after `last` file operations, or ended before them."""
    try:
        with operations(last):
            action()
    except Killed:
        return True
    return False


LISTINGS = {"as names go": sorted, "backwards": lambda names: sorted(names, reverse=True)}


@pytest.mark.parametrize("finished", [True, False], ids=["done", "half trained"])
@pytest.mark.parametrize("listing", LISTINGS)
@pytest.mark.parametrize("links", ["links", "no links"])
def test_clearing_killed_at_any_file_operation_never_goes_on_from_the_old_config(
    tmp_path, monkeypatch, finished, listing, links
):
    if links == "no links":
        monkeypatch.setattr(os, "link", _refuse)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(LISTINGS[listing](real_iterdir(path))))
    monkeypatch.setattr(os, "scandir", _ordered(os.scandir, LISTINGS[listing]))
    trained(tmp_path / "whole", finished)
    last, ended = 0, False
    while not ended:
        root = tmp_path / str(last)
        shutil.copytree(tmp_path / "whole", root, symlinks=True)
        ended = not killed(generalist(root, OTHER).clear, last)
        before = generalist(root)  # the old config's: done as it was, or to go on whole
        steps = [path.name for path in complete_checkpoints(before.checkpoints)]
        assert steps in ([], ["step-00000010", "step-00000020"])
        assert all((before.checkpoints / step / "state.pt").exists() for step in steps)
        now = generalist(root, OTHER)
        if now.is_stale or now.done():  # the plain command says --force, which clears again
            now.clear()
        assert is_as_new(root, OTHER), f"after {last} operations"
        assert not list((root / "generalist").glob(WINNER))
        last += 1
    assert last > 10


def _refuse(source, target, **_):
    raise OSError(1, os.strerror(1), str(source), None, str(target))


def _ordered(scandir, order):
    """os.scandir in an order by name: what a file system lists first is its own affair."""

    def ordered(*arguments):
        with scandir(*arguments) as entries:
            by_name = {entry.name: entry for entry in entries}
        return _Listing(by_name[name] for name in order(by_name))

    return ordered


class _Listing:
    """What os.scandir returns."""

    def __init__(self, entries):
        self.entries = iter(list(entries))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.entries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def close(self):
        pass


def test_checkpoints_without_a_key_are_nobodys(tmp_path):
    stage = trained(tmp_path, finished=False)
    (stage.directory / "KEY").unlink()
    assert is_as_new(tmp_path)


def weights_of(stage):
    return stage.directory / "attempts" / "first" / "part" / "weights.npy"


LACKS = {
    "missing": (lambda path: path.unlink(), "it is missing"),
    "empty": (lambda path: path.write_text(""), "it has 0 bytes instead of 5"),
    "shorter": (lambda path: path.write_text("1"), "it has 1 bytes instead of 5"),
    "longer": (lambda path: path.write_text("1 2 3 4"), "it has 7 bytes instead of 5"),
}


@pytest.mark.parametrize("fault", LACKS)
@pytest.mark.parametrize("where", ["the attempt's", "RUN's"])
def test_a_stage_whose_files_are_not_whole_is_not_done_and_is_done_again(tmp_path, fault, where):
    stage = trained(tmp_path)
    harm, reason = LACKS[fault]
    path, size = (
        (weights_of(stage), 5) if where == "the attempt's" else (tmp_path / "model.json", 2)
    )
    harm(path)
    again = generalist(tmp_path)
    assert not again.is_done and again.done() is None and not again.is_stale
    assert again.lacks == f"{path}: {reason.replace('of 5', f'of {size}')}"
    assert [path.name for path in complete_checkpoints(again.checkpoints)]  # it goes on from there
    attempt = again.begin("second")
    attempt.path("model.json").write_text("{}")
    assert attempt.finish(published=["model.json"])
    assert again.is_done and again.done()["attempt"] == "second" and not again.lacks
    assert (tmp_path / "model.json").read_text() == "{}"


@pytest.mark.parametrize("content", [b"", b"\0" * 80])
def test_a_marker_that_lost_its_content_is_none(tmp_path, content):
    stage = trained(tmp_path)
    (stage.directory / "DONE").unlink()
    (stage.directory / "DONE").write_bytes(content)
    again = generalist(tmp_path)
    assert not again.is_done and again.lacks == "DONE is empty"
    assert again.begin("second").finish() and again.done()["attempt"] == "second"


def test_an_earlier_versions_stage_whose_files_are_empty_is_not_done(tmp_path):
    stage = trained(tmp_path)
    without_checksums(stage)
    assert generalist(tmp_path).is_done
    weights_of(stage).write_text("")
    assert generalist(tmp_path).lacks == f"{weights_of(stage)}: it has 0 bytes"


def test_of_two_that_find_a_stage_not_whole_the_later_spares_what_the_first_made(tmp_path):
    stage = trained(tmp_path)
    weights_of(stage).unlink()
    late = generalist(tmp_path)
    assert late.lacks
    assert generalist(tmp_path).begin("second").finish()
    late._forget_done()
    assert generalist(tmp_path).done()["attempt"] == "second"


def test_without_hard_links_a_stage_that_is_not_whole_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _refuse)
    stage = trained(tmp_path)
    weights_of(stage).unlink()
    assert generalist(tmp_path).begin("second").finish()
    assert generalist(tmp_path).done()["attempt"] == "second"


def without_checksums(stage):
    """As versions before wrote DONE."""
    done = json.loads((stage.directory / "DONE").read_text())
    (stage.directory / "DONE").unlink()
    del done["files"], done["published"]
    write_json(stage.directory / "DONE", done)


def flip(path, bit=9):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("asked", ["part/weights.npy", "part", ""])
def test_a_flipped_bit_is_found_when_its_file_is_asked_for(tmp_path, asked):
    flip(weights_of(trained(tmp_path)))
    stage = generalist(tmp_path)
    assert stage.is_done and stage.path("model.json").read_text() == "{}"
    with pytest.raises(DamagedFile) as error:
        stage.path(asked)
    said = str(error.value)
    assert "\n" not in said and f"{weights_of(stage)} is damaged: its checksum" in said
    assert f"remove {stage.directory / 'DONE'}, then `referral run` makes it again" in said
    (stage.directory / "DONE").unlink()
    assert generalist(tmp_path).begin("second").finish()


def test_a_file_is_compared_once_per_process_and_again_when_it_changes(tmp_path, monkeypatch):
    stage, compared, entry_of = trained(tmp_path), [], checksums.entry_of
    monkeypatch.setattr(checksums, "entry_of", lambda path: compared.append(path) or entry_of(path))
    for _ in range(3):
        stage.path("part/weights.npy")
    assert compared == [weights_of(stage)]
    weights_of(stage).write_text("3 2 1")
    os.utime(weights_of(stage), (1, 1))
    with pytest.raises(DamagedFile):
        stage.path("part/weights.npy")


def test_a_changed_file_of_run_itself_has_its_stage_done_again(tmp_path):
    stage = trained(tmp_path)
    (tmp_path / "model.json").write_text("[]")  # of the same length
    lacks = f"{tmp_path / 'model.json'}: its checksum is another"
    assert stage.lacks == "" and generalist(tmp_path).lacks == lacks


def test_what_is_written_after_done_has_no_checksum(tmp_path):
    stage = trained(tmp_path)
    stage.path("log-0.txt").write_text("started and ended")
    (weights_of(stage).parent / "train-0.tar.index.npz").touch()
    assert generalist(tmp_path).path("log-0.txt").read_text() == "started and ended"
    assert set(generalist(tmp_path).done()["files"]) == {
        "metrics.jsonl",
        "model.json",
        "part/weights.npy",
    }


def test_a_run_without_checksums_opens_and_says_so_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "referral")
    stage = trained(tmp_path)
    without_checksums(stage)
    flip(weights_of(stage))
    for _ in range(2):
        assert generalist(tmp_path).path("part/weights.npy").exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} has no checksums, for an older version made it: its files are read as is"
    ]


def test_everything_is_on_the_disk_before_done_is_there(tmp_path, monkeypatch):
    stage = generalist(tmp_path)
    attempt = stage.begin("first")
    attempt.path("part/weights.npy").write_text("1 2 3")
    order = []
    real_fsync = os.fsync

    def fsync(descriptor):
        order.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), stage.directory))
        real_fsync(descriptor)

    def link(source, target, **_):
        order.append("DONE appears")
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    attempt.finish()
    before = order[: order.index("DONE appears")]
    own = "attempts/first"
    assert before.index(f"{own}/part/weights.npy") < before.index(f"{own}/part") < before.index(own)
    assert before[-2:] == ["attempts", "."] and before[-3] == own
    assert any(name.startswith(f"{own}/.DONE") for name in before)
    assert order[len(before) + 1] == "."  # and DONE's own name


def test_links_that_a_power_loss_took_are_put_back(tmp_path):
    stage = trained(tmp_path)
    (stage.directory / "model.json").unlink()
    stage.link()
    assert (stage.directory / "model.json").read_text() == "{}"


@pytest.mark.parametrize("files", ["[]", '{"model.json": 3}', '{"model.json": {"bytes": "2"}}'])
def test_a_list_of_checksums_that_is_none_is_a_damaged_marker(tmp_path, files):
    stage = trained(tmp_path)
    done = json.loads((stage.directory / "DONE").read_text())
    (stage.directory / "DONE").unlink()
    write_json(stage.directory / "DONE", done | {"files": json.loads(files) or 5})
    with pytest.raises(UserError, match='DONE is damaged .*"files" is no list of checksums'):
        generalist(tmp_path).done()


def test_a_file_system_without_fsync_of_directories_will_do(tmp_path, monkeypatch):
    def of_files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, os.strerror(22))

    monkeypatch.setattr(os, "fsync", of_files_alone)
    assert generalist(tmp_path).begin().finish()


# Runs of older versions, whose DONE has no checksums


def test_in_a_run_without_checksums_a_value_of_another_form_is_blamed_on_what_was_read(tmp_path):
    stage = trained(tmp_path)
    done = stage.directory / "DONE"
    content = json.loads(done.read_text())
    del content["files"]
    done.write_text(json.dumps(content))
    path = stage.path("model.json")
    with pytest.raises(UserError) as error:
        with blaming_unchecked(tmp_path):
            json.loads(path.read_text())["schema"]
    line = str(error.value)
    assert len(line.splitlines()) == 1 and "KeyError: 'schema'" in line
    assert line.endswith(f"read were {path}") and "remove the DONE of its stage" in line


def test_in_a_run_with_checksums_an_error_of_ours_stays(tmp_path):
    path = trained(tmp_path).path("model.json")
    with pytest.raises(KeyError):
        with blaming_unchecked(tmp_path):
            json.loads(path.read_text())["schema"]


def test_a_published_name_that_no_checksum_is_for_is_as_one_of_an_older_version(tmp_path):
    stage = trained(tmp_path)
    done = stage.directory / "DONE"
    content = json.loads(done.read_text())
    (tmp_path / "model.json").write_text("{}")
    for files in ({}, {"other": {"bytes": 1, "xxh3_128": ""}}):
        done.write_text(json.dumps(content | {"files": files, "published": ["model.json"]}))
        assert checksums.recorded(tmp_path / "model.json") is None


@pytest.mark.parametrize("name", ["DONE", "KEY"])
def test_a_pipe_or_a_terabyte_in_the_place_of_a_marker_is_not_read(tmp_path, name):
    trained(tmp_path)
    marker = tmp_path / "generalist" / name
    marker.unlink()
    os.mkfifo(marker)
    for _ in range(2):
        stage = generalist(tmp_path)
        if name == "KEY":
            assert stage.is_stale
        else:
            with pytest.raises(DamagedFile, match="DONE is damaged"):
                stage.done()
        marker.unlink()
        marker.touch()
        os.truncate(marker, 2**40)
