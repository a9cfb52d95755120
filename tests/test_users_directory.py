"""A user's directory may hold files called as our packages or our libraries: ours still run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.calling import TRAINER
from launch.local import torchrun
from trainer.data.decoding import built_in, import_function

ROOT = Path(__file__).parents[1]
LIKE_OURS = ("trainer", "numpy", "torch", "launch", "pipeline", "typing_extensions")


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The working directory. Whatever is imported from it writes a file called RAN."""
    text = f"open({str(tmp_path / 'RAN')!r}, 'a').write(__name__)\n"
    for name in LIKE_OURS:
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "__init__.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_trainer_that_runs_is_ours_and_garbage_is_no_valid_shard(directory):
    (directory / "train-000000.tar").write_bytes(b"garbage" * 500)
    command = [*TRAINER, "shards", "validate", "train-000000.tar"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not (directory / "RAN").exists()
    assert ended.returncode != 0
    assert ended.stderr.splitlines()[-1] == "1 of 1 shards are corrupt", ended
    assert "Traceback" not in ended.stderr


def test_every_way_to_start_the_trainer_leaves_the_working_directory_out():
    assert TRAINER[:3] == torchrun(2)[:3] == [sys.executable, "-P", "-m"]
    sources = [
        path
        for pattern in ("*.py", "*.md", "*.sbatch", "*.sh", "*.toml", "Makefile")
        for path in ROOT.rglob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]
    lines = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"""-m"?,? "?(trainer|launch)\b""", line)
    ]
    assert len(lines) > 20
    unsafe = [
        line
        for line in lines
        if not re.search(r"-P\b|PYTHONSAFEPATH=1|torchrun (-m|\[)|by hand write", line)
    ]
    assert not unsafe


def test_a_users_module_is_found_behind_all_others_and_may_import_its_neighbours_later(directory):
    (directory / "mine_here.py").write_text(
        "import numpy\ndef late():\n    import beside_mine\n    return beside_mine.VALUE\n"
    )
    (directory / "beside_mine.py").write_text("VALUE = 3\n")
    assert import_function("mine_here:late", "model.name")() == 3
    assert sys.path[-1] == str(directory)
    with pytest.raises(Exception, match="module trainer has no function f .*trainer/__init__.py"):
        import_function("trainer:f", "model.name")
    assert not (directory / "RAN").exists()


def test_what_is_built_in_does_not_add_the_working_directory(directory):
    built_in()
    assert str(directory) not in sys.path and "" not in sys.path
