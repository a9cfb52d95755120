"""Hidden names say who writes. What a dead process left is swept, and nothing else."""

import os
import subprocess
import sys
import time

import pytest
from filesystems import in_memory, why_not

from networks import temporaries
from networks.births import birth
from networks.temporaries import (
    LONGEST_WRITE_S,
    _short,
    appearing,
    discard,
    sweep,
    temporary_beside,
)
from pipeline.files import write_bytes

OWN = f".{os.getpid()}-{_short(birth(os.getpid()))}."


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def of_process(path, pid: int, born: str = ""):
    """What `temporary_beside` would name in another process. Of an earlier version without BORN."""
    name = temporary_beside(path).name
    return path.with_name(name.replace(OWN, f".{pid}-{born}." if born else f".{pid}."))


def old(path):
    then = time.time() - LONGEST_WRITE_S - 60
    os.utime(path, (then, then))


def test_a_temporary_lies_beside_its_file_hidden_and_says_whose_it_is(tmp_path):
    one, other = (temporary_beside(tmp_path / "model.json") for _ in range(2))
    assert one != other and one.parent == tmp_path
    assert one.name.startswith(".model.json.") and OWN in one.name


def test_what_a_dead_process_left_is_swept_files_and_directories_at_any_depth(tmp_path):
    pid = dead_pid()
    (tmp_path / "checkpoints").mkdir()
    file = of_process(tmp_path / "state.pt", pid, "0123abcd")
    directory = of_process(tmp_path / "checkpoints" / "step-00000010", pid)
    file.touch()
    directory.mkdir()
    (directory / "state.pt").touch()
    assert set(sweep(tmp_path)) == {file, directory}
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]


def test_what_a_living_process_writes_and_what_is_not_ours_stays(tmp_path):
    names = [".lock", ".gitignore", ".model.json", ".nfs0000012345", "model.json.host.1.abcdef01"]
    kept = [tmp_path / name for name in names] + [temporary_beside(tmp_path / "a.npy")]
    for path in kept:
        path.touch()
    for path in kept[:-1]:
        old(path)
    assert sweep(tmp_path) == [] and all(path.exists() for path in kept)


def test_a_living_process_is_the_writer_only_if_it_was_born_as_the_writer_was(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as living:
        pid, own = living.pid, _short(birth(living.pid))
        recycled = of_process(tmp_path / "a.npy", pid, "0123abcd")
        kept = [of_process(tmp_path / "a.npy", pid, own), of_process(tmp_path / "b.npy", pid)]
        for path in (recycled, *kept):
            path.touch()
        assert sweep(tmp_path) == [recycled] and all(path.exists() for path in kept)
        living.kill()
    assert set(sweep(tmp_path)) == set(kept)


def test_what_a_process_writes_that_nobody_may_look_at_stays(tmp_path, monkeypatch):
    path = of_process(tmp_path / "a.npy", 4321, "0123abcd")
    path.touch()

    def kill(pid, number):
        assert (pid, number) == (4321, 0)
        raise PermissionError

    monkeypatch.setattr(temporaries, "birth", lambda pid: None)  # as /proc with hidepid has it
    monkeypatch.setattr(os, "kill", kill)
    assert sweep(tmp_path) == [] and path.exists()


@pytest.mark.parametrize(
    "name", [".a.npy.other-host.1.abcdef01", ".DONE.0123abcd", ".model.safetensors.77"]
)
def test_where_the_writer_cannot_be_asked_a_day_without_a_write_is_its_death(tmp_path, name):
    path = tmp_path / name
    path.touch()
    assert sweep(tmp_path) == []
    old(path)
    assert sweep(tmp_path) == [path]


def test_beside_shards_only_the_directory_itself_is_swept(tmp_path):
    (tmp_path / "below").mkdir()
    path = of_process(tmp_path / "below" / "a.npy", dead_pid())
    path.touch()
    assert sweep(tmp_path, recursive=False) == [] and path.exists()


def test_a_clock_that_was_set_forward_takes_nothing_from_a_living_writer(tmp_path, monkeypatch):
    path = temporary_beside(tmp_path / "state.pt")
    path.touch()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3 * LONGEST_WRITE_S)
    assert sweep(tmp_path) == [] and path.exists()


def test_what_appears_has_its_name_once_it_is_written_and_never_after_an_error(tmp_path):
    path = tmp_path / "program.pt2"
    with pytest.raises(OSError), appearing(path, ".pt2") as temporary:
        temporary.write_text("half")
        raise OSError
    assert list(tmp_path.iterdir()) == []
    with appearing(path, ".pt2") as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.suffix == ".pt2"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_writer_of_a_suffix_left_is_swept(tmp_path):
    left = of_process(tmp_path / "a.pt2", dead_pid(), "0123abcd")
    left = left.with_name(f"{left.name}.onnx")
    left.touch()
    assert sweep(tmp_path) == [left]


@pytest.mark.skipif(why_not("tmpfs") != "", reason=why_not("tmpfs"))
def test_on_a_read_only_file_system_the_error_is_of_the_file_and_not_of_the_temporary():
    with in_memory(1024) as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(OSError) as refusal:
            write_bytes(place / "model.json", b"{}")
        assert refusal.value.filename == str(place / "model.json")
        discard(place / "not there")
