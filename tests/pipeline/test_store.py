"""One attempt at a stage wins, on whatever file system RUN lies."""

import errno
import multiprocessing
import os
import subprocess
import threading
import time

import pytest

from launch.journal import JobRecord
from pipeline.config import UserError, load_config
from pipeline.files import WINNER, claim, probe
from pipeline.graph import RunDirectory
from pipeline.store import read_json, write_json

BASE = {
    "data": {"train": "d/train-0.tar", "val": "d/val-0.tar", "test": "d/test-0.tar"},
    "train": {"steps": 100},
    "specialists": {"steps": 20},
}
real_link = os.link


def generalist(root):
    return RunDirectory(root, load_config(None, [], {**BASE})).generalist


def refuse(source="", target="", **_):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(source), None, str(target))


def only_within_a_directory(source, target, **options):
    if os.path.dirname(source) != os.path.dirname(target):
        refuse(source, target)
    real_link(source, target, **options)


LINKS = {"everywhere": real_link, "within a directory": only_within_a_directory, "none": refuse}


@pytest.fixture(params=LINKS)
def links(request, monkeypatch):
    """Hard links as this file system, BeeGFS, and SMB or exFAT have them."""
    monkeypatch.setattr(os, "link", LINKS[request.param])
    return request.param


def finish_together(root, barrier, outcomes):
    attempt = generalist(root).begin()
    attempt.path("weights").write_text(attempt.id)
    barrier.wait()
    outcomes.put((attempt.id, attempt.finish()))


def test_of_attempts_that_finish_together_exactly_one_wins(links, tmp_path):
    context = multiprocessing.get_context("fork")
    for trial in range(5):
        root, barrier, outcomes = tmp_path / str(trial), context.Barrier(6), context.Queue()
        arguments = (root, barrier, outcomes)
        children = [context.Process(target=finish_together, args=arguments) for _ in range(6)]
        for child in children:
            child.start()
        ended = [outcomes.get(timeout=30) for _ in children]
        for child in children:
            child.join()
        winners = [name for name, won in ended if won]
        stage = generalist(root)
        assert winners == [stage.done()["attempt"]]
        assert stage.is_done and (stage.directory / "weights").read_text() == winners[0]
        assert not list(stage.directory.glob(".*"))


def test_done_is_never_read_half_written(links, tmp_path):
    source, target = tmp_path / "attempt" / "DONE", tmp_path / "DONE"
    source.parent.mkdir()
    write_json(source, {"attempt": "a", "files": ["x"] * 50_000})
    seen, reading = [], threading.Event()

    def read():
        while not seen:
            reading.set()
            if target.exists():
                seen.append(read_json(target))

    reader = threading.Thread(target=read)
    reader.start()
    reading.wait()
    claim(source, target)
    reader.join()
    assert len(seen[0]["files"]) == 50_000


def test_a_winner_that_died_before_done_is_finished_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    first, second = generalist(tmp_path).begin("first"), generalist(tmp_path).begin("second")
    assert first.finish()
    (first.stage.directory / "DONE").unlink()  # what it had come to when it died
    assert not second.finish() and generalist(tmp_path).done()["attempt"] == "first"


def test_a_cleared_stage_remembers_no_winner(links, tmp_path):
    stage = generalist(tmp_path)
    assert stage.begin("first").finish()
    stage.clear()
    assert not stage.is_done and not (stage.directory / WINNER).exists()
    assert stage.begin("second").finish() and stage.done()["attempt"] == "second"


def test_weights_of_an_earlier_attempt_do_not_stay_beside_those_in_other_files(tmp_path):
    stage = generalist(tmp_path)
    first = stage.begin("first")
    first.path("model.safetensors").write_text("one")
    assert first.finish()
    stage.clear()
    second = stage.begin("second")
    parts = ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    for name in parts:
        second.path(name).write_text("two")
    assert second.finish()
    assert sorted(path.name for path in stage.directory.glob("model*")) == parts


def test_a_half_cleared_winner_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    stage = generalist(tmp_path)
    (stage.directory / WINNER).mkdir(parents=True)
    assert stage.begin().finish()


def test_without_symbolic_links_the_winners_files_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    attempt = generalist(tmp_path).begin()
    attempt.publish("metrics.jsonl")  # is not there yet
    attempt.path("metrics.jsonl").write_text("{}")
    attempt.path("model.json").write_text("[]")
    assert attempt.stage.shown("metrics.jsonl").read_text() == "{}"
    assert attempt.finish()
    assert (attempt.stage.directory / "model.json").read_text() == "[]"


def test_the_probe_accepts_each_of_these_file_systems_and_leaves_nothing(links, tmp_path):
    probe(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "broken, need", [("replace", "rename it over another"), ("rename", "let one of two writers")]
)
def test_the_probe_names_what_a_file_system_cannot_do(tmp_path, monkeypatch, broken, need):
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, broken, refuse)
    with pytest.raises(UserError, match=need) as error:
        probe(tmp_path)
    assert "choose --run on another one" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_stage_that_trains_nothing_publishes_no_link_that_leads_nowhere(tmp_path):
    stage = generalist(tmp_path)
    for attempt in (stage.begin("a"), stage.begin("b")):
        attempt.publish("metrics.jsonl")
        assert not (stage.directory / "metrics.jsonl").is_symlink()
        attempt.publish_growing("metrics.jsonl")
        assert (stage.directory / "metrics.jsonl").read_text() == ""
    stage.begin("c").publish("metrics.jsonl")
    assert not (stage.directory / "metrics.jsonl").is_symlink()
    assert stage.begin("c").finish()
    copy = tmp_path.with_name(f"{tmp_path.name}-copy")
    subprocess.run(["cp", "-rL", str(tmp_path), str(copy)], check=True)


def test_a_clock_that_is_set_back_gives_no_negative_seconds(tmp_path, monkeypatch):
    stage = generalist(tmp_path)
    attempt, record = stage.begin(), JobRecord(started=time.time())
    monkeypatch.setattr(time, "time", lambda: 1.0)
    assert attempt.finish() and record.elapsed_s == 0
    done = stage.done()
    assert done is not None and 0 <= done["seconds"] < 60 and attempt.seconds >= 0


def test_a_run_that_was_moved_is_not_made_anew_where_it_was(tmp_path):
    (tmp_path / "run").mkdir()
    stage = generalist(tmp_path / "run")
    attempt = stage.begin()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"run/generalist: cannot be written: No such file"):
        stage.begin()
    for write in (attempt.path, attempt.publish_growing):
        with pytest.raises(FileNotFoundError):
            write("metrics.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_nothing_is_deleted_that_a_link_out_of_the_run_leads_to(tmp_path):
    """As in a run that somebody made to have `--force` delete what is not theirs."""
    (tmp_path / "run").mkdir()
    (tmp_path / "precious" / "attempts").mkdir(parents=True)
    (tmp_path / "precious" / "letter.txt").write_text("kept")
    (tmp_path / "run" / "generalist").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"run/generalist is a link out of .*; remove the link"):
        generalist(tmp_path / "run").clear()
    assert (tmp_path / "precious" / "letter.txt").read_text() == "kept"
    assert (tmp_path / "precious" / "attempts").is_dir()
