"""A run on the loopback Slurm, and what a test asks of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cluster import Cluster

HERE = Path(__file__).parent


class Patient:
    """A run on the loopback Slurm, commanded as a user would."""

    def __init__(self, cluster: Cluster, root: Path, program: list[str]):
        self.cluster, self.root, self.program = cluster, root, program
        self.run = root / "run"
        self.config = root / "config.toml"
        self.faults = root / "faults"
        self.faults.mkdir(exist_ok=True)
        self.environment = {
            **cluster.environment,
            "OMP_NUM_THREADS": "1",
            "HOME": str(root),
            "REFERRAL_FAULTS": str(self.faults),
            "PYTHONPATH": f"{HERE}:{HERE.parent.parent}",
        }

    def referral(self, *words, code: int = 0) -> str:
        """What the command prints on both streams, after the exit code that is expected."""
        ended = subprocess.run(
            [sys.executable, *self.program, *map(str, words)],
            env=self.environment,
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=200,
        )
        assert ended.returncode == code, ended.stdout
        assert "Traceback" not in ended.stdout
        return ended.stdout

    def behave(self, **behaviour: dict) -> None:
        """What goes wrong in a stage, for a fake trainer. `__` stands for `/`."""
        content = {place.replace("__", "/"): fault for place, fault in behaviour.items()}
        (self.root / "behaviour.json").write_text(json.dumps(content))

    def submit(self, *settings: str, code: int = 0, dry_run: bool = False) -> str:
        options = ["--dry-run"] if dry_run else []
        for setting in settings:
            options += ["--set", setting]
        return self.referral(
            "run", self.config, "--run", self.run, "--on", "slurm", *options, code=code
        )

    def status(self) -> dict[str, dict]:
        """Per stage what `referral status --json` says."""
        content = json.loads(self.referral("status", self.run, "--json"))
        return {stage["stage"]: stage for stage in content["stages"]}

    def states(self) -> dict[str, str]:
        return {place: stage["state"] for place, stage in self.status().items()}

    def jobs(self) -> dict[str, dict]:
        """The record of each job in jobs.json."""
        return json.loads((self.run / "jobs.json").read_text())["jobs"]

    def ids(self) -> dict[str, str]:
        """Slurm's id of each job."""
        return {name: record["id"] for name, record in self.jobs().items()}

    def wait_until(self, condition, what: str, seconds: float = 150) -> None:
        """Until something holds, or a log says why it will not."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(
                    f"{log}:\n{log.read_text()[-3000:]}\n"
                    for log in sorted(self.run.glob("logs/*.txt"))
                )
                raise AssertionError(f"waited in vain for {what}\n{self.cluster.jobs()}\n{logs}")
            time.sleep(0.2)

    def wait_for_end(self, seconds: float = 150) -> None:
        """Until no job of the run waits or runs."""
        numbers = {number.partition("_")[0] for number in self.ids().values() if number}

        def ended():
            states = self.cluster.jobs().items()
            mine = {state for number, state in states if number.partition("_")[0] in numbers}
            return not mine & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}

        self.wait_until(ended, "the jobs' end", seconds)

    def steps(self, place: str) -> int:
        """How far the newest attempt at a stage has logged its training."""
        rows = [json.loads(line) for line in _lines(self.run / place / "metrics.jsonl")]
        return max((row["step"] for row in rows if "loss" in row), default=0)

    def log(self, job: str) -> str:
        """The log of a job, which its place names: of "specialists/001" specialists-001.txt."""
        return (self.run / self.jobs()[job]["log"]).read_text()

    def starts(self, job: str) -> int:
        """How often Slurm started a job, by its log."""
        return len(set(re.findall(r"restarts (\d+), try", self.log(job))))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
