import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch.display import Display
from launch.local import Pool
from launch.machine import Machine
from launch.plan import plan
from launch.prepare import absolute
from pipeline.config import load_config, save_config
from pipeline.graph import RunDirectory

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
FAKE_TRAINER = [sys.executable, str(HERE / "fake_trainer.py")]
REFERRAL = [sys.executable, str(HERE / "faked_referral.py")]
CLASSES = ["a", "b", "c", "d", "e", "f", "g", "h"]


class Ward:
    """A config, a little data directory and a run below `root`, with a fake trainer."""

    def __init__(self, root: Path):
        self.root = root
        self.run_path = root / "run"
        self.data = root / "data"
        self.data.mkdir()
        for split in ("train", "val", "test"):
            (self.data / f"{split}-000000.tar").touch()
        self.write_manifest(CLASSES)
        self.values = {
            "data": {
                split: str(self.data / f"{split}-{{000000..000003}}.tar")
                for split in ("train", "val", "test")
            },
            "train": {"steps": 100},
            "specialists": {"steps": 20},
            "clusters": {"num_groups": 4},
            "students": {"main": {"steps": 40}},
            "launch": {"pool": 2, "retries": 0},
            "engine": {"device": "cpu"},
        }
        self.toml = root / "config.toml"

    def write_manifest(self, classes):
        splits = {split: {"samples": 0, "shards": []} for split in ("train", "val", "test")}
        (self.data / "manifest.json").write_text(
            json.dumps({"schema": 1, "classes": classes, "splits": splits})
        )

    def config(self, *overrides):
        return absolute(load_config(None, list(overrides), json.loads(json.dumps(self.values))))

    def run(self, *overrides) -> RunDirectory:
        """RUN, laid out."""
        run = RunDirectory(self.run_path, self.config(*overrides))
        self.run_path.mkdir(exist_ok=True)
        save_config(run.config, self.run_path / "config.toml")
        return run

    def old_run(self, groups: int) -> tuple[str, ...]:
        """Settings that add classes to a finished run of so many groups, written below root."""
        old = self.root / "old"
        for place in ("generalist", "clusters", *(f"specialists/{m:03d}" for m in range(groups))):
            (old / place).mkdir(parents=True, exist_ok=True)
            (old / place / "DONE").write_text(place)
        members = [[m] for m in range(groups)]
        (old / "clusters" / "groups.json").write_text(
            json.dumps({"schema": 1, "num_classes": groups, "members": members})
        )
        (old / "clusters" / "summary.json").write_text(json.dumps({"skipped": []}))
        return (f"extend.run={old}",)

    def finish(self, stages) -> None:
        for stage in stages:
            stage.begin().finish()

    def behave(self, **places) -> None:
        """What goes wrong in a stage. `__` stands for `/`."""
        content = {
            place.replace("__", "/").replace("wall_", "wall-"): fault
            for place, fault in places.items()
        }
        (self.root / "behaviour.json").write_text(json.dumps(content))

    def pool(self, run: RunDirectory, size: int = 2, devices=(), display=None) -> Pool:
        silent = Console(file=open(os.devnull, "w"))
        display = display or Display(silent, silent)
        return Pool(run, plan(run), Machine(size, tuple(devices)), display, FAKE_TRAINER)

    def calls(self, *words) -> list[tuple[str, str]]:
        """What the fake trainer noted: (begin | end | fail | checkpoint, stage)."""
        path = self.root / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [tuple(line.split()[:2]) for line in lines]
        return [call for call in calls if not words or call[0] in words]

    def write_config(self, **sections) -> Path:
        import tomli_w

        self.toml.write_text(tomli_w.dumps(self.values | sections))
        return self.toml

    def start(self, *arguments) -> subprocess.Popen:
        """The command `referral` in a process of its own, as a session leader. Ctrl-C reaches it.

        Where the tests run as a shell's background job, SIGINT is ignored, and a child would
        inherit that.
        """
        return subprocess.Popen(
            [*REFERRAL, *map(str, arguments)],
            cwd=self.root,
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


@pytest.fixture
def ward(tmp_path) -> Ward:
    return Ward(tmp_path)


@pytest.fixture
def referral(ward, monkeypatch, capfd):
    """Run the command line in this process: referral("run", ...) -> (exit code, stdout, stderr)."""
    import launch.cli

    monkeypatch.setattr(launch.cli, "FAKE", FAKE_TRAINER)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ward.root)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["referral", *map(str, arguments)])
        try:
            code = launch.cli.main()
        except SystemExit as ended:
            code = ended.code
        output = capfd.readouterr()
        assert "Traceback" not in output.out + output.err
        return code, output.out, output.err

    return call
