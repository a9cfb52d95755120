"""What the runner on Slurm costs, measured on the loopback Slurm of tests/slurm: python benchmarks/slurm.py [SECONDS]

Submitting: the wall clock of `referral run --on slurm` for 200 specialists, Python's start included.
Overhead: a graph whose jobs sleep SECONDS (60) each; from the submission to the end of the last job, against the sleeps
on its critical path, and how much of the difference is Slurm's own, from a job's end to the next one's start.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "slurm")]

from cluster import Cluster  # noqa: E402
from patient import Patient  # noqa: E402

SLEEPER = """
import sys, time
from pathlib import Path
from trainer.config import load_config
from trainer.run_directory import RunDirectory
words, root = sys.argv[1:], Path(sys.argv[-1])
run = RunDirectory(root, load_config(root / "config.toml"))
kinds = {{"specialist": lambda i: run.specialists[int(i)], "student": run.students.get, "control": run.controls.get}}
stages = [kinds[words[0]](i) for i in words[2:-2]] if words[0] in kinds else [getattr(run, w) for w in words[:-2]]
for number, stage in enumerate(stages):
    attempt = stage.begin()
    time.sleep(0 if number else {sleep})  # one sleep a job
    attempt.finish()
"""


def patient(cluster: Cluster, root: Path, specialists: int, sleep: float) -> Patient:
    """A run whose trainer only sleeps."""
    found = Patient(cluster, root, ["-m", "launch.cli"])
    (root / "sleeper.py").write_text(SLEEPER.format(sleep=sleep))
    python = root / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{root}/sleeper.py" "$@"\n')
    python.chmod(0o755)
    data = root / "data"
    data.mkdir()
    splits = {split: {"samples": 0, "shards": []} for split in ("train", "val", "test")}
    names = [f"class {k}" for k in range(specialists)]
    (data / "manifest.json").write_text(
        json.dumps({"schema": 1, "classes": names, "splits": splits})
    )
    found.config.write_text(
        f'data = {{ train = "{data}", val = "{data}", test = "{data}" }}\ntrain = {{ steps = 1 }}\n'
        f"clusters = {{ num_groups = {specialists} }}\nstudents.main = {{}}\n"
    )
    found.run.mkdir()  # prepared: the trainer's own look into the shards is no part of this
    (found.run / "config.toml").write_text(found.config.read_text())
    (found.run / "site.sh").write_text(f'python="{python}"\n')
    return found


def submitting(cluster: Cluster, root: Path) -> None:
    ward, began = patient(cluster, root, 200, 0), time.monotonic()
    said = ward.submit("slurm.throttle=8")
    wall = time.monotonic() - began
    print(
        f"200 specialists: {wall:.2f} s; {re.search(r'[0-9]+ submissions in [0-9.]+ s', said)[0]}"
    )
    ward.referral("cancel", ward.run)


def overhead(cluster: Cluster, root: Path, sleep: float) -> None:
    ward, began = patient(cluster, root, 4, sleep), time.time()
    ward.submit()
    ward.wait_for_end(20 * sleep + 120)
    path = ["generalist", "clusters", "specialist-000", "combine", "student-main", "report"]
    rows = [ward.cluster.fields(ward.ids()[name]) for name in path]
    wall = max(moment(row["EndTime"]) for row in rows) - began
    gaps = sum(
        moment(after["StartTime"]) - moment(row["EndTime"])
        for row, after in zip(rows, rows[1:], strict=False)
    )
    busy = sleep * len(path)
    print(
        f"{len(path)} jobs of {sleep:g} s in a row: {wall:.0f} s, {wall / busy - 1:.1%} more than their sleeps"
    )
    print(
        f"Slurm's own time between them: {gaps:.0f} s; without it {(wall - gaps) / busy - 1:.1%} more"
    )


def moment(text: str) -> float:
    """Of Slurm's clock, in whole seconds."""
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def main() -> None:
    sleep = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    load = os.getloadavg()[0]
    version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
    print(f"{version}, {os.cpu_count()} cores, load {load:.1f}")
    with tempfile.TemporaryDirectory(prefix="referral-slurm-", dir="/tmp") as place:
        root = Path(place)
        root.chmod(0o755)
        cluster = Cluster(root / "slurm")
        try:
            cluster.start()
            for name, measure in (
                ("submitting", submitting),
                ("overhead", lambda *two: overhead(*two, sleep)),
            ):
                (root / name).mkdir()
                measure(cluster, root / name)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
