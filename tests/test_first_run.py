"""A new user's commands on six kinds of data, as the README says them, end in a report."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import userdata
from running import run_all

from pipeline.config import load_config
from trainer.commands.init import main as init

ROOT = Path(__file__).parents[1]
CHANCE = 1 / userdata.CLASSES
# {kind: (makes the data, the first command)}. The other two are the README's.
KINDS = {
    "gray": (
        lambda here: userdata.picture_folder(here / "photos", 1),
        "referral shards folder photos/ --out shards/ --size 32 --gray",
    ),
    "colour": (
        lambda here: userdata.picture_folder(here / "photos", 3),
        "referral shards folder photos/ --out shards/ --size 32",
    ),
    "text": (
        lambda here: userdata.text_table(here / "texts.csv"),
        "referral shards table texts.csv --out shards/",
    ),
    "vectors": (
        lambda here: userdata.vectors(here / "data.npz"),
        "referral shards arrays data.npz --out shards/",
    ),
    "webdataset": (
        lambda here: userdata.webdataset(here / "tars"),
        "referral shards from-webdataset tars/ --out shards/ --label json:label",
    ),
    "idx": (
        lambda here: userdata.idx_files(here / "idx"),
        "referral shards arrays idx/train-images-idx3-ubyte.gz idx/train-labels-idx1-ubyte.gz "
        "idx/t10k-images-idx3-ubyte.gz idx/t10k-labels-idx1-ubyte.gz --out shards/",
    ),
}


# Advice trains some ten small networks more: two kinds ask for it before they run.
ADVISED = ("colour", "vectors")


def commands_of_readme() -> dict[str, str]:
    """{word: command} of the first block of "Your own data", in its order."""
    section = (ROOT / "README.md").read_text().split("## Your own data")[1]
    block = section.lstrip("\n").split("\n\n")[0]
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    return {command.split()[1]: command for command in commands}


def run(command: str, directory: Path) -> str:
    _, *words = shlex.split(command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch.cli", *words],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_of_the_readme_end_in_a_report(kind, tmp_path):
    make, shards = KINDS[kind]
    make(tmp_path)
    commands = commands_of_readme()
    assert shards.startswith(commands["shards"]) or kind not in ("gray", "colour")
    run(shards, tmp_path)
    run(commands["init"], tmp_path)
    run_directory = tmp_path / shlex.split(commands["run"])[-1]
    if kind in ADVISED:
        run(commands["advise"], tmp_path)
        advice = json.loads((run_directory / "advice.json").read_text())
        assert advice["best"] in {row["name"] for row in advice["levers"]}
    output = run(commands["run"], tmp_path)
    assert str(run_directory.relative_to(tmp_path) / "report.html") in output
    assert (run_directory / "report.html").exists()
    results = json.loads((run_directory / "results.json").read_text())
    for row in (results["generalist"], results["ensemble"], results["student"]):
        assert row["top1"] > 2 * CHANCE
    assert results["controls"].keys() == {"control_wall", "control_compute", "student_hard"}
    assert ("advice" in results) == (kind in ADVISED)


def test_what_init_writes_runs_to_the_report_in_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    userdata.vectors(tmp_path / "data.npz")
    assert init(["data.npz", "--out", "mine.toml"]) == 0
    run_all(tmp_path / "run", load_config("mine.toml"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["ensemble"]["top1"] > 2 * CHANCE
    assert (tmp_path / "run" / "report.html").exists()


def test_the_readme_begins_with_shards_init_advise_and_run():
    assert list(commands_of_readme()) == ["shards", "init", "advise", "run"]
