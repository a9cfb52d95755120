"""What the runner on Slurm costs, measured on the loopback Slurm of tests/slurm.

    python -m benchmarks.slurm [SECONDS]  8 minutes, needs slurmctld, slurmd, munged, root
    python -m benchmarks.slurm --quick    seconds, no Slurm: a dry run of 200

Planning: the wall clock of `referral run --on slurm --dry-run` for 200 specialists.
Submitting: that of `referral run --on slurm` for as many.  Both have Python's start in them.
Overhead: a graph whose jobs sleep SECONDS (60) each.  Its time from the submission to the end of
the last job, against the sleeps on its critical path, and how much of the difference is Slurm's
own, from a job's end to the next one's start.

The last line is one JSON object with all of it:
    {"cores", "load", "slurm": its version or null,
     "planning": {"specialists", "seconds", "submissions"}, and where there is a Slurm
     "submitting": {"specialists", "seconds", "submissions", "submissions_s"},
     "overhead": {"jobs", "sleep_s", "wall_s", "between_s"}}
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.cluster import Cluster, what_is_missing
from tests.slurm.patient import Patient

SPECIALISTS = 200
SLEEPER = """
import argparse, time
from pipeline.graph import open_run
parser = argparse.ArgumentParser()
parser.add_argument("kinds", nargs="+")
parser.add_argument("--run")
parser.add_argument("--index", nargs="+", default=[])
parser.add_argument("--name", nargs="+", default=[])
args = parser.parse_args()
addresses = ["None", *args.index, *args.name]
time.sleep({sleep})
for stage in open_run(args.run).stages:
    if stage.name in args.kinds and str(stage.address) in addresses:
        stage.begin().finish()
"""


def make_run(cluster: Cluster, root: Path, specialists: int, sleep: float = 0) -> Patient:
    """A run, not begun, whose trainer only sleeps."""
    root.mkdir()
    run = Patient(cluster, root, ["-P", "-m", "launch.cli"])
    (root / "sleeper.py").write_text(SLEEPER.format(sleep=sleep))
    python = root / "python"
    python.write_text(f'#!/bin/sh\nshift 3\nexec "{sys.executable}" "{root}/sleeper.py" "$@"\n')
    python.chmod(0o755)
    data = root / "data"
    data.mkdir()
    names = [f"class {index}" for index in range(specialists)]
    splits = {split: {"samples": 0, "shards": []} for split in ("train", "val", "test")}
    manifest = {"schema": 1, "classes": names, "splits": splits}
    (data / "manifest.json").write_text(json.dumps(manifest))
    run.config.write_text(
        f'data = {{ train = "{data}", val = "{data}", test = "{data}" }}\n'
        "train = { steps = 1 }\n"
        f"clusters = {{ num_groups = {specialists} }}\n"
        "students.main = {}\n"
    )
    run.run.mkdir()  # prepared: the trainer's own look into the shards is no part of this
    (run.run / "config.toml").write_text(run.config.read_text())
    site = root / ".config" / "referral" / "site.sh"  # the user's own, who has root as home
    site.parent.mkdir(parents=True)
    site.write_text(f'python="{python}"\n')
    return run


def planning(root: Path) -> dict:
    cluster = Cluster(root.with_name("unstarted"))
    cluster.environment["PATH"] = "/nowhere"  # no client of Slurm's is asked
    run = make_run(cluster, root, SPECIALISTS)
    began = time.monotonic()
    script = run.submit("slurm.throttle=8", dry_run=True)
    wall = time.monotonic() - began
    submissions = len(re.findall(r"^\w+=\$\(sbatch ", script, re.MULTILINE))
    print(f"{SPECIALISTS} specialists planned in {wall:.2f} s, {submissions} submissions")
    return {"specialists": SPECIALISTS, "seconds": wall, "submissions": submissions}


def submitting(cluster: Cluster, root: Path) -> dict:
    run = make_run(cluster, root, SPECIALISTS)
    began = time.monotonic()
    output = run.submit("slurm.throttle=8")
    wall = time.monotonic() - began
    line = re.search(r"([0-9]+) submissions in ([0-9.]+) s", output)
    assert line is not None, output
    print(f"{SPECIALISTS} specialists: {wall:.2f} s; {line[0]}")
    run.referral("cancel", run.run)
    return {
        "specialists": SPECIALISTS,
        "seconds": wall,
        "submissions": int(line[1]),
        "submissions_s": float(line[2]),
    }


def overhead(cluster: Cluster, root: Path, sleep: float) -> dict:
    run = make_run(cluster, root, 4, sleep)
    began = time.time()
    run.submit()
    run.wait_for_end(20 * sleep + 120)
    jobs = ["generalist", "clusters", "specialists/000", "ensemble", "students/main", "report"]
    ids = run.ids()
    rows = [cluster.fields(ids[job]) for job in jobs]
    wall = max(moment(row["EndTime"]) for row in rows) - began
    between = sum(
        moment(after["StartTime"]) - moment(row["EndTime"])
        for row, after in zip(rows, rows[1:], strict=False)
    )
    asleep = sleep * len(jobs)
    print(
        f"{len(jobs)} jobs of {sleep:g} s in a row: {wall:.0f} s, "
        f"{wall / asleep - 1:.1%} more than their sleeps"
    )
    print(
        f"Slurm's own time between them: {between:.0f} s; "
        f"without it {(wall - between) / asleep - 1:.1%} more"
    )
    return {"jobs": len(jobs), "sleep_s": sleep, "wall_s": wall, "between_s": between}


def moment(text: str) -> float:
    """Of Slurm's clock, in whole seconds."""
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def slurm_version() -> str:
    return subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()


def measure_on_slurm(root: Path, sleep: float) -> dict:
    cluster = Cluster(root / "slurm")
    try:
        cluster.start()
        return {
            "submitting": submitting(cluster, root / "submitting"),
            "overhead": overhead(cluster, root / "overhead", sleep),
        }
    finally:
        cluster.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.slurm", description="What Slurm costs.")
    parser.add_argument("seconds", nargs="?", type=float, default=60.0, help="that each job sleeps")
    parser.add_argument("--quick", action="store_true", help="the dry run alone, without a Slurm")
    args = parser.parse_args()
    missing = what_is_missing()
    if missing and not args.quick:
        sys.exit(f"{missing} (or --quick)")
    version = None if args.quick else slurm_version()
    results = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "slurm": version}
    print(f"{version or 'no Slurm'}, {results['cores']} cores, load {results['load']}")
    with tempfile.TemporaryDirectory(prefix="referral-slurm-", dir="/tmp") as directory:
        root = Path(directory)
        root.chmod(0o755)  # munge refuses what others may write
        results["planning"] = planning(root / "planning")
        if not args.quick:
            results |= measure_on_slurm(root, args.seconds)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
