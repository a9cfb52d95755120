"""RUN/.lock keeps two launchers apart, and nobody is signalled whom it names by mistake."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

import launch.lock
import networks.births
from launch.lock import FILE, Held, Holder, is_held, locked, stop_launcher
from launch.processes import ask_to_end, birth, has_ended, is_born, signal_group
from pipeline.config import UserError

HOST = os.uname().nodename
HOLDING = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def process(*words):
    """A process of its own, killed at the end, with words it prints a line when it is ready."""
    command = [sys.executable, "-c", *words] if words else ["sleep", "60"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE if words else None, text=True)
    try:
        if words:
            child.stdout.readline()
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.fixture
def bystander():
    with process() as child:
        yield child


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.lock, "UNNAMED_S", 0.2)
    return tmp_path / "run"


def lives(child) -> bool:
    time.sleep(0.1)
    return child.poll() is None


def test_two_launchers_of_one_run_are_one_too_many(run):
    with locked(run):
        assert is_held(run)
        with pytest.raises(Held, match=r"\.lock.*another launcher.*process \d+ on"):
            with locked(run):
                pass
    assert not is_held(run)
    with locked(run):
        pass


def test_a_lock_says_who_holds_it_and_since_when_it_lives(run):
    with locked(run):
        holder = Holder.parse((run / FILE).read_text())
    assert holder == Holder(os.getpid(), HOST, birth(os.getpid()))
    assert is_born(os.getpid(), holder.born)


def test_the_locks_of_older_versions_are_read():
    assert Holder.parse("process 17 on a-host\n") == Holder(17, "a-host", "")


@pytest.mark.parametrize("text", ["", "process -1 on h", "process on h", "process 1 2 on h", "\0"])
def test_what_is_no_line_of_a_lock_names_nobody(text):
    assert Holder.parse(text) is None


def test_a_launcher_on_another_machine_is_not_signalled(run):
    with locked(run):
        (run / FILE).write_text("process 1 on another-machine\n")
        with pytest.raises(UserError, match="another launcher is running .*process 1 on another"):
            stop_launcher(run, 2)


def stale_lines(pid: int) -> list[str]:
    return [
        f"process {pid} on {HOST}, born 0:1\n",  # the number was given away again
        f"process {pid} on {HOST}\n",  # of an older version, and it has not the lock open
        f"process -1 on {HOST}\n",
        f"process 0 on {HOST}\n",
        f"process 1 on {HOST}\n",
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_process_that_a_stale_line_names_is_not_signalled(run, bystander, number, monkeypatch):
    """Somebody else holds the lock: a launcher, say, that has not written its name yet."""
    killed = []
    run.mkdir()
    (run / FILE).touch()
    with process(HOLDING, str(run / FILE)) as holding, monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda *words: killed.append(words))
        (run / FILE).write_text(stale_lines(bystander.pid)[number])
        with pytest.raises(UserError, match="not the one that it names .* nothing was signalled"):
            stop_launcher(run, 2)
        assert lives(bystander) and lives(holding) and not killed


def test_a_run_that_cannot_be_written_is_not_taken_for_one_that_is_running(
    run, bystander, monkeypatch
):
    run.mkdir()
    (run / FILE).write_text(f"process {bystander.pid} on {HOST}\n")
    opened = os.open

    def read_only(path, flags, *more):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", read_only)
    assert not stop_launcher(run, 2)
    assert lives(bystander)
    with pytest.raises(UserError, match="cannot be written: Read-only file system") as error:
        with locked(run):
            pass
    assert not isinstance(error.value, Held)


@pytest.mark.parametrize("noted", [True, False])
def test_the_holder_is_signalled_by_its_birth_or_by_its_open_lock(run, noted):
    run.mkdir()
    (run / FILE).touch()
    with process(HOLDING, str(run / FILE)) as holding:
        born = birth(holding.pid) if noted else ""
        (run / FILE).write_text(Holder(holding.pid, HOST, born).line)
        assert stop_launcher(run, 10)
        assert holding.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize("pid", [-1, 0, 1, os.getpid()], ids=["every", "group", "init", "own"])
def test_no_group_nor_init_nor_this_process_is_asked_to_end(tmp_path, pid):
    assert not ask_to_end(pid, birth(pid) or "", tmp_path)


def test_without_a_handle_the_signal_goes_by_the_number(tmp_path, bystander, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open")
    assert not ask_to_end(bystander.pid, "0:1", tmp_path)
    assert lives(bystander)
    assert ask_to_end(bystander.pid, birth(bystander.pid), tmp_path)
    assert bystander.wait(5) == -signal.SIGTERM


def test_a_mark_is_of_one_boot_and_older_versions_wrote_the_ticks_alone(bystander, monkeypatch):
    mark = birth(bystander.pid)
    assert is_born(bystander.pid, mark) and is_born(bystander.pid, mark.rpartition(":")[2])
    assert not is_born(bystander.pid, f"another-boot:{mark.rpartition(':')[2]}")
    monkeypatch.setattr(networks.births.Path, "exists", lambda path: False)
    by_ps = birth(bystander.pid)
    assert by_ps and by_ps != mark and is_born(bystander.pid, by_ps)


def test_a_child_that_was_waited_for_has_no_group_any_more(monkeypatch):
    signalled = []
    child = subprocess.Popen(["true"], start_new_session=True)
    while not has_ended(child):
        time.sleep(0.01)
    monkeypatch.setattr(os, "killpg", lambda *words: signalled.append(words))
    signal_group(child, signal.SIGKILL)
    assert signalled == [(child.pid, signal.SIGKILL)]  # a zombie: its number is its own
    child.wait()
    signal_group(child, signal.SIGKILL)
    assert len(signalled) == 1


def test_a_lock_that_is_a_link_or_a_pipe_is_neither_followed_nor_waited_for(run, tmp_path):
    run.mkdir()
    (tmp_path / "precious").write_text("all mine")
    (run / FILE).symlink_to(tmp_path / "precious")
    for refused in (lambda: locked(run).__enter__(), lambda: is_held(run)):
        with pytest.raises(UserError, match=r"cannot be (written|read)"):
            refused()
    assert (tmp_path / "precious").read_text() == "all mine"
    (run / FILE).unlink()
    os.mkfifo(run / FILE)
    with pytest.raises(UserError, match="it is no regular file"):
        is_held(run)


def test_a_file_system_without_locks_is_said_in_one_line(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for asked in (lambda: locked(run).__enter__(), lambda: stop_launcher(run, 1)):
        with pytest.raises(UserError, match="cannot lock files .flock: No locks.*another one"):
            asked()
