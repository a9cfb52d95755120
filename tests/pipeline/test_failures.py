"""What is no error of ours is one line, with what helps. Everything else keeps its traceback."""

import errno
import os
import re
import signal
import subprocess
import sys

import numpy
import pytest

from networks.checksums import ChangedFile
from pipeline.config import UserError
from pipeline.extras import EXTRAS, ROOT, missing_package, remedy, require
from pipeline.failures import INTERRUPTED, answer, cannot_write, explain, fullest, size_text
from pipeline.files import DamagedFile, read_json, write_bytes


def raising(error):
    def work():
        raise error

    return work


def said(capsys, error, **options):
    """(exit code, what was printed) of a command in which `error` arises."""
    code = answer(raising(error), **options)
    output = capsys.readouterr()
    assert output.out == ""
    return code, output.err


def test_a_mistake_of_the_users_is_its_own_words(capsys):
    assert said(capsys, UserError("one\ntwo")) == (2, "error: one\nerror: two\n")
    assert said(capsys, ChangedFile("a is damaged")) == (2, "error: a is damaged\n")


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "the disk is full: .* free and more is needed; remove something"),
        (errno.EDQUOT, "your quota of disk space is used up: .* free"),
        (errno.EROFS, "read-only file system; choose a place that can be written"),
        (errno.EACCES, "permission denied; change its permissions"),
        (errno.EMFILE, "too many open files; raise the limit"),
    ],
)
def test_what_a_disk_refuses_is_one_line_with_the_path_and_the_remedy(
    capsys, tmp_path, number, words
):
    path = str(tmp_path / "model.json")
    code, line = said(capsys, OSError(number, os.strerror(number), path))
    assert code == 2 and line.count("\n") == 1 and line.startswith(f"error: {path}: ")
    assert re.search(words, line)


def test_a_full_disk_says_what_is_needed_and_what_is_free(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code = answer(lambda: write_bytes(tmp_path / "graph.json", bytes(2048)))
    line = capsys.readouterr().err
    assert code == 2 and re.search(r"graph.json: the disk is full: 2.0 KiB are needed and .*", line)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB, where this process may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_on_a_disk_that_is_full_nothing_is_left_and_the_line_has_its_size(capsys, tiny_disk):
    code = answer(lambda: write_bytes(tiny_disk / "weights", bytes(2**20)))
    line = capsys.readouterr().err
    assert code == 2 and "1.0 MiB are needed and 64.0 KiB are free" in line
    assert not list(tiny_disk.iterdir())


def test_of_several_places_the_fullest_is_named(tiny_disk):
    assert fullest([tiny_disk.parent, tiny_disk]) == tiny_disk


def save_array(path):
    numpy.save(path / "array.npy", numpy.zeros(2**18))


def save_arrays(path):
    numpy.savez(path / "arrays.npz", x=numpy.zeros(2**18))


def save_tensors(path):
    from safetensors.numpy import save_file

    save_file({"x": numpy.zeros(2**18)}, path / "model.safetensors")


def save_text(path):
    (path / "log.txt").write_text("x" * 2**20)


@pytest.mark.parametrize("save", [save_array, save_arrays, save_tensors, save_text])
def test_however_a_library_says_that_the_disk_is_full_it_is_one_line(capsys, tiny_disk, save):
    code = answer(lambda: save(tiny_disk), places=[tiny_disk])
    line = capsys.readouterr().err
    assert code == 2 and line.count("\n") == 1
    assert line.startswith(f"error: {tiny_disk}") and "the disk is full" in line


def test_memory_that_cannot_be_had_is_one_line(capsys):
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 3 bytes")
    assert "out of memory: " in said(capsys, error)[1]


def test_an_error_of_ours_is_raised():
    with pytest.raises(KeyError):
        answer(raising(KeyError("key")))
    assert explain(ValueError("x")) is None and explain(ImportError("x", name="pipeline.x")) is None


def test_what_may_pass_is_no_mistake_of_the_users():
    assert explain(OSError(errno.EIO, "Input/output error", "x"))[0] == 1
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
    assert explain(missing)[0] == 2 and explain(missing, passing=[errno.ENOENT])[0] == 1


def test_ctrl_c_is_one_line_and_130(capsys):
    assert said(capsys, KeyboardInterrupt()) == (INTERRUPTED, "interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_swallows_into_an_error_of_its_own_still_is_one_line(
    capsys, number
):
    def work():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ImportError("the library failed to start") from None

    before = signal.getsignal(number)
    assert answer(work) == INTERRUPTED and capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(number) is before


def test_a_reader_that_has_seen_enough_is_no_error():
    program = (
        "from pipeline.failures import answer\n"
        "answer(lambda: [print('x' * 999) for _ in range(9999)] and 0)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_cannot_write_names_the_option_that_gave_the_path(tmp_path):
    error = OSError(errno.EISDIR, "Is a directory")
    text = str(cannot_write(tmp_path, error, option="--plot"))
    assert text == f"--plot {tmp_path}: cannot be written: Is a directory"


def test_sizes_read_like_prose():
    sizes = [size_text(count) for count in (12, 2048, 5 * 2**20, 3 * 2**40)]
    assert sizes == ["12 bytes", "2.0 KiB", "5.0 MiB", "3072.0 GiB"]


def test_a_file_of_ours_that_was_cut_short_is_named(tmp_path):
    (tmp_path / "DONE").write_text('{"hash": ')
    with pytest.raises(DamagedFile, match="DONE is damaged .* restore it, or remove it"):
        read_json(tmp_path / "DONE")


# Extras


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_package_is_one_line_with_the_extra_that_brings_it(extra, monkeypatch):
    for module in EXTRAS[extra]:
        monkeypatch.setitem(sys.modules, module, None)
        error = ModuleNotFoundError(f"No module named '{module}.x'", name=f"{module}.x")
        assert missing_package(error) == (
            f"{module} is not installed; pip install -e '{ROOT}[{extra}]'"
        )
        with pytest.raises(UserError, match=f"engine.track: {module} is not installed; pip"):
            require(module, "engine.track")


def test_a_package_that_no_extra_brings_is_installed_by_its_name():
    assert remedy("nothing.of.ours") == "pip install nothing"


def test_an_installed_package_that_cannot_be_imported_is_not_called_missing():
    assert missing_package(ImportError("a symbol is missing", name="numpy")) == ""


@pytest.mark.parametrize("package", ["networks", "ensemble", "clustering"])
def test_from_python_too_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    import importlib

    def absent(name, *_):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    module = importlib.import_module(package)
    monkeypatch.setattr(module, "import_module", absent)
    name = {"networks": "Classifier", "ensemble": "combine_kl", "clustering": "ClassGroups"}
    with pytest.raises(ImportError, match="No module named 'torch'.*`referral doctor` says"):
        getattr(module, name[package])


def test_on_an_installation_without_extras_every_command_of_the_trainer_is_one_line():
    from trainer.__main__ import COMMANDS

    program = (
        "import sys\n"
        "for name in ('torch', 'PIL', 'scipy', 'sklearn', 'webdataset', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from trainer.__main__ import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    main([name] if name == 'doctor' else [name, 'x', 'y'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Traceback" not in ran.stderr
    remedy = f"pip install -e '{ROOT}[train]'"
    lines = [line for line in ran.stderr.splitlines() if remedy in line]
    assert len(lines) == len(COMMANDS) - 1, ran.stderr
